"""Two levels (arXiv:1701.06538, appendix B): first a choice of groups, then one of experts within each.

Shape legend: T tokens, D model width, E experts, G groups of E / G neighbouring experts, g groups per token, k experts
of each, K = g * k experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ray_moe.ops.gates.base import Routing, wide
from ray_moe.ops.gates.linear import LinearGate, check, check_top_k, normalized, project


@dataclass(frozen=True, slots=True)
class HierarchicalSettings:
    """The g most probable groups of each token, and the k most probable experts of each of these."""

    num_groups: int = 2
    """G, of which E is a multiple."""
    top_groups: int = 1
    """g."""
    top_k: int = 2
    """k, experts of each chosen group."""
    normalize: bool = True
    """Whether the weights of a token's groups, and those of its experts within a group, are divided by their sum."""
    upcast: bool = True
    """Whether logits are computed in float32 where hidden states and weights are narrower."""

    def __post_init__(self) -> None:
        check(
            self,
            (self.num_groups >= 1, "num_groups is 1 or more"),
            (1 <= self.top_groups <= self.num_groups, "top_groups is in 1..num_groups"),
            (self.top_k >= 1, "top_k is 1 or more"),
        )

    def build(self, hidden_size: int, num_experts: int) -> HierarchicalGate:
        check(self, (num_experts % self.num_groups == 0, f"num_groups divides {num_experts}, the number of experts"))
        check_top_k(self.top_k, num_experts // self.num_groups, "experts in a group")
        return HierarchicalGate(hidden_size, num_experts, self, group_weight=self.num_groups)


class HierarchicalGate(LinearGate):
    """See `HierarchicalSettings`. An expert's weight is that of its group times its own within the group."""

    group_weight: nn.Parameter

    def forward(self, hidden: torch.Tensor) -> Routing:
        """[T, D] -> the routing, whose logits are the logarithms of the probabilities of all experts."""
        options = self.settings
        size = self.num_experts // options.num_groups
        of_groups = wide(project(hidden, self.group_weight, options.upcast)).log_softmax(-1)  # [T, G]
        within = wide(self.logits(hidden)).unflatten(-1, (options.num_groups, size)).log_softmax(-1)  # [T, G, E / G]
        first, group = of_groups.exp().topk(options.top_groups, dim=-1)  # [T, g]
        ours = within.exp().gather(1, group.unsqueeze(-1).expand(-1, -1, size))
        second, expert = ours.topk(options.top_k, dim=-1)  # [T, g, k]
        if options.normalize:
            first, second = normalized(first), normalized(second)
        index = group.unsqueeze(-1) * size + expert
        weight = first.unsqueeze(-1) * second
        return Routing(index.flatten(1), weight.flatten(1), (of_groups.unsqueeze(-1) + within).flatten(1))
