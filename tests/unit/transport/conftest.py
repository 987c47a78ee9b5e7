"""One host process for all tests that leave it alive, and the ways to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop

from ray_moe.transport.connection import StreamConnection
from ray_moe.transport.settings import TransportSettings
from ray_moe.transport.stream_transport import StreamTransport
from tests.unit.transport import device_stand_in
from tests.unit.transport.hosts import NODE, TOKEN, HostProcess, is_listening

WAYS: dict[str, dict[str, Any]] = {
    "shared memory": {"node_id": NODE, "settings": TransportSettings(inline_bytes=1000)},
    "shared memory of a GPU": {"node_id": NODE, "settings": TransportSettings(device="cpu")},
    "inline": {"node_id": NODE, "settings": TransportSettings(arena_bytes=0)},
    "gRPC, shared memory": {"node_id": NODE, "sockets": False, "settings": TransportSettings(inline_bytes=1000)},
    "gRPC, inline": {"node_id": "another node"},
}


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Hosts in this process run on both: Ray's actors are on uvloop, unless that is turned off."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def host() -> Iterator[HostProcess]:
    """A host that lives through all tests, and has nothing to complain about in the end."""
    host = HostProcess.start(TransportSettings(device="cpu"))
    address = host.address
    assert is_listening(address)
    yield host
    assert host.stop() == ""
    assert host.process.returncode == 0
    assert not is_listening(address)


@pytest.fixture(params=WAYS)
def connection(request: pytest.FixtureRequest, host: HostProcess) -> Iterator[StreamConnection]:
    """A connection by each of the ways."""
    device_stand_in.install()
    transport = StreamTransport(TOKEN, **WAYS[request.param])
    connection = transport.connect(host.address)
    assert connection.shares_memory == ("shared memory" in request.param)
    assert connection.shares_device_memory == ("GPU" in request.param)
    assert connection.target == (host.address.tcp if "gRPC" in request.param else host.address.unix)
    yield connection
    transport.close()


@pytest.fixture(params=[True, False], ids=["socket", "gRPC"])
def sockets(request: pytest.FixtureRequest) -> bool:
    """Whether the host is reached by socket, not by gRPC."""
    return bool(request.param)


@pytest.fixture
def connect(sockets: bool) -> Iterator[Callable[..., StreamConnection]]:
    """Connects to any host with any settings, over shared memory unless told otherwise; closes in the end."""
    transports: list[StreamTransport] = []

    def connect(host: HostProcess, **others: Any) -> StreamConnection:
        settings: dict[str, Any] = {"node_id": NODE, "sockets": sockets} | others
        transport = StreamTransport(TOKEN, **settings)
        transports.append(transport)
        return transport.connect(host.address)

    yield connect
    for transport in transports:
        transport.close()
