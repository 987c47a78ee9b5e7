"""The host's end of Unix sockets: a server in the actor's event loop, one socket for each router on this node.

It checks who connects; what comes then is answered by a `HostStream`. A broken or hostile line is ended alone; the
others go on. Whoever does not say hello in time is sent away, and of a router that does not take its answers no more
calls are read.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import uuid

from ray_moe.errors import HostLost, RayMoEError, WireError
from ray_moe.transport import codec, frames
from ray_moe.transport.base import Submit
from ray_moe.transport.hello import HELLO_ID, MAX_HELLO_BYTES, STOPPING, Doorkeeper, read_hello
from ray_moe.transport.host_stream import HostStream, RouterGone
from ray_moe.transport.settings import TransportSettings
from ray_moe.transport.sockets import Peer
from ray_moe.wire import tensors

_log = logging.getLogger(__name__)

_FAREWELL_S = 1.0
"""How long `stop`, and a refusal, wait until the router has been told."""

_BACKLOG = 128

_MAX_UNREAD = 64
"""Calls that a router may have open while it takes no answers; then no more are read."""


class SocketServer:
    """Receives the calls of routers on this node, in the event loop that starts it."""

    def __init__(self, submit: Submit, doorkeeper: Doorkeeper, settings: TransportSettings) -> None:
        self.submit = submit
        self.doorkeeper = doorkeeper
        self.settings = settings
        self.lines: set[_Line] = set()
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> str:
        """Listen. Returns what belongs into `HostAddress.unix`: empty where there are no such sockets (not Linux)."""
        if sys.platform != "linux":
            return ""
        name = f"ray-moe-{uuid.uuid4().hex}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind("\0" + name)
        except OSError as error:  # a sandbox that has none
            listener.close()
            _log.warning("no Unix socket for routers on this node: %s", error)
            return ""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Line(self), sock=listener, backlog=_BACKLOG)
        return name

    async def stop(self) -> None:
        """End every line (calls in flight are cancelled) and stop listening. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        leaving = [asyncio.create_task(line.leave(HostLost(STOPPING))) for line in self.lines]
        if leaving:
            await asyncio.wait(leaving, timeout=_FAREWELL_S)
        for line in self.lines.copy():
            line.abort()
        await asyncio.gather(*leaving)
        await server.wait_closed()


class _Line(asyncio.BufferedProtocol):
    """One socket, to a router or to whoever connected."""

    def __init__(self, server: SocketServer) -> None:
        self._server = server
        self._bytes = frames.ByteStream(MAX_HELLO_BYTES)
        self._stream: HostStream | None = None
        """None before the router has been let in."""
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._writing = asyncio.Lock()
        self._over = asyncio.Event()

    # --- life ------------------------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._server.lines.add(self)
        self._peer = Peer.of(transport.get_extra_info("socket"))
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._server.settings.connect_timeout_s, transport.abort)  # type: ignore[attr-defined]
        if not self._peer.is_trusted:
            _log.warning("refused %s, which is another user than this host's", self._peer)
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._deadline.cancel()
        self._may_write.set()
        self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        if self._stream is not None:
            await self._stream.end()
            self._stream = None  # it has the shared memory, and this in a circle
        self._server.lines.discard(self)
        self._over.set()

    async def leave(self, error: RayMoEError) -> None:
        """Tell the router why, and end the line; returns when nothing of it is left, what was not answered included."""
        if not self._transport.is_closing():
            message = tensors.encode_header(codec.failure_fields(error), ())
            self._transport.write(frames.frame(HELLO_ID, (message,), len(message)))
            self._transport.close()
        await self._over.wait()

    def abort(self) -> None:
        self._transport.abort()

    # --- receiving -------------------------------------------------------------------------------------------
    def get_buffer(self, sizehint: int) -> memoryview:
        return self._bytes.space()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for message_id, message in self._bytes.received(nbytes):
                if self._stream is None:
                    self._admit(message_id, message)
                elif not self._transport.is_closing():
                    self._stream.take(message_id, message)
        except RayMoEError as error:
            self._refuse(error)
        else:
            if self._stream is not None and self._stream.num_open >= _MAX_UNREAD and not self._may_write.is_set():
                self._transport.pause_reading()

    def _admit(self, message_id: int, message: memoryview) -> None:
        if message_id != HELLO_ID:
            raise WireError("a router says hello first")
        hello = read_hello(message)
        self._server.doorkeeper.check(hello.token, hello.version, hello.incarnation, self._peer)
        self._deadline.cancel()
        settings = self._server.settings
        self._bytes.assembler.max_message_bytes = settings.max_message_bytes
        self._stream = HostStream(self, self._server.submit, settings, hello.arena, hello.device_arena)
        self._transport.write(self._stream.hello())

    def _refuse(self, error: RayMoEError) -> None:
        self._deadline.cancel()
        self._deadline = asyncio.get_running_loop().call_later(_FAREWELL_S, self.abort)
        self._refusing = asyncio.ensure_future(self.leave(error))

    # --- sending ---------------------------------------------------------------------------------------------
    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def write_now(self, frame: bytes) -> bool:
        if not self._may_write.is_set() or self._writing.locked():
            return False
        if self._transport.is_closing():
            raise RouterGone
        self._transport.write(frame)
        return True

    async def write(self, frame: bytes) -> None:
        if not self.write_now(frame):
            async with self._writing:  # they line up, frame by frame
                await self._may_write.wait()
                if self._transport.is_closing():
                    raise RouterGone
                self._transport.write(frame)
