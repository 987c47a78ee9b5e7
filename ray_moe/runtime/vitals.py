"""How a router feels: requests that wait, tokens that pause, requests that failed. Thread-safe, and cheap per token.

Measured where clients would feel it, between two tokens of a running generation. Filled by `engine.py`; read by the
router for its reports, by the number of actors that are wanted, and by the report on a fault.
"""

from __future__ import annotations

import threading
import time
from collections import deque

WINDOW_S = 60.0
"""Pauses are remembered for so long."""


class Vitals:
    """Of one engine."""

    def __init__(self) -> None:
        self.num_failed = 0
        """Requests that ended with an error that was not the caller's."""
        self._lock = threading.Lock()
        self._waiting: dict[object, float] = {}
        self._num_open = 0
        self._idle_since_s = time.monotonic()
        self._pauses: deque[tuple[float, float]] = deque()  # (when it ended, how long), one for each second at the most

    # --- told by the engine ----------------------------------------------------------------------------------
    def opened(self, request: object, waits: bool = True) -> None:
        """A request has come; with `waits` it is in the queue until `begun`."""
        with self._lock:
            self._num_open += 1
            if waits:
                self._waiting[request] = time.monotonic()

    def begun(self, request: object) -> None:
        with self._lock:
            self._waiting.pop(request, None)

    def closed(self, request: object) -> None:
        with self._lock:
            self._waiting.pop(request, None)
            self._num_open -= 1
            self._idle_since_s = time.monotonic()

    def failed(self) -> None:
        with self._lock:
            self.num_failed += 1

    def paused(self, pause_s: float) -> None:
        """Two tokens of a generation came `pause_s` apart."""
        now_s = time.monotonic()
        with self._lock:
            if self._pauses and int(self._pauses[-1][0]) == int(now_s):
                pause_s = max(pause_s, self._pauses.pop()[1])
            self._pauses.append((now_s, pause_s))
            while self._pauses[0][0] < now_s - WINDOW_S:
                self._pauses.popleft()

    # --- asked -----------------------------------------------------------------------------------------------
    @property
    def queue_age_s(self) -> float:
        """How long the oldest request has waited that has not begun; 0 without any."""
        with self._lock:
            return time.monotonic() - min(self._waiting.values()) if self._waiting else 0.0

    @property
    def idle_s(self) -> float:
        """Time since there was a request; 0 while there is one."""
        with self._lock:
            return 0.0 if self._num_open else time.monotonic() - self._idle_since_s

    def longest_pause_s(self, since_s: float = float("-inf")) -> float:
        """Of the last `WINDOW_S`, and of those only pauses that ended after `since_s` (monotonic); 0 without any."""
        start_s = max(since_s, time.monotonic() - WINDOW_S)
        with self._lock:
            return max((pause_s for end_s, pause_s in self._pauses if end_s >= start_s), default=0.0)
