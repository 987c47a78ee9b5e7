"""Dynamic routing (arXiv:2403.07652): as many experts as it takes until their probabilities sum to p.

Where the gate is sure a token has one expert, where it is not it has many. The gate tells a loss "entropy", which keeps
it from being unsure of everything (equation 8).

Shape legend: T tokens, D model width, E experts, K the most experts that a token of the batch has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ray_moe.ops.gates.base import Routing, wide
from ray_moe.ops.gates.linear import LinearGate, check, check_top_k, mean, normalized


@dataclass(frozen=True, slots=True)
class DynamicKSettings:
    """The fewest experts of each token that together are as probable as `threshold`."""

    threshold: float = 0.4
    """p."""
    max_k: int | None = None
    """The most that a token can have; None is all experts."""
    normalize: bool = False
    """Whether a token's weights are divided by their sum, which the paper does not."""
    upcast: bool = True
    """Whether logits are computed in float32 where hidden states and weights are narrower."""

    def __post_init__(self) -> None:
        check(
            self,
            (0 < self.threshold <= 1, "threshold is in (0, 1]"),
            (self.max_k is None or self.max_k >= 1, "max_k is 1 or more, or None"),
        )

    def build(self, hidden_size: int, num_experts: int) -> DynamicKGate:
        if self.max_k is not None:
            check_top_k(self.max_k, num_experts)
        return DynamicKGate(hidden_size, num_experts, self)


class DynamicKGate(LinearGate):
    """See `DynamicKSettings`."""

    def forward(self, hidden: torch.Tensor) -> Routing:
        """[T, D] -> the routing; the device is waited for, to know K."""
        logits = wide(self.logits(hidden))
        probabilities = logits.softmax(-1)
        weight, index = probabilities.topk(self.settings.max_k or self.num_experts, dim=-1)
        is_in = weight.detach().cumsum(-1) - weight.detach() < self.settings.threshold
        most = int(is_in.sum(-1).max()) if len(hidden) else 1
        index, weight = index.masked_fill(~is_in, self.num_experts)[:, :most], (weight * is_in)[:, :most]
        entropy = -(probabilities * logits.log_softmax(-1)).sum(-1)
        return Routing(
            index, normalized(weight) if self.settings.normalize else weight, logits, {"entropy": mean(entropy)}
        )
