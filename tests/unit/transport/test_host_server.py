"""What the host's end of a line owes its own process: work ends with its router, and stopping is clean."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from ray_moe.errors import HostLost, WireError
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.transport.connection import StreamConnection
from ray_moe.transport.host_server import HostServer
from ray_moe.transport.settings import TransportSettings
from ray_moe.transport.stream_transport import StreamTransport
from ray_moe.types import HostAddress
from tests.unit.transport.hosts import NODE, TOKEN, call, is_listening


@asynccontextmanager
async def serving(
    submit: Callable[[ExpertCall], Awaitable[ExpertReply]], sockets: bool, **settings: Any
) -> AsyncIterator[tuple[HostServer, StreamConnection]]:
    """A host and a connection to it, both in this process."""
    server = HostServer(submit, TOKEN)
    tcp, unix = await server.start()
    address = HostAddress("expert-0", "", NODE, 0, tcp, unix)
    transport = StreamTransport(TOKEN, node_id=NODE, sockets=sockets, settings=TransportSettings(**settings))
    try:
        yield server, await asyncio.to_thread(transport.connect, address)
    finally:
        await asyncio.to_thread(transport.close)
        await server.stop()
        assert not is_listening(address)


async def test_work_for_a_router_that_left_is_cancelled(sockets: bool) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def submit(_: ExpertCall) -> ExpertReply:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        raise AssertionError

    async with serving(submit, sockets) as (_, connection):
        future = connection.submit(call("any", torch.zeros(1, 1)))
        await asyncio.wait_for(started.wait(), 10)
        await asyncio.to_thread(connection.close)
        assert isinstance(future.exception(0), HostLost)
        await asyncio.wait_for(cancelled.wait(), 10)


async def test_stopping_ends_streams_and_says_so(sockets: bool) -> None:
    started = asyncio.Event()

    async def submit(_: ExpertCall) -> ExpertReply:
        started.set()
        await asyncio.sleep(60)
        raise AssertionError

    async with serving(submit, sockets) as (server, connection):
        future = connection.submit(call("any", torch.zeros(1, 1)))
        await asyncio.wait_for(started.wait(), 10)
        await server.stop()
        with pytest.raises(HostLost, match="the host is stopping"):
            await asyncio.wait_for(asyncio.wrap_future(future), 10)
        await server.stop()


async def test_the_hosts_memory_is_released_once_the_answer_is_sent(sockets: bool) -> None:
    released: asyncio.Queue[str] = asyncio.Queue()

    async def submit(sent: ExpertCall) -> ExpertReply:
        dtype = torch.complex64 if sent.layer == "cannot be sent" else torch.float32
        return ExpertReply(sent.hidden.to(dtype), lambda: released.put_nowait(sent.layer))

    async with serving(submit, sockets, chunk_bytes=4096) as (_, connection):
        for num_tokens, layer in ((1, "in one frame"), (300, "in many"), (5000, "in shared memory")):
            (await asyncio.wrap_future(connection.submit(call(layer, torch.zeros(num_tokens, 16))))).release()
            assert await asyncio.wait_for(released.get(), 10) == layer
        with pytest.raises(WireError, match="complex64 cannot be sent"):
            await asyncio.wrap_future(connection.submit(call("cannot be sent", torch.zeros(1, 16))))
        assert await asyncio.wait_for(released.get(), 10) == "cannot be sent"
        assert released.empty()


async def test_calls_longer_than_allowed_are_not_sent(sockets: bool) -> None:
    async def submit(sent: ExpertCall) -> ExpertReply:
        return ExpertReply(sent.hidden.clone())

    async with serving(submit, sockets, max_message_bytes=10_000, arena_bytes=0) as (_, connection):
        with pytest.raises(WireError, match="where 10000 are allowed"):
            await asyncio.wrap_future(connection.submit(call("any", torch.zeros(1000, 16))))
        reply = await asyncio.wrap_future(connection.submit(call("any", torch.ones(10, 16))))
        assert reply.rows.sum() == 160
