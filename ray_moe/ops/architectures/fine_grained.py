"""Fine-grained experts (DeepSeekMoE, arXiv:2401.06066): m times as many, m times as narrow, m times as many per token.

Parameters of the experts and computation per token stay the same, and a token has many more combinations of experts to
choose from. `ExpertSizes` is plain arithmetic: make a layer of what it says.

Shape legend: D model width, F expert width, E experts, K experts per token, N shared experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ray_moe.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """How many experts of which width a layer has. Raises `InvalidConfig` for what cannot be."""

    expert_size: int
    """F."""
    num_experts: int
    """E, those that are chosen from."""
    top_k: int
    """K."""
    num_shared: int = 0
    """N, those that are always on."""

    def __post_init__(self) -> None:
        if self.expert_size < 1 or not 1 <= self.top_k <= self.num_experts or self.num_shared < 0:
            raise InvalidConfig(
                f"expert_size is 1 or more, top_k is in 1..num_experts, num_shared 0 or more; got {self}"
            )

    def cut(self, m: int) -> ExpertSizes:
        """Each expert in m, and m times as many per token. Raises: `InvalidConfig` where m does not divide F."""
        if m < 1 or self.expert_size % m:
            fit = ", ".join(str(n) for n in range(1, min(self.expert_size, 64) + 1) if self.expert_size % n == 0)
            raise InvalidConfig(f"experts {self.expert_size} wide cannot be cut in {m}; m is one of {fit}, ...")
        return ExpertSizes(self.expert_size // m, self.num_experts * m, self.top_k * m, self.num_shared * m)

    def isolate(self, num_shared: int) -> ExpertSizes:
        """So many experts always on, and taken from those that are chosen, of which a token then has fewer.

        Raises: `InvalidConfig` where nothing would be left to choose.
        """
        if not 0 <= num_shared < self.top_k:
            raise InvalidConfig(
                f"num_shared is {num_shared}; with {self.top_k} experts per token, 0 to {self.top_k - 1}"
            )
        return replace(
            self,
            num_experts=self.num_experts - num_shared,
            top_k=self.top_k - num_shared,
            num_shared=self.num_shared + num_shared,
        )

    def num_parameters(self, hidden_size: int, *, gated: bool = True) -> int:
        """Of all experts, shared ones included, without biases (and without the gate's E * D, which grow with E)."""
        return (3 if gated else 2) * hidden_size * self.expert_size * (self.num_experts + self.num_shared)

    def flops_per_token(self, hidden_size: int, *, gated: bool = True) -> int:
        """Multiply-adds of a token's experts, times two."""
        return 2 * (3 if gated else 2) * hidden_size * self.expert_size * (self.top_k + self.num_shared)

    @property
    def num_combinations(self) -> int:
        """Sets of experts that a token can have."""
        return math.comb(self.num_experts, self.top_k)
