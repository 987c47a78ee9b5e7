"""What is particular to lines by Unix socket: bytes come in any pieces, nobody is waited for, and strangers go."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from ray_moe.errors import HostLost, RayMoEError, Unauthenticated, WireError
from ray_moe.transport import codec, frames
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.transport.connection import StreamConnection
from ray_moe.transport.hello import HELLO_ID, PROTOCOL_VERSION, Hello, write_hello
from ray_moe.transport.host_server import HostServer
from ray_moe.transport.settings import TransportSettings
from ray_moe.transport.stream_transport import StreamTransport
from ray_moe.types import HostAddress
from ray_moe.wire import tensors
from tests.unit.transport.hosts import NODE, TOKEN, HostProcess, ask, call, rows_of
from tests.unit.transport.strangers import SocketIntruder, framed, received

INLINE = TransportSettings(arena_bytes=0, chunk_bytes=10_000)
HELLO = framed(tensors.encode_header((False, False), ()), HELLO_ID)
GOOD_HELLO = framed(write_hello(Hello(TOKEN, PROTOCOL_VERSION, "", None, None)), HELLO_ID)

ANNOUNCED = struct.Struct("<QQQ")


def asking(layer: str, hidden: torch.Tensor) -> bytes:
    """A call as a message."""
    return b"".join(tensors.encode((codec.call_fields(call(layer, hidden)), None), (hidden, None, None, None))[0])


def answering(hidden: torch.Tensor) -> bytes:
    return b"".join(tensors.encode((codec.ROWS_FOLLOW,), (hidden,))[0])


# --- The router's end ----------------------------------------------------------------------------------------
class Slow:
    """A host that does what the test says, when it says so."""

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        name = f"ray-moe-slow-{uuid.uuid4().hex}"
        self._listener.bind("\0" + name)
        self._listener.listen()
        self.address = HostAddress("slow", "", NODE, os.getpid(), "", name)
        self.transport = StreamTransport(TOKEN, node_id=NODE, settings=INLINE)

    def connect(self) -> StreamConnection:
        """The router's end of a line whose other end is `line`, with what came there in `messages`."""
        made: list[StreamConnection] = []
        thread = threading.Thread(target=lambda: made.append(self.transport.connect(self.address)))
        thread.start()
        self.line, _ = self._listener.accept()
        self.line.settimeout(30)
        self.messages = received(self.line)
        assert next(self.messages)[0] == HELLO_ID
        self.line.sendall(HELLO)
        thread.join(10)
        return made[0]

    def close(self) -> None:
        self.transport.close()
        self._listener.close()
        self.line.close()


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow()
    yield slow
    slow.close()


def test_answers_are_understood_however_they_come(slow: Slow) -> None:
    connection = slow.connect()
    hidden = torch.randn(3, 64)
    futures = [connection.submit(call("any", hidden)) for _ in range(2)]
    ids = [next(slow.messages)[0] for _ in futures]
    (long, short), message = ids, answering(hidden)
    sent = list(frames.cut(long, [message], len(message), 300))
    sent.insert(1, framed(message, short))
    for byte in b"".join(sent):
        slow.line.sendall(bytes([byte]))
    for future in futures:
        assert torch.equal(rows_of(future.result(30)), hidden)


def test_a_host_that_does_not_read_keeps_nobody_and_mixes_nothing(slow: Slow) -> None:
    """Long calls and short ones from many threads, far more than the socket takes."""
    connection = slow.connect()
    before = set(threading.enumerate())
    sizes = [1, 30, 200, 40_000]  # in one piece, about a frame, in pieces, far longer than the socket's buffer

    def work(number: int) -> None:
        for i in range(8):
            connection.submit(call(f"{number}", torch.full((sizes[(i + number) % 4], 64), float(number))))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    came = {}
    for _ in range(48):
        message_id, message = next(slow.messages)
        (fields, _), specs, region = tensors.decode(message)
        (hidden, *_) = tensors.tensors_in(region, specs)
        assert hidden is not None
        came[message_id] = hidden.unique().tolist() == [float(fields[0])]
    assert sorted(came) == list(range(1, 49))
    assert all(came.values())
    for thread in set(threading.enumerate()) - before - set(threads):
        thread.join(10)  # what caught up is over, and the next call goes at once
    connection.submit(call("after", torch.ones(1, 4)))
    assert next(slow.messages)[0] == 49


def test_short_calls_pass_long_ones(slow: Slow) -> None:
    connection = slow.connect()
    connection.submit(call("long", torch.zeros(100_000, 64)))
    connection.submit(call("short", torch.zeros(1, 64)))
    assert [next(slow.messages)[0] for _ in range(2)] == [2, 1]


def test_closing_in_the_middle_of_a_call_leaves_nothing(slow: Slow) -> None:
    before = set(threading.enumerate())
    connection = slow.connect()
    futures = [connection.submit(call("any", torch.zeros(rows, 64))) for rows in (100_000, 1, 100)]
    connection.close()
    for future in futures:
        with pytest.raises(HostLost, match="closed here"):
            future.result(0)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), thread


