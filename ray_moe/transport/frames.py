"""Messages of any size over a stream of small ones: cut into frames, put together again.

A frame is ``u64 message id | u64 length of the whole message | part``, numbers little-endian. Parts of one message
come in order; frames of different messages may come in between. No I/O here; both ends of the gRPC stream use it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from ray_moe.errors import WireError
from ray_moe.wire.tensors import Buffer

_PREFIX: Final = struct.Struct("<QQ")


def frame(message_id: int, buffers: Iterable[Buffer], num_bytes: int) -> bytes:
    """A message of `num_bytes` as one frame."""
    return b"".join((_PREFIX.pack(message_id, num_bytes), *buffers))


def cut(message_id: int, buffers: Iterable[Buffer], num_bytes: int, chunk_bytes: int) -> Iterator[bytes]:
    """A message of `num_bytes` as frames of up to `chunk_bytes`, each made when it is asked for."""
    prefix = _PREFIX.pack(message_id, num_bytes)
    parts: list[bytes | memoryview] = [prefix]
    room = chunk_bytes
    for buffer in buffers:
        rest = memoryview(buffer).cast("B")
        while rest:
            part, rest = rest[:room], rest[room:]
            parts.append(part)
            room -= len(part)
            if not room:
                yield b"".join(parts)
                parts, room = [prefix], chunk_bytes
    if len(parts) > 1:
        yield b"".join(parts)


@dataclass(slots=True)
class _Partial:
    data: memoryview
    num_received: int = 0


class Assembler:
    """Puts the frames of one direction of one stream together."""

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._partial: dict[int, _Partial] = {}

    def feed(self, data: bytes) -> tuple[int, memoryview] | None:
        """Take the next frame; return (message id, message) when it completes one.

        A message of one frame is a view of `data`; a longer one is in new, writable memory. Raises `WireError` for
        what cannot be a frame, after which the stream cannot be understood any more.
        """
        if len(data) <= _PREFIX.size:
            raise WireError(f"a frame has more than {_PREFIX.size} bytes, {len(data)} came")
        message_id, num_bytes = _PREFIX.unpack_from(data)
        part = memoryview(data)[_PREFIX.size :]
        partial = self._partial.get(message_id)
        if partial is None:
            if num_bytes == len(part):
                return message_id, part
            partial = self._partial[message_id] = _Partial(self._allocate(num_bytes))
        end = partial.num_received + len(part)
        if num_bytes != len(partial.data) or end > num_bytes:
            raise WireError(f"the frames of message {message_id} disagree about its length")
        partial.data[partial.num_received : end] = part
        partial.num_received = end
        if end < num_bytes:
            return None
        del self._partial[message_id]
        return message_id, partial.data

    def _allocate(self, num_bytes: int) -> memoryview:
        # Pages are not touched before they are received, so an announcement alone costs no memory.
        if num_bytes > self._max_message_bytes:
            raise WireError(
                f"a message of {num_bytes} bytes was announced; at most {self._max_message_bytes} are taken"
            )
        try:
            return np.empty(num_bytes, np.uint8).data
        except MemoryError:
            raise WireError(
                f"there is no memory for a message of {num_bytes} bytes: send fewer tokens at once"
            ) from None
