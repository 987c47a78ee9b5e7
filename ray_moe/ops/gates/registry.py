"""The gates of this package by name, and making one.

Called by `MoELayer`, and by whoever replaces the gates of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib import import_module
from typing import Any

from ray_moe.errors import InvalidConfig
from ray_moe.ops.gates.base import GateSettings
from ray_moe.ops.gates.dense_to_sparse import DenseToSparseSettings
from ray_moe.ops.gates.dynamic_k import DynamicKSettings
from ray_moe.ops.gates.expert_choice import ExpertChoiceSettings
from ray_moe.ops.gates.gumbel import GumbelSettings
from ray_moe.ops.gates.hard_concrete import HardConcreteSettings
from ray_moe.ops.gates.hashing import HashSettings
from ray_moe.ops.gates.hierarchical import HierarchicalSettings
from ray_moe.ops.gates.modality import ModalitySettings
from ray_moe.ops.gates.multi_task import MultiTaskSettings
from ray_moe.ops.gates.noisy_topk import NoisyTopKSettings
from ray_moe.ops.gates.sigmoid import SigmoidSettings
from ray_moe.ops.gates.switch import SwitchSettings
from ray_moe.ops.gates.topk import TopKSettings
from ray_moe.ops.gates.topk_random import TopKRandomSettings

GATES: dict[str, Any] = {
    "topk": TopKSettings,
    "switch": SwitchSettings,
    "noisy_topk": NoisyTopKSettings,
    "topk_random": TopKRandomSettings,
    "expert_choice": ExpertChoiceSettings,
    "dynamic_k": DynamicKSettings,
    "gumbel": GumbelSettings,
    "dense_to_sparse": DenseToSparseSettings,
    "hard_concrete": HardConcreteSettings,
    "sigmoid": SigmoidSettings,
    "hierarchical": HierarchicalSettings,
    "hash": HashSettings,
    "multi_task": MultiTaskSettings,
    "modality": ModalitySettings,
}
"""Settings of each gate by its name."""


def settings_class(name: str) -> Any:
    """What makes the gate `name`: one of `GATES`, or ``module:Class``, settings of a gate of one's own.

    The second is found by import, so that it is known in every process that has the module.

    Raises: `InvalidConfig`.
    """
    if name in GATES:
        return GATES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise InvalidConfig(
            f"unknown gate {name!r}; give one of {', '.join(GATES)}, settings, a module, or module:Class"
        )
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidConfig(
            f"cannot import the gate {name!r}: {error}; the module must be on PYTHONPATH, on every node"
        ) from error
    if not (is_dataclass(found) and callable(getattr(found, "build", None))):
        raise InvalidConfig(f"the gate {name!r} is no dataclass with build(hidden_size, num_experts) -> module")
    return found


@dataclass(frozen=True, slots=True)
class GateChoice:
    """A gate by its name, where K may be left to the model that it is for."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of its settings; others are at their defaults."""

    def settings(self, top_k: int) -> GateSettings:
        """Args: top_k: K, where the gate has an option `top_k` and nothing is said. Raises: as `make_settings`."""
        has_top_k = "top_k" in settings_class(self.name).__dataclass_fields__
        own: dict[str, Any] = {"top_k": top_k} if has_top_k else {}
        return make_settings(self.name, **{**own, **self.options})

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in self.options.items())})"


def make_settings(name: str, **options: Any) -> GateSettings:
    """Settings of the gate `name` (as of `settings_class`), with its own defaults where nothing is said.

    Raises: `InvalidConfig` for a name or an option that is not there (it names those that are), an option that must be
        given, or a value that cannot be.
    """
    kind = settings_class(name)
    known = {option.name: option for option in fields(kind)}
    if unknown := [option for option in options if option not in known]:
        raise InvalidConfig(f"gate {name!r} has no option {unknown[0]!r}; it has {', '.join(known)}")
    for option in known.values():
        if option.name not in options and option.default is MISSING and option.default_factory is MISSING:
            raise InvalidConfig(f"gate {name!r} needs {option.name}: give {kind.__name__}({option.name}=...)")
    settings: GateSettings = kind(**options)
    return settings


def make_gate(settings: GateSettings | str, hidden_size: int, num_experts: int) -> Any:
    """A gate with fresh weights.

    Args:
        settings: of the gate, or its name for the defaults.
        hidden_size: D, the width of what it is asked about.
        num_experts: E, what it chooses from.

    Raises: `InvalidConfig`.
    """
    if isinstance(settings, str):
        settings = make_settings(settings)
    return settings.build(hidden_size, num_experts)
