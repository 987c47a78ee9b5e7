"""Streams between nodes, encrypted: nobody can read them on the way, and strangers are refused at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_moe.errors import HostLost, RayMoEError, Unauthenticated
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.transport.connection import StreamConnection
from ray_moe.transport.host_server import HostServer
from ray_moe.transport.settings import MemberCertificate, TransportSettings
from ray_moe.transport.stream_transport import StreamTransport
from ray_moe.types import HostAddress
from tests.unit.transport.host_process import negated
from tests.unit.transport.hosts import NODE, call, rows_of

DIRECTORY = Path(__file__).parents[2] / "certificates"
TOKEN = "a token that nobody may read"
SETTINGS = TransportSettings(connect_timeout_s=60, chunk_bytes=4096)
"""Whoever is refused would notice if it took until the time-out."""


def read(name: str) -> bytes:
    return (DIRECTORY / name).read_bytes()


def member(name: str, authority: str = "authority", called: str = "localhost") -> MemberCertificate:
    return MemberCertificate(called, read(f"{name}.pem"), read(f"{name}.key"), read(f"{authority}.pem"))


HOST = member("server")
ROUTER = member("client")


async def negate(sent: ExpertCall) -> ExpertReply:
    return ExpertReply(negated(sent))


@asynccontextmanager
async def hosting(certificate: MemberCertificate | None) -> AsyncIterator[HostAddress]:
    """A host in this process."""
    server = HostServer(negate, TOKEN, settings=SETTINGS, certificate=certificate)
    tcp, unix = await server.start()
    try:
        yield HostAddress("expert-0", "", NODE, 0, tcp, unix)
    finally:
        await server.stop()


@asynccontextmanager
async def connecting(
    address: HostAddress, certificate: MemberCertificate | None, token: str = TOKEN, node_id: str = "another node"
) -> AsyncIterator[StreamConnection]:
    """A router's connection, which was let in."""
    transport = StreamTransport(token, node_id=node_id, settings=SETTINGS, certificate=certificate)
    try:
        yield await asyncio.to_thread(transport.connect, address)
    finally:
        await asyncio.to_thread(transport.close)


async def refusal(address: HostAddress, certificate: MemberCertificate | None, **others: Any) -> RayMoEError:
    """What a router hears that is not let in."""
    with pytest.raises(RayMoEError) as caught:
        async with connecting(address, certificate, **others):
            pass
    return caught.value


async def ask(connection: StreamConnection, hidden: torch.Tensor) -> torch.Tensor:
    return rows_of(await asyncio.wrap_future(connection.submit(call("any", hidden))))


@dataclass
class Wire:
    """Stands between a router and a host, and keeps what passes."""

    address: HostAddress
    passed: bytearray


@asynccontextmanager
async def tapped(address: HostAddress) -> AsyncIterator[Wire]:
    passed = bytearray()
    host, _, port = address.tcp.rpartition(":")

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(2**16):
                passed.extend(data)
                sink.write(data)
                await sink.drain()
        finally:
            sink.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        await asyncio.gather(carry(reader, back), carry(there, writer), return_exceptions=True)

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        yield Wire(replace(address, tcp=f"127.0.0.1:{server.sockets[0].getsockname()[1]}"), passed)
    finally:
        server.close()
        await server.wait_closed()


# --- Members -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("encrypted", [True, False])
async def test_neither_the_token_nor_what_is_computed_can_be_read_on_the_way(encrypted: bool) -> None:
    hidden = torch.randn(3000, 8)
    host, router = (HOST, ROUTER) if encrypted else (None, None)
    async with hosting(host) as address, tapped(address) as wire, connecting(wire.address, router) as connection:
        assert connection.is_encrypted == encrypted
        for num_tokens in (1, 3000):
            assert torch.equal(await ask(connection, hidden[:num_tokens]), -hidden[:num_tokens])
    secrets = (TOKEN.encode(), hidden[0].numpy().tobytes(), (-hidden[0]).numpy().tobytes())
    assert [secret in wire.passed for secret in secrets] == [not encrypted] * 3


async def test_on_one_node_lines_stay_as_they_are_and_ask_for_the_token() -> None:
    async with hosting(HOST) as address:
        async with connecting(address, ROUTER, node_id=NODE) as connection:
            assert (connection.target, connection.is_encrypted) == (address.unix, False)
            assert connection.shares_memory
            hidden = torch.randn(5000, 8)
            assert torch.equal(await ask(connection, hidden), -hidden)
        assert isinstance(await refusal(address, ROUTER, token="another", node_id=NODE), Unauthenticated)
        out_of_reach = replace(address, unix="ray-moe-in-another-container")
        async with connecting(out_of_reach, ROUTER, node_id=NODE) as connection:
            assert (connection.target, connection.is_encrypted) == (address.tcp, True)


# --- Strangers -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("host", "router", "said"),
    [
        pytest.param(HOST, None, "perhaps the host expects an encrypted line", id="plaintext router"),
        pytest.param(None, ROUTER, "WRONG_VERSION_NUMBER", id="plaintext host"),
        pytest.param(
            HOST, member("stranger", "stranger_authority"), "CERTIFICATE_VERIFY_FAILED", id="another authority"
        ),
        pytest.param(HOST, member("stranger"), "Socket closed; no encrypted line", id="router's certificate"),
        pytest.param(member("stranger"), ROUTER, "CERTIFICATE_VERIFY_FAILED", id="host's certificate"),
        pytest.param(HOST, member("client", called="other"), "Hostname Verification Check failed", id="another name"),
    ],
)
async def test_who_is_not_of_the_cluster_is_refused_at_once_and_told_of_once(
    host: MemberCertificate | None, router: MemberCertificate | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with hosting(host) as address:
        transport = StreamTransport(TOKEN, settings=SETTINGS, certificate=router)
        for _ in range(3):
            with pytest.raises(HostLost, match=said) as caught:
                await asyncio.to_thread(transport.connect, address)
            assert "transport.tls" in caught.value.message
    (told,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert "host expert-0" in told
    assert said in told


async def test_a_member_with_another_token_is_refused_and_both_ends_know_why(caplog: pytest.LogCaptureFixture) -> None:
    async with hosting(HOST) as address:
        error = await refusal(address, ROUTER, token="another")
        assert isinstance(error, Unauthenticated)
        assert "not the token of this host" in error.message
        (told,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
        assert "refused a stream from" in told
        assert "another" not in told
        async with connecting(address, ROUTER) as connection:  # it goes on for others
            assert torch.equal(await ask(connection, torch.ones(1, 1)), -torch.ones(1, 1))


def test_the_private_key_is_not_shown() -> None:
    shown = repr(HOST)
    assert "localhost" in shown
    assert "PRIVATE" not in shown


async def test_another_life_of_the_service_has_another_token_and_another_certificate() -> None:
    transport = StreamTransport("of the life before", settings=SETTINGS, certificate=member("stranger"))
    async with hosting(HOST) as address:
        with pytest.raises(HostLost, match="no encrypted line"):
            await asyncio.to_thread(transport.connect, address)
        transport.renew("of the life before", ROUTER)
        with pytest.raises(Unauthenticated):
            await asyncio.to_thread(transport.connect, address)
        transport.renew(TOKEN, ROUTER)
        connection = await asyncio.to_thread(transport.connect, address)
        assert torch.equal(await ask(connection, torch.ones(1, 1)), -torch.ones(1, 1))
        await asyncio.to_thread(transport.close)
