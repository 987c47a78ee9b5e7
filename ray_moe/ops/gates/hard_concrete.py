"""A gate that learns which experts its layer needs: each is open or shut by a hard concrete variable.

From arXiv:1712.01312: a variable z in [0, 1] for each expert that is exactly 0 or 1 with some probability, and has a
gradient nevertheless. In training it is drawn anew for each call, outside training it is its mean, stretched and cut
off. The gate tells a loss "expected_experts", how many experts are open on average: times a small coefficient it is the
price of an expert. `ops/methods/search.py` ends the search with a layer that has only the experts that are open.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ray_moe.ops.gates.base import Routing, wide
from ray_moe.ops.gates.linear import LinearGate, check, check_top_k, normalized


@dataclass(frozen=True, slots=True)
class HardConcreteSettings:
    """The K most probable of the open experts, weighted by their probability times how open they are."""

    top_k: int = 2
    """K; a token has fewer where fewer are open."""
    normalize: bool = True
    """Whether probabilities of a token's K experts are divided by their sum, before they are multiplied by z."""
    initial: float = 0.9
    """How probably an expert is not shut at the beginning."""
    temperature: float = 2 / 3
    """β of the paper: the lower, the more often z is 0 or 1."""
    stretch: tuple[float, float] = (-0.1, 1.1)
    """γ and ζ of the paper: z is drawn from this interval and cut off at 0 and 1."""
    upcast: bool = True
    """Whether logits are computed in float32 where hidden states and weights are narrower."""

    def __post_init__(self) -> None:
        check(
            self,
            (self.top_k >= 1, "top_k is 1 or more"),
            (0 < self.initial < 1, "initial is between 0 and 1"),
            (0 < self.temperature < 1, "temperature is between 0 and 1"),
            (self.stretch[0] < 0 and self.stretch[1] > 1, "stretch is from below 0 to above 1"),
        )

    @property
    def shift(self) -> float:
        """An expert is not shut with probability sigmoid(log_alpha - shift) (equation 12)."""
        return self.temperature * math.log(-self.stretch[0] / self.stretch[1])

    def build(self, hidden_size: int, num_experts: int) -> HardConcreteGate:
        check_top_k(self.top_k, num_experts)
        return HardConcreteGate(hidden_size, num_experts, self)


class HardConcreteGate(LinearGate):
    """See `HardConcreteSettings`. One expert at least is open."""

    log_alpha: torch.Tensor
    """[E] how open each expert is; a parameter until `close`, and a buffer of the same name afterwards."""

    def __init__(self, hidden_size: int, num_experts: int, settings: HardConcreteSettings) -> None:
        super().__init__(hidden_size, num_experts, settings)
        first = math.log(settings.initial / (1 - settings.initial)) + settings.shift
        self.log_alpha = nn.Parameter(torch.full((num_experts,), first))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights; experts become as open as at the beginning."""
        bound = self.hidden_size**-0.5
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        if hasattr(self, "log_alpha"):  # not while it is made
            initial = self.settings.initial
            nn.init.constant_(self.log_alpha, math.log(initial / (1 - initial)) + self.settings.shift)

    @property
    def is_closed(self) -> bool:
        """Whether the search is over."""
        return "log_alpha" not in self._parameters

    def close(self) -> None:
        """End the search: how open experts are is what it is now, in training too."""
        if not self.is_closed:
            values = self.log_alpha.detach().clone()
            del self.log_alpha
            self.register_buffer("log_alpha", values)

    def openness(self) -> torch.Tensor:
        """[E] z of each expert: drawn in training, its own value outside and when closed."""
        log_alpha = wide(self.log_alpha)
        if self.training and not self.is_closed:
            uniform = torch.rand_like(log_alpha).clamp_(1e-6, 1 - 1e-6)
            noisy = ((uniform.logit() + log_alpha) / self.settings.temperature).sigmoid()
        else:
            noisy = log_alpha.sigmoid()
        low, high = self.settings.stretch
        z = (noisy * (high - low) + low).clamp(0, 1)
        best = torch.zeros_like(z).scatter(0, log_alpha.argmax(0, keepdim=True), 1)
        return torch.where(z.any(), z, best)

    @torch.no_grad()
    def open_experts(self) -> list[int]:
        """Numbers of the experts that are not shut outside training."""
        low, high = self.settings.stretch
        z = wide(self.log_alpha).sigmoid() * (high - low) + low
        numbers: list[int] = (z > 0).nonzero().flatten().tolist()
        return numbers or [int(self.log_alpha.argmax())]

    def forward(self, hidden: torch.Tensor) -> Routing:
        """[T, D] -> the routing. Shut experts take no part in the softmax, as if they were not there."""
        logits, z = wide(self.logits(hidden)), self.openness()
        is_shut = z == 0
        probability = logits.masked_fill(is_shut, float("-inf")).softmax(-1)
        index = (probability * z).detach().topk(self.settings.top_k, dim=-1).indices
        weight = probability.gather(-1, index)
        if self.settings.normalize:
            weight = normalized(weight)
        index_is_shut = is_shut[index]
        number = (wide(self.log_alpha) - self.settings.shift).sigmoid().sum()
        return Routing(
            index.masked_fill(index_is_shut, self.num_experts), weight * z[index], logits, {"expected_experts": number}
        )
