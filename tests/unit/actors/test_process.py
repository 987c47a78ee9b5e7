"""What is made at a start is never looked through for garbage."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from ray_moe.actors.process import made_to_stay


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def is_looked_through(made: object) -> bool:
    return any(each is made for each in gc.get_objects())


def test_nothing_is_collected_meanwhile_and_what_is_there_stays() -> None:
    with made_to_stay():
        made: list[object] = [[]]
        assert not gc.isenabled()
        assert is_looked_through(made)
    later: list[object] = [[]]
    assert gc.isenabled()
    assert not is_looked_through(made)
    assert is_looked_through(later)


def test_garbage_of_a_start_goes() -> None:
    class Node:
        other: object

    with made_to_stay():
        first, second = Node(), Node()
        first.other, second.other = second, first
        gone = weakref.ref(first)
        del first, second
        assert gone() is not None
    assert gone() is None


def test_a_start_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(OSError, match="no such"), made_to_stay():
        raise OSError("no such file")
    assert gc.isenabled()
