"""A capacity of experts, in training alone, for networks whose layers have none of their own.

Called by `driver.py`. A `MoELayer` has its own (`MoELayer(capacity=...)`), in evaluation too; a model of `transformers`
has none, and once it is saved nothing limits its experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray_moe.errors import InvalidConfig
from ray_moe.ops.capacity import CapacitySettings, limit
from ray_moe.ops.gates.base import Routing
from ray_moe.ops.methods.base import Method
from ray_moe.ops.methods.sites import Site


@dataclass(frozen=True, slots=True)
class ExpertCapacity(Method):
    """In training no expert takes more slots of a forward pass than `settings` allow (arXiv:2006.16668)."""

    settings: CapacitySettings

    def __post_init__(self) -> None:
        if self.settings.adaptive:
            raise InvalidConfig("a capacity of all layers is not adaptive; give MoELayer(capacity=...) one that is")

    def route(self, site: Site, step: int, routing: Routing) -> Routing:
        return limit(routing, site.num_experts, self.settings)[0] if site.gate.training else routing
