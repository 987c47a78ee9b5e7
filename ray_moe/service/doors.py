"""The front doors that a router opens; the composition root hands them down by name.

Every actor of a service gets that name with its specification and so imports this module, also those that only
coordinate: it must not import torch, transformers or the HTTP server, which take seconds.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ray_moe.actors.spec import FrontDoor, Ports
from ray_moe.config import ServerConfig
from ray_moe.runtime.tracing import Tracer
from ray_moe.service.admission import Admission
from ray_moe.service.auth import KeyRing
from ray_moe.service.backend import Backend
from ray_moe.service.grpc.server import FrontDoor as GrpcFrontDoor
from ray_moe.service.metering import MeteredBackend
from ray_moe.service.tls import TlsFiles

if TYPE_CHECKING:
    from ray_moe.service.openai.jobs import RequestLimits


def open_all(backend: Backend, server: ServerConfig, tracer: Tracer | None = None) -> FrontDoor:
    """gRPC, and HTTP where it is wanted."""
    return Doors(backend, server, tracer)


class Doors:
    """Of one router: they open and close together."""

    def __init__(self, backend: Backend, server: ServerConfig, tracer: Tracer | None = None) -> None:
        self._keys = KeyRing(Path(server.keys_file) if server.keys_file else None)
        tls = None
        if server.tls_cert_file:
            client_ca = Path(server.tls_client_ca_file) if server.tls_client_ca_file else None
            tls = TlsFiles(Path(server.tls_cert_file), Path(server.tls_key_file), client_ca)
        backend = cast(Backend, MeteredBackend(backend))
        admission = Admission(
            backend,
            max_in_flight_bytes=server.max_in_flight_bytes,
            keys=self._keys,
            tracer=tracer,
            allow_anonymous=server.allow_anonymous,
        )
        self._grpc = GrpcFrontDoor(
            backend,
            server.host,
            server.port,
            max_request_bytes=server.max_request_bytes,
            max_forward_tokens=server.max_forward_tokens,
            max_prompt_bytes=server.max_prompt_bytes,
            admission=admission,
            tls=tls,
        )
        self._server, self._backend, self._admission = server, backend, admission
        self._http = None
        if server.http_port is not None:
            from ray_moe.service.openai.server import HttpFrontDoor

            self._http = HttpFrontDoor(
                backend,
                server.host,
                server.http_port,
                limits=self._limits,
                admission=admission,
                max_metric_experts=server.max_metric_experts,
                tls=tls,
            )

    @property
    def http_app(self) -> Any:
        """What is answered by HTTP, as an ASGI application for another server than ours."""
        from ray_moe.service.openai.app import make_app

        return make_app(self._backend, self._admission, self._limits, self._server.max_metric_experts)

    @property
    def _limits(self) -> RequestLimits:
        from ray_moe.service.openai.jobs import RequestLimits

        server = self._server
        return RequestLimits(max_prompt_bytes=server.max_prompt_bytes, read_timeout_s=server.read_timeout_s)

    async def take(self, port: int) -> bool:
        """Speak gRPC on another port too, unless somebody listens there; whether it does now."""
        return await self._grpc.take(port)

    async def find(self, method: str, metadata: Any) -> Any:
        """The handler of gRPC's `/service/method`, for calls that another server brings."""
        return await self._grpc.find(method, metadata)

    async def start(self) -> Ports:
        """Listen. Then none listens if one cannot.

        Raises: `InsufficientResources` when a port is taken, `InvalidConfig` for wrong files of keys or certificates.
        """
        self._keys.load()
        grpc_port = await self._grpc.start()
        try:
            return Ports(grpc_port, 0 if self._http is None else await self._http.start())
        except BaseException:
            await self._grpc.stop(0.0)
            raise

    async def stop(self, grace_s: float) -> None:
        """Admit nothing more, give requests in flight `grace_s`, then cancel them."""
        doors = [door for door in (self._grpc, self._http) if door is not None]
        await asyncio.gather(*(door.stop(grace_s) for door in doors))
