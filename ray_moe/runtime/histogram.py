"""A distribution as counts between bounds: it takes the same room whatever it has seen, and about a microsecond to add
to. Filled by `vitals.py`, read by `service/metrics.py`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Reading:
    """A histogram at one moment."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    """Values up to each bound and above the one before it; the last are above all bounds."""
    total: float
    """Sum of all values."""

    @property
    def cumulative(self) -> tuple[int, ...]:
        """Values up to each bound; the last are all."""
        return tuple(accumulate(self.counts))


class Histogram:
    """See the module. Thread-safe."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: ascending."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        bucket = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[bucket] += 1
            self._total += value

    def read(self) -> Reading:
        with self._lock:
            return Reading(self._bounds, tuple(self._counts), self._total)
