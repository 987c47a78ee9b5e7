"""What a run of training changes about how experts are chosen: the gate, and methods that go by the step.

A shell around `models/gates.py` and `ops/methods/`, for experts that are on hosts. Called by `actors/training.py`
(a worker), `service/training.py` (before one starts) and `export.py` (what may be written).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.models.gate_trial import GateTrial, try_gate
from ray_moe.models.gates import replace_gates, tell_ids
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.capacity import CapacitySettings
from ray_moe.ops.gates.registry import GateChoice
from ray_moe.ops.methods.base import Method, Ramp, Shape
from ray_moe.ops.methods.capacity import ExpertCapacity
from ray_moe.ops.methods.curriculum import ActiveExperts, Anneal, top_k_of
from ray_moe.ops.methods.driver import Methods
from ray_moe.ops.methods.dropout import ExpertDropout
from ray_moe.ops.methods.sites import find_sites
from ray_moe.ops.methods.warmup import FreezeGate, RandomRouting
from ray_moe.types import LayerPath


@dataclass(frozen=True, slots=True)
class MethodSettings:
    """Methods for a model of `transformers` with its experts elsewhere; none by default. Steps count from 0."""

    first_active: int | None = None
    """Experts of a token at first; the number goes to the gate's own. None: it is that from the beginning."""
    active_steps: int = 1000
    active_begin: int = 0
    active_shape: Shape = "linear"
    learns_from: int = 0
    """The first step in which gates learn."""
    learns_until: int | None = None
    """The first in which they do not any more; None is never."""
    random_steps: int = 0
    """First steps in which tokens go to random experts."""
    expert_dropout: float = 0.0
    capacity: CapacitySettings | None = None
    """Of each forward pass in training."""
    seed: int = 0


def make_methods(model: nn.Module, settings: MethodSettings) -> Methods | None:
    """The methods of a run, in the order in which they change a choice; None for none. What anneals is told the step.

    Args: model: with its gates, and what of it is to learn marked so.

    Raises: as `Methods`; `InvalidConfig` for a curriculum of gates without a fixed number of experts.
    """
    wanted: list[Method] = []
    if settings.first_active is not None:
        wanted.append(ActiveExperts(_curriculum(model, settings, settings.first_active)))
    if any(hasattr(module, "anneal") for module in model.modules()):
        wanted.append(Anneal())
    if settings.learns_from or settings.learns_until is not None:
        wanted.append(FreezeGate(settings.learns_from, settings.learns_until))
    if settings.random_steps:
        wanted.append(RandomRouting(settings.random_steps, settings.seed))
    if settings.expert_dropout:
        wanted.append(ExpertDropout(settings.expert_dropout, settings.seed))
    if settings.capacity is not None:
        wanted.append(ExpertCapacity(settings.capacity))
    return Methods(model, wanted) if wanted else None


def _curriculum(model: nn.Module, settings: MethodSettings, first: int) -> Ramp:
    """It ends at the model's own K, which is the one that a checkpoint of it will have."""
    own = {top_k_of(site) for site in find_sites(model)}
    if len(own) != 1 or None in own:
        raise InvalidConfig(
            "train.methods.active_experts needs gates with one number of experts for each token (top_k); these have "
            f"{', '.join(map(str, sorted(own, key=str)))}: leave `first` out, or take another train.gate"
        )
    (last,) = own
    return Ramp(first, float(last or 0), settings.active_steps, settings.active_begin, settings.active_shape)


# --- What a gate can be taken for ----------------------------------------------------------------------------
def check_gate(checkpoint: Checkpoint, choice: GateChoice, losses: Collection[str] = ()) -> GateTrial:
    """What the gate is in this model. Loads nothing.

    Args: losses: that it is to tell.

    Raises: `UnsupportedModel`, `InvalidConfig` as `try_gate`; `InvalidConfig` for a loss that it does not tell.
    """
    trial = try_gate(checkpoint.outline(), choice)
    if unknown := [loss for loss in losses if loss not in trial.losses]:
        raise InvalidConfig(
            f"train.auxiliary.{unknown[0]} is not a loss of the gate {choice.name!r}, which has "
            f"{', '.join(sorted(trial.losses)) or 'none of its own'}: set it to 0, or take another train.gate"
        )
    return trial


def place_gates(model: nn.Module, choice: GateChoice, seed: int = 0) -> list[LayerPath]:
    """Put the gate in the place of a model's routers; their paths. Raises: as `replace_gates`."""
    paths = replace_gates(model, choice, seed=seed)
    tell_ids(model)
    return paths


def check_writable(checkpoint: Checkpoint, choice: GateChoice | None) -> None:
    """Whether a checkpoint like this one says what was trained with the gate (None: with its own routers).

    Raises: `InvalidConfig` where it would not.
    """
    difference = "" if choice is None else try_gate(checkpoint.outline(), choice).difference
    if difference:
        raise InvalidConfig(
            f"the gate {choice} is not what the routers of a {checkpoint.model_type} model compute ({difference}): a "
            "checkpoint that transformers loads would choose experts in another way than was trained, so this cannot "
            "be published or exported. It can be trained, kept in checkpoints of training (train.checkpoints) and "
            "loaded into Python (ray_moe.load_trained)"
        )
