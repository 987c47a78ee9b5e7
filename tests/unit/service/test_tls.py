"""Certificates: refused when they cannot work, followed when they change, asked of clients; for gRPC and asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_moe.client.aio import AsyncClient
from ray_moe.errors import InvalidConfig, Unavailable
from ray_moe.service.grpc.credentials import server_credentials
from ray_moe.service.tls import TlsFiles, server_context
from tests.unit.service.certificates import (
    AUTHORITY,
    DIRECTORY,
    STRANGER_AUTHORITY,
    Exchangeable,
    cert,
    files,
    grpc_server,
    key,
)
from tests.unit.service.fake_backend import LAYER, STATUS, WIDTH

GREETING = b"hello"


@asynccontextmanager
async def plain_server(tls: TlsFiles) -> AsyncIterator[int]:
    """A server of asyncio, as HTTP servers are; greets whoever it lets in."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(GREETING)
            await writer.drain()
            await reader.read()
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=server_context(tls, every_s=0))
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


SERVERS = pytest.mark.parametrize("server", [grpc_server, plain_server], ids=["grpc", "asyncio"])


def client_context(name: str | None = None, ca: Path = AUTHORITY) -> ssl.SSLContext:
    """A client's, with the certificate of that name."""
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    if name is not None:
        context.load_cert_chain(cert(name), key(name))
    return context


def connect(port: int, context: ssl.SSLContext, server_name: str = "localhost") -> tuple[str, bytes]:
    """Whose certificate the server shows, and the first byte that it sends to whom it lets in."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname=server_name) as secure,
    ):
        shown: Any = secure.getpeercert()
        secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")  # what gRPC waits for
        first = secure.recv(1)
        _hang_up(secure)
    return dict(pair for (pair,) in shown["subject"])["commonName"], first


def _hang_up(connection: ssl.SSLSocket) -> None:
    """Close it and wait until the server has too: gRPC crashes when it is stopped while a connection breaks off."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_WR)
        while connection.recv(2**16):
            pass


async def shown_by(port: int, context: ssl.SSLContext | None = None, server_name: str = "localhost") -> str:
    """Name in the certificate of a new connection that was let in."""
    name, first = await asyncio.to_thread(connect, port, context or client_context(), server_name)
    assert first
    return name


async def refused(port: int, context: ssl.SSLContext) -> bool:
    """Whether the server lets a client go; with TLS 1.3 it says so only after the handshake."""
    try:
        _, first = await asyncio.to_thread(connect, port, context)
    except (ssl.SSLError, ConnectionError):
        return True
    return not first


# --- files ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("use", [server_context, server_credentials])
@pytest.mark.parametrize(
    ("tls", "said"),
    [
        (TlsFiles(cert("none"), key("server")), r"cannot read the certificate in .*none\.pem: No such file"),
        (TlsFiles(cert("server"), key("none")), r"cannot read the private key in .*none\.key: No such file"),
        (TlsFiles(cert("server"), DIRECTORY), "cannot read the private key in .*: Is a directory"),
        (files(client_ca=cert("none")), r"cannot read the client CA in .*none\.pem: No such file"),
        (TlsFiles(cert("server"), key("renewed")), r"private key in .*renewed\.key is not that of the certificate"),
        (TlsFiles(cert("server"), key("encrypted")), r"private key in .*encrypted\.key is encrypted"),
        (TlsFiles(key("server"), key("server")), r"the certificate in .*server\.key cannot be used"),
        (TlsFiles(cert("server"), cert("server")), r"cannot be used with the private key in .*server\.pem"),
        (files(client_ca=key("client")), r"the client CA in .*client\.key cannot be used"),
    ],
)
def test_files_that_cannot_work_are_refused_in_words(
    use: Callable[[TlsFiles], object], tls: TlsFiles, said: str
) -> None:
    with pytest.raises(InvalidConfig, match=said):
        use(tls)


def test_a_damaged_certificate_is_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "cert.pem"
    lines = cert("server").read_text().splitlines()
    damaged.write_text("\n".join([*lines[:3], *lines[5:]]))
    with pytest.raises(InvalidConfig, match=f"the certificate in {damaged} cannot be used"):
        server_context(TlsFiles(damaged, key("server")))


