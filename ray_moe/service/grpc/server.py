"""The gRPC front door: one `grpc.aio` server over a `Backend`, in the caller's event loop.

It listens, admits, checks, maps errors and stops gracefully. It does not know what the backend does or where it runs.
Started by the composition root.
"""

from __future__ import annotations

import os
import socket

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read when grpc is loaded; its fork handlers crash children

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from ray_moe.errors import InsufficientResources
from ray_moe.service.admission import Admission
from ray_moe.service.backend import Backend
from ray_moe.service.grpc.admin import AdminService, HealthService
from ray_moe.service.grpc.credentials import server_credentials
from ray_moe.service.grpc.guard import Guard
from ray_moe.service.grpc.inference import InferenceService
from ray_moe.service.kserve.reflection import pool_of
from ray_moe.service.kserve.servicer import KServeService
from ray_moe.service.tls import TlsFiles
from ray_moe.wire.kserve import grpc_service_pb2
from ray_moe.wire.v1 import admin_pb2, inference_pb2

_PROTOS = (inference_pb2, admin_pb2, grpc_service_pb2, health_pb2, reflection_pb2)


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
            max_forward_tokens: of one Forward.
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
        self._admin = AdminService(backend, self._guard)
        known = (InferenceService.NAME, KServeService.NAME, AdminService.NAME)
        self._health = HealthService(self._guard, frozenset(known))
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Listen; returns the port, which the system chose if 0 was asked for.

        Requests are answered from now on, by `Unavailable` until the backend is ready.

        Raises:
            InsufficientResources: the port is in use, or cannot be had for another reason, which is named.
        """
        server = grpc.aio.server(options=_options(self._max_request_bytes))
        services = (self._inference, self._kserve, self._admin, self._health)
        server.add_generic_rpc_handlers([service.handler() for service in services])
        names = [service.NAME for service in services]
        pool = pool_of(*(proto.DESCRIPTOR for proto in _PROTOS))
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server, pool)
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            where = f"{host}:{self._port}"
            if self._tls is None:
                port = server.add_insecure_port(where)
            else:
                port = server.add_secure_port(where, server_credentials(self._tls))
        except RuntimeError as exc:
            raise InsufficientResources(
                f"cannot listen on {host}:{self._port}: {_why_not(self._host, self._port)}; stop what listens there, "
                "or choose another port (0 takes a free one) or another address of this machine"
            ) from exc
        await server.start()
        self._server = server
        return port

    async def stop(self, grace_s: float = 5.0) -> None:
        """Admit nothing more, give requests in flight `grace_s`, then cancel them. Idempotent."""
        self._admission.stopping = True
        if self._server is not None:
            await self._server.stop(grace_s)


def _options(max_request_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # otherwise a second server on the port would silently take half of the calls
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", max_request_bytes),
        # A client that vanished without a word is noticed within 40 s, and its work ends.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # the one that is honoured
        # Clients may ask likewise, through long silences (a stream waits for its first token).
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _why_not(host: str, port: int) -> str:
    """The system's own words; gRPC says only that it failed."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, port))
    except OSError as exc:
        return (exc.strerror or str(exc)).lower()
    return "the address cannot be bound"
