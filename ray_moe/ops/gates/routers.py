"""The routers of models of `transformers`: which module beside some experts is one, and what it answers. Known by
attributes alone, so that `transformers` is not needed. Called by `models/gates.py` and `ops/methods/sites.py`.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ray_moe.ops.gates.base import Routing


class Answer(tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
    """(logits [T, E], weight [T, K], index [T, K]), as blocks take it, of a gate in a router's place."""

    routing: Routing
    """What the gate said, with its own losses."""

    def __new__(cls, routing: Routing) -> Answer:
        self = super().__new__(cls, (routing.logits, routing.weight, routing.index))
        self.routing = routing
        return self


def routers_beside(block: nn.Module, experts: Any) -> Iterator[tuple[str, nn.Module]]:
    """What in a block could be its router, by name: modules with a weight [E, D]."""
    for name, child in block.named_children():
        weight = getattr(child, "weight", None)
        if (
            child is not experts
            and isinstance(weight, torch.Tensor)
            and weight.shape[:-1] == (int(experts.num_experts),)
        ):
            yield name, child


def allow_no_expert(experts: Any) -> None:
    """Without expert parallelism `transformers` takes every index for an expert, also the one that means "none"."""
    experts._is_expert_parallel = True
