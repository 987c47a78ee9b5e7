"""The least that a round trip between two processes of one machine can cost: shared memory and an eventfd.

Used by the benchmarks as the unit in which transports are measured.
"""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable

import numpy as np


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
