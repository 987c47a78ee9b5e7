"""The router's end of a line to a host: calls, their numbers and their shared memory, whichever way messages travel.

A line that breaks is the failure detector: it fails every call in flight at once. Retrying is not done here
(`runtime/moe_layer.py`). What takes the messages there and back is a `Carrier`: a gRPC stream or a socket. Replies
complete a `concurrent.futures.Future`, which engine threads wait on and coroutines wrap. A thread that does nothing but
wait may read them itself (`base.Attendable`), where the carrier lets it.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Protocol

from ray_moe.errors import HostLost, RayMoEError, Unauthenticated, WireError
from ray_moe.transport import codec, device_memory, hello
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.transport.device_memory import DeviceArena, DeviceSlot
from ray_moe.transport.hello import HELLO_ID, Hello
from ray_moe.transport.settings import TransportSettings
from ray_moe.transport.shared_memory import Arena, Slot
from ray_moe.types import HostAddress
from ray_moe.wire import tensors
from ray_moe.wire.tensors import Buffer

_log = logging.getLogger(__name__)

_JOIN_S = 1.0
"""How long `close` waits for the reader: not for ever, since a callback may wait for whoever closes."""


_HOST_ENDED = "the host ended it"


class LineEnded(Exception):
    """Why a line is over. With a `refusal` the host did not let the router in, and that is the error to raise."""

    def __init__(self, reason: str, refusal: RayMoEError | None = None) -> None:
        super().__init__(reason)
        self.refusal = refusal


Received = Callable[[int, memoryview], None]
"""Told the id and the bytes of each message of the host. Raises `LineEnded` and `WireError`."""


class Carrier(Protocol):
    """Takes the messages of one connection to the host, and brings those of the host."""

    target: str
    """Where it goes."""
    is_encrypted: bool
    is_distrusted: bool
    """Whether it failed because one end did not accept the other, as far as one can tell."""

    def open(self, hello: Hello, received: Received) -> None:
        """Begin; the first that is `received` is the host's answer. Raises `LineEnded` when nobody is there."""
        ...

    def send(self, message_id: int, buffers: Sequence[Buffer], num_bytes: int) -> None:
        """Send a message of `num_bytes`. Never waits for the host; does nothing once the line is over. Thread-safe."""
        ...

    def listen(self) -> None:
        """See to what the host says until the line is over. Raises `LineEnded`, `WireError` for nonsense."""
        ...

    def close(self) -> None:
        """End the line, and `listen`. Idempotent, from any thread."""
        ...

    def fileno(self) -> int:
        """What to poll for messages that others than `listen` take in; -1 where only `listen` can."""
        ...

    def set_listening(self, is_on: bool) -> None:
        """Whether `listen` takes messages in, or only sees when the line breaks."""
        ...

    def take_in(self) -> bool:
        """Hand over what has come, without waiting. False when the line is over. Raises as `listen` does."""
        ...


@dataclass(slots=True)
class _InFlight:
    """A call that was sent and has not been answered. Its slot stays taken until then, even when nobody waits any
    more: the host may still write there."""

    future: Future[ExpertReply]
    wanted: codec.Wanted
    slot: Slot | DeviceSlot | None
    is_attended: bool
    """Whether the one who waits for it reads the line."""


