"""The gRPC front door: one `grpc.aio` server over a `Backend`, in the caller's event loop.

It listens, admits, checks, maps errors and stops gracefully. It does not know what the backend does or where it runs.
Started by the composition root.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read when grpc is loaded; its fork handlers crash children

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from ray_moe.errors import InsufficientResources
from ray_moe.service import ports
from ray_moe.service.admission import Admission
from ray_moe.service.backend import Backend
from ray_moe.service.grpc.admin import AdminService, HealthService
from ray_moe.service.grpc.credentials import server_credentials
from ray_moe.service.grpc.guard import Guard
from ray_moe.service.grpc.inference import InferenceService
from ray_moe.service.grpc.interceptor import RequestInterceptor
from ray_moe.service.grpc.reflection import ReflectionService
from ray_moe.service.grpc.training import TrainingService
from ray_moe.service.kserve.reflection import pool_of
from ray_moe.service.kserve.servicer import KServeService
from ray_moe.service.tls import TlsFiles
from ray_moe.wire.kserve import grpc_service_pb2
from ray_moe.wire.v1 import admin_pb2, inference_pb2, training_pb2

_DOORS = {
    InferenceService.NAME: "grpc",
    TrainingService.NAME: "grpc",
    AdminService.NAME: "grpc",
    KServeService.NAME: "kserve",
}
"""What the log calls them. Health and reflection are asked all the time, and not told of."""

_PROTOS = (inference_pb2, training_pb2, admin_pb2, grpc_service_pb2, health_pb2, reflection_pb2)


@dataclass(frozen=True, slots=True)
class _Call(grpc.HandlerCallDetails):
    method: str
    invocation_metadata: Any


class FrontDoor:
    """The server: `start`, and later `stop`, in one event loop."""

    def __init__(
        self,
        backend: Backend,
        host: str = "127.0.0.1",
        port: int = 8476,
        *,
        admission: Admission | None = None,
        max_request_bytes: int = 512 * 2**20,
        max_forward_tokens: int = 131_072,
        max_prompt_bytes: int = 2**20,
        tls: TlsFiles | None = None,
    ) -> None:
        """Listens nowhere yet.

        Args:
            backend: what does the work.
            host: address to listen on; ``0.0.0.0`` is every interface.
            port: TCP port; 0 takes a free one.
            admission: shared with other doors of the router; None: its own, with nothing set.
            max_request_bytes: of one message; gRPC ends at 2 GiB.
            max_forward_tokens: of one Forward, and of one micro-batch.
            max_prompt_bytes: of a prompt given as text, in UTF-8.
            tls: certificate to encrypt with; None: no encryption.
        """
        self._tls = tls
        self._host = host
        self._port = port
        self._max_request_bytes = max_request_bytes
        self._admission = admission or Admission(backend)
        self._guard = Guard(self._admission)
        self._inference = InferenceService(
            backend, self._guard, max_forward_tokens=max_forward_tokens, max_prompt_bytes=max_prompt_bytes
        )
        self._kserve = KServeService(
            backend, self._guard, max_forward_tokens=max_forward_tokens, max_prompt_bytes=max_prompt_bytes
        )
        self._training = TrainingService(
            backend, self._guard, max_tokens=max_forward_tokens, max_prompt_bytes=max_prompt_bytes
        )
        self._admin = AdminService(backend, self._guard)
        known = (InferenceService.NAME, TrainingService.NAME, KServeService.NAME, AdminService.NAME)
        self._health = HealthService(self._guard, frozenset(known))
        self._interceptor = RequestInterceptor(_DOORS, self._admission.tracer)
        self._servers: list[grpc.aio.Server] = []

    async def find(self, method: str, metadata: Any) -> grpc.RpcMethodHandler[Any, Any]:
        """What answers `/service/method` of those that do work, for calls that another server brings."""
        details = _Call(method, metadata)

        async def continuation(details: grpc.HandlerCallDetails) -> Any:
            handlers = (service.handler().service(details) for service in (self._inference, self._kserve))
            return next((handler for handler in handlers if handler is not None), None)

        return await self._interceptor.intercept_service(continuation, details)

    async def start(self) -> int:
        """Listen; returns the port, which is a free one if 0 was asked for.

        Requests are answered from now on, by `Unavailable` until the backend is ready.

        Raises:
            InsufficientResources: the port is in use, or cannot be had for another reason, which is named.
        """
        return await ports.listen(self._host, self._port, self._listen)

    async def take(self, port: int) -> bool:
        """Listen on another port too, unless somebody does; whether it does now."""
        if ports.why_taken(self._host, port) is not None:  # gRPC would tell it to the log each time
            return False
        try:
            await self._listen(port)
        except InsufficientResources:
            return False
        return True

    async def _listen(self, wanted: int) -> int:
        server = grpc.aio.server(interceptors=[self._interceptor], options=_options(self._max_request_bytes))
        services = (self._inference, self._training, self._kserve, self._admin, self._health)
        server.add_generic_rpc_handlers([service.handler() for service in services])
        pool = pool_of(*(proto.DESCRIPTOR for proto in _PROTOS))
        reflection = ReflectionService(self._guard, [service.NAME for service in services], pool)
        server.add_generic_rpc_handlers([reflection.handler()])
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            where = f"{host}:{wanted}"
            if self._tls is None:
                port = server.add_insecure_port(where)
            else:
                port = server.add_secure_port(where, server_credentials(self._tls))
        except RuntimeError as exc:
            raise self._cannot_listen(
                wanted, ports.why_taken(self._host, wanted) or "the address cannot be bound"
            ) from exc
        await server.start()
        self._servers.append(server)
        return port

    def _cannot_listen(self, port: int, why: str) -> InsufficientResources:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return InsufficientResources(
            f"cannot listen on {host}:{port}: {why}; stop what listens there, or choose another port (0 takes a free "
            "one) or another address of this machine"
        )

    async def stop(self, grace_s: float = 5.0) -> None:
        """Admit nothing more, give requests in flight `grace_s`, then cancel them. Idempotent."""
        self._admission.stopping = True
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))


def _options(max_request_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # otherwise a second server on the port would silently take half of the calls
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", max_request_bytes),
        ("grpc.server_handshake_timeout_ms", 20_000),  # a new connection that says nothing is closed
        # A client that vanished without a word is noticed within 40 s, and its work ends.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # the one that is honoured
        # Clients may ask likewise, through long silences (a stream waits for its first token).
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
