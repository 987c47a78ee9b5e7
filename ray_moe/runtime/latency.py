"""How long a host's answers have taken, and by when the next one should be there.

Pure: fed with observations, reads no clock. `runtime/lines.py` adds every answer, which is on the hot path and only
notes it; what the answers amount to is worked out when somebody wonders, which is when one is late.
"""

from __future__ import annotations

import math
import threading
from collections import deque

WEIGHT = 0.1
"""Share of the newest answer in the means: they follow the last ten or twenty answers."""

MOST_NOTED = 64
"""Answers that are noted; older ones would count less than a thousandth."""

FEWEST = 5
"""Answers before the history is worth asking."""

NARROW = 1e-3
"""Below this spread of the rows (variance over squared mean) nothing can be said of the time for one row."""


class LatencyHistory:
    """Exponentially weighted line through (rows, seconds), and how far answers lie from it.

    "Rows" are those that the host had to compute for the answer: the call's own and what was sent before it, so that
    waiting behind one's own calls is not taken for slowness.
    """

    def __init__(self) -> None:
        self._noted: deque[tuple[float, float]] = deque(maxlen=MOST_NOTED)
        self._lock = threading.Lock()
        self._count = 0
        self._mean_rows = 0.0
        self._mean_s = 0.0
        self._variance = 0.0
        """Of the rows."""
        self._rows_s = 0.0
        """Covariance of rows and seconds."""
        self._row_s = 0.0
        """Seconds for one row more: the slope of the line."""
        self._deviation_s = 0.0
        """Mean absolute distance of the answers from what was expected of them."""
        self._most_rows = 0.0

    def add(self, rows: float, seconds: float) -> None:
        """An answer came `seconds` after its call, with `rows` for the host to compute in that time."""
        self._noted.append((rows, seconds))

    def _fold(self, rows: float, seconds: float) -> None:
        self._count += 1
        # The first answers are averaged evenly: no start value lingers.
        weight = max(WEIGHT, 1.0 / self._count)
        off_rows, off_s = rows - self._mean_rows, seconds - self._mean_s
        if self._count > 1:
            distance_s = abs(off_s - self._row_s * off_rows)
            self._deviation_s += max(WEIGHT, 1.0 / (self._count - 1)) * (distance_s - self._deviation_s)
        self._mean_rows += weight * off_rows
        self._mean_s += weight * off_s
        self._variance = (1.0 - weight) * (self._variance + weight * off_rows * off_rows)
        self._rows_s = (1.0 - weight) * (self._rows_s + weight * off_rows * off_s)
        wide = self._variance > NARROW * self._mean_rows * self._mean_rows
        self._row_s = max(0.0, self._rows_s / self._variance) if wide else 0.0
        self._most_rows = max(rows, self._mean_rows + 0.99 * (self._most_rows - self._mean_rows))

    def expected_s(self, rows: float) -> float:
        """Seconds within which an answer of `rows` has come as a rule; infinite while nothing is known.

        Beyond the rows that were seen the time grows in proportion, the worst that a host can do: a first long prompt
        after many single tokens is not late because its like has never been seen.
        """
        with self._lock:
            while self._noted:
                self._fold(*self._noted.popleft())
            return self._at(rows)

    def _at(self, rows: float) -> float:
        if self._count < FEWEST:
            return math.inf
        seen = min(rows, self._most_rows)
        line_s = self._mean_s + self._row_s * (seen - self._mean_rows)
        # A line through scattered answers may start below nothing.
        usual_s = max(line_s, self._mean_s * min(1.0, seen / self._mean_rows)) if self._mean_rows else self._mean_s
        return (usual_s + 2.0 * self._deviation_s) * max(1.0, rows / max(self._most_rows, 1.0))
