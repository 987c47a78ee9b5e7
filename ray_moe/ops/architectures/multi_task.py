"""The multi-gate mixture of experts: experts that all tasks share, and a gate and a tower for each task.

Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", KDD 2018. There
every gate weighs all experts; with `top_k` each takes the most probable ones alone.

Shape legend: B examples, D width, E experts, N tasks, P pairs of an example and an expert that some task wants.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.ops.gates.base import Routing, TokenInfo
from ray_moe.ops.gates.multi_task import MultiTaskSettings
from ray_moe.ops.layer import MoELayer


class MMoE(nn.Module):
    """Experts, and for each task its mix of them and its tower.

    An expert computes an example once, however many tasks want it. `moe.routing` is that of the last call, of B * N
    tokens: an example's tasks are neighbours.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_size: int | None,
        num_experts: int,
        towers: Iterable[nn.Module],
        *,
        top_k: int | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            hidden_size: D.
            expert_size, num_experts: of the experts.
            towers: of each task, [B, D] -> whatever it predicts.
            top_k: experts of each task; None is all, as in the paper.
            options: of `MoELayer`, without `gate` and `capacity`.

        Raises: `InvalidConfig` as `MoELayer`, and for a capacity.
        """
        super().__init__()
        if options.get("capacity") is not None:
            raise InvalidConfig("an MMoE has no capacity: its experts compute an example once, whoever wants it")
        self.towers = nn.ModuleList(towers)
        gate = MultiTaskSettings(len(self.towers), top_k)
        self.moe = MoELayer(hidden_size, expert_size, num_experts, gate=gate, **options)

    def forward(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """[B, D] -> what each task's tower makes of its mix."""
        num_tasks = len(self.towers)
        task = torch.arange(num_tasks, device=hidden.device).repeat(len(hidden))
        routing = self.moe.route(hidden.repeat_interleave(num_tasks, 0), TokenInfo(task=task))
        mixed = self._mix(hidden, routing).unflatten(0, (-1, num_tasks))
        return [tower(mixed[:, number]) for number, tower in enumerate(self.towers)]

    def _mix(self, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        """[B, D] -> [B * N, D] by the routing of as many."""
        num_tasks = len(self.towers)
        weight = torch.zeros_like(routing.logits).scatter(1, routing.index, routing.weight.to(routing.logits))
        weight = weight.unflatten(0, (-1, num_tasks))  # [B, N, E]
        wanted = torch.zeros_like(routing.logits, dtype=torch.bool).scatter(1, routing.index, True)
        example, expert = wanted.unflatten(0, (-1, num_tasks)).any(1).nonzero(as_tuple=True)  # [P]
        rows = self.moe.experts(hidden[example], expert.unsqueeze(1), hidden.new_ones(len(example), 1))
        share = weight.transpose(1, 2)[example, expert]  # [P, N]
        terms = (share.unsqueeze(-1) * rows.unsqueeze(1)).to(hidden.dtype)  # [P, N, D]
        out = hidden.new_zeros(len(hidden), num_tasks, hidden.shape[-1]).index_add(0, example, terms)
        return out.flatten(0, 1)
