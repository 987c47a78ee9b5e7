"""The host's end of the gRPC transport: a server in the actor's event loop, one stream for each router.

It checks who calls, decodes each call, hands it to `submit`, and sends the answers in the order in which they are
ready. It computes nothing and knows no expert. A broken or hostile stream is ended alone; the others go on.

With a certificate, what comes over TCP must be encrypted and show one of the same authority. The Unix socket is for
routers on this machine, which nothing leaves, and stays as it is. The token is asked for at both.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

from ray_moe.errors import InsufficientResources, RayMoEError, WireError
from ray_moe.transport import codec, frames, shared_memory
from ray_moe.transport.base import Submit
from ray_moe.transport.grpc_options import (
    ARENA_KEY,
    HELLO_ID,
    INCARNATION_KEY,
    METHOD,
    PROTOCOL_VERSION,
    SERVICE,
    TOKEN_KEY,
    TOKEN_PREFIX,
    VERSION_KEY,
    grpc,
    server_credentials,
    server_options,
)
from ray_moe.transport.settings import MemberCertificate, TransportSettings
from ray_moe.wire import tensors

_log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[bytes, bytes]

_FAREWELL_S = 1.0
"""How long `stop` waits until the routers have been told."""


class HostServer:
    """Receives the calls of every router, in the event loop that starts it.

    `incarnation` is the one of the host's `HostAddress`: a router that looks for another life is turned away. The
    tensors of a call may lie in memory that the router reuses once it has the answer: they are valid until `submit`
    returns, and must not be kept or written to.
    """

    def __init__(
        self,
        submit: Submit,
        token: str,
        *,
        incarnation: str = "",
        settings: TransportSettings | None = None,
        certificate: MemberCertificate | None = None,
    ) -> None:
        self._certificate = certificate
        self._submit = submit
        self._token = token.encode()
        self._incarnation = incarnation
        self._settings = settings or TransportSettings()
        self._server: grpc.aio.Server | None = None
        self._streams: dict[asyncio.Task[None], asyncio.Task[Any]] = {}
        """What reads and answers, and the call's own task, which then tells the router how it ended."""

    async def start(self, host_ip: str = "127.0.0.1", port: int = 0) -> tuple[str, str]:
        """Listen on `host_ip` (port 0 takes a free one) and on an abstract Unix socket.

        Returns what belongs into `HostAddress.tcp` and `.unix`. Raises `InsufficientResources` when the port is taken.
        """
        server = grpc.aio.server(options=server_options(self._settings))
        handler = grpc.stream_stream_rpc_method_handler(self._exchange)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        host = f"[{host_ip}]" if ":" in host_ip else host_ip
        unix = f"unix-abstract:ray-moe-{uuid.uuid4().hex}"
        try:
            tcp = f"{host}:{self._add_tcp_port(server, f'{host}:{port}')}"
        except RuntimeError as error:
            raise InsufficientResources(f"cannot listen on {host}:{port}: is the port in use? ({error})") from None
        try:
            server.add_insecure_port(unix)
        except RuntimeError:
            unix = ""  # not Linux: TCP serves everybody
        await server.start()
        self._server = server
        return tcp, unix

    def _add_tcp_port(self, server: grpc.aio.Server, address: str) -> int:
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
        stream = _Stream(context, self._submit, self._settings, shared_memory.attach(metadata.get(ARENA_KEY)))
        task = asyncio.create_task(stream.serve())
        self._streams[task] = cast("asyncio.Task[Any]", asyncio.current_task())
        task.add_done_callback(self._streams.pop)
        try:
            await task
        except _RouterGone:
            return
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except asyncio.CancelledError:
            if self._server is not None:
                raise  # the router went away
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the host is stopping")

    async def _admit(self, metadata: dict[str, Any], context: Context) -> None:
        """Turn away (by raising) whoever has no business here."""
        offered = str(metadata.get(TOKEN_KEY, "")).removeprefix(TOKEN_PREFIX).encode()
        if not hmac.compare_digest(offered, self._token):
            _log.warning("refused a stream from %s: its token is not that of this service", context.peer())
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "the token of the router is not the token of this host"
            )
        version = metadata.get(VERSION_KEY)
        if version != str(PROTOCOL_VERSION):
            await context.abort(
                grpc.StatusCode.UNIMPLEMENTED,
                f"this host speaks version {PROTOCOL_VERSION} of the protocol and the router {version}: "
                "run the same version of ray_moe everywhere",
            )
        wanted = metadata.get(INCARNATION_KEY)
        if self._incarnation and wanted and wanted != self._incarnation:
            await context.abort(grpc.StatusCode.NOT_FOUND, "another life of the host listens here now")


