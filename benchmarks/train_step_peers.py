"""The layers that `benchmarks/train_step.py` compares: one process of a contestant.

`python benchmarks/train_step_peers.py KIND PROBLEM RANK RANKS THREADS`, with MASTER_ADDR and MASTER_PORT for several
ranks. Each has a part of the tokens and a part of the experts; the gate is everybody's.

Shape legend: T tokens of this rank, D model width, E experts, K experts per token, N = T*K slots.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.train_step_work import Layer, Problem, answer, take_stdout
from ray_moe.ops.dispatch import combine
from ray_moe.ops.experts import StackedExperts
from ray_moe.ops.gates.topk import TopKGate
from ray_moe.ops.layer import MoELayer
from ray_moe.ops.routed_experts import Experts
from ray_moe.transport.allocator import tune_malloc


class Local:
    """One process with all experts."""

    def __init__(self, problem: Problem) -> None:
        p = problem
        self.layer = MoELayer(p.width, p.inner, p.experts, p.top_k, gated=p.gated)
        stack = {f"experts.{name}": value for name, value in p.stack(range(p.experts)).items()}
        self.layer.load_state_dict({"gate.weight": p.gate(), **stack})

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(hidden)
        return out

    def gates(self) -> list[nn.Parameter]:
        return list(self.layer.gate.parameters())

    def experts(self) -> list[nn.Parameter]:
        return list(self.layer.experts.parameters())

    def reduce(self) -> None:
        """There is nobody else."""


class Distributed:
    """Ranks that have a gate in common."""

    gate: nn.Module

    def gates(self) -> list[nn.Parameter]:
        return list(self.gate.parameters())

    def reduce(self) -> None:
        for parameter in self.gates():
            dist.all_reduce(parameter.grad)


class AllToAll(Distributed):
    """Expert parallelism written plainly: rows go to their experts' ranks and come back, by `all_to_all_single`."""

    def __init__(self, problem: Problem, rank: int, num_ranks: int) -> None:
        p, self.num_ranks, self.mine = problem, num_ranks, problem.experts // num_ranks
        self.gate = TopKGate(p.width, p.experts, p.top_k)
        self.gate.load_state_dict({"weight": p.gate()})
        self.stack = Experts(p.width, p.inner, self.mine, gated=p.gated)
        self.stack.load_state_dict(p.stack(range(rank * self.mine, (rank + 1) * self.mine)))

    def experts(self) -> list[nn.Parameter]:
        return list(self.stack.parameters())

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        routing = self.gate(hidden)
        slots, top_k = routing.index.reshape(-1), routing.index.shape[1]
        order = slots.argsort(stable=True)
        counts_there = slots.bincount(minlength=self.num_ranks * self.mine)  # [E] rows that this rank has for each
        counts_here = torch.empty_like(counts_there)  # [ranks, E / ranks] rows that each rank has for these experts
        dist.all_to_all_single(counts_here, counts_there)
        rows = hidden.index_select(0, order // top_k)
        out = self._exchange(
            self._compute(self._exchange(rows, counts_there, counts_here), counts_here), counts_here, counts_there
        )
        return combine(torch.zeros_like(out).index_copy(0, order, out), routing.weight)

    def _exchange(self, rows: torch.Tensor, counts_out: torch.Tensor, counts_in: torch.Tensor) -> torch.Tensor:
        sizes_out, sizes_in = (counts.view(self.num_ranks, -1).sum(1).tolist() for counts in (counts_out, counts_in))
        received = rows.new_empty(sum(sizes_in), rows.shape[1])
        out: torch.Tensor = torch.distributed.nn.functional.all_to_all_single(
            received, rows.contiguous(), sizes_in, sizes_out
        )
        return out

    def _compute(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows that are grouped by rank, then by expert."""
        expert = torch.arange(self.mine).repeat(self.num_ranks).repeat_interleave(counts)
        order = expert.argsort(stable=True)
        per_expert = counts.view(self.num_ranks, -1).sum(0).tolist()
        touched = [number for number, count in enumerate(per_expert) if count]
        grouped = rows.index_select(0, order)
        out = StackedExperts(self.stack).run(grouped, touched, [per_expert[number] for number in touched])
        return torch.zeros_like(out).index_copy(0, order, out)


class DeepSpeed(Distributed):
    """`deepspeed.moe.layer.MoE`; with `dropping`, an expert takes no more rows than the mean."""

    def __init__(self, problem: Problem, rank: int, num_ranks: int, dropping: bool) -> None:
        from deepspeed.moe.layer import MoE

        p, mine = problem, problem.experts // num_ranks
        self.layer = MoE(
            p.width,
            DeepSpeedExpert(p),
            num_experts=p.experts,
            ep_size=num_ranks,
            k=p.top_k,
            capacity_factor=1.0,
            min_capacity=0,
            drop_tokens=dropping,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        self.layer.set_deepspeed_parallelism()
        moe: Any = self.layer.deepspeed_moe
        self.gate = moe.gate.wg
        with torch.no_grad():
            moe.gate.wg.weight.copy_(p.gate())
            for local, expert in enumerate(moe.experts.deepspeed_experts):
                up, down = p.expert(rank * mine + local)
                expert.up.weight.copy_(up)
                expert.down.weight.copy_(down)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(hidden)[0]
        return out

    def experts(self) -> list[nn.Parameter]:
        return list(self.layer.deepspeed_moe.experts.parameters())


class DeepSpeedExpert(nn.Module):
    """DeepSpeed copies it for each expert."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.gated = problem.gated
        self.up = nn.Linear(problem.width, problem.inner * (1 + problem.gated), bias=False)
        self.down = nn.Linear(problem.inner, problem.width, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return self.down(nn.functional.silu(self.up(rows)))  # type: ignore[no-any-return]
        gate, up = self.up(rows).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]


def make(kind: str, problem: Problem, rank: int, num_ranks: int) -> Layer:
    if kind == "local":
        return Local(problem)
    if kind == "all_to_all":
        dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
        return AllToAll(problem, rank, num_ranks)
    import deepspeed

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    return DeepSpeed(problem, rank, num_ranks, dropping=kind == "deepspeed_dropping")


def main(kind: str, problem: str, *numbers: str) -> None:
    rank, num_ranks, threads = map(int, numbers)
    answers = take_stdout()
    torch.set_num_threads(threads)
    tune_malloc()  # everybody keeps freed memory: it is worth more than what is compared
    layer = make(kind, Problem(**json.loads(problem)), rank, num_ranks)
    barrier: Any = dist.barrier if num_ranks > 1 else lambda: None
    answer(layer, Problem(**json.loads(problem)), rank, num_ranks, barrier, answers)
    if num_ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
