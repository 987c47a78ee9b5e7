"""The OpenAI-compatible HTTP front door: one uvicorn server over a `Backend`, in the caller's event loop.

It listens and stops gracefully; what is served is `app.py`. It leaves signals and logging as they are. Started by the
composition root.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn

from ray_moe.errors import InsufficientResources
from ray_moe.service import ports
from ray_moe.service.admission import Admission
from ray_moe.service.backend import Backend
from ray_moe.service.openai.app import make_app
from ray_moe.service.openai.jobs import RequestLimits
from ray_moe.service.openai.protocol import ImpatientProtocol
from ray_moe.service.tls import TlsFiles, server_context

KEEP_ALIVE_S = 75
"""How long an idle connection is kept: longer than proxies and clients keep theirs, so that none is cut in use."""

FLUSH_S = 2.0
"""How long clients are given, after all work has ended, to take what they were told."""


class HttpFrontDoor:
    """The server: `start`, and later `stop`, in one event loop."""

    def __init__(
        self,
        backend: Backend,
        host: str = "127.0.0.1",
        port: int = 8477,
        *,
        admission: Admission | None = None,
        limits: RequestLimits | None = None,
        max_metric_experts: int = 32,
        tls: TlsFiles | None = None,
    ) -> None:
        """Listens nowhere yet.

        Args:
            backend: what does the work.
            host: address to listen on; ``0.0.0.0`` is every interface.
            port: TCP port; 0 takes a free one.
            admission: shared with other doors of the router; None: its own, with nothing set.
            limits: of one request.
            max_metric_experts: experts that have a metric of their own.
            tls: certificate to encrypt with; None: no encryption.
        """
        self._tls = tls
        self._host = host
        self._port = port
        self._limits = limits or RequestLimits()
        self._admission = admission or Admission(backend)
        self._app = make_app(backend, self._admission, self._limits, max_metric_experts)
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen; returns the port, which is a free one if 0 was asked for.

        Requests are answered from now on, by 503 until the backend is ready.

        Raises:
            InsufficientResources: the port is in use, or cannot be had for another reason, which is named.
        """
        tls, listener = self._tls, await ports.listen(self._host, self._port, self._listen)
        config = uvicorn.Config(
            self._app,
            http=partial(ImpatientProtocol, read_timeout_s=self._limits.read_timeout_s),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            ssl_context_factory=None if tls is None else lambda config, default: server_context(tls),
        )
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve([listener]))
        return int(listener.getsockname()[1])

    async def stop(self, grace_s: float = 5.0) -> None:
        """Admit nothing more, give requests in flight `grace_s`, then end them with an error. Idempotent."""
        self._admission.stopping = True
        server, serving = self._server, self._serving
        if server is None or serving is None:
            return
        server.config.timeout_graceful_shutdown = math.ceil(grace_s + FLUSH_S)
        server.should_exit = True
        if grace_s > 0:
            idle = asyncio.ensure_future(self._admission.idle.wait())
            await asyncio.wait([idle], timeout=grace_s)
            idle.cancel()
        self._admission.ending.set()
        await asyncio.wait([serving])
        await server.hang_up()
        serving.result()

    async def _listen(self, port: int) -> socket.socket:
        """A socket that listens; the first of the host's addresses that can be had."""
        loop = asyncio.get_running_loop()
        why: Exception | None = None
        try:
            found = await loop.getaddrinfo(self._host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError, OverflowError) as error:
            found, why = [], error
        for family, kind, protocol, _, address in found:
            listener = socket.socket(family, kind, protocol)
            try:
                # A port is free again as soon as its server has ended; on Linux two servers can still not share one.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self._host != "::")
                listener.bind(address)
                listener.listen(1024)
            except (OSError, OverflowError) as error:
                listener.close()
                why = error
            else:
                listener.setblocking(False)
                return listener
        host = f"[{self._host}]" if ":" in self._host else self._host
        words = why.strerror if isinstance(why, OSError) and why.strerror else str(why)
        raise InsufficientResources(
            f"cannot listen on {host}:{port}: {words.lower()}; stop what listens there, "
            "or choose another port (0 takes a free one) or another address of this machine"
        ) from why


class _Server(uvicorn.Server):
    """uvicorn's server as a part of a process that has signal handlers of its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def hang_up(self) -> None:
        """Close what is still open: clients that do not read."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.gather(*self.server_state.tasks, return_exceptions=True)