class _RouterGone(Exception):
    """The stream ended while something was to be written to it; `serve` sees the same and ends."""


class _Stream:
    """One router's stream, and the memory shared with that router, if any."""

    def __init__(
        self, context: Context, submit: Submit, settings: TransportSettings, shared: memoryview | None
    ) -> None:
        self._context = context
        self._submit = submit
        self._settings = settings
        self._shared = shared
        self._writing = asyncio.Lock()
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Read calls until the router goes away. Raises `WireError` when the frames make no sense."""
        assembler = frames.Assembler(self._settings.max_message_bytes)
        await self._send(HELLO_ID, (self._shared is not None,), ())
        try:
            while isinstance(frame := await self._context.read(), bytes):
                message = assembler.feed(frame)
                if message is None:
                    continue
                if message[0] in self._tasks:
                    raise WireError(f"message {message[0]} came again before it was answered")
                self._tasks[message[0]] = asyncio.create_task(self._answer(*message))
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, message_id: int, message: memoryview) -> None:
        try:
            await self._compute(message_id, message)
        except _RouterGone:
            _log.debug("a router went away before its answer")
        except Exception as error:  # whatever it is, the router hears it
            if not isinstance(error, RayMoEError):
                _log.exception("a call failed in an unexpected way")
            with contextlib.suppress(_RouterGone):
                await self._send(message_id, codec.failure_fields(error), ())
        finally:
            self._tasks.pop(message_id, None)

    async def _compute(self, message_id: int, message: memoryview) -> None:
        fields, specs, region = tensors.decode(message)
        if len(fields) != 2 or type(fields[0]) is not list:
            raise WireError("a call has a list of fields, and its place in shared memory or nil")
        call_fields, placement = fields
        room = None
        if placement is not None:
            region, room = self._find(placement, region)
        reply = await self._submit(codec.read_call(call_fields, specs, tensors.tensors_in(region, specs)))
        try:
            rows = reply.rows
            if room is not None and rows.nbytes <= len(room):
                spec = tensors.make_spec(rows.dtype, tuple(rows.shape))
                tensors.tensor_at(room, 0, spec).copy_(rows.detach())
                header = tensors.encode_header((codec.ROWS_IN_ROOM,), (spec,))
                await self._write(frames.frame(message_id, (header,), len(header)))
            else:
                await self._send(message_id, (codec.ROWS_FOLLOW,), (rows,))
        finally:
            reply.release()

    def _find(self, placement: object, inline: memoryview) -> tuple[memoryview, memoryview]:
        """Where the request lies and where the reply may go, as the router says; `inline` is what its message holds."""
        if type(placement) is not list or [type(number) for number in placement] != [int, int, int]:
            raise WireError("a place in shared memory is its offset, the request's bytes and the reply's bytes")
        offset, request_bytes, room_bytes = placement
        middle, end = offset + request_bytes, offset + request_bytes + room_bytes
        if self._shared is None or not 0 <= offset <= middle <= end <= len(self._shared):
            raise WireError(f"no shared memory reaches from byte {offset} to {end}")
        return self._shared[offset:middle] if request_bytes else inline, self._shared[middle:end]

    async def _send(self, message_id: int, fields: Sequence[Any], contents: codec.Tensors) -> None:
        buffers, num_bytes = tensors.encode(fields, contents)
        if num_bytes <= self._settings.chunk_bytes:
            await self._write(frames.frame(message_id, buffers, num_bytes))
        else:
            for frame in frames.cut(message_id, buffers, num_bytes, self._settings.chunk_bytes):
                await self._write(frame)

    async def _write(self, frame: bytes) -> None:
        async with self._writing:  # one frame at a time; frames of other answers may come in between
            try:
                await self._context.write(frame)
            except Exception as error:  # grpc has several for a stream that is over
                raise _RouterGone from error
