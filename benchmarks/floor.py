"""The least that something can cost on this machine, beside which the benchmarks put what it does cost.

`Ping` is the least for a round trip between two processes: shared memory and an eventfd. `Rates` are the machine's
best: how fast it copies, reads weights, and multiplies matrices. `Work` is what must be moved, read and computed; at
those rates it takes its floor. Used by the benchmarks and their pages.

Shape legend: T tokens, D model width, F expert width, K experts per token.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FLOAT_BYTES = 4
BEYOND_CACHES = 1_200_000_000
"""Bytes that no cache holds."""
ROWS = 2048
"""Of the matrix product that is timed."""


class Ping:
    """A second process that negates what lies in shared memory when it is rung for.

    Make it before anything starts threads (it forks), and `close` it. On one core the two processes share its caches
    and a wake-up is a context switch; on two cores, as a router and an actor are, it is what a hop between them costs.
    """

    def __init__(self, max_bytes: int) -> None:
        self._memory = mmap.mmap(-1, 2 * max_bytes)
        self._there, self._back = os.eventfd(0), os.eventfd(0)
        self._request = np.frombuffer(self._memory, np.float32, max_bytes // 4)
        self._reply = np.frombuffer(self._memory, np.float32, max_bytes // 4, max_bytes)
        self._pid = os.fork()
        if self._pid == 0:
            while True:
                count = os.eventfd_read(self._there)
                np.negative(self._request[:count], out=self._reply[:count])
                os.eventfd_write(self._back, 1)

    def round_trip(self, rows: np.ndarray) -> Callable[[], np.ndarray]:
        """What to time: copy `rows` [n, D] float32 in, ring, wait, copy the reply out."""
        flat, out = rows.reshape(-1), np.empty(rows.size, np.float32)

        def go() -> np.ndarray:
            self._request[: flat.size] = flat
            os.eventfd_write(self._there, flat.size)
            os.eventfd_read(self._back)
            out[:] = self._reply[: flat.size]
            return out

        return go

    def on_cores(self, num_cores: int) -> None:
        """Pin this process and the other one to the same core (1) or to one each (2); 0 lets both go anywhere."""
        everywhere = set(range(os.cpu_count() or 1))
        here, there = {0: (everywhere, everywhere), 1: ({0}, {0}), 2: ({0}, {max(everywhere)})}[num_cores]
        os.sched_setaffinity(0, here)
        os.sched_setaffinity(self._pid, there)

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does at best, with as many threads as it was measured with."""

    copy_bytes_per_s: float
    """Bytes that are copied, each read and written once."""
    read_bytes_per_s: float
    """Bytes of weights, read for one row."""
    flops_per_s: float
    """Of products of large matrices, float32."""

    def best(self, other: Rates) -> Rates:
        """Of two measurements: others may have been at work during one of them."""
        return Rates(
            max(self.copy_bytes_per_s, other.copy_bytes_per_s),
            max(self.read_bytes_per_s, other.read_bytes_per_s),
            max(self.flops_per_s, other.flops_per_s),
        )


@dataclass(frozen=True, slots=True)
class Work:
    """What cannot be left out."""

    moved_bytes: float
    """That are copied from one process to another."""
    read_bytes: float
    """Of weights."""
    flops: float

    def least_s(self, rates: Rates) -> float:
        """Weights are read while matrices are multiplied; a copy takes the same cores as they do."""
        computing_s = max(self.read_bytes / rates.read_bytes_per_s, self.flops / rates.flops_per_s)
        return computing_s + self.moved_bytes / rates.copy_bytes_per_s


def layer_work(tokens: int, width: int, inner: int, top_k: int, touched: int, *, gated: bool, train: bool) -> Work:
    """Of the experts of one MoE layer that are in another process; `train` is forward and backward.

    Rows go there and come back once for each token, whatever hosts they go to; backward moves as much again. It reads
    the weights a second time and writes as many gradients, and multiplies twice as much.
    """
    matrices = 3 if gated else 2
    times = 3 if train else 1
    return Work(
        moved_bytes=2 * tokens * width * FLOAT_BYTES * (2 if train else 1),
        read_bytes=touched * matrices * width * inner * FLOAT_BYTES * times,
        flops=2 * tokens * top_k * matrices * width * inner * times,
    )


def measure_rates(width: int, inner: int, clock: Callable[[], float] = time.perf_counter, repeats: int = 9) -> Rates:
    """Through matrices [F, D], with the threads that torch has; `clock` may be that of the process."""
    import torch

    weights = [torch.randn(inner, width) for _ in range(max(BEYOND_CACHES // (FLOAT_BYTES * width * inner), 1))]
    row, rows = torch.randn(1, width), torch.randn(ROWS, width)
    half = len(weights) // 2 or 1
    targets = [torch.empty_like(weight) for weight in weights[:half]]

    def through(tokens: Any, matrices: Sequence[Any]) -> Callable[[], None]:
        def run() -> None:
            for matrix in matrices:
                torch.nn.functional.linear(tokens, matrix)

        return run

    def copy() -> None:
        for target, weight in zip(targets, weights, strict=False):
            target.copy_(weight)

    num_bytes = FLOAT_BYTES * width * inner
    with torch.inference_mode():
        return Rates(
            copy_bytes_per_s=num_bytes * half / _least_s(copy, clock, repeats),
            read_bytes_per_s=num_bytes * len(weights) / _least_s(through(row, weights), clock, repeats),
            flops_per_s=2 * ROWS * width * inner / _least_s(through(rows, weights[:1]), clock, repeats),
        )


def _least_s(run: Callable[[], object], clock: Callable[[], float], repeats: int) -> float:
    taken_s = []
    for _ in range(repeats):
        began_s = clock()
        run()
        taken_s.append(clock() - began_s)
    return min(taken_s)
