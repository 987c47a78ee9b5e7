"""What a configuration says of experts, in its own words: the many names of the same few numbers.

Believes nothing; a word may be left over from another model. Called by `models/inspect.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_moe.policy.anatomy import ExpertGroup, Kind

_COUNTS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
    "expert_count",
)
_TOP_KS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "moe_k",
    "num_selected_experts",
    "expert_used_count",
)
_SHARED = (
    "n_shared_experts",
    "num_shared_experts",
    "moe_num_shared_experts",
    "num_shared_expert",
    "expert_shared_count",
)
_SWITCHES = ("enable_moe_block", "is_moe")
_LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "block_count")


@dataclass(frozen=True, slots=True)
class Words:
    """The numbers a configuration names; None where it names none."""

    family: str
    num_experts: int | None = None
    top_k: int | None = None
    num_shared: int | None = None
    num_layers: int | None = None
    said: Mapping[str, Any] = field(default_factory=dict)
    """Key -> value, of all that speak of experts."""
    switched_off: str = ""
    """The key that says that the experts are not used."""

    @property
    def says_anything(self) -> bool:
        return bool(self.family or self.said)

    @property
    def says(self) -> Kind | None:
        if not self.says_anything:
            return None
        return "moe" if self.num_experts and not self.switched_off else "dense"

    @property
    def text(self) -> str:
        said = ", ".join(f"{key}={value}" for key, value in self.said.items())
        return f"{self.family or 'no model_type'}: {said or 'no word of experts'}"

    def as_groups(self) -> tuple[ExpertGroup, ...]:
        """As if all layers were alike, where nothing else is known."""
        if self.says != "moe" or self.num_experts is None:
            return ()
        one = ExpertGroup("layers.{}", self.num_experts, 0, self.top_k)
        return tuple(
            ExpertGroup(one.path.format(i), one.num_experts, 0, one.top_k) for i in range(self.num_layers or 1)
        )


def read_words(config: Mapping[str, Any]) -> Words:
    """Of a configuration as a mapping, with the configurations inside it."""
    flat = dict(_flat(config))

    def first(keys: tuple[str, ...]) -> int | None:
        numbers = [(key, flat[key]) for key in keys if type(flat.get(key)) is int and flat[key] > 0]
        said.update(numbers)
        return numbers[0][1] if numbers else None

    said: dict[str, Any] = {}
    num_experts, top_k, num_shared = first(_COUNTS), first(_TOP_KS), first(_SHARED)
    off = next((key for key in _SWITCHES if flat.get(key) is False), "")
    if off:
        said[off] = False
    family = str(config.get("model_type") or config.get("general.architecture") or "")
    layers = next((flat[key] for key in _LAYERS if type(flat.get(key)) is int), None)
    return Words(family, num_experts, top_k, num_shared, layers, said, off)


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Outer values last, so that they win over those of inner configurations."""
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _flat(value)
    yield from ((key.rpartition(".")[2] if isinstance(key, str) else key, v) for key, v in config.items())
