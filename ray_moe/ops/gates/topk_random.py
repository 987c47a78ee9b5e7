"""The K most probable experts, and one at random: so that all experts are tried, whatever the gate prefers.

With ``draw="next", dispatch="by_weight", top_k=1`` it is the gate of GShard (arXiv:2006.16668, algorithm 1).

Shape legend: T tokens, D model width, E experts, K experts per token that are not random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ray_moe.ops.gates.base import Routing, wide
from ray_moe.ops.gates.linear import LinearGate, check, check_top_k, normalized

Draw = Literal["probability", "uniform", "next"]
Dispatch = Literal["always", "by_weight"]


@dataclass(frozen=True, slots=True)
class TopKRandomSettings:
    """The K most probable experts of each token and one of the others, weighted by their probabilities.

    Outside training the one is the next most probable and always asked.
    """

    top_k: int = 1
    """K, without the random one."""
    draw: Draw = "probability"
    """How the one is drawn from the others: by their probabilities, all alike, or the next most probable."""
    dispatch: Dispatch = "always"
    """Whether it is asked: always, or with a probability of its weight times K + 1, so that one which hardly counts is
    mostly left out."""
    upcast: bool = True
    """Whether logits are computed in float32 where hidden states and weights are narrower."""

    def __post_init__(self) -> None:
        check(
            self,
            (self.top_k >= 1, "top_k is 1 or more"),
            (self.draw in get_args(Draw), f"draw is one of {', '.join(get_args(Draw))}"),
            (self.dispatch in get_args(Dispatch), f"dispatch is one of {', '.join(get_args(Dispatch))}"),
        )

    def build(self, hidden_size: int, num_experts: int) -> TopKRandomGate:
        check_top_k(self.top_k, num_experts - 1, "experts beside a random one")
        return TopKRandomGate(hidden_size, num_experts, self)


class TopKRandomGate(LinearGate):
    """See `TopKRandomSettings`."""

    def forward(self, hidden: torch.Tensor) -> Routing:
        """[T, D] -> the routing with K + 1 columns, the last of them the random one. Weights sum to 1 before any is
        left out."""
        options = self.settings
        logits = wide(self.logits(hidden))
        first = logits.topk(options.top_k, dim=-1).indices
        index = torch.cat([first, self._another(logits.detach(), first)], dim=-1)
        weight = normalized(logits.softmax(-1).gather(-1, index))
        if self.training and options.dispatch == "by_weight":
            one = weight[:, -1:].detach()
            is_out = torch.rand_like(one) >= one * (options.top_k + 1)
            is_out = torch.cat([torch.zeros_like(first, dtype=torch.bool), is_out], dim=-1)
            index, weight = index.masked_fill(is_out, self.num_experts), weight.masked_fill(is_out, 0)
        return Routing(index, weight, logits)

    def _another(self, logits: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """[T, 1]: an expert that is not among the `first` [T, K]."""
        draw = self.settings.draw if self.training else "next"
        if draw != "next":  # the greatest of logits with Gumbel noise is drawn by their softmax
            noise = -torch.empty_like(logits).exponential_().clamp_(min=torch.finfo(logits.dtype).tiny).log()
            logits = noise if draw == "uniform" else logits + noise
        return logits.scatter(-1, first, float("-inf")).argmax(dim=-1, keepdim=True)
