"""The arena's bookkeeping: nothing overlaps, everything comes back, low addresses first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ray_moe.transport.free_list import FreeList

SIZE = 1000


@given(st.lists(st.integers(1, 400) | st.integers(-20, -1), max_size=60))
def test_parts_never_overlap_and_join_again(steps: list[int]) -> None:
    """A positive step allocates that much; a negative one frees one of those taken."""
    free = FreeList(SIZE)
    taken: list[tuple[int, int]] = []
    owner = [0] * SIZE
    for step in steps:
        if step > 0:
            # First fit: the lowest run of free bytes that is long enough.
            expected = next((at for at in range(SIZE - step + 1) if not any(owner[at : at + step])), None)
            start = free.allocate(step)
            assert start == expected
            if start is not None:
                owner[start : start + step] = [1] * step
                taken.append((start, step))
        elif taken:
            start, length = taken.pop(step % len(taken))
            owner[start : start + length] = [0] * length
            free.free(start, length)
        assert free.is_empty == (not taken)
    for start, length in taken:
        free.free(start, length)
    assert free.is_empty
    assert free.allocate(SIZE) == 0
    assert free.allocate(1) is None
