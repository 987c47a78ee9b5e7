"""What a gate would be in the place of a checkpoint's routers, found out before anything is loaded.

A checkpoint is loaded by `transformers` with the routers of its family. So a model that was trained with another gate
is what a checkpoint of it says only where the gate, in evaluation, computes what those routers do. That is asked of
both, with random weights and random hidden states. Called by `training/gating.py`.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.models.experts import experts_modules
from ray_moe.models.gates import find_routers, replace_gates
from ray_moe.ops.gates.base import takes_info
from ray_moe.ops.gates.registry import GateChoice
from ray_moe.ops.gates.routers import routers_beside
from ray_moe.types import LayerPath

NUM_TOKENS = 64
"""Hidden states that both are asked about, once as they are and once four times as large, so that some are sure."""


@dataclass(frozen=True, slots=True)
class GateTrial:
    """A gate in every MoE block of a model."""

    paths: tuple[LayerPath, ...]
    parameters: tuple[str, ...]
    """Names of what it learns, as the model has them."""
    losses: frozenset[str]
    """That it tells in training (`Routing.losses`)."""
    takes_ids: bool
    """Whether it has to hear which tokens there are (`models.gates.tell_ids`)."""
    difference: str
    """How it differs from the model's own routers in evaluation; empty where it does not."""


def try_gate(outline: nn.Module, choice: GateChoice) -> GateTrial:
    """Put the gate into a model without weights and look at it.

    Args: outline: the whole model on the meta device; it is changed.

    Raises: as `replace_gates`; `InvalidConfig` for a gate that has to be told more of the tokens than their ids.
    """
    generator = torch.Generator().manual_seed(0)
    for path, experts in experts_modules(outline).items():
        for _, router in routers_beside(outline.get_submodule(path.rpartition(".")[0]), experts):
            _draw(router, generator)
    routers: list[Any] = [router for _, router, _ in find_routers(outline)]
    paths = replace_gates(outline, choice)
    gates = [outline.get_submodule(path) for path in paths]
    parameters = [
        f"{path}.{name}" for path, gate in zip(paths, gates, strict=True) for name, _ in gate.named_parameters()
    ]
    hidden_TD = torch.randn(NUM_TOKENS, routers[0].weight.shape[-1], generator=generator)
    hidden_TD = torch.cat([hidden_TD, 4 * hidden_TD])
    try:
        losses = frozenset(gates[0].train()(hidden_TD).routing.losses)
    except InvalidRequest as error:
        raise InvalidConfig(
            f"the gate {choice.name!r} cannot be used here, where tokens have ids and nothing else: {error}. Make the "
            "model in Python (ray_moe.models.gates.told, or MoELayer's info) and train it with ray_moe.remote_trainer"
        ) from None
    difference = _difference(routers, gates, hidden_TD)
    return GateTrial(tuple(paths), tuple(parameters), losses, takes_info(gates[0]), difference)


@torch.no_grad()
def _draw(router: nn.Module, generator: torch.Generator) -> None:
    """Give a router on the meta device random weights, in float32 on the CPU."""
    router.to_empty(device="cpu").float()
    for tensor in (*router.parameters(), *router.buffers()):
        if tensor.is_floating_point():
            tensor.normal_(std=tensor.shape[-1] ** -0.5 if tensor.ndim else 1.0, generator=generator)
        else:
            tensor.zero_()


@torch.no_grad()
def _difference(routers: Sequence[Any], gates: Sequence[nn.Module], hidden_TD: torch.Tensor) -> str:
    for router, gate in zip(routers, gates, strict=True):
        theirs, ours = (_weights(each.eval()(hidden_TD), len(router.weight)) for each in (router, gate))
        off = float((theirs - ours).abs().max())
        if not off <= 1e-5 * max(1.0, float(theirs.abs().max())):
            return f"what it gives an expert of a token differs by up to {off:.2g} from {type(router).__name__}"
    return ""


def _weights(answer: tuple[torch.Tensor, torch.Tensor, torch.Tensor], num_experts: int) -> torch.Tensor:
    """[T, E]: what each expert's output is multiplied by."""
    _, weight_TK, index_TK = answer
    weights = torch.zeros(len(index_TK), num_experts + 1)  # the last column is "no expert"
    return weights.scatter_add_(1, index_TK.long(), weight_TK.float())[:, :num_experts]
