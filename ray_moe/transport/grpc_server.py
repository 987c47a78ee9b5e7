"""The host's end of gRPC streams: a server in the actor's event loop, one stream for each router on another node.

It checks who calls; what comes then is answered by a `HostStream`. A broken or hostile stream is ended alone; the
others go on. With a certificate, what comes must be encrypted and show one of the same authority.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

from ray_moe.errors import HostLost, InsufficientResources, RayMoEError, Unauthenticated, WireError
from ray_moe.transport import frames
from ray_moe.transport.base import Submit
from ray_moe.transport.grpc_options import (
    ARENA_KEY,
    DEVICE_ARENA_KEY,
    INCARNATION_KEY,
    METHOD,
    SERVICE,
    TOKEN_KEY,
    TOKEN_PREFIX,
    VERSION_KEY,
    grpc,
    server_credentials,
    server_options,
)
from ray_moe.transport.hello import STOPPING, Doorkeeper
from ray_moe.transport.host_stream import HostStream, RouterGone
from ray_moe.transport.settings import MemberCertificate, TransportSettings

Context = grpc.aio.ServicerContext[bytes, bytes]

_FAREWELL_S = 1.0
"""How long `stop` waits until the routers have been told."""

_REFUSALS = {
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    WireError: grpc.StatusCode.UNIMPLEMENTED,
    HostLost: grpc.StatusCode.NOT_FOUND,
}


class GrpcServer:
    """Receives the calls of routers over TCP, in the event loop that starts it."""

    def __init__(
        self,
        submit: Submit,
        doorkeeper: Doorkeeper,
        settings: TransportSettings,
        certificate: MemberCertificate | None,
    ) -> None:
        self._certificate = certificate
        self._submit = submit
        self._doorkeeper = doorkeeper
        self._settings = settings
        self._server: grpc.aio.Server | None = None
        self._streams: dict[asyncio.Task[None], asyncio.Task[Any]] = {}
        """What reads and answers, and the call's own task, which then tells the router how it ended."""

    async def start(self, host_ip: str, port: int) -> str:
        """Listen on `host_ip` (port 0 takes a free one). Returns what belongs into `HostAddress.tcp`.

        Raises `InsufficientResources` when the port is taken.
        """
        server = grpc.aio.server(options=server_options(self._settings))
        handler = grpc.stream_stream_rpc_method_handler(self._exchange)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        host = f"[{host_ip}]" if ":" in host_ip else host_ip
        try:
            tcp = f"{host}:{self._add_port(server, f'{host}:{port}')}"
        except RuntimeError as error:
            raise InsufficientResources(f"cannot listen on {host}:{port}: is the port in use? ({error})") from None
        await server.start()
        self._server = server
        return tcp

    def _add_port(self, server: grpc.aio.Server, address: str) -> int:
        if self._certificate is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, server_credentials(self._certificate))

    async def stop(self) -> None:
        """End every stream (calls in flight are cancelled) and stop listening. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        # Streams end by themselves first: those that grpc cancels leave a traceback here, and hear no reason there.
        calls = list(self._streams.values())
        for stream in self._streams:
            stream.cancel()
        if calls:
            await asyncio.wait(calls, timeout=_FAREWELL_S)
        await server.stop(None)

    async def _exchange(self, _: AsyncIterator[bytes], context: Context) -> None:
        metadata = dict(context.invocation_metadata() or ())
        await self._admit(metadata, context)
        offers = [metadata.get(key) for key in (ARENA_KEY, DEVICE_ARENA_KEY)]
        arena, device_arena = [offer if isinstance(offer, bytes) else None for offer in offers]
        task = asyncio.create_task(self._serve(context, arena, device_arena))
        self._streams[task] = cast("asyncio.Task[Any]", asyncio.current_task())
        task.add_done_callback(self._streams.pop)
        try:
            await task
        except RouterGone:
            return
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except asyncio.CancelledError:
            if self._server is not None:
                raise  # the router went away
            await context.abort(grpc.StatusCode.UNAVAILABLE, STOPPING)

    async def _admit(self, metadata: dict[str, Any], context: Context) -> None:
        """Turn away (by raising) whoever has no business here."""
        token = str(metadata.get(TOKEN_KEY, "")).removeprefix(TOKEN_PREFIX)
        try:
            self._doorkeeper.check(token, metadata.get(VERSION_KEY), metadata.get(INCARNATION_KEY), context.peer())
        except RayMoEError as error:
            await context.abort(_REFUSALS[type(error)], str(error))

    async def _serve(self, context: Context, arena: bytes | None, device_arena: bytes | None) -> None:
        """Read calls until the router goes away. Raises `WireError` when the frames make no sense."""
        assembler = frames.Assembler(self._settings.max_message_bytes)
        outlet = _Outlet(context)
        stream = HostStream(outlet, self._submit, self._settings, arena, device_arena)
        await outlet.write(stream.hello())
        try:
            while isinstance(frame := await context.read(), bytes):
                message = assembler.feed(frame)
                if message is not None:
                    stream.take(*message)
        finally:
            await stream.end()


class _Outlet:
    """One stream's way to its router."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._writing = asyncio.Lock()

    def write_now(self, frame: bytes) -> bool:  # grpc has only the other way
        return False

    async def write(self, frame: bytes) -> None:
        try:
            async with self._writing:
                await self._context.write(frame)
        except Exception as error:  # grpc has several for a stream that is over
            raise RouterGone from error
