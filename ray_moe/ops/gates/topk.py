"""The usual gate: a softmax over the experts, of which each token takes the K greatest.

That of GShard (arXiv:2006.16668) and Mixtral with the weights normalised, that of the Switch Transformer
(arXiv:2101.03961, with K = 1) and OLMoE without.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.ops.gates.base import Routing


class TopKGate(nn.Module):
    """The K most probable experts of each token, weighted by their probabilities."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, normalize: bool = True) -> None:
        """
        Args:
            hidden_size: D.
            num_experts: E.
            top_k: K.
            normalize: whether a token's K weights are divided by their sum. Without it the gate also learns from how
                probable the choice was, which with K = 1 is all that it learns from.

        Raises: `InvalidConfig` when K is not in 1..E.
        """
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise InvalidConfig(f"top_k is {top_k}; with {num_experts} experts it can be 1 to {num_experts}")
        self.top_k, self.normalize = top_k, normalize
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights: uniform within ±1/√D, as `torch.nn.Linear` has them."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)

    def forward(self, hidden: torch.Tensor) -> Routing:
        """[T, D] -> the routing. Probabilities and weights have the dtype of the logits, but float32 at least."""
        logits = nn.functional.linear(hidden, self.weight)
        probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weight, index = probabilities.topk(self.top_k, dim=-1)
        if self.normalize:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        return Routing(index, weight, logits)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, top_k={self.top_k}, normalize={self.normalize}"
