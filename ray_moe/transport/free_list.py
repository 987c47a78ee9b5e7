"""Which parts of a stretch of memory are free: first fit from low addresses, neighbours joined when freed.

Low addresses first, so that the pages that are ever touched stay few. Pure bookkeeping, not thread-safe; the arena of
`transport/shared_memory.py` is the memory and holds the lock.
"""

from __future__ import annotations

from bisect import bisect_left


class FreeList:
    """The free parts of ``[0, size)``."""

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
