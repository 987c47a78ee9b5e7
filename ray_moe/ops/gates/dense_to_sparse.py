"""A gate that begins dense and becomes sparse as its temperature falls: the dense-to-sparse gate of EvoMoE.

From arXiv:2112.14397: every token first has all experts, so all learn and the gate learns from all; a lower temperature
makes a token's weights more unequal, and experts with less than a threshold are left out. In training the logits have
Gumbel noise. `ops/methods/evomoe.py` drives it; the stage before, in which there is only one expert, is here too, so
that a checkpoint of that stage computes by itself.

Shape legend: T tokens, D model width, E experts, K the most experts that a token of the batch has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ray_moe.ops.gates.base import Routing, wide
from ray_moe.ops.gates.linear import LinearGate, check, check_top_k, compact


@dataclass(frozen=True, slots=True)
class DenseToSparseSettings:
    """The experts of each token that have at least `threshold` of its weight, and the first of them in any case."""

    threshold: float = 0.1
    """What an expert's weight must be for it to be asked. 1/E and above is never dense."""
    temperature: float = 2.0
    """At the first step."""
    final_temperature: float = 0.2
    """From `anneal_steps` on; exponentially between."""
    anneal_steps: int = 10_000
    """See `DenseToSparseGate.anneal`."""
    final_k: int | None = 1
    """The most experts of a token once annealing is done; None leaves it to the threshold."""
    noise: float = 1.0
    """What the Gumbel noise of training is multiplied by."""
    upcast: bool = True
    """Whether logits are computed in float32 where hidden states and weights are narrower."""

    def __post_init__(self) -> None:
        check(
            self,
            (0 <= self.threshold < 1, "threshold is in [0, 1)"),
            (0 < self.final_temperature <= self.temperature < math.inf, "0 < final_temperature <= temperature"),
            (self.anneal_steps >= 1, "anneal_steps is 1 or more"),
            (self.final_k is None or self.final_k >= 1, "final_k is 1 or more, or None"),
            (0 <= self.noise < math.inf, "noise is finite and 0 or more"),
        )

    def temperature_at(self, step: int) -> float:
        """Of a step, from 0."""
        if step >= self.anneal_steps:
            return self.final_temperature
        ratio = self.final_temperature / self.temperature
        return self.temperature * math.pow(ratio, max(step, 0) / self.anneal_steps)

    def build(self, hidden_size: int, num_experts: int) -> DenseToSparseGate:
        if self.final_k is not None:
            check_top_k(self.final_k, num_experts)
        return DenseToSparseGate(hidden_size, num_experts, self)


class DenseToSparseGate(LinearGate):
    """See `DenseToSparseSettings`. Weights are the probabilities, which sum to 1 before any is left out."""

    temperature: torch.Tensor
    """Scalar, in the checkpoint."""
    is_annealed: torch.Tensor
    """Scalar, in the checkpoint: whether `final_k` holds."""
    is_alone: torch.Tensor
    """Scalar, in the checkpoint: whether there is only the first expert yet, which all tokens go to."""

    def __init__(self, hidden_size: int, num_experts: int, settings: DenseToSparseSettings) -> None:
        super().__init__(hidden_size, num_experts, settings)
        self.register_buffer("temperature", torch.tensor(settings.temperature))
        self.register_buffer("is_annealed", torch.tensor(False))
        self.register_buffer("is_alone", torch.tensor(False))

    def anneal(self, step: int) -> None:
        """Take the temperature of a step. To be called before it: calls are no steps, where gradients accumulate."""
        self.temperature.fill_(self.settings.temperature_at(step))
        self.is_annealed.fill_(step >= self.settings.anneal_steps)

    def forward(self, hidden: torch.Tensor) -> Routing:
        """[T, D] -> the routing; the device is waited for, to know K."""
        logits = noisy = wide(self.logits(hidden))
        if self.is_alone:
            first = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
            return Routing(first, torch.ones_like(logits[:, :1]), logits)
        if self.training and self.settings.noise:
            tiny = torch.finfo(logits.dtype).tiny
            gumbel = -torch.empty_like(logits).exponential_().clamp_(min=tiny).log()
            noisy = logits + self.settings.noise * gumbel
        weight = (noisy / self.temperature).softmax(-1)
        is_in = weight.detach() >= self.settings.threshold
        is_in = is_in.scatter(-1, weight.detach().argmax(-1, keepdim=True), True)
        if self.settings.final_k is not None and self.is_annealed:
            best = weight.detach().topk(self.settings.final_k, dim=-1).indices
            is_in &= torch.zeros_like(is_in).scatter(-1, best, True)
        return Routing(*compact(is_in, weight), logits)
