"""Who waits for a batch's answers hears of them, however they come."""

import socket
import threading
import time
from queue import Empty
from types import SimpleNamespace

import pytest

from ray_moe.runtime.arrivals import Arrivals


class Line:
    """One end of a pair of sockets; each byte that comes is one answer."""

    def __init__(self, arrivals):
        self.here, self.there = socket.socketpair()
        self.arrivals = arrivals
        self.is_left = False

    def fileno(self):
        return self.here.fileno()

    def take_in(self):
        came = self.here.recv(100)
        for byte in came:
            self.arrivals.put(SimpleNamespace(number=byte))
        return bool(came)

    def leave(self):
        self.is_left = True


@pytest.fixture
def arrivals():
    return Arrivals()


@pytest.fixture
def line(arrivals):
    line = Line(arrivals)
    yield line
    line.here.close()
    line.there.close()


def test_answers_are_read_from_the_line(arrivals, line):
    assert arrivals.attend(line)
    line.there.send(b"\x01\x02")
    assert arrivals.get(10).number == 1
    assert not arrivals.empty()
    assert arrivals.get_nowait().number == 2
    threading.Timer(0.05, line.there.send, (b"\x03",)).start()
    assert arrivals.get(10).number == 3


@pytest.mark.parametrize("is_attended", [True, False])
def test_others_may_tell_while_it_waits(arrivals, line, is_attended):
    if is_attended:
        assert arrivals.attend(line)
    for number in range(20):
        threading.Timer(0.01, arrivals.put, (SimpleNamespace(number=number),)).start()
        began_s = time.monotonic()
        assert arrivals.get(10).number == number
        assert time.monotonic() - began_s < 5


@pytest.mark.parametrize("is_attended", [True, False])
@pytest.mark.parametrize("timeout_s", [-1.0, 0.0, 0.05])
def test_nothing_comes(arrivals, line, is_attended, timeout_s):
    if is_attended:
        arrivals.attend(line)
    began_s = time.monotonic()
    with pytest.raises(Empty):
        arrivals.get(timeout_s)
    assert time.monotonic() - began_s >= timeout_s - 0.01


def test_what_came_in_time_is_seen_though_the_time_is_over(arrivals, line):
    arrivals.attend(line)
    line.there.send(b"\x07")
    assert arrivals.get(0.0).number == 7


def test_a_line_that_ends_is_read_no_more(arrivals, line):
    arrivals.attend(line)
    line.there.close()
    with pytest.raises(Empty):
        arrivals.get(0.05)
    threading.Timer(0.02, arrivals.put, (SimpleNamespace(number=1),)).start()
    assert arrivals.get(10).number == 1


def test_lines_are_left(arrivals, line):
    arrivals.attend(line)
    arrivals.leave()
    assert line.is_left
    line.there.send(b"\x01")
    with pytest.raises(Empty):
        arrivals.get(0.02)
    assert arrivals.attend(line)
    assert arrivals.get(10).number == 1


def test_a_line_that_cannot_be_read_here(arrivals):
    assert not arrivals.attend(SimpleNamespace(fileno=lambda: -1))
