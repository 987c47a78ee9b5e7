"""One host process for all tests that leave it alive, and the three ways to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ray_moe.transport.grpc_client import GrpcConnection, GrpcTransport
from ray_moe.transport.settings import TransportSettings
from tests.unit.transport.hosts import NODE, TOKEN, HostProcess, is_listening

WAYS: dict[str, dict[str, Any]] = {
    "shared memory": {"node_id": NODE, "settings": TransportSettings(inline_bytes=1000)},
    "inline": {"node_id": NODE, "settings": TransportSettings(arena_bytes=0)},
    "tcp": {"node_id": "another node"},
}


@pytest.fixture(scope="session")
def host() -> Iterator[HostProcess]:
    """A host that lives through all tests, and has nothing to complain about in the end."""
    host = HostProcess.start()
    address = host.address
    assert is_listening(address)
    yield host
    assert host.stop() == ""
    assert host.process.returncode == 0
    assert not is_listening(address)


@pytest.fixture(params=WAYS)
def connection(request: pytest.FixtureRequest, host: HostProcess) -> Iterator[GrpcConnection]:
    """A connection by each of the ways."""
    transport = GrpcTransport(TOKEN, **WAYS[request.param])
    connection = transport.connect(host.address)
    assert connection.shares_memory == (request.param == "shared memory")
    assert connection.target == (host.address.tcp if request.param == "tcp" else host.address.unix)
    yield connection
    transport.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., GrpcConnection]]:
    """Connects to any host with any settings, over shared memory unless told otherwise; closes in the end."""
    transports: list[GrpcTransport] = []

    def connect(host: HostProcess, **others: Any) -> GrpcConnection:
        transport = GrpcTransport(TOKEN, **({"node_id": NODE} | others))
        transports.append(transport)
        return transport.connect(host.address)

    yield connect
    for transport in transports:
        transport.close()
