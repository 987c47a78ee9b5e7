"""Hash layers (arXiv:2106.04426): which experts a token has is decided by which token it is, and never learned.

Experts are ranked for each token by a hash of both (rendezvous hashing), and the first K are taken: these are distinct,
all experts are equally likely, and with one expert more only the tokens that it gets change theirs.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ray_moe.ops.gates.base import Routing, TokenInfo
from ray_moe.ops.gates.linear import check, check_top_k

GOLDEN, FIRST, SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Of SplitMix64, as torch has integers: with a sign."""


@dataclass(frozen=True, slots=True)
class HashSettings:
    """The K experts that come first in a token's own order."""

    top_k: int = 1
    """K."""
    seed: int = 0
    """Another seed is another order: give layers different ones, and what meets in one layer is apart in the next."""

    def __post_init__(self) -> None:
        check(self, (self.top_k >= 1, "top_k is 1 or more"), (0 <= self.seed < 2**63, "seed is in 0..2^63 - 1"))

    def build(self, hidden_size: int, num_experts: int) -> HashGate:
        check_top_k(self.top_k, num_experts)
        return HashGate(num_experts, self)


class HashGate(nn.Module):
    """See `HashSettings`. Has no weights, and none of its experts counts more than another."""

    def __init__(self, num_experts: int, settings: HashSettings) -> None:
        super().__init__()
        self.num_experts, self.settings = num_experts, settings

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """There are none."""

    def forward(self, hidden: torch.Tensor, info: TokenInfo | None = None) -> Routing:
        """[T, D] -> the routing of the tokens' ids.

        Without ids a token's place in the batch is taken: even, and the same whenever the batch is, but nothing that an
        expert could specialise in. (Hidden states would be no better: they change with every step of training.)
        """
        ids = None if info is None else info.ids
        if ids is None:
            ids = torch.arange(len(hidden), device=hidden.device)
        experts = torch.arange(self.num_experts, device=ids.device)
        rank = mix(mix(ids.long() + self.settings.seed * GOLDEN % 2**63).unsqueeze(-1) + experts * GOLDEN)
        index = rank.topk(self.settings.top_k, dim=-1).indices
        logits = rank.to(torch.promote_types(hidden.dtype, torch.float32)) * 2.0**-63
        return Routing(index, torch.full_like(logits[:, : index.shape[-1]], 1 / index.shape[-1]), logits)

    def extra_repr(self) -> str:
        return f"{self.num_experts}, {self.settings}"


def mix(values: torch.Tensor) -> torch.Tensor:
    """[...] integers of 64 bits, scattered: the last step of SplitMix64."""
    values = (values ^ _shifted(values, 30)) * FIRST
    values = (values ^ _shifted(values, 27)) * SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, with zeros from the left."""
    shifted: torch.Tensor = (values >> by) & (2 ** (64 - by) - 1)
    return shifted
