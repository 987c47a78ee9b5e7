"""Expert choice (arXiv:2202.09368): experts choose tokens, so each has the same load and no loss is needed for it.

A token may have many experts or none. Which ones depends on the other tokens of the batch, also on later ones: a
decoder that is trained so sees a little of the future, and has other tokens around it when it generates.

Shape legend: T tokens, D model width, E experts, K the most experts that a token of the batch has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ray_moe.ops.gates.base import Routing, wide
from ray_moe.ops.gates.linear import LinearGate, check, compact


@dataclass(frozen=True, slots=True)
class ExpertChoiceSettings:
    """Each expert takes the tokens that it is most probable for."""

    capacity_factor: float = 2.0
    """Experts per token on average: each takes T times this / E tokens, rounded up."""
    upcast: bool = True
    """Whether logits are computed in float32 where hidden states and weights are narrower."""

    def __post_init__(self) -> None:
        check(self, (0 < self.capacity_factor < math.inf, "capacity_factor is finite and more than 0"))

    def build(self, hidden_size: int, num_experts: int) -> ExpertChoiceGate:
        check(self, (self.capacity_factor <= num_experts, f"capacity_factor is at most {num_experts}, all experts"))
        return ExpertChoiceGate(hidden_size, num_experts, self)


class ExpertChoiceGate(LinearGate):
    """See `ExpertChoiceSettings`."""

    def forward(self, hidden: torch.Tensor) -> Routing:
        """[T, D] -> the routing. Weights are the probabilities, as in the paper."""
        logits = self.logits(hidden)
        probabilities = wide(logits).softmax(-1)
        each_takes = math.ceil(len(hidden) * self.settings.capacity_factor / self.num_experts)
        tokens = probabilities.topk(each_takes, dim=0).indices
        chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(0, tokens, True)
        return Routing(*compact(chosen, probabilities), logits)
