"""Which parts of a stretch of memory are free: first fit from low addresses, neighbours joined when freed.

Low addresses first, so that the pages that are ever touched stay few. Pure bookkeeping: the arenas of
`transport/shared_memory.py` and `transport/device_memory.py` are the memory.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable


class FreeList:
    """The free parts of ``[0, size)``. Not thread-safe."""

    def __init__(self, size: int) -> None:
        self.size = size
        # Disjoint, ascending, never touching: the i-th free part is [starts[i], ends[i]).
        self._starts = [0]
        self._ends = [size]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is allocated."""
        return self._starts == [0] and self._ends == [self.size]

    def allocate(self, length: int) -> int | None:
        """Start of a free part of `length` > 0, now taken; None when there is none."""
        for i, start in enumerate(self._starts):
            end = start + length
            if end < self._ends[i]:
                self._starts[i] = end
                return start
            if end == self._ends[i]:
                del self._starts[i], self._ends[i]
                return start
        return None

    def free(self, start: int, length: int) -> None:
        """Give back exactly what `allocate` returned."""
        end = start + length
        i = bisect_left(self._starts, start)
        joins_left = i > 0 and self._ends[i - 1] == start
        joins_right = i < len(self._starts) and self._starts[i] == end
        if joins_left and joins_right:
            self._ends[i - 1] = self._ends[i]
            del self._starts[i], self._ends[i]
        elif joins_left:
            self._ends[i - 1] = end
        elif joins_right:
            self._starts[i] = start
        else:
            self._starts.insert(i, start)
            self._ends.insert(i, end)


class Ledger:
    """The same for many threads, and for the garbage collector among them."""

    def __init__(self, size: int, on_empty: Callable[[int], None] = lambda peak: None) -> None:
        """`on_empty` is told when all is free again, and up to where it was taken since; it must not come back here."""
        self._free = FreeList(size)
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()
        self._on_empty = on_empty
        self._peak = 0

    @property
    def is_empty(self) -> bool:
        with self._lock:
            self._collect()
            return self._free.is_empty

    def allocate(self, length: int) -> int | None:
        """Start of a free part of `length` > 0, now taken; None when there is none."""
        with self._lock:
            self._collect()
            start = self._free.allocate(length)
            if start is not None:
                self._peak = max(self._peak, start + length)
            return start

    def give_back(self, start: int, length: int) -> None:
        """What `allocate` returned is free. Also called by the garbage collector, in any thread at any point, even in
        the middle of `allocate`: so it must not wait for the lock."""
        self._returned.append((start, length))
        if self._lock.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        while self._returned:
            self._free.free(*self._returned.popleft())
        if self._peak and self._free.is_empty:
            self._on_empty(self._peak)
            self._peak = 0
