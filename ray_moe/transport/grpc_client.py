"""The router's end of the gRPC transport: one long-lived bidirectional stream to each host.

The synchronous API of grpc is used on purpose: it needs no event loop, so calls may come from any thread, and a
reply completes a `concurrent.futures.Future`, which engine threads wait on and coroutines wrap. A stream that breaks
is the failure detector: it fails every call in flight at once. Retrying is not done here (`runtime/moe_layer.py`).

With a certificate, streams over TCP are encrypted and each end checks the other's certificate. Unix sockets and shared
memory never leave the machine, and stay as they are; the token is asked for on every stream.
"""

from __future__ import annotations

import itertools
import logging
import re
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
    ARENA_KEY,
    HELLO_ID,
    INCARNATION_KEY,
    METHOD,
    PROTOCOL_VERSION,
    SERVICE,
    TOKEN_KEY,
    TOKEN_PREFIX,
    VERSION_KEY,
    channel_credentials,
    client_options,
    grpc,
)
from ray_moe.transport.settings import MemberCertificate, TransportSettings
from ray_moe.transport.shared_memory import Arena, Slot
from ray_moe.types import HostAddress
from ray_moe.wire import tensors

_log = logging.getLogger(__name__)

_JOIN_S = 1.0
"""How long `close` waits for the reader: not for ever, since a callback may wait for whoever closes."""

_DISTRUST = re.compile("handshake failed|verification check failed|socket closed", re.IGNORECASE)
"""What grpc says when the ends do not agree about encryption or certificates. One that is refused hears no reason."""


class GrpcTransport:
    """Makes gRPC connections to hosts. Thread-safe.

    `node_id` is the router's own node: hosts on it are reached by Unix socket and share memory with it. With a
    `certificate`, all others must show one of the same authority, and streams to them are encrypted. `on_lost` is
    called once, from a thread of the connection and after its calls have failed, when an open stream breaks by itself
    (not by `close`); it must not block.
    """

    def __init__(
        self,
        token: str,
        *,
        node_id: str = "",
        settings: TransportSettings | None = None,
        certificate: MemberCertificate | None = None,
        on_lost: Callable[[HostAddress], None] | None = None,
    ) -> None:
        self._token = token
        self._certificate = certificate
        self._node_id = node_id
        self._settings = settings or TransportSettings()
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._open: set[GrpcConnection] = set()
        self._distrusted: set[HostAddress] = set()

    def connect(self, address: HostAddress) -> GrpcConnection:
        """Open a stream to `address` within the connect time-out.

        Raises `HostLost` when it cannot be reached, another life of the host listens there or a certificate is not
        accepted (whoever has taken a dead host's port shows a wrong one), `Unauthenticated` when it does not accept the
        token, `WireError` when it speaks another version of the protocol.
        """
        if not (self._token.isascii() and self._token.isprintable()):
            raise Unauthenticated("the token cannot be sent: it must be printable ASCII, without line breaks")
        same_node = self._node_id != "" and address.node_id == self._node_id
        targets = [target for target in (address.unix if same_node else "", address.tcp) if target]
        deadline = time.monotonic() + self._settings.connect_timeout_s
        failures = []
        for position, target in enumerate(targets):
            timeout_s = (deadline - time.monotonic()) / (len(targets) - position)
            certificate = self._certificate if target == address.tcp else None
            connection = GrpcConnection(address, target, self._settings, same_node, certificate, self._ended)
            try:
                connection.start(self._token, timeout_s)
            except HostLost as error:
                failures.append(f"{target}: {error}")
                self._tell_once(connection, error)
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

    def _tell_once(self, connection: GrpcConnection, error: HostLost) -> None:
        """Log that the ends do not trust each other: to those who retry, the host is only lost."""
        if connection.is_distrusted and connection.address not in self._distrusted:
            self._distrusted.add(connection.address)
            _log.warning("%s", error)

    def _ended(self, connection: GrpcConnection, by_itself: bool) -> None:
        with self._lock:
            self._open.discard(connection)
        if by_itself and self._on_lost is not None:
            self._on_lost(connection.address)


@dataclass(slots=True)
class _InFlight:
    """A call that was sent and has not been answered. Its slot stays taken until then, even when nobody waits any
    more: the host may still write there."""

    future: Future[ExpertReply]
    num_rows: int
    slot: Slot | None


