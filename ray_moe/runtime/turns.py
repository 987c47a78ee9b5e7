"""Two rows of one step take turns at the backbone: one computes while the other waits for its experts.

Without turns both would ask their experts at the same time, be answered together, and wait together again. Used by
`decoder_only.py`, which cuts a step in two, and by `engine.py`, which knows when experts are waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Turn:
    """At most one thread has it. Each of them takes it, and gives it away while it waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        """Of the lock: a thread."""

    def take(self) -> None:
        """Wait until it is this thread's; at once where it is already."""
        if self._owner != threading.get_ident():
            self._lock.acquire()
            self._owner = threading.get_ident()

    def give(self) -> None:
        """Let another thread have it; nothing happens where this one has not."""
        if self._owner == threading.get_ident():
            self._owner = None
            self._lock.release()


current: ContextVar[Turn | None] = ContextVar("turn", default=None)
"""What this thread's row takes before it computes; None where a step is one row."""


@contextmanager
def taking(turn: Turn) -> Iterator[None]:
    """Around the computing of one of the rows."""
    token = current.set(turn)
    turn.take()
    try:
        yield
    finally:
        turn.give()
        current.reset(token)
