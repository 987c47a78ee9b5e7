"""Calls through Ray's object store, to a real actor."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from ray_moe.errors import ExpertFailed, HostLost, StaleRouting, WireError
from ray_moe.transport.auto import AutoTransport
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.transport.object_store import ObjectStoreTransport
from ray_moe.transport.settings import TransportSettings
from ray_moe.transport.stream_transport import StreamTransport
from ray_moe.types import HostAddress

ADDRESS = HostAddress("expert-0", "first life", "a node", 0, "127.0.0.1:1", "")
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def start_actor() -> Any:
    """An actor that answers with the tokens in reverse order (or as its layer's name says)."""

    class Host:
        def __init__(self) -> None:
            self.num_released = 0
            self.broken = False

        def set_broken(self, broken: bool) -> None:
            self.broken = broken

        def pid(self) -> int:
            return os.getpid()

        def released(self) -> int:
            return self.num_released

        async def exchange(self, header: bytes, *arrays: Any) -> Any:
            from ray_moe.transport.object_store import serve_exchange

            if self.broken:
                raise RuntimeError("a bug in exchange")
            return await serve_exchange(self._submit, header, arrays, "first life")

        async def _submit(self, call: ExpertCall) -> ExpertReply:
            import asyncio

            if call.layer == "stale":
                raise StaleRouting("no such expert here")
            if call.layer == "sleep":
                await asyncio.sleep(60)
            tokens = call.hidden if call.token is None else call.hidden[call.token.long()]
            if call.layer == "short":
                tokens = tokens[1:]
            return ExpertReply(tokens.flip(0), self._release)

        def _release(self) -> None:
            self.num_released += 1

    actor = ray.remote(num_cpus=0)(Host).remote()
    ray.get(actor.pid.remote())  # it is there, however long that takes
    return actor


@pytest.fixture(scope="module")
def actor() -> Iterator[Any]:
    actor = start_actor()
    yield actor
    ray.kill(actor)


def call(layer: str, hidden: torch.Tensor, **others: Any) -> ExpertCall:
    num_rows = len(others.get("token", hidden))
    return ExpertCall(layer, 1, hidden, None, others.get("token"), [0], [num_rows])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 8, 5000])
def test_rows_come_back(actor: Any, num_tokens: int, dtype: torch.dtype) -> None:
    transport = ObjectStoreTransport(lambda _: actor)
    hidden = torch.randn(num_tokens, 64).to(dtype)
    reply = transport.connect(ADDRESS).submit(call("flip", hidden)).result(30)
    assert reply.rows.dtype is dtype
    assert torch.equal(reply.rows.view(torch.uint8), hidden.view(torch.uint8).flip(0))
    reply.release()
    transport.close()


def test_calls_may_overlap_and_the_hosts_memory_is_released(actor: Any) -> None:
    connection = ObjectStoreTransport(lambda _: actor).connect(ADDRESS)
    before = ray.get(actor.released.remote())
    hidden = [torch.full((n, 8), float(n)) for n in range(1, 9)]
    token = torch.tensor([0, 0, 0], dtype=torch.int32)
    futures = [connection.submit(call("flip", tokens, token=token)) for tokens in hidden]
    for tokens, future in zip(hidden, futures, strict=True):
        assert torch.equal(future.result(30).rows, tokens[:1].repeat(3, 1))
    assert ray.get(actor.released.remote()) == before + 8
    connection.close()


def test_errors_of_the_host(actor: Any) -> None:
    connection = ObjectStoreTransport(lambda _: actor).connect(ADDRESS)
    hidden = torch.randn(3, 4)
    with pytest.raises(StaleRouting, match="no such expert here"):
        connection.submit(call("stale", hidden)).result(30)
    with pytest.raises(WireError, match="outside the 3"):
        connection.submit(call("flip", hidden, token=torch.tensor([3], dtype=torch.int32))).result(30)
    with pytest.raises(WireError, match="rows"):
        connection.submit(call("short", hidden)).result(30)
    with pytest.raises(WireError, match="complex64 cannot be sent"):
        connection.submit(call("flip", hidden.to(torch.complex64))).result(30)
    assert torch.equal(connection.submit(call("flip", hidden)).result(30).rows, hidden.flip(0))
    connection.close()
    with pytest.raises(HostLost, match="closed here"):
        connection.submit(call("flip", hidden)).result(30)


