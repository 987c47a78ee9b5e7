"""Lines between two processes, by each of the ways: what goes in comes out."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import pytest
import torch

from ray_moe import errors
from ray_moe.errors import ExpertFailed, HostLost, WireError
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.transport.connection import StreamConnection
from ray_moe.transport.settings import TransportSettings
from ray_moe.transport.stream_transport import StreamTransport
from tests.unit.transport.host_process import negated
from tests.unit.transport.hosts import NODE, TOKEN, HostProcess, ask, call, rows_of

Connect = Callable[..., StreamConnection]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]


def is_idle(connection: StreamConnection) -> bool:
    """Whether no shared memory is lent to any call."""
    return connection._arena is None or connection._arena.is_empty


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 8, 5000])
def test_rows_come_back(connection: StreamConnection, num_tokens: int, dtype: torch.dtype) -> None:
    hidden = torch.randn(num_tokens, 64).to(dtype)
    rows = ask(connection, "echo", hidden)
    assert rows.dtype is dtype
    assert torch.equal(rows, -hidden)
    assert is_idle(connection)


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_eight_bit_rows_come_back(connection: StreamConnection, dtype: torch.dtype) -> None:
    hidden = torch.randn(300, 64).to(dtype)
    rows = ask(connection, "copy", hidden)
    assert rows.dtype is dtype
    assert torch.equal(rows.view(torch.uint8), hidden.view(torch.uint8))


@pytest.mark.parametrize("num_tokens", [3, 500])
@pytest.mark.parametrize("combine", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_every_part_of_a_call_arrives(
    connection: StreamConnection, num_tokens: int, combine: bool, backward: bool
) -> None:
    num_rows = 2 * num_tokens
    sent = call(
        "echo",
        torch.randn(2 * num_tokens, 48),
        gather=torch.randint(0, 2 * num_tokens, (num_tokens,)),
        token=torch.randint(0, num_tokens, (num_rows,), dtype=torch.int32),
        weight=torch.rand(num_rows) if combine else None,
        grad=torch.randn(num_rows, 48) if backward else None,
    )
    rows = rows_of(connection.submit(sent).result(30))
    expected = negated(sent)
    assert len(rows) == (num_tokens if combine or backward else num_rows)
    assert torch.equal(rows, expected)

    sent.layer, sent.epoch, sent.experts, sent.counts, sent.call_id = "fields", 7, [3, 9], [num_rows - 1, 1], "abc"
    if not (combine or backward):
        sent.token, sent.gather, sent.counts = None, torch.tensor([0]), [1, 0]
        assert ask_fields(connection, sent) == [7, 2, 3]


def ask_fields(connection: StreamConnection, sent: ExpertCall) -> list[int]:
    numbers: list[int] = rows_of(connection.submit(sent).result(30))[0].int().tolist()
    return numbers


def test_what_is_sent_needs_no_special_memory(connection: StreamConnection) -> None:
    for hidden in (torch.randn(64, 300).t(), torch.randn(300, 128)[:, ::2], torch.randn(300, 64, requires_grad=True)):
        assert torch.equal(ask(connection, "echo", hidden), -hidden.detach())
        assert torch.equal(
            ask(connection, "echo", hidden, gather=torch.tensor([5, 5, 299])), -hidden.detach()[[5, 5, 299]]
        )


def test_a_reply_may_be_wider_or_of_another_dtype_than_was_foreseen(connection: StreamConnection) -> None:
    hidden = torch.randn(300, 64)
    assert torch.equal(ask(connection, "wide", hidden), hidden.repeat(1, 2))
    assert is_idle(connection)


def test_hundred_megabytes(connection: StreamConnection) -> None:
    hidden = torch.randn(25_000, 1024)
    small = connection.submit(call("sleep:0", torch.ones(1, 4)))
    large = connection.submit(call("echo", hidden))
    after = connection.submit(call("echo", torch.ones(1, 4)))
    assert torch.equal(rows_of(large.result(60)), -hidden)
    assert torch.equal(rows_of(small.result(60)), rows_of(after.result(60)))


def test_replies_come_in_the_order_in_which_they_are_ready(connection: StreamConnection) -> None:
    done: list[str] = []
    futures = []
    for name in ("sleep:0.4", "sleep:0.2", "echo"):
        future = connection.submit(call(name, torch.randn(100, 64)))
        future.add_done_callback(lambda _, name=name: done.append(name))  # type: ignore[misc]
        futures.append(future)
    wait(futures, 30)
    assert done == ["echo", "sleep:0.2", "sleep:0.4"]


def test_many_calls_from_many_threads(connection: StreamConnection) -> None:
    wrong: list[int] = []

    def work(thread: int) -> None:
        sent = []
        for i in range(8):
            hidden = torch.full((1 + 150 * ((i + thread) % 5), 64), float(8 * thread + i))
            layer = ("echo", "sleep:0.01", "thread:0.01")[i % 3]
            sent.append((hidden, connection.submit(call(layer, hidden))))
        for hidden, future in sent:
            if not torch.equal(rows_of(future.result(30)), -hidden):
                wrong.append(thread)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert is_idle(connection)


async def test_coroutines_wait_for_calls(connection: StreamConnection) -> None:
    futures = [connection.submit(call("sleep:0.01", torch.full((50, 64), float(i)))) for i in range(5)]
    replies = await asyncio.gather(*[asyncio.wrap_future(future) for future in futures])
    assert [rows_of(reply)[0, 0].item() for reply in replies] == [0, -1, -2, -3, -4]


@pytest.mark.parametrize("num_tokens", [1, 300])
def test_errors_of_the_host(connection: StreamConnection, num_tokens: int) -> None:
    hidden = torch.randn(num_tokens, 64)
    for name in ("StaleRouting", "ExpertFailed", "WireError", "Unavailable", "Cancelled"):
        with pytest.raises(getattr(errors, name), match=r"^as asked for$"):
            ask(connection, f"raise:{name}", hidden)
    with pytest.raises(ExpertFailed, match="RuntimeError: as asked for"):
        ask(connection, "raise:something else", hidden)
    with pytest.raises(WireError, match=r"the host answered float32 .* rows \[\d+, D\] were asked for"):
        ask(connection, "short", torch.cat([hidden, hidden]))
    assert torch.equal(ask(connection, "echo", hidden), -hidden)
    assert is_idle(connection)


def test_a_call_that_cannot_be_sent_fails_alone(connection: StreamConnection) -> None:
    with pytest.raises(WireError, match="complex64 cannot be sent"):
        ask(connection, "echo", torch.zeros(2, 4, dtype=torch.complex64))
    with pytest.raises(WireError, match="complex64 cannot be sent"):
        ask(connection, "echo", torch.zeros(2000, 64, dtype=torch.complex64))
    assert is_idle(connection)


def test_the_host_refuses_a_call_that_contradicts_itself(connection: StreamConnection) -> None:
    hidden = torch.randn(300, 64)
    with pytest.raises(WireError, match="outside the 300"):
        ask(connection, "echo", hidden, token=torch.tensor([0, 300], dtype=torch.int32))
    assert is_idle(connection)
    assert torch.equal(ask(connection, "echo", hidden), -hidden)


def test_a_cancelled_call_gives_its_memory_back_once_it_is_answered(host: HostProcess, connect: Connect) -> None:
    connection = connect(host)
    hidden = torch.randn(2000, 64)
    slow = connection.submit(call("thread:0.3", hidden))
    assert slow.cancel()
    assert not is_idle(connection)  # the host still computes there
    assert torch.equal(ask(connection, "echo", hidden), -hidden)
    assert not is_idle(connection)
    assert torch.equal(ask(connection, "thread:0.5", hidden), -hidden)
    assert is_idle(connection)


def test_a_reply_that_nobody_takes_gives_its_memory_back(host: HostProcess, connect: Connect) -> None:
    connection = connect(host)
    answered = threading.Event()
    future: Future[ExpertReply] | None = connection.submit(call("echo", torch.randn(2000, 64)))
    assert future is not None
    future.add_done_callback(lambda _: answered.set())
    assert answered.wait(30)
    assert not is_idle(connection)
    future = None
    ask(connection, "echo", torch.zeros(1, 1))  # the reader has let go of it, too
    gc.collect()
    assert is_idle(connection)


def test_rows_in_use_are_not_written_over(host: HostProcess, connect: Connect) -> None:
    connection = connect(host)
    hidden = torch.randn(2000, 64)
    rows = connection.submit(call("echo", hidden)).result(30).rows  # never released
    gc.collect()
    for value in range(5):
        ask(connection, "echo", torch.full((2000, 64), float(value)))
    assert torch.equal(rows, -hidden)


def test_replies_take_what_is_in_flight_under_its_lock(host: HostProcess, connect: Connect) -> None:
    connection = connect(host)
    was_held = []

    class Watched(dict[int, Any]):
        def pop(self, *arguments: Any) -> Any:
            was_held.append(connection._lock.locked())
            return super().pop(*arguments)

    connection._in_flight = Watched()
    ask(connection, "echo", torch.ones(1, 64))
    assert was_held == [True]


def test_a_full_arena_sends_inline(host: HostProcess, connect: Connect) -> None:
    connection = connect(host, settings=TransportSettings(arena_bytes=1024 * 1024))
    assert connection.shares_memory
    hidden = [torch.full((1500, 64), float(i)) for i in range(6)]  # 384 kB each way: one fits
    futures = [connection.submit(call("sleep:0.1", tokens)) for tokens in hidden]
    for tokens, future in zip(hidden, futures, strict=True):
        assert torch.equal(rows_of(future.result(30)), -tokens)
    half = torch.randn(3000, 64)  # 768 kB each way
    slot = connection._take_slot(call("echo", half), 3000)
    assert slot is not None and slot.placement[1:] == (0, 768_000)
    slot.release()
    assert torch.equal(ask(connection, "echo", half), -half)
    large = torch.randn(10_000, 64)
    assert torch.equal(ask(connection, "echo", large), -large)
    assert is_idle(connection)


def test_small_requests_and_large_replies_share_what_is_large(host: HostProcess, connect: Connect) -> None:
    connection = connect(host)
    hidden = torch.randn(10, 64)
    token = torch.arange(10, dtype=torch.int32).repeat(100)
    assert torch.equal(ask(connection, "echo", hidden, token=token), -hidden.repeat(100, 1))
    hidden, weight = torch.randn(1000, 64), torch.rand(10)
    rows = ask(connection, "echo", hidden, gather=torch.arange(10), weight=weight)
    assert torch.equal(rows, -hidden[:10] * weight.unsqueeze(1))
    assert is_idle(connection)


def test_several_routers_do_not_see_each_other(host: HostProcess, connect: Connect) -> None:
    connections = [connect(host) for _ in range(3)]
    ones = [torch.full((2000, 64), float(i)) for i in range(3)]
    futures = [connection.submit(call("sleep:0.1", one)) for connection, one in zip(connections, ones, strict=True)]
    assert ask(connections[0], "arenas", torch.zeros(1, 1)).item() == 3
    connections[0].close()
    for one, future in list(zip(ones, futures, strict=True))[1:]:
        assert torch.equal(rows_of(future.result(30)), -one)
    with pytest.raises(HostLost):
        futures[0].result(0)


def test_closing_leaves_nothing(host: HostProcess, sockets: bool) -> None:
    before = set(threading.enumerate())
    transport = StreamTransport(TOKEN, node_id=NODE, sockets=sockets)
    connection, other = transport.connect(host.address), transport.connect(host.address)
    slow = connection.submit(call("sleep:5", torch.zeros(1, 1)))
    connection.close()
    with pytest.raises(HostLost, match="closed here"):
        slow.result(0)
    with pytest.raises(HostLost, match="closed here"):
        connection.submit(call("echo", torch.zeros(1, 1))).result(0)
    connection.close()
    assert ask(other, "arenas", torch.zeros(1, 1)).item() >= 1
    transport.close()
    transport.close()
    assert other.is_lost
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), thread


def test_a_connection_may_be_closed_from_a_callback(host: HostProcess, connect: Connect) -> None:
    connection = connect(host)
    future = connection.submit(call("echo", torch.zeros(1, 1)))
    closed = threading.Event()

    def close(_: Future[ExpertReply]) -> None:
        connection.close()
        closed.set()

    future.add_done_callback(close)
    assert closed.wait(10)
    assert connection.is_lost
