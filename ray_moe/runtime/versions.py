"""Which version of the weights is computing: what the experts of a step are asked with.

A backbone's handler (`models/experts.py`) is told layer and tokens only, so the version of a step, or of a single
layer, is a context variable around it. Used by `engine.py` and `generation.py`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

current: ContextVar[int] = ContextVar("version", default=0)


@contextmanager
def computing(version: int) -> Iterator[None]:
    """While the block runs, experts are asked for in `version`."""
    token = current.set(version)
    try:
        yield
    finally:
        current.reset(token)


class Users:
    """Counts the requests of each version. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[int] = Counter()

    def enter(self, version: int) -> None:
        with self._lock:
            self._counts[version] += 1

    def leave(self, version: int) -> None:
        with self._lock:
            self._counts[version] -= 1

    @property
    def versions(self) -> frozenset[int]:
        """Those that have any."""
        with self._lock:
            return frozenset(version for version, count in self._counts.items() if count)