class GrpcConnection:
    """One stream to one life of a host. Thread-safe; made by `GrpcTransport.connect`."""

    def __init__(
        self,
        address: HostAddress,
        target: str,
        settings: TransportSettings,
        share_memory: bool,
        certificate: MemberCertificate | None,
        on_end: Callable[[GrpcConnection, bool], None],
    ) -> None:
        self.address = address
        self.target = target
        self.is_encrypted = certificate is not None
        self.is_distrusted = False
        """Whether it failed because one end did not accept the other, as far as one can tell."""
        self._settings = settings
        self._on_end = on_end
        self._outbox: SimpleQueue[bytes | Iterator[bytes] | None] = SimpleQueue()
        self._ids = itertools.count(HELLO_ID + 1)
        self._hello: Future[None] = Future()
        self._lock = threading.Lock()
        self._in_flight: dict[int, _InFlight] = {}
        self._end: str | None = None  # why the stream is over; guarded by _lock, like _in_flight
        self._arena = _make_arena(settings.arena_bytes) if share_memory else None
        options = client_options(settings)
        if certificate is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            options.append(("grpc.ssl_target_name_override", certificate.name))
            self._channel = grpc.secure_channel(target, channel_credentials(certificate), options)

    def start(self, token: str, timeout_s: float) -> None:
        """Open the stream and wait for the host's first message. On any error the connection is closed."""
        metadata: tuple[tuple[str, str | bytes], ...] = (
            (TOKEN_KEY, TOKEN_PREFIX + token),
            (VERSION_KEY, str(PROTOCOL_VERSION)),
            (INCARNATION_KEY, self.address.incarnation),
        )
        if self._arena is not None:
            metadata += ((ARENA_KEY, self._arena.offer),)
        exchange = self._channel.stream_stream(f"/{SERVICE}/{METHOD}", None, None)  # no serializer: bytes
        self._stream = exchange(self._requests(), metadata=metadata)
        self._reader = threading.Thread(target=self._read, name=f"replies-{self.address.host_id}", daemon=True)
        self._reader.start()
        try:
            self._hello.result(max(timeout_s, 0.0))
        except FutureTimeoutError:
            self.close()
            raise HostLost(f"no answer within {timeout_s:.1f} s") from None

    @property
    def shares_memory(self) -> bool:
        """Whether large payloads lie in memory shared with the host."""
        return self._arena is not None

    @property
    def is_lost(self) -> bool:
        return self._end is not None

    def submit(self, call: ExpertCall) -> Future[ExpertReply]:
        """Send `call`. Its tensors must not change until the future is done."""
        future: Future[ExpertReply] = Future()
        message_id = next(self._ids)
        num_rows = codec.num_reply_rows(call)
        slot = self._take_slot(call, num_rows)
        try:
            message = self._encode(message_id, call, slot)
        except Exception as error:
            if slot is not None:
                slot.free()
            if not isinstance(error, WireError):
                raise
            future.set_exception(error)
            return future
        with self._lock:
            end = self._end
            if end is None:
                self._in_flight[message_id] = _InFlight(future, num_rows, slot)
                self._outbox.put(message)
        if end is not None:
            future.set_exception(HostLost(end))
        return future

    def close(self) -> None:
        self._finish("it was closed here", by_itself=False)
        if threading.current_thread() is not self._reader:
            self._reader.join(_JOIN_S)

    # --- Sending ---------------------------------------------------------------------------------------------
    def _take_slot(self, call: ExpertCall, num_reply_rows: int) -> Slot | None:
        """Shared memory for what is large of `call` and its reply; None to send it inline."""
        arena = self._arena
        if arena is None:
            return None
        inline_bytes = self._settings.inline_bytes
        row_bytes = call.hidden.shape[-1] * call.hidden.itemsize
        room_bytes = num_reply_rows * row_bytes
        request_bytes = (call.num_tokens + (0 if call.grad is None else call.num_rows)) * row_bytes
        if request_bytes < inline_bytes and room_bytes < inline_bytes:
            return None
        request_bytes = tensors.region_bytes(codec.call_specs(call)) if request_bytes >= inline_bytes else 0
        room_bytes = room_bytes if room_bytes >= inline_bytes else 0
        # Where both do not fit, the larger alone may.
        return arena.allocate(request_bytes, room_bytes) or (
            arena.allocate(request_bytes, 0) if request_bytes > room_bytes else arena.allocate(0, room_bytes)
        )

    def _encode(self, message_id: int, call: ExpertCall, slot: Slot | None) -> bytes | Iterator[bytes]:
        fields = (codec.call_fields(call), None if slot is None else slot.placement)
        if slot is not None and slot.request:
            specs = codec.call_specs(call)
            header = tensors.encode_header(fields, specs)
            codec.write_call(call, tensors.tensors_in(slot.request, specs))
            return frames.frame(message_id, (header,), len(header))
        buffers, num_bytes = tensors.encode(fields, codec.call_tensors(call))
        if num_bytes > self._settings.max_message_bytes:
            raise WireError(f"a call of {num_bytes} bytes, where {self._settings.max_message_bytes} are allowed")
        if num_bytes <= self._settings.chunk_bytes:
            return frames.frame(message_id, buffers, num_bytes)
        return frames.cut(message_id, buffers, num_bytes, self._settings.chunk_bytes)

    def _requests(self) -> Iterator[bytes]:
        """What grpc sends, when it asks; long messages take turns, frame by frame, and short ones pass them."""
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
        reason = "the host ended it"
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
            self._welcome(message)
            return
        with self._lock:
            call = self._in_flight.pop(message_id, None)
        if call is None:
            return
        try:
            reply = _read_reply(message, call.num_rows, call.slot)
        except RayMoEError as error:
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(error)
        else:
            if call.future.set_running_or_notify_cancel():
                call.future.set_result(reply)
            else:
                reply.release()

    def _welcome(self, hello: memoryview) -> None:
        fields, _, _ = tensors.decode(hello)
        if self._hello.done() or len(fields) != 1:
            raise WireError("a host says hello once, and whether it shares memory")
        if self._arena is not None:
            self._arena.close_file()
            if not fields[0]:
                self._arena = None
        self._hello.set_result(None)

    def _explain(self, error: grpc.RpcError) -> str:
        """Why the stream ended. What the host said on purpose, instead of hello, becomes the error of `start`."""
        code, details = error.code(), error.details()
        if not self._hello.done():
            if code is grpc.StatusCode.UNAUTHENTICATED:
                self._hello.set_exception(Unauthenticated(details))
            elif code is grpc.StatusCode.UNIMPLEMENTED:
                self._hello.set_exception(WireError(details))
            elif self.target == self.address.tcp and _DISTRUST.search(details or ""):
                self.is_distrusted = True
                details = f"{details}; {self._advice}"
        return f"{code.name}: {details}"

    @property
    def _advice(self) -> str:
        if self.is_encrypted:
            return "no encrypted line: both ends need transport.tls, and certificates of one authority and one name"
        return "perhaps the host expects an encrypted line (transport.tls), and this router has no certificate"

    # --- The end ---------------------------------------------------------------------------------------------
    def _finish(self, reason: str, by_itself: bool) -> None:
        with self._lock:
            if self._end is not None:
                return
            end = self._end = f"the stream to host {self.address.host_id} ended: {reason}"
            lost, self._in_flight = self._in_flight, {}
        for call in lost.values():
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(HostLost(end))  # each its own: raised, it holds on to the waiter's frames
        self._outbox.put(None)
        self._stream.cancel()  # type: ignore[no-untyped-call]  # grpc-stubs forgot
        self._channel.close()
        if self._arena is not None:
            self._arena.close_file()
            self._arena = None
        was_open = self._hello.done() and self._hello.exception() is None
        if not self._hello.done():
            self._hello.set_exception(HostLost(end))
        self._on_end(self, by_itself and was_open)


def _make_arena(num_bytes: int) -> Arena | None:
    if num_bytes <= 0:
        return None
    try:
        return Arena(num_bytes)
    except (OSError, AttributeError) as error:  # no memory, or not Linux: everything travels inline
        _log.warning("no shared memory for payloads: %s", error)
        return None


def _read_reply(message: memoryview, num_rows: int, slot: Slot | None) -> ExpertReply:
    """The reply, which owns the slot from now on. Raises what the host answered instead; then the slot is free."""
    try:
        fields, specs, region = tensors.decode(message)
        spec, in_room = codec.read_reply(fields, specs, num_rows)
        if not in_room:
            reply = ExpertReply(tensors.tensor_in(region, spec))
        elif slot is None:
            raise WireError("the host answered in shared memory where none was offered")
        else:
            reply, slot = ExpertReply(slot.rows(spec), slot.free), None
        return reply
    finally:
        if slot is not None:
            slot.free()
