"""The router's end of the gRPC transport: one long-lived bidirectional stream to each host.

The synchronous API of grpc is used on purpose: it needs no event loop, so calls may come from any thread, and a
reply completes a `concurrent.futures.Future`, which engine threads wait on and coroutines wrap. A stream that breaks
is the failure detector: it fails every call in flight at once. Retrying is not done here (`runtime/moe_layer.py`).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from ray_moe.errors import HostLost, RayMoEError, Unauthenticated, WireError
from ray_moe.transport import codec, frames
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.transport.grpc_options import (
    HELLO_ID,
    INCARNATION_KEY,
    METHOD,
    PROTOCOL_VERSION,
    SERVICE,
    TOKEN_KEY,
    TOKEN_PREFIX,
    VERSION_KEY,
    client_options,
    grpc,
)
from ray_moe.transport.settings import TransportSettings
from ray_moe.types import HostAddress
from ray_moe.wire import tensors
from ray_moe.wire.tensors import TensorSpec

_log = logging.getLogger(__name__)

OnLost = Callable[[HostAddress], None]


class GrpcTransport:
    """Makes gRPC connections to hosts. Thread-safe.

    `node_id` is the router's own node: hosts on it are reached by Unix socket. `on_lost` is called once, from a thread
    of the connection, when an open stream breaks by itself (not by `close`); it must not block.
    """

    def __init__(
        self,
        token: str,
        *,
        node_id: str = "",
        settings: TransportSettings | None = None,
        on_lost: OnLost | None = None,
    ) -> None:
        self._token = token
        self._node_id = node_id
        self._settings = settings or TransportSettings()
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._open: set[GrpcConnection] = set()

    def connect(self, address: HostAddress) -> GrpcConnection:
        """Open a stream to `address` within the connect time-out.

        Raises `HostLost` when it cannot be reached or another life of the host listens there, `Unauthenticated` when it
        does not accept the token, `WireError` when it speaks another version of the protocol.
        """
        targets = [address.tcp]
        if address.unix and address.node_id == self._node_id:
            targets.insert(0, address.unix)
        deadline = time.monotonic() + self._settings.connect_timeout_s
        failures = []
        for position, target in enumerate(targets):
            timeout_s = (deadline - time.monotonic()) / (len(targets) - position)
            connection = GrpcConnection(address, target, self._settings, self._lost)
            try:
                connection.start(self._token, timeout_s)
            except HostLost as error:
                failures.append(f"{target}: {error}")
                continue
            with self._lock:
                self._open.add(connection)
            return connection
        raise HostLost(f"host {address.host_id} cannot be reached ({'; '.join(failures)})")

    def close(self) -> None:
        """Close every connection that is still open. Idempotent."""
        with self._lock:
            closing, self._open = self._open, set()
        for connection in closing:
            connection.close()

    def _lost(self, connection: GrpcConnection, by_itself: bool) -> None:
        with self._lock:
            self._open.discard(connection)
        if by_itself and self._on_lost is not None:
            self._on_lost(connection.address)


@dataclass(slots=True)
class _InFlight:
    """A call that was sent and has not been answered."""

    future: Future[ExpertReply]
    expected: TensorSpec


class GrpcConnection:
    """One stream to one life of a host. Thread-safe; made by `GrpcTransport.connect`."""

    def __init__(
        self,
        address: HostAddress,
        target: str,
        settings: TransportSettings,
        on_end: Callable[[GrpcConnection, bool], None],
    ) -> None:
        self.address = address
        self.target = target
        self._settings = settings
        self._on_end = on_end
        self._outbox: SimpleQueue[bytes | Iterator[bytes] | None] = SimpleQueue()
        self._ids = itertools.count(HELLO_ID + 1)
        self._hello: Future[None] = Future()
        self._lock = threading.Lock()
        self._in_flight: dict[int, _InFlight] = {}
        self._end: HostLost | None = None  # guarded by _lock, like _in_flight
        self._channel = grpc.insecure_channel(target, client_options(settings))

    def start(self, token: str, timeout_s: float) -> None:
        """Open the stream and wait for the host's first message. On any error the connection is closed."""
        metadata = (
            (TOKEN_KEY, TOKEN_PREFIX + token),
            (VERSION_KEY, str(PROTOCOL_VERSION)),
            (INCARNATION_KEY, self.address.incarnation),
        )
        exchange = self._channel.stream_stream(f"/{SERVICE}/{METHOD}", None, None)  # no serializer: bytes
        self._stream = exchange(self._requests(), metadata=metadata)
        name = f"replies-{self.address.host_id}"
        self._reader = threading.Thread(target=self._read, name=name, daemon=True)
        self._reader.start()
        try:
            self._hello.result(max(timeout_s, 0.0))
        except FutureTimeoutError:
            self.close()
            raise HostLost(f"no answer within {timeout_s:.1f} s") from None

    def submit(self, call: ExpertCall) -> Future[ExpertReply]:
        """Send `call`. Its tensors must not change until the future is done."""
        future: Future[ExpertReply] = Future()
        message_id = next(self._ids)
        try:
            message = self._encode(message_id, call)
        except WireError as error:
            future.set_exception(error)
            return future
        with self._lock:
            end = self._end
            if end is None:
                self._in_flight[message_id] = _InFlight(future, codec.reply_spec(call))
                self._outbox.put(message)
        if end is not None:
            future.set_exception(end)
        return future

    def close(self) -> None:
        self._finish("the connection was closed", by_itself=False)
        if threading.current_thread() is not self._reader:
            self._reader.join()

    # --- Sending ---------------------------------------------------------------------------------------------
    def _encode(self, message_id: int, call: ExpertCall) -> bytes | Iterator[bytes]:
        specs = codec.call_specs(call)
        header = tensors.encode_header(codec.call_fields(call), specs)
        buffers = [header, *tensors.region_of(codec.call_tensors(call))]
        num_bytes = len(header) + tensors.region_bytes(specs)
        if num_bytes <= self._settings.chunk_bytes:
            return frames.frame(message_id, buffers, num_bytes)
        return frames.cut(message_id, buffers, num_bytes, self._settings.chunk_bytes)

    def _requests(self) -> Iterator[bytes]:
        """What grpc sends, in the order it asks; long messages take turns, frame by frame, and short ones pass them."""
        long: deque[Iterator[bytes]] = deque()
        while True:
            try:
                message = self._outbox.get(block=not long)
            except Empty:
                pass
            else:
                if message is None:
                    return
                if isinstance(message, bytes):
                    yield message
                    continue
                long.append(message)
            turn = long.popleft()
            frame = next(turn, None)
            if frame is not None:
                long.append(turn)
                yield frame

    # --- Receiving -------------------------------------------------------------------------------------------
    def _read(self) -> None:
        assembler = frames.Assembler(self._settings.max_message_bytes)
        reason = "the host closed the stream"
        try:
            for frame in self._stream:
                message = assembler.feed(frame)
                if message is not None:
                    self._received(*message)
        except grpc.RpcError as error:
            reason = self._explain(error)
        except WireError as error:
            reason = f"the host sent what cannot be understood: {error}"
        finally:
            self._finish(reason, by_itself=True)

    def _received(self, message_id: int, message: memoryview) -> None:
        if message_id == HELLO_ID:
            self._hello.set_result(None)
            return
        with self._lock:
            call = self._in_flight.pop(message_id, None)
        if call is None or not call.future.set_running_or_notify_cancel():
            return
        try:
            call.future.set_result(self._reply(call, message))
        except RayMoEError as error:
            call.future.set_exception(error)

    def _reply(self, call: _InFlight, message: memoryview) -> ExpertReply:
        fields, specs, region = tensors.decode_header(message)
        if fields:
            raise codec.read_failure(fields)
        return ExpertReply(codec.read_reply(tensors.tensors_in(region, specs), call.expected))

    def _explain(self, error: grpc.RpcError) -> str:
        """Why the stream ended. An error that the host gave on purpose, before its hello, is kept for `start`."""
        code, details = error.code(), error.details()
        if not self._hello.done():
            if code is grpc.StatusCode.UNAUTHENTICATED:
                self._hello.set_exception(Unauthenticated(details))
            elif code is grpc.StatusCode.UNIMPLEMENTED:
                self._hello.set_exception(WireError(details))
        return f"{code.name}: {details}"

    # --- The end ---------------------------------------------------------------------------------------------
    def _finish(self, reason: str, by_itself: bool) -> None:
        with self._lock:
            if self._end is not None:
                return
            end = self._end = HostLost(f"the stream to host {self.address.host_id} ended: {reason}")
            lost, self._in_flight = self._in_flight, {}
        for call in lost.values():
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(end)
        self._outbox.put(None)
        self._stream.cancel()  # type: ignore[no-untyped-call]  # grpc-stubs forgot
        self._channel.close()
        established = self._hello.done() and self._hello.exception() is None
        if not self._hello.done():
            self._hello.set_exception(end)
        self._on_end(self, by_itself and established)
