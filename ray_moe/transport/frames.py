"""Messages of any size over a stream of small ones: cut into frames, put together again.

A frame is ``u64 message id | u64 length of the whole message | u64 length of the part | part``, numbers little-endian.
Parts of one message come in order; frames of different messages may come in between. No I/O here; both ends of gRPC
streams, which keep frames apart, and of sockets, which do not, use it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from ray_moe.errors import WireError
from ray_moe.wire.tensors import Buffer

_PREFIX: Final = struct.Struct("<QQQ")


def frame(message_id: int, buffers: Iterable[Buffer], num_bytes: int) -> bytes:
    """A message of `num_bytes` as one frame."""
    return b"".join((_PREFIX.pack(message_id, num_bytes, num_bytes), *buffers))


def cut(message_id: int, buffers: Iterable[Buffer], num_bytes: int, chunk_bytes: int) -> Iterator[bytes]:
    """A message of `num_bytes` as frames of up to `chunk_bytes`, each made when it is asked for."""
    parts: list[memoryview] = []
    length = room = min(chunk_bytes, num_bytes)
    left = num_bytes
    for buffer in buffers:
        rest = memoryview(buffer).cast("B")
        while rest:
            part, rest = rest[:room], rest[room:]
            parts.append(part)
            room -= len(part)
            if not room:
                yield b"".join((_PREFIX.pack(message_id, num_bytes, length), *parts))
                left -= length
                parts, length = [], min(chunk_bytes, left)
                room = length


@dataclass(slots=True)
class _Partial:
    data: memoryview
    num_received: int = 0


class Assembler:
    """Puts the frames of one direction of one stream together."""

    def __init__(self, max_message_bytes: int) -> None:
        self.max_message_bytes = max_message_bytes
        self._partial: dict[int, _Partial] = {}

    def feed(self, data: bytes) -> tuple[int, memoryview] | None:
        """Take the next frame; return (message id, message) when it completes one.

        A message of one frame is a view of `data`; a longer one is in new, writable memory. Raises `WireError` for
        what cannot be a frame, after which the stream cannot be understood any more.
        """
        if len(data) <= _PREFIX.size:
            raise WireError(f"a frame has more than {_PREFIX.size} bytes, {len(data)} came")
        message_id, num_bytes, length = _PREFIX.unpack_from(data)
        part = memoryview(data)[_PREFIX.size :]
        if length != len(part):
            raise WireError(f"a frame announces {length} bytes and has {len(part)}")
        if num_bytes == length and not self.has_begun(message_id):
            return message_id, part
        self.place(message_id, num_bytes, length)[:] = part
        message = self.placed(message_id)
        return None if message is None else (message_id, message)

    def has_begun(self, message_id: int) -> bool:
        """Whether a part of this message has come, and not all of it."""
        return message_id in self._partial

    def place(self, message_id: int, num_bytes: int, length: int) -> memoryview:
        """Where the next `length` bytes of a message of `num_bytes` belong. Raises `WireError` when they cannot be."""
        partial = self._partial.get(message_id)
        if partial is None:
            partial = _Partial(self._allocate(num_bytes))
        start, end = partial.num_received, partial.num_received + length
        if length == 0 or num_bytes != len(partial.data) or end > num_bytes:
            raise WireError(f"the frames of message {message_id} disagree about its length")
        self._partial[message_id] = partial
        partial.num_received = end
        return partial.data[start:end]

    def placed(self, message_id: int) -> memoryview | None:
        """The message, if what has been put in its places is all of it."""
        partial = self._partial[message_id]
        if partial.num_received < len(partial.data):
            return None
        del self._partial[message_id]
        return partial.data

    def _allocate(self, num_bytes: int) -> memoryview:
        # Pages are not touched before they are received, so an announcement alone costs no memory.
        if num_bytes > self.max_message_bytes:
            raise WireError(f"a message of {num_bytes} bytes was announced; at most {self.max_message_bytes} are taken")
        try:
            return np.empty(num_bytes, np.uint8).data
        except MemoryError:
            raise WireError(
                f"there is no memory for a message of {num_bytes} bytes: send fewer tokens at once"
            ) from None


class ByteStream:
    """Finds the messages in bytes that come as they please: what is long is received where it stays."""

    def __init__(self, max_message_bytes: int, buffer_bytes: int = 64 * 1024) -> None:
        self.assembler = Assembler(max_message_bytes)
        self._buffer = memoryview(bytearray(buffer_bytes))
        self._num_buffered = 0
        self._part = self._buffer[:0]
        """What is still to come of the part that is being received."""
        self._message_id = 0

    def space(self) -> memoryview:
        """Where the next bytes go; never empty."""
        return self._part or self._buffer[self._num_buffered :]

    def received(self, num_bytes: int) -> Iterator[tuple[int, memoryview]]:
        """The (message id, message) that `num_bytes` more in `space` complete; must be gone through.

        Messages are in new, writable memory. Raises `WireError` as `Assembler` does.
        """
        if self._part:
            self._part = self._part[num_bytes:]
            if self._part:
                return
            message = self.assembler.placed(self._message_id)
            if message is not None:
                yield self._message_id, message
            return
        buffer, start, end = self._buffer, 0, self._num_buffered + num_bytes
        while end - start >= _PREFIX.size:
            message_id, total, length = _PREFIX.unpack_from(buffer, start)
            start += _PREFIX.size
            here = min(length, end - start)
            part = buffer[start : start + here]
            start += here
            if 0 < here == total == length and not self.assembler.has_begun(message_id):
                yield message_id, memoryview(bytearray(part))
                continue
            place = self.assembler.place(message_id, total, length)
            place[:here] = part
            if here < length:
                self._part, self._message_id = place[here:], message_id
            elif (message := self.assembler.placed(message_id)) is not None:
                yield message_id, message
        buffer[: end - start] = buffer[start:end]
        self._num_buffered = end - start
