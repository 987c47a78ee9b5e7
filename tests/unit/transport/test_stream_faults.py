"""Lines to hosts when things go wrong: killed, stopped, hostile or unreachable peers."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_moe.errors import HostLost, InsufficientResources, Unauthenticated, WireError
from ray_moe.transport import codec, frames, hello
from ray_moe.transport.connection import StreamConnection
from ray_moe.transport.host_server import HostServer
from ray_moe.transport.settings import TransportSettings
from ray_moe.transport.stream_transport import StreamTransport
from ray_moe.types import HostAddress
from ray_moe.wire import tensors
from tests.unit.transport.hosts import NODE, TOKEN, HostProcess, ask, call, is_listening, python
from tests.unit.transport.strangers import (
    GrpcImpostor,
    GrpcIntruder,
    Impostor,
    Intruder,
    SocketImpostor,
    SocketIntruder,
    framed,
)

Connect = Callable[..., StreamConnection]
QUICK = TransportSettings(ping_interval_s=0.2, ping_timeout_s=0.4, connect_timeout_s=1.0)


@pytest.fixture(scope="module")
def spares() -> Iterator[list[HostProcess]]:
    """Hosts that die in these tests. They start together, since starting takes long."""
    hosts = [HostProcess.start(), HostProcess.start(QUICK)]
    yield hosts
    for host in hosts:
        host.process.kill()
        host.process.communicate()


def num_bytes(data: bytes) -> str:
    """Names a test after bytes that cannot be printed."""
    return f"{len(data)} bytes"


class Lost:
    """An `on_lost` hook that remembers."""

    def __init__(self) -> None:
        self.addresses: list[HostAddress] = []
        self.heard = threading.Event()

    def __call__(self, address: HostAddress) -> None:
        self.addresses.append(address)
        self.heard.set()


# --- Peers that die ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sockets", [True])  # and gRPC: it dies but once
def test_a_killed_host_fails_every_call_at_once(spares: list[HostProcess], connect: Connect) -> None:
    lost = Lost()
    connections = [
        connect(spares[0], on_lost=lost),
        connect(spares[0], on_lost=lost, sockets=False),
        connect(spares[0], on_lost=lost, settings=TransportSettings(arena_bytes=0)),
        connect(spares[0], on_lost=lost, node_id="another node"),
    ]
    futures = [
        connection.submit(call(layer, torch.randn(num_tokens, 64)))
        for connection in connections
        for layer in ("sleep:60", "thread:3")
        for num_tokens in (1, 5000)
    ]
    hidden = torch.randn(100_000, 256)
    futures += [connection.submit(call("echo", hidden)) for connection in connections[2:]]  # on their way when it dies
    ask(connections[0], "echo", torch.zeros(1, 1))
    killed_at = time.monotonic()
    spares[0].kill(signal.SIGKILL)
    done, _ = wait(futures, 10)
    assert time.monotonic() - killed_at < 1
    assert len(done) == 18
    for future in futures:
        assert isinstance(future.exception(), HostLost)
    assert lost.heard.wait(10)
    for connection in connections:
        with pytest.raises(HostLost):
            ask(connection, "echo", torch.zeros(1, 1))
        connection.close()
    assert lost.addresses == [spares[0].address] * 4
    spares[0].process.wait(10)
    assert not is_listening(spares[0].address)
    with pytest.raises(HostLost, match="cannot be reached"):
        connect(spares[0])


def test_a_stopped_host_is_lost_and_a_busy_one_is_not(spares: list[HostProcess], connect: Connect) -> None:
    lost = Lost()
    connection = connect(spares[1], settings=QUICK, on_lost=lost)
    # One that is only busy, not letting its event loop run, is not lost.
    hidden = torch.randn(300, 64)
    assert torch.equal(ask(connection, "block:1.0", hidden), -hidden)
    assert lost.addresses == []

    future = connection.submit(call("sleep:60", hidden))
    spares[1].kill(signal.SIGSTOP)
    with pytest.raises(HostLost):
        future.result(5)
    assert lost.heard.wait(10)
    with pytest.raises(HostLost, match=r"no answer within|ping timeout"):  # it listens, but it does not speak
        connect(spares[1], settings=QUICK)
    spares[1].kill(signal.SIGCONT)
    assert lost.addresses == [spares[1].address]


def test_a_killed_router_leaves_nothing(host: HostProcess, connect: Connect, tmp_path: Path) -> None:
    connection = connect(host)
    before = ask(connection, "arenas", torch.zeros(1, 1)).item()
    shared = set(os.listdir("/dev/shm"))
    router = python("router_process.py", TOKEN, json.dumps(asdict(host.address)), TMPDIR=str(tmp_path))
    assert router.stdout is not None
    assert router.stdout.readline() == "True 5000\n"
    assert ask(connection, "arenas", torch.zeros(1, 1)).item() == before + 1
    router.kill()
    router.communicate()
    deadline = time.monotonic() + 10
    while ask(connection, "arenas", torch.zeros(1, 1)).item() != before:  # a thread still computes on it for a second
        assert time.monotonic() < deadline
    assert {name for name in os.listdir("/dev/shm") if "ray-moe" in name} <= shared
    assert not list(tmp_path.iterdir())
    assert torch.equal(ask(connection, "echo", torch.ones(1, 1)), -torch.ones(1, 1))


# --- Peers that should not be connected ----------------------------------------------------------------------
def test_a_wrong_token_is_refused(host: HostProcess, sockets: bool) -> None:
    for token in ("another token", "", TOKEN + "x"):
        with pytest.raises(Unauthenticated, match="not the token of this host"):
            StreamTransport(token, node_id=NODE, sockets=sockets).connect(host.address)
    for token in ("two\nlines", "café"):
        with pytest.raises(Unauthenticated, match="cannot be sent"):
            StreamTransport(token, node_id=NODE, sockets=sockets).connect(host.address)


def test_another_version_is_refused(host: HostProcess, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    version = hello.PROTOCOL_VERSION
    monkeypatch.setattr(hello, "PROTOCOL_VERSION", 99)
    with pytest.raises(WireError, match=f"version {version} of the protocol and the router 99: run the same version"):
        connect(host)


def test_another_life_of_the_host_is_refused(host: HostProcess) -> None:
    transport = StreamTransport(TOKEN, node_id=NODE)
    with pytest.raises(HostLost) as caught:
        transport.connect(replace(host.address, incarnation="second life"))
    assert str(caught.value).count("another life of the host listens here") == 2  # at its socket, and by gRPC


def test_an_address_where_nobody_listens() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = HostAddress("e", "i", NODE, 0, f"127.0.0.1:{bound.getsockname()[1]}", "ray-moe-none")
        started = time.monotonic()
        with pytest.raises(HostLost, match=r"host e cannot be reached.*ray-moe-none.*refused.*127"):
            StreamTransport(TOKEN, node_id=NODE).connect(address)
        with pytest.raises(HostLost, match="it has no address"):
            StreamTransport(TOKEN).connect(replace(address, tcp=""))
        assert time.monotonic() - started < 5


def test_an_address_that_never_answers_takes_no_longer_than_allowed() -> None:
    with socket.socket() as silent, socket.socket(socket.AF_UNIX) as mute:
        silent.bind(("127.0.0.1", 0))
        mute.bind("\0ray-moe-mute")
        silent.listen()
        mute.listen()
        address = HostAddress("e", "i", NODE, 0, f"127.0.0.1:{silent.getsockname()[1]}", "ray-moe-mute")
        started = time.monotonic()
        with pytest.raises(HostLost, match=r"ray-moe-mute: no answer within 0.5 s; 127"):
            StreamTransport(TOKEN, node_id=NODE, settings=QUICK).connect(address)
        assert time.monotonic() - started < 3


@pytest.mark.parametrize("sockets", [True])
def test_grpc_is_taken_where_the_unix_socket_is_not_there(host: HostProcess, connect: Connect) -> None:
    elsewhere = HostProcess(host.process)
    elsewhere._address = replace(host.address, unix="ray-moe-in-another-container")
    connection = connect(elsewhere)
    assert connection.target == host.address.tcp
    assert connection.shares_memory
    hidden = torch.randn(5000, 64)
    assert torch.equal(ask(connection, "echo", hidden), -hidden)


def test_memory_that_the_host_cannot_map_is_not_used(
    host: HostProcess, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)  # as from another container
    connection = connect(host)
    assert not connection.shares_memory
    hidden = torch.randn(5000, 64)
    assert torch.equal(ask(connection, "echo", hidden), -hidden)


def test_without_memfd_everything_goes_inline(
    host: HostProcess, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    connection = connect(host)
    assert not connection.shares_memory
    hidden = torch.randn(5000, 64)
    assert torch.equal(ask(connection, "echo", hidden), -hidden)


async def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = HostServer(no_expert, TOKEN)
        with pytest.raises(InsufficientResources, match=f"cannot listen on 127.0.0.1:{port}"):
            await server.start(port=port)
        await server.stop()


async def no_expert(_: Any) -> Any:
    raise AssertionError("nothing was to be computed")


# --- Hostile clients -----------------------------------------------------------------------------------------
@pytest.fixture
def intruder(host: HostProcess, sockets: bool) -> Iterator[Intruder]:
    intruder = SocketIntruder(host) if sockets else GrpcIntruder(host)
    yield intruder
    intruder.close()


@pytest.mark.parametrize(
    "message",
    [struct.pack("<QQQ", 1, 2**40, 1) + b"x", struct.pack("<QQQ", 1, 0, 1) + b"x", bytes(100), b"\xff" * 90],
    ids=num_bytes,
)
def test_frames_that_make_no_sense_end_their_own_stream_only(
    host: HostProcess, connect: Connect, intruder: Intruder, message: bytes
) -> None:
    connection = connect(host)
    future = connection.submit(call("sleep:0.1", torch.ones(1, 1)))
    with pytest.raises(WireError):
        intruder.send(message)
    assert future.result(10).rows.item() == -1


@pytest.mark.parametrize("message", [b"", b"short"], ids=num_bytes)
@pytest.mark.parametrize("sockets", [False])
def test_what_is_too_short_for_a_frame_ends_a_grpc_stream(intruder: Intruder, message: bytes) -> None:
    with pytest.raises(WireError, match="a frame has more than 24 bytes"):
        intruder.send(message)


FIELDS = codec.call_fields(call("echo", torch.zeros(2, 4)))
SPECS = [tensors.make_spec(torch.float32, (2, 4)), None, None, None]


@pytest.mark.parametrize(
    "message",
    [
        b"x",
        bytes(64),
        b"\xff" * 640,
        tensors.encode_header((), ()),
        tensors.encode_header((FIELDS,), SPECS),
        tensors.encode_header((None, None), SPECS),
        tensors.encode_header((FIELDS, None), SPECS),  # without its tensor
        tensors.encode_header((FIELDS, None), []) + bytes(64),
        tensors.encode_header((FIELDS, (4096, 64, 64)), SPECS),  # nobody offered shared memory
        tensors.encode_header((FIELDS, (-1, 0, 0)), SPECS) + bytes(64),
        tensors.encode_header((FIELDS, (0, 2**62, 2**62)), SPECS),
        tensors.encode_header((FIELDS, "here"), SPECS),
        tensors.encode_header((FIELDS, (1.5, 0, 0)), SPECS),
    ],
    ids=num_bytes,
)
def test_messages_that_make_no_sense_are_answered_as_such(intruder: Intruder, message: bytes) -> None:
    good = b"".join(tensors.encode((FIELDS, None), (torch.ones(2, 4), None, None, None))[0])
    answers = intruder.send(framed(message, 7), framed(good, 8))
    kinds = {}
    for answer in answers:
        message_id, body = frames.Assembler(1000).feed(answer) or (0, b"")
        kinds[message_id] = tensors.decode(body)[0][:2]
    assert kinds == {7: [codec.FAILED, "WireError"], 8: [codec.ROWS_FOLLOW]}


def test_a_router_that_says_good_bye_in_the_middle(host: HostProcess, connect: Connect, intruder: Intruder) -> None:
    long = list(frames.cut(3, [bytes(1000)], 1000, 100))
    assert intruder.send(*long[:3], linger=False) == []
    assert ask(connect(host), "echo", torch.ones(1, 1)).item() == -1


# --- Hostile hosts -------------------------------------------------------------------------------------------
@pytest.fixture
def impersonate(sockets: bool) -> Iterator[Callable[..., StreamConnection]]:
    """Connects to an impostor that gives these answers."""
    impostors: list[Impostor] = []
    transport = StreamTransport(TOKEN, node_id=NODE, settings=replace(QUICK, ping_timeout_s=5))

    def impersonate(*answers: bytes) -> StreamConnection:
        impostors.append(SocketImpostor(list(answers)) if sockets else GrpcImpostor(list(answers)))
        return transport.connect(impostors[-1].address)

    yield impersonate
    transport.close()
    for impostor in impostors:
        impostor.stop()


HELLO = framed(tensors.encode_header((True, False), ()), 0)
ROWS = tensors.make_spec(torch.float32, (5000, 64))


@pytest.mark.parametrize(
    "hello",
    [bytes(100), framed(b"no message", 0), framed(tensors.encode_header((), ()), 0)],
    ids=num_bytes,
)
def test_a_host_that_cannot_say_hello(impersonate: Callable[..., StreamConnection], hello: bytes) -> None:
    with pytest.raises(HostLost, match="cannot be understood"):
        impersonate(hello)


@pytest.mark.parametrize(
    "answer",
    [
        framed(b"x"),
        framed(bytes(64)),
        framed(tensors.encode_header((), ())),
        framed(tensors.encode_header((codec.ROWS_FOLLOW,), ())),
        framed(tensors.encode_header((codec.ROWS_FOLLOW,), (ROWS,))),
        framed(tensors.encode_header((codec.ROWS_IN_ROOM,), (tensors.make_spec(torch.float32, (5000, 65)),))),
        framed(tensors.encode_header((codec.FAILED, 1, 2), ())),
    ],
    ids=num_bytes,
)
def test_answers_that_make_no_sense_fail_their_call_only(
    impersonate: Callable[..., StreamConnection], answer: bytes
) -> None:
    connection = impersonate(HELLO, answer, framed(tensors.encode_header((codec.ROWS_IN_ROOM,), (ROWS,)), 2))
    arena = connection._arena
    with pytest.raises(WireError):
        ask(connection, "echo", torch.zeros(5000, 64))
    assert ask(connection, "echo", torch.zeros(5000, 64)).shape == (5000, 64)
    assert arena is not None and arena.is_empty


def test_an_answer_in_memory_that_was_not_offered(impersonate: Callable[..., StreamConnection]) -> None:
    header = tensors.encode_header((codec.ROWS_IN_ROOM,), (tensors.make_spec(torch.float32, (1, 4)),))
    with pytest.raises(WireError, match="where none was offered"):
        ask(impersonate(HELLO, framed(header)), "echo", torch.zeros(1, 4))


@pytest.mark.parametrize("answer", [bytes(30), HELLO, struct.pack("<QQQ", 1, 2**50, 1) + b"x"], ids=num_bytes)
def test_frames_that_make_no_sense_lose_the_host(impersonate: Callable[..., StreamConnection], answer: bytes) -> None:
    connection = impersonate(HELLO, answer)
    futures = [connection.submit(call("echo", torch.zeros(2, 4))) for _ in range(3)]
    for future in futures:
        with pytest.raises(HostLost, match="cannot be understood"):
            future.result(10)


def test_answers_to_nothing_are_ignored(impersonate: Callable[..., StreamConnection]) -> None:
    good = b"".join(tensors.encode((codec.ROWS_FOLLOW,), (torch.ones(1, 1),))[0])
    connection = impersonate(HELLO, framed(good, 99), framed(good, 2), framed(good, 1))
    futures = [connection.submit(call("echo", torch.ones(1, 1))) for _ in range(3)]
    assert futures[0].result(10).rows.item() == futures[1].result(10).rows.item() == 1
    assert not futures[2].done() or isinstance(futures[2].exception(), HostLost)
