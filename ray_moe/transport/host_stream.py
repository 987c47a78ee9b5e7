"""The host's end of one router's line: reads calls, hands them to `submit`, and answers, whichever way messages travel.

Answers go in the order in which they are ready. It computes nothing and knows no expert.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch

from ray_moe.errors import RayMoEError, WireError
from ray_moe.transport import codec, device_memory, frames, shared_memory
from ray_moe.transport.base import Submit
from ray_moe.transport.hello import HELLO_ID
from ray_moe.transport.settings import TransportSettings
from ray_moe.wire import tensors

_log = logging.getLogger(__name__)

Write = Callable[[bytes], Awaitable[None]]
"""Sends a frame once the router is ready for it and those that waited longer are sent. Raises `RouterGone`."""


class RouterGone(Exception):
    """The line ended while something was to be written to it."""


class HostStream:
    """One router's calls, and the memory shared with that router, if any.

    The tensors of a call may lie in memory that the router reuses once it has the answer: they are valid until `submit`
    returns, and must not be kept or written to.
    """

    def __init__(
        self,
        write: Write,
        submit: Submit,
        settings: TransportSettings,
        arena: bytes | None,
        device_arena: bytes | None,
    ) -> None:
        self._write = write
        self._submit = submit
        self._settings = settings
        self._shared = shared_memory.attach(arena)
        device = torch.device(settings.device) if settings.device else None
        self._device_memory = device_memory.attach(device_arena, device)
        self._tasks: dict[int, asyncio.Task[None]] = {}

    @property
    def num_open(self) -> int:
        """Calls that have not been answered."""
        return len(self._tasks)

    def hello(self) -> bytes:
        """The frame that the router must get first."""
        message = tensors.encode_header((self._shared is not None, self._device_memory is not None), ())
        return frames.frame(HELLO_ID, (message,), len(message))

    def take(self, message_id: int, message: memoryview) -> None:
        """Answer this call. Raises `WireError` when it is being answered already."""
        if message_id in self._tasks:
            raise WireError(f"message {message_id} came again before it was answered")
        self._tasks[message_id] = asyncio.create_task(self._answer(message_id, message))

    async def end(self) -> None:
        """Cancel what has not been answered, and wait until nothing of it runs."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, message_id: int, message: memoryview) -> None:
        try:
            await self._compute(message_id, message)
        except RouterGone:
            _log.debug("a router went away before its answer")
        except Exception as error:  # whatever it is, the router hears it
            if not isinstance(error, RayMoEError):
                _log.exception("a call failed in an unexpected way")
            with contextlib.suppress(RouterGone):
                await self._send(message_id, codec.failure_fields(error), ())
        finally:
            self._tasks.pop(message_id, None)

    async def _compute(self, message_id: int, message: memoryview) -> None:
        fields, specs, region = tensors.decode(message)
        if len(fields) != 2 or type(fields[0]) is not list:
            raise WireError("a call has a list of fields, and its place in shared memory or nil")
        call_fields, placement = fields
        room: memoryview | torch.Tensor | None = None
        contents: codec.Tensors
        if type(placement) is list and len(placement) == 4:
            (hidden, grad), (hidden_spec, grad_spec), room = device_memory.find(self._device_memory, placement)
            _, token, weight, _ = tensors.tensors_in(region, specs)
            contents, specs = (hidden, token, weight, grad), [hidden_spec, *specs[1:3], grad_spec]
        else:
            if placement is not None:
                region, room = self._find(placement, region)
            contents = tensors.tensors_in(region, specs)
        reply = await self._submit(codec.read_call(call_fields, specs, contents))
        try:
            rows = reply.rows
            if room is not None and rows.nbytes <= len(room):
                spec = tensors.make_spec(rows.dtype, tuple(rows.shape))
                if isinstance(room, torch.Tensor):
                    device_memory.tensor_at(room, 0, spec).copy_(rows.detach())
                    device_memory.finish(room.device)
                else:
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