async def test_one_file_may_hold_both(tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_text("for humans: ü\n" + key("server").read_text() + cert("server").read_text())
    for server in (grpc_server, plain_server):
        async with server(TlsFiles(both, both)) as port:
            assert await shown_by(port) == "server"


# --- reload --------------------------------------------------------------------------------------------------
@SERVERS
@pytest.mark.parametrize("server_name", ["localhost", "127.0.0.1"])
async def test_a_new_certificate_counts_from_the_next_connection_on(
    server: Any, server_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tls = Exchangeable(tmp_path)
    async with server(tls.files) as port:
        for before, after in (("server", "renewed"), ("renewed", "server")):
            assert await shown_by(port, server_name=server_name) == before
            tls.certificate(after)
            assert await shown_by(port, server_name=server_name) == before
            assert "is not that of the certificate" in caplog.text
            tls.key(after)
            assert await shown_by(port, server_name=server_name) == after
        tls.files.cert_file.unlink()
        assert await shown_by(port, server_name=server_name) == "server"
        tls.certificate("server")
        assert await shown_by(port, server_name=server_name) == "server"


async def test_no_call_notices_that_certificates_change(tmp_path: Path) -> None:
    tls = Exchangeable(tmp_path)
    hidden = np.ones((1, WIDTH), np.float32)
    over = asyncio.Event()

    async def work(client: AsyncClient) -> int:
        num_calls = 0
        while not over.is_set():
            np.testing.assert_array_equal(await client.forward(LAYER, hidden), -hidden)
            num_calls += 1
        return num_calls

    async with grpc_server(tls.files) as port, contextlib.AsyncExitStack() as stack:
        target = f"localhost:{port}"
        standing = [await stack.enter_async_context(AsyncClient(target, 30, ca_file=AUTHORITY)) for _ in range(2)]
        at_work = [asyncio.create_task(work(client)) for client in standing]
        for round_ in range(4):
            name = ("renewed", "server")[round_ % 2]
            tls.certificate(name)
            async with AsyncClient(target, 30, ca_file=AUTHORITY) as client:
                assert await client.status() == STATUS
            tls.key(name)
            assert await shown_by(port) == name
            async with AsyncClient(target, 30, ca_file=AUTHORITY) as client:
                assert await client.status() == STATUS
        over.set()
        assert min(await asyncio.gather(*at_work)) > 0


# --- clients' certificates -----------------------------------------------------------------------------------
@SERVERS
async def test_only_clients_with_a_certificate_of_that_authority_are_let_in(server: Any) -> None:
    async with server(files(client_ca=AUTHORITY)) as port:
        assert await shown_by(port, client_context("client")) == "server"
        assert await refused(port, client_context())
        assert await refused(port, client_context("stranger"))


@SERVERS
async def test_an_authority_of_clients_can_be_taken_away(server: Any, tmp_path: Path) -> None:
    tls = Exchangeable(tmp_path, AUTHORITY)
    async with server(tls.files) as port:
        assert await shown_by(port, client_context("client")) == "server"
        tls.client_ca(STRANGER_AUTHORITY)
        assert await refused(port, client_context("client"))
        assert await shown_by(port, client_context("stranger")) == "server"
        both = tmp_path / "both.pem"
        both.write_bytes(AUTHORITY.read_bytes() + STRANGER_AUTHORITY.read_bytes())
        tls.client_ca(both)
        assert await shown_by(port, client_context("client")) == "server"
        assert await shown_by(port, client_context("stranger")) == "server"


async def test_a_session_is_no_way_around_the_clients_certificate() -> None:
    context = client_context("client")
    async with plain_server(files(client_ca=AUTHORITY)) as port:

        def resume() -> tuple[bool, bool]:
            with (
                socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
                context.wrap_socket(raw, server_hostname="localhost") as first,
            ):
                assert first.recv(1)
                session = first.session
            with (
                socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
                context.wrap_socket(raw, server_hostname="localhost", session=session) as second,
            ):
                assert second.recv(1)
                return bool(session and session.has_ticket), bool(second.session_reused)

        assert await asyncio.to_thread(resume) == (False, False)
        old = client_context("client")
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert await refused(port, old)


# --- both ends are ours --------------------------------------------------------------------------------------
async def test_clients_and_servers_that_do_not_match_say_why() -> None:
    async with grpc_server(files()) as port:
        async with AsyncClient(f"127.0.0.1:{port}", 10, ca_file=STRANGER_AUTHORITY, max_attempts=1) as client:
            with pytest.raises(Unavailable, match=f"the certificate of 127.0.0.1:{port} is not trusted"):
                await client.status()
        async with AsyncClient(f"127.0.0.1:{port}", 10, max_attempts=1) as client:
            with pytest.raises(Unavailable, match=f"the service at 127.0.0.1:{port} cannot be reached"):
                await client.status()
    async with grpc_server(files(client_ca=AUTHORITY)) as port:
        for name, ok in (("client", True), ("stranger", False)):
            async with AsyncClient(
                f"127.0.0.1:{port}", 10, ca_file=AUTHORITY, cert_file=cert(name), key_file=key(name), max_attempts=1
            ) as client:
                if ok:
                    assert await client.status() == STATUS
                else:
                    with pytest.raises(Unavailable):
                        await client.status()
