"""A gate that learns how many experts each token needs, by a Gumbel-softmax for each expert (arXiv:1611.01144).

Each expert is kept or not, by a probability that is linear in the hidden state under a sigmoid. In training the choice
is drawn and softened: between 0 and 1, differentiable in the logits for the experts that are left out, too. The lower
the temperature, the harder. Outside training an expert is kept that is more probably kept than not.

The gate tells a loss "expected_experts": what keeps it from keeping all.

Shape legend: T tokens, D model width, E experts, K slots per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ray_moe.ops.gates.base import Routing, wide
from ray_moe.ops.gates.linear import LinearGate, check, check_top_k, mean


@dataclass(frozen=True, slots=True)
class GumbelSettings:
    """As many experts as a token needs."""

    max_k: int | None = None
    """K, the most that a token can have; None is all experts. In training a token's K best are asked, hard or not."""
    target: float | None = None
    """Experts per token to aim at: the loss is the square of what the mean is off by. None: the loss is the mean."""
    hard: bool = False
    """Whether choices are hard in training, too, with the gradients of soft ones (straight-through): experts that are
    left out cost nothing then, and give no gradient to the gate either."""
    temperature: float = 1.0
    """At the first step."""
    final_temperature: float = 0.1
    """From `anneal_steps` on; exponentially between."""
    anneal_steps: int = 10_000
    """See `GumbelGate.anneal`."""
    upcast: bool = True
    """Whether logits are computed in float32 where hidden states and weights are narrower."""

    def __post_init__(self) -> None:
        check(
            self,
            (self.max_k is None or self.max_k >= 1, "max_k is 1 or more, or None"),
            (self.target is None or self.target > 0, "target is more than 0, or None"),
            (0 < self.final_temperature <= self.temperature < math.inf, "0 < final_temperature <= temperature"),
            (self.anneal_steps >= 1, "anneal_steps is 1 or more"),
        )

    def temperature_at(self, step: int) -> float:
        """Of a step, from 0."""
        progress = min(max(step, 0) / self.anneal_steps, 1.0)
        ratio: float = (self.final_temperature / self.temperature) ** progress
        return self.temperature * ratio

    def build(self, hidden_size: int, num_experts: int) -> GumbelGate:
        if self.max_k is not None:
            check_top_k(self.max_k, num_experts)
        return GumbelGate(hidden_size, num_experts, self)


class GumbelGate(LinearGate):
    """See `GumbelSettings`. A token keeps one expert at least."""

    temperature: torch.Tensor
    """Scalar, in the checkpoint."""

    def __init__(self, hidden_size: int, num_experts: int, settings: GumbelSettings) -> None:
        super().__init__(hidden_size, num_experts, settings)
        self.register_buffer("temperature", torch.tensor(settings.temperature))

    def anneal(self, step: int) -> None:
        """Take the temperature of a step. To be called before it: calls are no steps, where gradients accumulate."""
        self.temperature.fill_(self.settings.temperature_at(step))

    def forward(self, hidden: torch.Tensor) -> Routing:
        """[T, D] -> the routing: an expert's weight is how far it is kept times how probable that is, over the sum."""
        logits = wide(self.logits(hidden))
        noisy = logits
        if self.training:  # logistic noise is the difference of two Gumbel noises: of "kept" and of "not"
            noisy = logits + torch.logit(torch.rand_like(logits), eps=1e-6)
        values, index = noisy.topk(self.settings.max_k or self.num_experts, dim=-1)
        probable = nn.functional.logsigmoid(logits.gather(-1, index))
        is_out = values <= 0
        is_out[:, :1] = False
        hard = probable.masked_fill(is_out, float("-inf")).softmax(-1)
        if not self.training:
            weight = hard
        else:
            weight = soft = (nn.functional.logsigmoid(values / self.temperature) + probable).softmax(-1)
            if self.settings.hard:
                weight = hard.detach() + (soft - soft.detach())
        if self.settings.hard or not self.training:
            index = index.masked_fill(is_out, self.num_experts)
        return Routing(index, weight, logits, {"expected_experts": self._loss(logits)})

    def _loss(self, logits: torch.Tensor) -> torch.Tensor:
        number, target = mean(logits.sigmoid().sum(-1)), self.settings.target
        return number if target is None else (number - target).square()
