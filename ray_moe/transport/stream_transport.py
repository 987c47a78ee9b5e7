"""Lines from a router to hosts: by Unix socket to those of its own node, by gRPC to all others.

On its own node, the router also shares memory with hosts. What stays on the node is in clear; streams over TCP are
encrypted where there is a certificate. The token is asked for on every line.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable

import torch

from ray_moe.errors import HostLost, Unauthenticated
from ray_moe.transport.connection import Carrier, StreamConnection
from ray_moe.transport.device_memory import DeviceArena
from ray_moe.transport.grpc_client import GrpcCarrier
from ray_moe.transport.settings import MemberCertificate, TransportSettings
from ray_moe.transport.socket_client import SocketCarrier
from ray_moe.types import HostAddress

_log = logging.getLogger(__name__)


class StreamTransport:
    """Makes lines to hosts. Thread-safe.

    `node_id` is the router's own node: it shares memory with hosts there, and reaches them by socket unless `sockets`
    is False. Where the socket cannot be reached (another container), gRPC is taken. With a `certificate`, hosts that
    are reached by gRPC must show one of the same authority, and streams to them are encrypted. `on_lost` is called
    once, from a thread of the connection and after its calls have failed, when an open line breaks by itself (not by
    `close`); it must not block.
    """

    def __init__(
        self,
        token: str,
        *,
        node_id: str = "",
        sockets: bool = True,
        settings: TransportSettings | None = None,
        certificate: MemberCertificate | None = None,
        on_lost: Callable[[HostAddress], None] | None = None,
    ) -> None:
        self._token = token
        self._certificate = certificate
        self._node_id = node_id
        self._sockets = sockets
        self._settings = settings or TransportSettings()
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._open: set[StreamConnection] = set()
        self._device_arena: weakref.ref[DeviceArena] | None = None
        """Of the connections there are; guarded by a lock of its own, since taking it takes time."""
        self._sharing = threading.Lock()
        self._distrusted: set[HostAddress] = set()

    def renew(self, token: str, certificate: MemberCertificate | None) -> None:
        """Greet hosts with these from now on: they are of another life of the service."""
        self._token, self._certificate = token, certificate

    def connect(self, address: HostAddress) -> StreamConnection:
        """Open a line to `address` within the connect time-out.

        Raises `HostLost` when it cannot be reached, another life of the host listens there or a certificate is not
        accepted (whoever has taken a dead host's port shows a wrong one), `Unauthenticated` when it does not accept the
        token, `WireError` when it speaks another version of the protocol.
        """
        if not (self._token.isascii() and self._token.isprintable()):
            raise Unauthenticated("the token cannot be sent: it must be printable ASCII, without line breaks")
        is_near = self._node_id != "" and address.node_id == self._node_id
        ways: list[Callable[[], Carrier]] = []
        if is_near and self._sockets and address.unix:
            ways.append(lambda: SocketCarrier(address.unix, self._settings))
        if address.tcp:
            ways.append(lambda: GrpcCarrier(address.tcp, self._settings, self._certificate))
        deadline = time.monotonic() + self._settings.connect_timeout_s
        arena = self._shared_arena() if is_near else None
        failures = []
        for position, make in enumerate(ways):
            timeout_s = (deadline - time.monotonic()) / (len(ways) - position)
            carrier = make()
            connection = StreamConnection(address, carrier, self._settings, is_near, arena, self._ended)
            try:
                connection.start(self._token, timeout_s)
            except HostLost as error:
                failures.append(f"{carrier.target}: {error}")
                self._tell_once(address, carrier, error)
                continue
            with self._lock:
                self._open.add(connection)
            if connection.is_lost:  # it ended before it was in the set
                self._ended(connection, by_itself=False)
            return connection
        raise HostLost(f"host {address.host_id} cannot be reached ({'; '.join(failures) or 'it has no address'})")

    def close(self) -> None:
        """Close every connection that is still open. Idempotent."""
        with self._lock:
            closing, self._open = self._open, set()
        for connection in closing:
            connection.close()

    def _shared_arena(self) -> DeviceArena | None:
        """Memory of the GPU for all hosts of this node; it goes with the last connection that has it."""
        settings = self._settings
        if not settings.device or settings.device_arena_bytes <= 0:
            return None
        with self._sharing:
            arena = None if self._device_arena is None else self._device_arena()
            if arena is None:
                try:
                    arena = DeviceArena(settings.device_arena_bytes, torch.device(settings.device))
                except OSError as error:  # no room, or not this platform: hidden states travel by way of the CPU
                    _log.warning("no shared GPU memory: %s", error)
                    return None
                self._device_arena = weakref.ref(arena)
            return arena

    def _tell_once(self, address: HostAddress, carrier: Carrier, error: HostLost) -> None:
        """Log that the ends do not trust each other: to those who retry, the host is only lost."""
        if carrier.is_distrusted and address not in self._distrusted:
            self._distrusted.add(address)
            _log.warning("%s", error)

    def _ended(self, connection: StreamConnection, by_itself: bool) -> None:
        with self._lock:
            self._open.discard(connection)
        if by_itself and self._on_lost is not None:
            self._on_lost(connection.address)
