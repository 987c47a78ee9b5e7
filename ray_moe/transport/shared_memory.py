"""Memory that a router and a host on the same node share, so that large payloads never pass through the stream.

The router makes one `Arena` for each connection, and for each large call takes a `Slot` in it: the bytes of the request
and room for the reply. The host maps the same memory (`attach`), computes on the request where it lies and copies its
answer into the room. The memory is a memfd: it has no name, so nothing can be left behind when either side dies, and
it is not bounded by the size of /dev/shm.

A slot is free again only when its call was answered and the reply is no longer used; what a dead host's last writes
would hit is the memory of its own connection, which goes as a whole.
"""

from __future__ import annotations

import fcntl
import hmac
import mmap
import os
import stat
import weakref
from functools import partial
from typing import Any, Final

import msgpack
import numpy as np
import torch

from ray_moe.errors import WireError
from ray_moe.transport.free_list import Ledger
from ray_moe.wire.tensors import TensorSpec, aligned

_NAME: Final = "ray-moe"  # what /proc/*/maps shows; not a name that could be opened
_NONCE_BYTES: Final = 32
_HEADER_BYTES: Final = 4096
"""The first page holds the nonce only."""
_KEEP_BYTES: Final = 64 * 1024 * 1024
"""Pages below this stay when an arena is empty; those above were for a burst and are given back."""


class Slot:
    """A stretch of an arena: `request_bytes` for what goes to the host, then `room_bytes` for what comes back.

    It is free again after `release` (again does nothing), or when the slot and every tensor of `rows` are gone,
    whichever is first: a reply that nobody looked at, because its waiter was cancelled meanwhile, must not leak it.
    """

    __slots__ = ("_room", "placement", "release", "request")

    def __init__(self, arena: Arena, memory: memoryview, offset: int, request_bytes: int, room_bytes: int) -> None:
        self.placement = (offset, request_bytes, room_bytes)
        """What the host must be told."""
        self.request = memory[offset : offset + request_bytes]
        # The one object that lives as long as torch uses the room: a tensor's storage holds the array it was made of.
        self._room = np.ndarray((room_bytes,), np.uint8, memory, offset + request_bytes)
        self.release = weakref.finalize(self._room, arena.give_back, offset, request_bytes + room_bytes)
        self.release.atexit = False

    def rows(self, spec: TensorSpec) -> torch.Tensor:
        """What the host left in the room. Raises `WireError` when that cannot be in there."""
        if spec.num_bytes > len(self._room):
            raise WireError(f"the host answered {spec.num_bytes} bytes where it was offered {len(self._room)}")
        return torch.from_numpy(self._room)[: spec.num_bytes].view(spec.dtype).view(spec.shape)


class Arena:
    """The router's side. Thread-safe."""

    def __init__(self, num_bytes: int) -> None:
        """Take `num_bytes` of address space; pages cost nothing until they are touched. Raises `OSError`."""
        self._fd = -1
        self._size = _HEADER_BYTES + aligned(num_bytes)
        self._nonce = os.urandom(_NONCE_BYTES)
        self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, self._size)
        # It cannot shrink any more, so touching it never kills the other side (SIGBUS).
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._map = mmap.mmap(self._fd, self._size)
        self._map[:_NONCE_BYTES] = self._nonce
        self._memory = memoryview(self._map)
        # Not a method of its own: that would be a cycle, and the memory would wait for the garbage collector.
        self._ledger = Ledger(self._size - _HEADER_BYTES, partial(_trim, self._map))

    @property
    def offer(self) -> bytes:
        """What `attach` needs to find this memory."""
        packed: bytes = msgpack.packb((os.getpid(), self._fd, self._size, self._nonce))
        return packed

    @property
    def is_empty(self) -> bool:
        return self._ledger.is_empty

    def close_file(self) -> None:
        """Forget the file once the host has mapped it or declined; the memory stays. It goes with its last user."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close_file()

    def allocate(self, request_bytes: int, room_bytes: int) -> Slot | None:
        """A slot for both, or None when there is no room now. At least one of them is positive."""
        request_bytes, room_bytes = aligned(request_bytes), aligned(room_bytes)
        start = self._ledger.allocate(request_bytes + room_bytes)
        return None if start is None else Slot(self, self._memory, _HEADER_BYTES + start, request_bytes, room_bytes)

    def give_back(self, offset: int, length: int) -> None:
        """The slot at `offset` is free."""
        self._ledger.give_back(offset - _HEADER_BYTES, length)


def _trim(memory: mmap.mmap, peak: int) -> None:
    if peak > _KEEP_BYTES:
        start = _HEADER_BYTES + _KEEP_BYTES
        memory.madvise(mmap.MADV_REMOVE, start, len(memory) - start)


def attach(offer: object) -> memoryview | None:
    """The host's side: map the arena that a router offers. None when that is not possible: another node, another
    container, another user, or not an arena at all. It is unmapped when the last view of it is gone."""
    try:
        pid, fd, size, nonce = _parse(offer)
        path = f"/proc/{pid}/fd/{fd}"
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            return None
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(handle)
            sealed = fcntl.fcntl(handle, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if not (stat.S_ISREG(status.st_mode) and sealed and status.st_size == size):
                return None
            memory = memoryview(mmap.mmap(handle, size))
        finally:
            os.close(handle)
    except (OSError, ValueError, TypeError, OverflowError):  # the last three from numbers and bytes that make no sense
        return None
    return memory if hmac.compare_digest(bytes(memory[:_NONCE_BYTES]), nonce) else None


def _parse(offer: object) -> tuple[int, int, int, bytes]:
    fields: Any = msgpack.unpackb(offer) if isinstance(offer, bytes) else None
    if not isinstance(fields, list) or [type(field) for field in fields] != [int, int, int, bytes]:
        raise ValueError("not an offer of shared memory")
    pid, fd, size, nonce = fields
    if size < _HEADER_BYTES:
        raise ValueError("smaller than its own header")
    return pid, fd, size, nonce
