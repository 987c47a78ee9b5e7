"""The work of `benchmarks/layer.py`: one MoE layer, gate and experts, and how a process is asked to run it.

Needs torch only, so that it runs in any environment.

Shape legend: T tokens, D model width.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.train_step_work import Problem

Run = Callable[[torch.Tensor], torch.Tensor]
"""The whole layer, [T, D] -> [T, D]."""


def answer(runs: Mapping[str, Run], problem: Problem, answers: TextIO) -> None:
    """Do what standard input asks for, until it ends.

    A request is ``{"way": name, "what": "forward" or "train", "tokens": T, "block_s": s}``; `train` is forward and
    backward. The answer has the seconds of each run within the block, of which there is one at least, and sums by which
    contestants are compared.

    Args:
        runs: the layer, by each of the process's ways to do it.
        answers: where to write.
    """
    answers.write('{"ready": true}\n')
    for line in sys.stdin:
        request = json.loads(line)
        run = runs[request["way"]]
        hidden, grad = problem.batch(request["tokens"], 0, 1)
        once = train if request["what"] == "train" else forward
        samples_s: list[float] = []
        until = time.perf_counter() + request["block_s"]
        while not samples_s or time.perf_counter() < until:
            begin = time.perf_counter()
            out, of_hidden = once(run, hidden, grad)
            samples_s.append(time.perf_counter() - begin)
        sums = {"output": float((out * grad).sum()), "hidden": float(of_hidden.double().square().sum())}
        answers.write(json.dumps({"s": statistics.median(samples_s), "runs": len(samples_s), "sums": sums}) + "\n")


@torch.no_grad()
def forward(run: Run, hidden: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out; there is no gradient."""
    return run(hidden), torch.zeros(())


def train(run: Run, hidden: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out, and the gradient of the hidden states. That of the weights accumulates, as in a micro-batch."""
    tokens = hidden.clone().requires_grad_()
    out = run(tokens)
    out.backward(grad)
    return out.detach(), torch.zeros(()) if tokens.grad is None else tokens.grad
