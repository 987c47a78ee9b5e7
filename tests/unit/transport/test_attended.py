"""Lines whose answers are taken in by who waits for them: nothing is lost, whoever reads."""

from __future__ import annotations

import select
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import pytest
import torch

from ray_moe.errors import HostLost
from ray_moe.transport.base import Attendable
from ray_moe.transport.connection import StreamConnection
from tests.unit.transport.hosts import HostProcess, ask, call, rows_of

Connect = Callable[..., StreamConnection]


@pytest.fixture
def line(host: HostProcess, connect: Connect, sockets: bool) -> StreamConnection:
    line = connect(host)
    assert isinstance(line, Attendable)
    assert (line.fileno() >= 0) is sockets
    return line


def attend(line: StreamConnection, future: Any, timeout_s: float = 30.0) -> None:
    """Take in what comes until `future` is done."""
    until_s = time.monotonic() + timeout_s
    while not future.done() and time.monotonic() < until_s:
        if line.fileno() < 0:
            wait([future], timeout_s)
            return
        select.select([line], [], [], 1.0)
        line.take_in()


def test_who_waits_reads_and_nobody_else(line: StreamConnection, sockets: bool) -> None:
    hidden = torch.randn(3, 8)
    for _ in range(20):
        future = line.submit(call("echo", hidden), is_attended=True)
        if sockets:  # it lies there until it is read here
            select.select([line], [], [], 30.0)
            time.sleep(0.005)
            assert not future.done()
        attend(line, future)
        assert torch.equal(rows_of(future.result(0)), -hidden)


def test_what_nobody_reads_is_seen_to_beside_what_is_attended(line: StreamConnection) -> None:
    hidden = torch.randn(3, 8)
    slow = line.submit(call("sleep:0.2", hidden))
    attended = line.submit(call("sleep:0.1", hidden), is_attended=True)
    assert torch.equal(rows_of(slow.result(30)), -hidden)  # nobody here reads
    assert torch.equal(rows_of(attended.result(30)), -hidden)  # who sees to the one sees to the other


def test_calls_that_are_left_are_answered(line: StreamConnection) -> None:
    hidden = torch.randn(3, 8)
    futures = [line.submit(call("sleep:0.1", hidden), is_attended=True) for _ in range(3)]
    line.leave()
    for future in futures:
        assert torch.equal(rows_of(future.result(30)), -hidden)
    assert torch.equal(ask(line, "echo", hidden), -hidden)


def test_several_threads_read_one_line(line: StreamConnection) -> None:
    problems: list[BaseException] = []

    def work(number: int) -> None:
        hidden = torch.full((3, 8), float(number))
        try:
            for turn in range(50):
                future = line.submit(call("echo", hidden + turn), is_attended=turn % 3 > 0)
                attend(line, future)
                assert torch.equal(rows_of(future.result(30)), -(hidden + turn))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not problems


@pytest.mark.parametrize("is_read", [True, False])
def test_the_end_of_the_host_is_seen_whether_it_is_read_or_not(connect: Connect, is_read: bool) -> None:
    mortal = HostProcess.start()
    try:
        line = connect(mortal)
        future = line.submit(call("sleep:60", torch.ones(1, 1)), is_attended=True)
        mortal.kill(signal.SIGKILL)
        if is_read:
            attend(line, future)
        with pytest.raises(HostLost):
            future.result(30)
        assert line.is_lost
        assert not line.take_in() or line.fileno() < 0
    finally:
        mortal.process.kill()
        mortal.process.communicate()
