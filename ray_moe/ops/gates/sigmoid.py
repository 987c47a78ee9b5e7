"""The gate of DeepSeek-V3 (arXiv:2412.19437): sigmoid scores, the best groups of experts first, and a selection bias.

The bias takes part in the choice and not in the weights. Moved against the load after each step (`update_bias`), it
balances experts without a loss whose gradients disturb the model (arXiv:2408.15664).

Shape legend: T tokens, D model width, E experts, G groups of E / G neighbouring experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ray_moe.errors import InvalidRequest
from ray_moe.ops.gates.base import Routing, wide
from ray_moe.ops.gates.linear import LinearGate, check, check_top_k

Rule = Literal["sign", "proportional"]


def bias_update(load: torch.Tensor, rate: float, rule: Rule = "sign") -> torch.Tensor:
    """What to add to a selection bias after a step: more for experts with less than the mean load.

    "sign" adds or takes away `rate`, as algorithm 1 of arXiv:2408.15664 does. "proportional" adds `rate` times how far
    the load is from the mean, over the mean, so that it does not depend on the number of tokens: smoother near balance,
    and stronger for what is overrun.

    Args:
        load: [E] slots of each expert in the step, of all micro-batches and workers.
        rate: the paper's u; 0.001 there.
        rule: which.

    Returns: [E], float32 or wider; zeros for a step without tokens.
    """
    load = wide(load)
    error = load.mean() - load
    if rule == "sign":
        return rate * error.sign()
    return rate * error / load.mean().clamp(min=torch.finfo(load.dtype).tiny)


@dataclass(frozen=True, slots=True)
class SigmoidSettings:
    """The K experts with the highest sigmoid score plus bias, out of a token's best groups."""

    top_k: int = 2
    """K."""
    num_groups: int = 1
    """G, of which E is a multiple; 1 lets all experts compete. A group is as good as its two best experts together."""
    top_groups: int = 1
    """Groups that a token's experts come from."""
    normalize: bool = True
    """Whether a token's K weights are divided by their sum."""
    scale: float = 1.0
    """What weights are multiplied by after that."""
    bias_rate: float = 0.001
    """By how much `update_bias` moves each bias."""
    upcast: bool = True
    """Whether logits are computed in float32 where hidden states and weights are narrower."""

    def __post_init__(self) -> None:
        check(
            self,
            (self.top_k >= 1, "top_k is 1 or more"),
            (self.num_groups >= 1, "num_groups is 1 or more"),
            (1 <= self.top_groups <= self.num_groups, "top_groups is in 1..num_groups"),
            (self.scale > 0, "scale is more than 0"),
            (self.bias_rate >= 0, "bias_rate is 0 or more"),
        )

    def build(self, hidden_size: int, num_experts: int) -> SigmoidGate:
        check(self, (num_experts % self.num_groups == 0, f"num_groups divides {num_experts}, the number of experts"))
        check_top_k(self.top_k, self.top_groups * num_experts // self.num_groups, "experts in a token's groups")
        return SigmoidGate(hidden_size, num_experts, self)


class SigmoidGate(LinearGate):
    """See `SigmoidSettings`."""

    bias: torch.Tensor
    """[E] what is added to the scores for the choice alone; never in less than float32, where small steps are lost."""

    def __init__(self, hidden_size: int, num_experts: int, settings: SigmoidSettings) -> None:
        super().__init__(hidden_size, num_experts, settings)
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, hidden: torch.Tensor) -> Routing:
        """[T, D] -> the routing."""
        options = self.settings
        logits = self.logits(hidden)
        scores = wide(logits).sigmoid()
        index = self._best_groups(scores.detach() + self.bias).topk(options.top_k, dim=-1).indices
        weight = scores.gather(-1, index)
        if options.normalize:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(index, weight * options.scale, logits)

    @torch.no_grad()
    def update_bias(self, load: torch.Tensor) -> None:
        """Lower the bias of experts with more than the mean load and raise that of the others, all by `bias_rate`.

        Args:
            load: [E] tokens of each expert in a step, of all workers together, so that all move alike.

        Raises: `InvalidRequest` for a load of other experts.
        """
        if load.shape != self.bias.shape:
            raise InvalidRequest(f"the load has the shape {list(load.shape)}; there are {self.num_experts} experts")
        self.bias += bias_update(load.to(self.bias), self.settings.bias_rate)

    def _best_groups(self, scores: torch.Tensor) -> torch.Tensor:
        """[T, E] with those of all but a token's best groups at minus infinity."""
        options = self.settings
        if options.top_groups == options.num_groups:
            return scores
        size = self.num_experts // options.num_groups
        of_groups = scores.unflatten(-1, (options.num_groups, size)).topk(min(2, size), dim=-1).values.sum(-1)
        best = of_groups.topk(options.top_groups, dim=-1).indices
        is_out = torch.ones_like(of_groups, dtype=torch.bool).scatter(-1, best, False)
        return scores.masked_fill(is_out.repeat_interleave(size, dim=-1), float("-inf"))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        bias = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias.dtype.itemsize < bias.dtype.itemsize and self.bias.dtype.itemsize < torch.float32.itemsize:
            self.bias = bias.to(self.bias.device)
        return self