def test_an_actor_whose_method_raises(actor: Any) -> None:
    connection = ObjectStoreTransport(lambda _: actor).connect(ADDRESS)
    hidden = torch.randn(3, 4)
    ray.get(actor.set_broken.remote(True))
    with pytest.raises(ExpertFailed, match="exchange"):
        connection.submit(call("flip", hidden)).result(30)
    ray.get(actor.set_broken.remote(False))
    assert torch.equal(connection.submit(call("flip", hidden)).result(30).rows, hidden.flip(0))


def test_hosts_that_are_not_there(actor: Any) -> None:
    def none(_: HostAddress) -> Any:
        raise ValueError("Failed to look up actor")

    with pytest.raises(HostLost, match="has no actor: Failed to look up"):
        ObjectStoreTransport(none).connect(ADDRESS)
    with pytest.raises(HostLost, match="another life"):
        ObjectStoreTransport(lambda _: actor).connect(replace(ADDRESS, incarnation="second life"))


def test_a_killed_actor_fails_every_call() -> None:
    actor = start_actor()
    lost: list[HostAddress] = []
    heard = threading.Event()

    def on_lost(address: HostAddress) -> None:
        lost.append(address)
        heard.set()

    transport = ObjectStoreTransport(lambda _: actor, on_lost=on_lost)
    connection = transport.connect(ADDRESS)
    futures = [connection.submit(call("sleep", torch.randn(n, 64))) for n in (1, 2000, 3)]
    os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
    killed_at = time.monotonic()
    wait(futures, 30)
    assert time.monotonic() - killed_at < 5
    for future in futures:
        assert isinstance(future.exception(), HostLost)
    with pytest.raises(HostLost):
        connection.submit(call("flip", torch.randn(1, 1))).result(30)
    assert heard.wait(10)
    with pytest.raises(HostLost, match="is not there"):
        transport.connect(ADDRESS)
    transport.close()
    assert lost == [ADDRESS]


def test_the_object_store_stands_in_where_a_port_cannot_be_reached(actor: Any) -> None:
    settings = TransportSettings(connect_timeout_s=2)
    transport = AutoTransport(StreamTransport("token", settings=settings), ObjectStoreTransport(lambda _: actor))
    hidden = torch.randn(5, 8)
    assert torch.equal(transport.connect(ADDRESS).submit(call("flip", hidden)).result(30).rows, hidden.flip(0))
    transport.close()


def test_arrays_that_do_not_fit_the_header_are_refused() -> None:
    from ray_moe.transport import codec
    from ray_moe.transport.object_store import serve_exchange
    from ray_moe.wire import tensors

    async def submit(_: ExpertCall) -> ExpertReply:
        raise AssertionError("nothing was to be computed")

    sent = call("flip", torch.zeros(2, 4))
    header = tensors.encode_header(("", codec.call_fields(sent)), codec.call_specs(sent))
    good = np.zeros(32, np.uint8)
    bad: list[list[Any]] = [[], [good[1:]], [good, good], [good.reshape(4, 8)], [good.view(np.int8)], ["text"]]
    for head, arrays in [(b"x", [good]), (tensors.encode_header((), ()), []), *[(header, arrays) for arrays in bad]]:
        answer = _run(serve_exchange(submit, head, arrays))
        assert tensors.decode(answer[0])[0][:2] == [codec.FAILED, "WireError"]


def _run(coroutine: Any) -> Any:
    """A coroutine that waits for nothing, to its end."""
    with pytest.raises(StopIteration) as stop:
        coroutine.send(None)
    return stop.value.value
