"""The gate of the Switch Transformer (arXiv:2101.03961): one expert for each token, weighted by its probability.

Shape legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ray_moe.ops.gates.base import Routing, wide
from ray_moe.ops.gates.linear import LinearGate, check


@dataclass(frozen=True, slots=True)
class SwitchSettings:
    """The most probable expert of each token."""

    jitter: float = 0.0
    """In training, what the gate sees is multiplied by numbers drawn uniformly from 1 ± jitter, so that it explores."""
    upcast: bool = True
    """Whether logits are computed in float32 where hidden states and weights are narrower."""

    def __post_init__(self) -> None:
        check(self, (0 <= self.jitter < 1, "jitter is in [0, 1)"))

    def build(self, hidden_size: int, num_experts: int) -> SwitchGate:
        return SwitchGate(hidden_size, num_experts, self)


class SwitchGate(LinearGate):
    """See `SwitchSettings`."""

    def forward(self, hidden: torch.Tensor) -> Routing:
        """[T, D] -> the routing, K = 1."""
        jitter = self.settings.jitter
        if self.training and jitter > 0:
            hidden = wide(hidden) if self.settings.upcast else hidden
            hidden = hidden * torch.empty_like(hidden).uniform_(1 - jitter, 1 + jitter)
        logits = self.logits(hidden)
        weight, index = wide(logits).softmax(-1).max(dim=-1, keepdim=True)
        return Routing(index, weight, logits)
