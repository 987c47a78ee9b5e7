"""How fast and how busy a host is, from the batches it computes.

Pure: times are given. Called by `runtime/host_loop.py`; read by the actor around it.
"""

from __future__ import annotations

import math

MEMORY_S = 5.0
"""Time constant of both means: what was five seconds ago counts a third."""

LEAST_FLOPS = 2_000_000
"""Smaller batches say more about the way to the processor than about its speed."""


class Meter:
    """Exponentially weighted speed and busy time of one host."""

    def __init__(self) -> None:
        self._flops = 0.0
        self._seconds = 0.0
        """Both fade alike, so that their ratio is the mean speed over time and not over batches."""
        self._busy = 0.0
        self._at_s = -math.inf

    def add(self, flops: float, begin_s: float, end_s: float) -> None:
        """A batch of `flops` was computed from `begin_s` to `end_s`, by one clock that goes on."""
        seconds = max(end_s - begin_s, 0.0)
        self._busy = self.busy_fraction(end_s, begin_s)
        self._at_s = end_s
        if flops >= LEAST_FLOPS and seconds > 0.0:
            kept = math.exp(-seconds / MEMORY_S)
            self._flops = self._flops * kept + flops
            self._seconds = self._seconds * kept + seconds

    @property
    def flops_per_s(self) -> float:
        """Speed while computing, over the last seconds of computing; 0 while nothing large enough was computed."""
        return self._flops / self._seconds if self._seconds else 0.0

    def busy_fraction(self, now_s: float, busy_since_s: float | None = None) -> float:
        """Part of the last seconds that went into computing, a batch that runs since `busy_since_s` included."""
        busy = self._busy * math.exp(-max(now_s - self._at_s, 0.0) / MEMORY_S)
        if busy_since_s is not None:
            begin_s = max(busy_since_s, self._at_s)
            busy += 1.0 - math.exp(-max(now_s - begin_s, 0.0) / MEMORY_S)
        return min(busy, 1.0)
