"""The work of `benchmarks/train_step.py`: one MoE layer, its weights and batches, and how a process is asked to train.

Each process of a contestant gets requests as lines of JSON on its standard input, does steps together with the others,
and answers a line each: `answer` is that loop. Needs torch and `ray_moe.ops` only, so that it runs in any environment.

Shape legend: T tokens, D model width, F expert width, E experts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TextIO

import torch


@dataclass(frozen=True, slots=True)
class Problem:
    """The layer. Everybody makes the same weights and batches from it."""

    width: int = 1024
    """D."""
    inner: int = 4096
    """F."""
    experts: int = 8
    """E."""
    top_k: int = 2
    gated: bool = False
    """SwiGLU instead of a plain FFN (up, SiLU, down)."""

    def gate(self) -> torch.Tensor:
        """[E, D]."""
        gate: torch.Tensor = torch.randn(self.experts, self.width, generator=_seeded(10**6)) * self.width**-0.5
        return gate

    def expert(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Up, [F, D] (or gate and up, [2F, D]), and down, [D, F], of one expert."""
        rows, seed = self.inner * (1 + self.gated), _seeded(number)
        up = torch.randn(rows, self.width, generator=seed) * self.width**-0.5
        return up, torch.randn(self.width, self.inner, generator=seed) * self.inner**-0.5

    def stack(self, numbers: range) -> dict[str, torch.Tensor]:
        """The weights of some experts, named as in `transformers`' experts interface."""
        ups, downs = zip(*(self.expert(number) for number in numbers), strict=True)
        return {"gate_up_proj" if self.gated else "up_proj": torch.stack(ups), "down_proj": torch.stack(downs)}

    def batch(self, tokens: int, rank: int, num_ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of T tokens and of the gradient of what becomes of them, [T / ranks, D] each."""
        both = torch.randn(2, tokens, self.width, generator=_seeded(10**7 + tokens))
        return both[0].chunk(num_ranks)[rank].clone(), both[1].chunk(num_ranks)[rank].clone()

    def touched(self, tokens: int) -> int:
        """Experts that a batch of T tokens goes to."""
        hidden, _ = self.batch(tokens, 0, 1)
        return len((hidden @ self.gate().T).topk(self.top_k).indices.unique())


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Layer(Protocol):
    """What a rank of a contestant trains."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T / ranks, D] -> the same."""
        ...

    def gates(self) -> list[torch.nn.Parameter]:
        """What every rank has a copy of."""
        ...

    def experts(self) -> list[torch.nn.Parameter]:
        """What only this rank has."""
        ...

    def reduce(self) -> None:
        """Sum the gradients of the gate over the ranks."""
        ...


def take_stdout() -> TextIO:
    """Where `answer` writes; what libraries print goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def answer(
    layer: Layer, problem: Problem, rank: int, num_ranks: int, barrier: Callable[[], object], answers: TextIO
) -> None:
    """Do what standard input asks for, until it ends.

    A request is ``{"tokens": T, "steps": n}``. The answer has, for each step after one that warms up, the seconds of
    forward and backward (`train_s`) and of the optimizer (`update_s`), and sums by which contestants are compared
    (`sums`): this rank's part of each.
    """
    answers.write('{"ready": true}\n')
    for line in sys.stdin:
        request = json.loads(line)
        hidden, grad = problem.batch(request["tokens"], rank, num_ranks)
        train_s, update_s, sums = [], [], {}
        parameters = [*layer.gates(), *layer.experts()]
        # Without a learning rate it costs the same, and every step can be compared with the first.
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
        for _ in range(request["steps"] + 1):
            optimizer.zero_grad()
            tokens = hidden.clone().requires_grad_()
            barrier()
            begin = time.perf_counter()
            out = layer(tokens)
            out.backward(grad)
            layer.reduce()
            middle = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            train_s.append(middle - begin)
            update_s.append(end - middle)
            sums = {
                "output": float((out.detach() * grad).sum()),
                "hidden": _square(tokens),
                "gate": sum(map(_square, layer.gates())) / num_ranks,
                "experts": sum(map(_square, layer.experts())),
            }
        answers.write(json.dumps({"train_s": train_s[1:], "update_s": update_s[1:], "sums": sums}) + "\n")


def _square(parameter: torch.Tensor) -> float:
    return 0.0 if parameter.grad is None else float(parameter.grad.double().square().sum())
