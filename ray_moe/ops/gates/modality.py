"""Experts for each modality and experts for all: vision sees vision's and the shared, text sees text's and the shared.

As in VLMo (arXiv:2111.02358) and MoMa (arXiv:2407.21770), whose experts are divided by modality, with a group of
cross-modal ones beside. Of which modality a token is, is in `TokenInfo.modality`.

Shape legend: T tokens, D model width, E experts, K experts per token, M modalities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ray_moe.ops.gates.base import Routing, TokenInfo, known, wide
from ray_moe.ops.gates.linear import LinearGate, check, check_top_k, normalized


@dataclass(frozen=True, slots=True)
class ModalitySettings:
    """The K most probable of the experts that a token's modality sees."""

    own: tuple[int, ...] | None = None
    """How many experts belong to each modality alone, in the order of the experts; those after them are shared. None is
    two modalities with a third of the experts each."""
    top_k: int = 2
    """K."""
    normalize: bool = True
    """Whether a token's K weights are divided by their sum."""
    upcast: bool = True
    """Whether logits are computed in float32 where hidden states and weights are narrower."""

    def __post_init__(self) -> None:
        check(
            self,
            (self.own is None or len(self.own) > 0, "own has a number for each modality, or is None"),
            (self.own is None or min(self.own, default=0) >= 0, "own has numbers of 0 or more"),
            (self.top_k >= 1, "top_k is 1 or more"),
        )

    def groups(self, num_experts: int) -> tuple[int, ...]:
        """`own` of so many experts."""
        return (num_experts // 3,) * 2 if self.own is None else tuple(self.own)

    def build(self, hidden_size: int, num_experts: int) -> ModalityGate:
        own = self.groups(num_experts)
        check(self, (sum(own) <= num_experts, f"own sums to at most {num_experts}, the number of experts"))
        check_top_k(self.top_k, min(own) + num_experts - sum(own), "experts for a modality")
        return ModalityGate(hidden_size, num_experts, self)


class ModalityGate(LinearGate):
    """See `ModalitySettings`."""

    is_hidden: torch.Tensor
    """[M, E] whether a modality does not see an expert."""

    def __init__(self, hidden_size: int, num_experts: int, settings: ModalitySettings) -> None:
        super().__init__(hidden_size, num_experts, settings)
        own = settings.groups(num_experts)
        owner = [modality for modality, number in enumerate(own) for _ in range(number)]
        shared = [False] * (num_experts - len(owner))
        is_hidden = torch.tensor([[other != mine for other in owner] + shared for mine in range(len(own))])
        self.register_buffer("is_hidden", is_hidden, persistent=False)

    def forward(self, hidden: torch.Tensor, info: TokenInfo | None = None) -> Routing:
        """[T, D] -> the routing; the logits of experts that a token does not see are minus infinity.

        Raises: `InvalidRequest` without the tokens' modalities, or where one of them is not in 0..M-1.
        """
        modality = known(info, "modality", len(self.is_hidden))
        logits = self.logits(hidden).masked_fill(self.is_hidden[modality], float("-inf"))
        weight, index = wide(logits).softmax(-1).topk(self.settings.top_k, dim=-1)
        return Routing(index, normalized(weight) if self.settings.normalize else weight, logits)
