"""The host's end of one router's line: reads calls, hands them to `submit`, and answers, whichever way messages travel.

Answers go in the order in which they are ready. It computes nothing and knows no expert.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import torch

from ray_moe.errors import RayMoEError, WireError
from ray_moe.transport import codec, device_memory, frames, shared_memory
from ray_moe.transport.base import Answer, ExpertCall, ExpertReply, Submit
from ray_moe.transport.hello import HELLO_ID
from ray_moe.transport.settings import TransportSettings
from ray_moe.wire import tensors
from ray_moe.wire.tensors import Buffer

_log = logging.getLogger(__name__)


class Outlet(Protocol):
    """Where frames for the router go, in the order in which they are given."""

    def write_now(self, frame: bytes) -> bool:
        """Send `frame` if nothing is in the way. Raises `RouterGone`."""
        ...

    async def write(self, frame: bytes) -> None:
        """Send `frame` once the router is ready for it and those that waited longer are sent. Raises `RouterGone`."""
        ...


class RouterGone(Exception):
    """The line ended while something was to be written to it."""


class HostStream:
    """One router's calls, and the memory shared with that router, if any.

    The tensors of a call may lie in memory that the router reuses once it has the answer: they are valid until `submit`
    has answered, and must not be kept or written to.
    """

    def __init__(
        self,
        outlet: Outlet,
        submit: Submit,
        settings: TransportSettings,
        arena: bytes | None,
        device_arena: bytes | None,
    ) -> None:
        self._outlet = outlet
        self._submit = submit
        self._settings = settings
        self._shared = shared_memory.attach(arena)
        device = torch.device(settings.device) if settings.device else None
        self._device_memory = device_memory.attach(device_arena, device)
        self._open: dict[int, Answer | asyncio.Task[None]] = {}
        """What has not been answered: what computes it, or sends it."""

    @property
    def num_open(self) -> int:
        """Calls that have not been answered."""
        return len(self._open)

    def hello(self) -> bytes:
        """The frame that the router must get first."""
        message = tensors.encode_header((self._shared is not None, self._device_memory is not None), ())
        return frames.frame(HELLO_ID, (message,), len(message))

    def take(self, message_id: int, message: memoryview) -> None:
        """Answer this call. Raises `WireError` when it is being answered already."""
        if message_id in self._open:
            raise WireError(f"message {message_id} came again before it was answered")
        try:
            call, room = self._read(message)
            answer = self._submit(call)
        except Exception as error:
            self._answered(message_id, None, error)
            return
        if isinstance(answer, Answer):
            self._open[message_id] = answer
            answer.listen(partial(self._answered, message_id, room))
        else:
            self._open[message_id] = asyncio.create_task(self._await(message_id, room, answer))

    async def end(self) -> None:
        """Cancel what has not been answered, and wait until nothing of it runs."""
        unanswered, self._open = self._open, {}
        tasks = []
        for each in unanswered.values():
            if isinstance(each, Answer):
                each.give_up()
            else:
                each.cancel()
                tasks.append(each)
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- reading ---------------------------------------------------------------------------------------------
    def _read(self, message: memoryview) -> tuple[ExpertCall, memoryview | torch.Tensor | None]:
        """The call, and the shared memory where its reply may go."""
        fields, specs, region = tensors.decode(message)
        if len(fields) != 2 or type(fields[0]) is not list:
            raise WireError("a call has a list of fields, and its place in shared memory or nil")
        call_fields, placement = fields
        room: memoryview | torch.Tensor | None = None
        contents: codec.Tensors
        if type(placement) is list and placement and type(placement[0]) is list:
            there, room = device_memory.find(self._device_memory, placement, specs)
            travelled = [spec if tensor is None else None for spec, tensor in zip(specs, there, strict=True)]
            inline = tensors.tensors_in(region, travelled)
            contents = [mine if tensor is None else tensor for tensor, mine in zip(there, inline, strict=True)]
        else:
            if placement is not None:
                region, room = self._find(placement, region)
            contents = tensors.tensors_in(region, specs)
        call = codec.read_call(call_fields, specs, contents)
        if isinstance(room, torch.Tensor):
            call.room = room
        return call, room

    def _find(self, placement: object, inline: memoryview) -> tuple[memoryview, memoryview]:
        """Where the request lies and where the reply may go, as the router says; `inline` is what its message holds."""
        if type(placement) is not list or [type(number) for number in placement] != [int, int, int]:
            raise WireError("a place in shared memory is its offset, the request's bytes and the reply's bytes")
        offset, request_bytes, room_bytes = placement
        middle, end = offset + request_bytes, offset + request_bytes + room_bytes
        if self._shared is None or not 0 <= offset <= middle <= end <= len(self._shared):
            raise WireError(f"no shared memory reaches from byte {offset} to {end}")
        return self._shared[offset:middle] if request_bytes else inline, self._shared[middle:end]

    # --- answering -------------------------------------------------------------------------------------------
    async def _await(
        self, message_id: int, room: memoryview | torch.Tensor | None, answer: Awaitable[ExpertReply]
    ) -> None:
        try:
            reply = await answer
        except Exception as error:
            self._answered(message_id, room, error)
        else:
            self._answered(message_id, room, reply)

    def _answered(
        self, message_id: int, room: memoryview | torch.Tensor | None, outcome: ExpertReply | Exception
    ) -> None:
        """Send what a call came to: at once if that can be, else in a task that waits for the router."""
        self._open.pop(message_id, None)
        release: Callable[[], None] = _nothing
        try:
            if isinstance(outcome, ExpertReply):
                release = outcome.release
                message = self._reply(outcome.rows, room)
            else:
                message = _failure(outcome)
        except Exception as error:  # whatever it is, the router hears it
            message = _failure(error)
        buffers, num_bytes = message
        try:
            if num_bytes <= self._settings.chunk_bytes:
                frame = frames.frame(message_id, buffers, num_bytes)
                if self._outlet.write_now(frame):
                    release()
                    return
                left: Iterable[bytes] = (frame,)
            else:
                left = frames.cut(message_id, buffers, num_bytes, self._settings.chunk_bytes)
        except RouterGone:
            release()
            return
        self._open[message_id] = asyncio.create_task(self._write(message_id, left, release))

    def _reply(self, rows: torch.Tensor, room: memoryview | torch.Tensor | None) -> tuple[Sequence[Buffer], int]:
        """The message of these rows, which have been copied into the room where they fit there."""
        if room is None or rows.nbytes > len(room):
            return tensors.encode((codec.ROWS_FOLLOW,), (rows,))
        spec = tensors.make_spec(rows.dtype, tuple(rows.shape))
        if isinstance(room, torch.Tensor):
            if rows.data_ptr() != room.data_ptr():
                device_memory.tensor_at(room, 0, spec).copy_(rows.detach())
                device_memory.finish(room.device)
        else:
            tensors.tensor_at(room, 0, spec).copy_(rows.detach())
        header = tensors.encode_header((codec.ROWS_IN_ROOM,), (spec,))
        return (header,), len(header)

    async def _write(self, message_id: int, left: Iterable[bytes], release: Callable[[], None]) -> None:
        try:
            for frame in left:
                await self._outlet.write(frame)
        except RouterGone:
            _log.debug("a router went away before its answer")
        finally:
            self._open.pop(message_id, None)
            release()


def _failure(error: Exception) -> tuple[Sequence[Buffer], int]:
    if not isinstance(error, RayMoEError):
        _log.error("a call failed in an unexpected way", exc_info=error)
    header = tensors.encode_header(codec.failure_fields(error), ())
    return (header,), len(header)


def _nothing() -> None:
    """There is nothing to release."""
