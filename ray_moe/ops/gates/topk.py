"""The usual gate: a softmax over the experts, of which each token takes the K greatest.

That of GShard (arXiv:2006.16668) and Mixtral with the weights normalised, that of OLMoE without.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ray_moe.ops.gates.base import Routing, wide
from ray_moe.ops.gates.linear import LinearGate, check_top_k, normalized


@dataclass(frozen=True, slots=True)
class TopKSettings:
    """The K most probable experts of each token."""

    top_k: int = 2
    """K."""
    normalize: bool = True
    """Whether a token's K weights are divided by their sum. Without it the gate also learns from how probable the
    choice was, which with K = 1 is all that it learns from."""
    upcast: bool = True
    """Whether logits are computed in float32 where hidden states and weights are narrower."""

    def build(self, hidden_size: int, num_experts: int) -> TopKGate:
        return TopKGate(hidden_size, num_experts, self.top_k, normalize=self.normalize, upcast=self.upcast)


class TopKGate(LinearGate):
    """The K most probable experts of each token, weighted by their probabilities."""

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, normalize: bool = True, upcast: bool = True
    ) -> None:
        """
        Args:
            hidden_size: D.
            num_experts: E.
            top_k, normalize, upcast: see `TopKSettings`.

        Raises: `InvalidConfig` when K is not in 1..E.
        """
        check_top_k(top_k, num_experts)
        super().__init__(hidden_size, num_experts, TopKSettings(top_k, normalize, upcast))

    def forward(self, hidden: torch.Tensor) -> Routing:
        """[T, D] -> the routing. Probabilities and weights have the dtype of the logits, but float32 at least."""
        logits = self.logits(hidden)
        weight, index = wide(logits).softmax(-1).topk(self.settings.top_k, dim=-1)
        return Routing(index, normalized(weight) if self.settings.normalize else weight, logits)