class StreamConnection:
    """A line to one life of a host. Thread-safe; made by `StreamTransport.connect`."""

    def __init__(
        self,
        address: HostAddress,
        carrier: Carrier,
        settings: TransportSettings,
        share_memory: bool,
        device_arena: DeviceArena | None,
        on_end: Callable[[StreamConnection, bool], None],
    ) -> None:
        """
        Args:
            carrier: how to get there; not yet open.
            share_memory: whether to offer the host shared memory.
            device_arena: memory of the GPU to offer it as well.
            on_end: told once, with whether the line ended by itself after it stood.
        """
        self.address = address
        self.target = carrier.target
        self.is_encrypted = carrier.is_encrypted
        self._carrier = carrier
        self._settings = settings
        self._on_end = on_end
        self._ids = itertools.count(HELLO_ID + 1)
        self._hello: Future[None] = Future()
        self._lock = threading.Lock()
        self._in_flight: dict[int, _InFlight] = {}
        self._num_unattended = 0
        """Of those in flight; guarded by _lock, as is the next."""
        self._is_listening = True
        self._end: str | None = None  # why the line is over; guarded by _lock, like _in_flight
        self._arena = _make_arena(settings.arena_bytes) if share_memory else None
        self.device_arena = device_arena
        """Shared with the host, so that tokens on the router's GPU stay there; None where it is not."""
        self._reader = threading.Thread(target=self._read, name=f"replies-{address.host_id}", daemon=True)

    def start(self, token: str, timeout_s: float) -> None:
        """Open the line and wait for the host's first message. On any error the connection is closed."""
        arena = None if self._arena is None else self._arena.offer
        device_arena = None if self.device_arena is None else self.device_arena.offer
        try:
            greeting = Hello(token, hello.PROTOCOL_VERSION, self.address.incarnation, arena, device_arena)
            self._carrier.open(greeting, self._received)
        except LineEnded as error:
            self._finish(str(error), by_itself=True)
        else:
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
    def shares_device_memory(self) -> bool:
        """Whether tokens on the router's GPU stay there."""
        return self.device_arena is not None

    @property
    def is_lost(self) -> bool:
        return self._end is not None

    def submit(self, call: ExpertCall, is_attended: bool = False) -> Future[ExpertReply]:
        """Send `call`. Its tensors must not change until the future is done.

        Args: is_attended: whether the caller takes the answer in itself, see `base.Attendable`.
        """
        future: Future[ExpertReply] = Future()
        wanted = codec.wanted(call)
        is_placed = call.place is not None and call.place.arena is self.device_arena
        slot = call.place if is_placed else self._take_slot(call, wanted.num_rows)
        try:
            buffers, num_bytes = self._encode(call, slot)
        except Exception as error:
            if slot is not None:
                slot.release()
            if not isinstance(error, WireError):
                raise
            future.set_exception(error)
            return future
        message_id = next(self._ids)
        with self._lock:
            end = self._end
            if end is None:
                self._in_flight[message_id] = _InFlight(future, wanted, slot, is_attended)
                self._num_unattended += not is_attended
                if (self._num_unattended > 0) is not self._is_listening:
                    self._listen_if_needed()
        if end is None:
            self._carrier.send(message_id, buffers, num_bytes)
        else:
            future.set_exception(HostLost(end))
        return future

    # --- Attendable ------------------------------------------------------------------------------------------
    def fileno(self) -> int:
        return self._carrier.fileno()

    def take_in(self) -> bool:
        try:
            if self._carrier.take_in():
                return True
            reason = _HOST_ENDED
        except (LineEnded, WireError) as error:
            reason = self._explain(error)
        self._finish(reason, by_itself=True)
        return False

    def leave(self) -> None:
        with self._lock:
            for call in self._in_flight.values():
                call.is_attended = False
            self._num_unattended = len(self._in_flight)
            self._listen_if_needed()

    def _listen_if_needed(self) -> None:
        """Holding the lock."""
        is_needed = self._num_unattended > 0
        if is_needed is not self._is_listening and self._carrier.fileno() >= 0:
            self._is_listening = is_needed
            self._carrier.set_listening(is_needed)

    # --- life ------------------------------------------------------------------------------------------------
    def close(self) -> None:
        self._finish("it was closed here", by_itself=False)
        if self._reader.ident is not None and threading.current_thread() is not self._reader:
            self._reader.join(_JOIN_S)

    # --- Sending ---------------------------------------------------------------------------------------------
    def _take_slot(self, call: ExpertCall, num_reply_rows: int) -> Slot | DeviceSlot | None:
        """Shared memory for what is large of `call` and its reply; None to send it inline."""
        row_bytes = call.hidden.shape[-1] * call.hidden.itemsize
        room_bytes = num_reply_rows * row_bytes
        device_arena = self.device_arena
        if device_arena is not None and call.hidden.device == device_arena.device and room_bytes:
            hidden, _, _, grad = codec.call_specs(call)
            if (slot := device_arena.allocate((hidden, None, None, grad), room_bytes)) is not None:
                return slot
        arena = self._arena
        if arena is None:
            return None
        inline_bytes = self._settings.inline_bytes
        request_bytes = (call.num_tokens + (0 if call.grad is None else call.num_rows)) * row_bytes
        if request_bytes < inline_bytes and room_bytes < inline_bytes:
            return None
        request_bytes = tensors.region_bytes(codec.call_specs(call)) if request_bytes >= inline_bytes else 0
        room_bytes = room_bytes if room_bytes >= inline_bytes else 0
        # Where both do not fit, the larger alone may.
        return arena.allocate(request_bytes, room_bytes) or (
            arena.allocate(request_bytes, 0) if request_bytes > room_bytes else arena.allocate(0, room_bytes)
        )

    def _encode(self, call: ExpertCall, slot: Slot | DeviceSlot | None) -> tuple[list[Buffer], int]:
        fields = (codec.call_fields(call), None if slot is None else slot.placement)
        if isinstance(slot, DeviceSlot):
            if (views := slot.request) is not None:
                codec.write_call(call, views)
                device_memory.finish(call.hidden.device)
            hidden, token, _, grad = slot.specs
            return tensors.encode(fields, (hidden, token or (None if call.kept else call.token), call.weight, grad))
        if slot is not None and slot.request:
            specs = codec.call_specs(call)
            header = tensors.encode_header(fields, specs)
            codec.write_call(call, tensors.tensors_in(slot.request, specs))
            return [header], len(header)
        buffers, num_bytes = tensors.encode(fields, codec.call_tensors(call))
        if num_bytes > self._settings.max_message_bytes:
            raise WireError(f"a call of {num_bytes} bytes, where {self._settings.max_message_bytes} are allowed")
        return buffers, num_bytes

    # --- Receiving -------------------------------------------------------------------------------------------
    def _read(self) -> None:
        reason = _HOST_ENDED
        try:
            self._carrier.listen()
        except (LineEnded, WireError) as error:
            reason = self._explain(error)
        finally:
            self._finish(reason, by_itself=True)

    def _explain(self, error: LineEnded | WireError) -> str:
        if isinstance(error, WireError):
            return f"the host sent what cannot be understood: {error}"
        if error.refusal is not None and not self._hello.done():
            self._hello.set_exception(error.refusal)
        return str(error)

    def _received(self, message_id: int, message: memoryview) -> None:
        if message_id == HELLO_ID:
            self._welcome(message)
            return
        with self._lock:
            call = self._in_flight.pop(message_id, None)
            self._num_unattended -= call is not None and not call.is_attended
        if call is None:
            return
        try:
            reply = _read_reply(message, call.wanted, call.slot)
        except RayMoEError as error:
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(error)
        else:
            if call.future.set_running_or_notify_cancel():
                call.future.set_result(reply)
            else:
                reply.release()

    def _welcome(self, message: memoryview) -> None:
        fields, _, _ = tensors.decode(message)
        if fields and fields[0] == codec.FAILED and type(fields[0]) is int:  # it refuses, or says good-bye
            error = codec.read_failure(fields)
            raise LineEnded(str(error), error if isinstance(error, (Unauthenticated, WireError)) else None)
        if self._hello.done() or len(fields) != 2:
            raise WireError("a host says hello once, and whether it shares memory and that of its GPU")
        if self._arena is not None:
            self._arena.close_file()
            if not fields[0]:
                self._arena = None
        if not fields[1]:
            self.device_arena = None
        self._hello.set_result(None)

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
        self._carrier.close()
        if self._arena is not None:
            self._arena.close_file()
            self._arena = None
        was_open = self._hello.done() and self._hello.exception() is None
        if self.device_arena is not None and (was_open or not by_itself):
            self.device_arena.linger([call.slot for call in lost.values() if isinstance(call.slot, DeviceSlot)])
        self.device_arena = None  # of a host that was not reached nobody else has it, and it is tried again and again
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


def _read_reply(message: memoryview, wanted: codec.Wanted, slot: Slot | DeviceSlot | None) -> ExpertReply:
    """The reply, which owns the slot from now on. Raises what the host answered instead; then the slot is free."""
    try:
        fields, specs, region = tensors.decode(message)
        spec, in_room = codec.read_reply(fields, specs, wanted)
        if not in_room:
            reply = ExpertReply(tensors.tensor_in(region, spec))
        elif slot is None:
            raise WireError("the host answered in shared memory where none was offered")
        else:
            reply, slot = ExpertReply(slot.rows(spec), slot.release), None
        return reply
    finally:
        if slot is not None:
            slot.release()