def test_another_user_does_not_hear_the_token(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.geteuid()
    monkeypatch.setattr("ray_moe.transport.sockets.os.geteuid", lambda: uid + 1)
    monkeypatch.setattr("ray_moe.transport.sockets.ROOT", uid + 2)
    with pytest.raises(HostLost, match=f"belongs to process {os.getpid()} of user {uid}"):
        slow.transport.connect(slow.address)
    slow.line, _ = slow._listener.accept()
    assert slow.line.recv(1000) == b""


# --- The host's end ------------------------------------------------------------------------------------------
def test_calls_are_understood_however_they_come(host: HostProcess) -> None:
    intruder = SocketIntruder(host)
    hidden = torch.randn(3, 64)
    message = asking("echo", hidden)
    sent = framed(message, 1)
    for byte in GOOD_HELLO + sent:
        intruder._socket.sendall(bytes([byte]))
    assert next(intruder._messages)[0] == HELLO_ID
    message_id, answer = next(intruder._messages)
    _, specs, region = tensors.decode(answer)
    (rows,) = tensors.tensors_in(region, specs)
    assert message_id == 1
    assert rows is not None and torch.equal(rows, -hidden)
    intruder.close()


@pytest.mark.parametrize(
    ("hello", "error", "said"),
    [
        (bytes(100), WireError, "disagree about its length"),
        (framed(b"no message", HELLO_ID), WireError, "header of this message ends"),
        (framed(tensors.encode_header((TOKEN,), ()), HELLO_ID), WireError, "a router says hello first"),
        (framed(asking("echo", torch.ones(1, 4)), 1), WireError, "a router says hello first"),
        (ANNOUNCED.pack(HELLO_ID, 20_000, 20_000), WireError, "at most 16384 are taken"),
        (
            framed(write_hello(Hello("x", PROTOCOL_VERSION, "", None, None)), HELLO_ID),
            Unauthenticated,
            "not the token of this",
        ),
        (
            framed(write_hello(Hello(TOKEN, 1, "", None, None)), HELLO_ID),
            WireError,
            "and the router 1: run the same version",
        ),
        (framed(write_hello(Hello(TOKEN, PROTOCOL_VERSION, "other", None, None)), HELLO_ID), HostLost, "another life"),
    ],
)
def test_who_says_no_good_hello_is_told_so_and_goes_alone(
    host: HostProcess, hello: bytes, error: type[RayMoEError], said: str
) -> None:
    transport = StreamTransport(TOKEN, node_id=NODE)
    connection = transport.connect(host.address)
    stranger = SocketIntruder(host, hello)
    with pytest.raises(error, match=said):
        stranger.hear()
    with pytest.raises(StopIteration):
        next(stranger._messages)
    stranger.close()
    assert ask(connection, "echo", torch.ones(1, 1)).item() == -1
    transport.close()


@asynccontextmanager
async def listening(
    submit: Callable[[ExpertCall], Awaitable[ExpertReply]], **settings: Any
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A host in this process, and the bare other end of a line to it."""
    server = HostServer(submit, TOKEN, settings=TransportSettings(**settings))
    _, unix = await server.start()
    try:
        reader, writer = await dial(unix)
        try:
            yield reader, writer
        finally:
            writer.close()
    finally:
        await server.stop()


async def dial(unix: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.connect("\0" + unix)  # which uvloop cannot
    return await asyncio.open_unix_connection(sock=line)


async def negate(sent: ExpertCall) -> ExpertReply:
    return ExpertReply(-sent.hidden)


@pytest.mark.parametrize("begun", [b"", GOOD_HELLO[:30], ANNOUNCED.pack(HELLO_ID, 16_000, 16_000)])
async def test_who_says_no_hello_in_time_is_sent_away(begun: bytes) -> None:
    async with listening(negate, connect_timeout_s=0.2) as (reader, writer):
        writer.write(begun)
        assert await asyncio.wait_for(reader.read(), 30) == b""


async def test_another_user_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.geteuid()
    monkeypatch.setattr("ray_moe.transport.sockets.os.geteuid", lambda: uid + 1)
    monkeypatch.setattr("ray_moe.transport.sockets.ROOT", uid + 2)
    async with listening(negate) as (reader, writer):
        writer.write(GOOD_HELLO)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 30) == b""


async def test_of_a_router_that_takes_no_answers_no_more_calls_are_taken() -> None:
    taken = 0

    async def submit(sent: ExpertCall) -> ExpertReply:
        nonlocal taken
        taken += 1
        return ExpertReply(sent.hidden.repeat(1, 100))

    message = asking("any", torch.zeros(10, 64))
    async with listening(submit) as (reader, writer):
        writer.write(GOOD_HELLO)
        for message_id in range(1, 1001):  # they would be answered with 256 MB
            writer.write(framed(message, message_id))
            if message_id % 100 == 0:
                await asyncio.sleep(0)
        before = -1
        while taken != before:
            before = taken
            await asyncio.sleep(0.3)
        assert 64 <= taken < 500
        stream = frames.ByteStream(2**20)
        answered: list[int] = []
        while len(answered) < 1001:
            data = await asyncio.wait_for(reader.read(len(stream.space())), 30)
            stream.space()[: len(data)] = data
            answered += [message_id for message_id, _ in stream.received(len(data))]
        assert sorted(answered) == list(range(1001))


async def test_stopping_does_not_wait_for_a_router_that_takes_nothing() -> None:
    server = HostServer(negate, TOKEN)
    _, unix = await server.start()
    reader, writer = await dial(unix)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    message = asking("any", torch.zeros(1000, 64))
    writer.write(GOOD_HELLO)
    for number in range(1, 21):
        writer.write(framed(message, number))
        await asyncio.sleep(0)
    await asyncio.wait_for(server.stop(), 30)
    writer.close()
    assert reader.at_eof() is False


def test_silence_ends_no_line(host: HostProcess) -> None:
    """Not for many intervals, idle or waiting, while the host is there."""
    transport = StreamTransport(
        TOKEN, node_id=NODE, settings=TransportSettings(ping_interval_s=0.01, ping_timeout_s=0.01)
    )
    connection = transport.connect(host.address)
    time.sleep(0.1)
    assert ask(connection, "sleep:0.2", torch.ones(1, 1)).item() == -1
    assert ask(connection, "block:0.2", torch.ones(1, 1)).item() == -1
    assert not connection.is_lost
    transport.close()
