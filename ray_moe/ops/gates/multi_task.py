"""A gate for each task over the same experts: the multi-gate Mixture-of-Experts of Ma et al., KDD 2018.

Which task a token is of is in `TokenInfo.task`; a batch may hold tokens of several.

Shape legend: T tokens, D model width, E experts, K experts per token, N tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ray_moe.ops.gates.base import Routing, TokenInfo, known, wide
from ray_moe.ops.gates.linear import LinearGate, check, check_top_k, normalized


@dataclass(frozen=True, slots=True)
class MultiTaskSettings:
    """The most probable experts of each token, as the gate of its task has it."""

    num_tasks: int
    """N."""
    top_k: int | None = None
    """K; None is all experts, as in the paper."""
    upcast: bool = True
    """Whether logits are computed in float32 where hidden states and weights are narrower."""

    def __post_init__(self) -> None:
        check(
            self,
            (self.num_tasks >= 1, "num_tasks is 1 or more"),
            (self.top_k is None or self.top_k >= 1, "top_k is 1 or more, or None"),
        )

    def build(self, hidden_size: int, num_experts: int) -> MultiTaskGate:
        if self.top_k is not None:
            check_top_k(self.top_k, num_experts)
        return MultiTaskGate(hidden_size, num_experts, self, weight=self.num_tasks * num_experts)


class MultiTaskGate(LinearGate):
    """See `MultiTaskSettings`. Its weight is [N * E, D], a task's rows together."""

    def forward(self, hidden: torch.Tensor, info: TokenInfo | None = None) -> Routing:
        """[T, D] -> the routing; a token's weights sum to 1.

        Raises: `InvalidRequest` without the tokens' tasks, or where one of them is not in 0..N-1.
        """
        task = known(info, "task", self.settings.num_tasks)
        every = self.logits(hidden).unflatten(-1, (self.settings.num_tasks, self.num_experts))
        logits = every.take_along_dim(task.view(-1, 1, 1), dim=1).squeeze(1)
        weight, index = wide(logits).softmax(-1).topk(self.settings.top_k or self.num_experts, dim=-1)
        return Routing(index, normalized(weight), logits)
