"""The gate of the sparsely-gated Mixture-of-Experts layer: noisy top-k (arXiv:1701.06538, section 2.1 and appendix A).

How much noise each expert's logit gets is learned, too. In training the gate tells a loss "load": how unevenly tokens
are spread, by an estimate of the number of tokens of each expert that is smooth in the logits.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ray_moe.ops.gates.base import Routing, wide
from ray_moe.ops.gates.linear import LinearGate, check, check_top_k, project
from ray_moe.ops.losses import load_loss


@dataclass(frozen=True, slots=True)
class NoisyTopKSettings:
    """The K greatest logits of each token after noise, and a softmax over these."""

    top_k: int = 2
    """K."""
    least_noise: float = 0.01
    """Added to the learned standard deviation of the noise, which could vanish otherwise."""
    upcast: bool = True
    """Whether logits are computed in float32 where hidden states and weights are narrower."""

    def __post_init__(self) -> None:
        check(self, (self.top_k >= 1, "top_k is 1 or more"), (self.least_noise > 0, "least_noise is more than 0"))

    def build(self, hidden_size: int, num_experts: int) -> NoisyTopKGate:
        check_top_k(self.top_k, num_experts)
        return NoisyTopKGate(hidden_size, num_experts, self, noise_weight=num_experts)


class NoisyTopKGate(LinearGate):
    """See `NoisyTopKSettings`. Without noise outside training."""

    noise_weight: nn.Parameter

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Zeros: at first the noise alone decides, so all experts are used alike (appendix A)."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: torch.Tensor) -> Routing:
        """[T, D] -> the routing, with a loss "load" in training."""
        top_k = self.settings.top_k
        clean = noisy = wide(self.logits(hidden))
        losses = {}
        if self.training:
            std = nn.functional.softplus(wide(project(hidden, self.noise_weight, self.settings.upcast)))
            std = std + self.settings.least_noise
            noisy = clean + torch.randn_like(clean) * std
            losses["load"] = load_loss(clean, noisy, std, top_k)
        values, index = noisy.topk(top_k, dim=-1)
        return Routing(index, values.softmax(-1), noisy, losses)
