"""The certificates of the tests (tests/certificates/make.sh), and servers that use them."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from ray_moe.service.admission import Admission
from ray_moe.service.grpc.admin import AdminService, HealthService
from ray_moe.service.grpc.credentials import server_credentials
from ray_moe.service.grpc.guard import Guard
from ray_moe.service.grpc.inference import InferenceService
from ray_moe.service.tls import TlsFiles
from tests.unit.service.fake_backend import FakeBackend

DIRECTORY = Path(__file__).parents[2] / "certificates"
AUTHORITY = DIRECTORY / "authority.pem"
"""Signed server, renewed and client."""
STRANGER_AUTHORITY = DIRECTORY / "stranger_authority.pem"
"""Signed stranger."""


def cert(name: str) -> Path:
    return DIRECTORY / f"{name}.pem"


def key(name: str) -> Path:
    return DIRECTORY / f"{name}.key"


def files(name: str = "server", client_ca: Path | None = None) -> TlsFiles:
    """The committed ones, as they are."""
    return TlsFiles(cert(name), key(name), client_ca)


class Exchangeable:
    """Copies that a server reads, and a test writes over."""

    def __init__(self, directory: Path, client_ca: Path | None = None) -> None:
        ca_file = None if client_ca is None else directory / "clients.pem"
        self.files = TlsFiles(directory / "cert.pem", directory / "key.pem", ca_file)
        self.certificate("server")
        self.key("server")
        if client_ca is not None:
            self.client_ca(client_ca)

    def certificate(self, name: str) -> None:
        shutil.copy(cert(name), self.files.cert_file)

    def key(self, name: str) -> None:
        shutil.copy(key(name), self.files.key_file)

    def client_ca(self, path: Path) -> None:
        if self.files.client_ca_file is None:
            raise ValueError("this server asks for no certificates")
        shutil.copy(path, self.files.client_ca_file)


@asynccontextmanager
async def grpc_server(tls: TlsFiles | None, interceptors: Sequence[Any] = ()) -> AsyncIterator[int]:
    """The services of the front door over a fake backend; yields the port of the loopback. Looks at the files before
    each handshake.
    """
    backend = FakeBackend()
    guard = Guard(Admission(backend))
    inference = InferenceService(backend, guard, max_forward_tokens=1000, max_prompt_bytes=1000)
    server = grpc.aio.server(interceptors=list(interceptors))
    services = (inference, AdminService(backend, guard), HealthService(guard, frozenset({"ray_moe.v1.Inference"})))
    server.add_generic_rpc_handlers([service.handler() for service in services])
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", server_credentials(tls, every_s=0))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)
