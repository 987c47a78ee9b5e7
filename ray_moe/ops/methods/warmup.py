"""Gates that begin late or end early: frozen before or after given steps, and random routing while experts warm up.

A frozen gate has no gradients, so optimizers leave it and its state as they are: as a learning rate of 0 does, without
weight decay and momenta that would go on. Random routing with a frozen gate is arXiv:2303.01610 and THOR
(arXiv:2110.04260) in small: all experts learn from all kinds of tokens first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ray_moe.errors import InvalidConfig
from ray_moe.ops.gates.base import Routing
from ray_moe.ops.methods.base import Method, Network
from ray_moe.ops.methods.sites import Site


@dataclass(frozen=True, slots=True)
class FreezeGate(Method):
    """Gates do not learn before one step and after another."""

    before: int = 0
    """The first step that they learn in."""
    after: int | None = None
    """The first step that they do not learn in again; None is never."""

    def __post_init__(self) -> None:
        if self.before < 0 or (self.after is not None and self.after < self.before):
            raise InvalidConfig(f"before is 0 or more, and after is not before it; got {self}")

    def attach(self, network: Network) -> None:
        for site in network.sites:
            if not site.learnable:
                raise InvalidConfig(f"the gate of {site.path or 'the layer'} has nothing to freeze")

    def apply(self, network: Network, step: int) -> None:
        learns = step >= self.before and (self.after is None or step < self.after)
        for site in network.sites:
            for parameter in site.learnable:
                parameter.requires_grad_(learns)
                if not learns:
                    parameter.grad = None

    def remove(self, network: Network) -> None:
        for site in network.sites:
            for parameter in site.learnable:
                parameter.requires_grad_(True)


@dataclass(frozen=True, slots=True)
class RandomRouting(Method):
    """In training, tokens go to as many experts as their gate would choose, but to random ones, and weighted alike.

    Drawn by seed, step and layer: the same tokens go to the same experts when a step is made again (and token t of each
    micro-batch of a step to the same ones). The sum of a token's weights is what the gate made it.
    """

    steps: int
    """How many of the first steps."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InvalidConfig(f"steps is {self.steps}; it must be 0 or more")

    def route(self, site: Site, step: int, routing: Routing) -> Routing:
        if step >= self.steps or not site.gate.training:
            return routing
        num_tokens, top_k = routing.index.shape
        if top_k > site.num_experts:
            raise InvalidConfig(f"a token has {top_k} slots and there are {site.num_experts} experts to draw from")
        device = routing.index.device
        draws = torch.rand(
            num_tokens, site.num_experts, generator=site.generator(self.seed, step, device), device=device
        )
        index = draws.topk(top_k, dim=-1).indices
        is_real = routing.index < site.num_experts
        share = routing.weight.sum(-1, keepdim=True) / is_real.sum(-1, keepdim=True).clamp(min=1)
        return replace(routing, index=index.masked_fill(~is_real, site.num_experts), weight=share * is_real)
