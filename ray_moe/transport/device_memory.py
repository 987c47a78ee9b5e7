"""GPU memory that a router and the hosts on the same node share, so that hidden states never leave the card.

As in `shared_memory.py` the router makes an arena, here one for all its connections, and takes a slot in it for each
call: the tokens and room for the rows. A batch whose hosts all share it is put there once, on a `DeviceSheet`, of which
each call has a part. The host opens the same memory (CUDA IPC), computes on the tokens where they lie and writes its
rows into the room. Only what is small travels with the message. Each side finishes its own kernels before it sends
one, so the other finds what it says; what follows on the router's side is in the order of its one stream.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgpack
import torch

from ray_moe.errors import WireError
from ray_moe.transport.free_list import Ledger
from ray_moe.wire.tensors import Specs, TensorSpec, aligned, make_spec

_HANDLE_BYTES: Final = 64
_LINGER_S: Final = 5.0
"""Memory is freed so long after its connection ended: until then the host may still have it open."""


class DeviceArena:
    """The router's side. Thread-safe."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Take `num_bytes` of the memory of `device`. Raises `OSError` when there is no room, or no way to share it."""
        self.memory, self._handle = make_memory(aligned(num_bytes), device)
        self.device = self.memory.device
        self.ledger = Ledger(len(self.memory))

    @property
    def offer(self) -> bytes:
        """What `attach` needs to find this memory."""
        packed: bytes = msgpack.packb((self._handle, len(self.memory)))
        return packed

    def allocate(self, request: Specs, room_bytes: int) -> DeviceSlot | None:
        """A slot for these tensors of a call and a reply of `room_bytes`, or None when there is no room now."""
        offsets, request_bytes = _laid_out(request)
        stretch = self._take(request_bytes + aligned(room_bytes))
        if stretch is None:
            return None
        middle = stretch.start + request_bytes
        places = [None if offset is None else stretch.start + offset for offset in offsets]
        return DeviceSlot(self, stretch, places, request, middle, aligned(room_bytes))

    def sheet(self, hidden: TensorSpec, num_rows: int) -> DeviceSheet | None:
        """A sheet for a batch of tokens [T, D] of which `num_rows` rows are made, or None when there is no room now."""
        (_, token_at), request_bytes = _laid_out((hidden, make_spec(torch.int32, (num_rows,))))
        row_bytes = hidden.num_bytes // max(1, hidden.shape[0])
        stretch = self._take(request_bytes + aligned(num_rows * row_bytes))
        return None if stretch is None else DeviceSheet(self, stretch, hidden, num_rows, token_at or 0, request_bytes)

    def _take(self, num_bytes: int) -> _Stretch | None:
        start = self.ledger.allocate(num_bytes)
        return None if start is None else _Stretch(self.ledger, start, num_bytes)

    def linger(self, slots: Sequence[DeviceSlot] = ()) -> None:
        """Keep the memory, and `slots` of calls that were not answered, until a host that is gone has surely let go of
        them."""
        timer = threading.Timer(_LINGER_S, lambda *kept: None, (self.memory, slots))
        timer.daemon = True
        timer.start()


class _Stretch:
    """A taken part of an arena. Free again after `release`, or when nobody has it any more."""

    __slots__ = ("__weakref__", "release", "start")

    def __init__(self, ledger: Ledger, start: int, num_bytes: int) -> None:
        self.start = start
        self.release = weakref.finalize(self, ledger.give_back, start, num_bytes)
        self.release.atexit = False


class DeviceSlot:
    """Where the tensors of a call lie, and the room for its rows."""

    __slots__ = ("_is_part", "_room_bytes", "_room_offset", "_stretch", "arena", "placement", "specs")

    def __init__(
        self,
        arena: DeviceArena,
        stretch: _Stretch,
        offsets: Sequence[int | None],
        specs: Specs,
        room_offset: int,
        room_bytes: int,
        *,
        is_part: bool = False,
    ) -> None:
        """Args:
        offsets: of the tensors of a call, in the order of `codec.call_tensors`; None for one that is not there.
        specs: of the same.
        is_part: whether the stretch has other slots, and the tensors are there already.
        """
        self.arena = arena
        self._stretch: _Stretch | None = stretch
        self._room_offset, self._room_bytes = room_offset, room_bytes
        self._is_part = is_part
        self.specs = specs
        """Of the tensors that lie here and do not travel."""
        self.placement = (offsets, room_offset, room_bytes)
        """What the host must be told."""

    @property
    def request(self) -> list[torch.Tensor | None] | None:
        """Where the tensors of the call belong; None where they are."""
        return None if self._is_part else _at(self.arena.memory, self.placement[0], self.specs)

    def release(self) -> None:
        """It is free again, if no other slot has the same stretch; once more does nothing."""
        stretch, self._stretch = self._stretch, None
        if stretch is not None and not self._is_part:
            stretch.release()

    def rows(self, spec: TensorSpec) -> torch.Tensor:
        """What the host left in the room. Raises `WireError` when that cannot be in there."""
        if spec.num_bytes > self._room_bytes:
            raise WireError(f"the host answered {spec.num_bytes} bytes where it was offered {self._room_bytes}")
        return tensor_at(self.arena.memory, self._room_offset, spec)


class DeviceSheet:
    """A batch of tokens that several hosts read, and what each of them makes of it, side by side.

    Free again when neither it nor a part of it is in use: not before a host that is late has answered.
    """

    def __init__(
        self,
        arena: DeviceArena,
        stretch: _Stretch,
        hidden: TensorSpec,
        num_rows: int,
        token_offset: int,
        request_bytes: int,
    ) -> None:
        self._arena, self._stretch = arena, stretch
        self._hidden, self._row_bytes = hidden, hidden.num_bytes // max(1, hidden.shape[0])
        self._token_at, self._room_at = stretch.start + token_offset, stretch.start + request_bytes
        self.hidden = tensor_at(arena.memory, stretch.start, hidden)
        """[T, D] to be written."""
        self.token = tensor_at(arena.memory, self._token_at, make_spec(torch.int32, (num_rows,)))
        """int32 [n] the token of each row, to be written."""

    def part(self, begin: int, end: int) -> DeviceSlot:
        """The slot of the rows from `begin` to `end`."""
        token = make_spec(torch.int32, (end - begin,))
        return DeviceSlot(
            self._arena,
            self._stretch,
            (self._stretch.start, self._token_at + begin * 4, None, None),
            (self._hidden, token, None, None),
            self._room_at + begin * self._row_bytes,
            (end - begin) * self._row_bytes,
            is_part=True,
        )


def attach(offer: bytes | None, device: torch.device | None) -> torch.Tensor | None:
    """The host's side: open the memory that a router offers, uint8. None when that cannot be: another card, or not an
    offer at all. It is closed with the last tensor in it."""
    if offer is None or device is None:
        return None
    try:
        handle, num_bytes = msgpack.unpackb(offer)
        if type(handle) is not bytes or len(handle) != _HANDLE_BYTES or type(num_bytes) is not int or num_bytes <= 0:
            return None
        return open_memory(handle, num_bytes, device)
    except (OSError, ValueError, TypeError):
        return None


def find(
    memory: torch.Tensor | None, placement: list[Any], specs: Specs
) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """The tensors of a call that lie where a router says, and the room for the reply. Raises `WireError`.

    Args: specs: of all tensors of the call; those without an offset are None in the answer, and travelled.
    """
    if [type(field) for field in placement] != [list, int, int]:
        raise WireError("a place in GPU memory is its tensors' offsets, and the reply's offset and bytes")
    offsets, room_offset, room_bytes = placement
    if len(offsets) != len(specs):
        raise WireError(f"{len(offsets)} offsets in GPU memory do not fit {len(specs)} tensors")
    found: list[torch.Tensor | None] = []
    for offset, spec in zip(offsets, specs, strict=True):
        if offset is None:
            found.append(None)
            continue
        if type(offset) is not int or spec is None:
            raise WireError("an offset in GPU memory is a number, of a tensor that the call has")
        if offset % spec.dtype.itemsize:
            raise WireError(f"no {spec.dtype} begins at byte {offset}")
        found.append(tensor_at(_within(memory, offset, spec.num_bytes), 0, spec))
    return found, _within(memory, room_offset, room_bytes)


def _within(memory: torch.Tensor | None, offset: int, num_bytes: int) -> torch.Tensor:
    if memory is None or num_bytes < 0 or not 0 <= offset <= offset + num_bytes <= len(memory):
        raise WireError(f"no GPU memory is shared from byte {offset} to {offset + num_bytes}")
    return memory[offset : offset + num_bytes]


def _laid_out(specs: Specs) -> tuple[list[int | None], int]:
    """Where these tensors lie one after the other, as `wire/tensors.py` lays them out, and how long that is."""
    offsets: list[int | None] = []
    end = 0
    for spec in specs:
        offsets.append(None if spec is None else end)
        end += 0 if spec is None else aligned(spec.num_bytes)
    return offsets, end


def _at(memory: torch.Tensor, offsets: Sequence[int | None], specs: Specs) -> list[torch.Tensor | None]:
    pairs = zip(offsets, specs, strict=True)
    return [None if at is None or spec is None else tensor_at(memory, at, spec) for at, spec in pairs]


def tensor_at(memory: torch.Tensor, offset: int, spec: TensorSpec) -> torch.Tensor:
    """The tensor that lies at `offset`; it must not reach beyond the end."""
    return memory[offset : offset + spec.num_bytes].view(spec.dtype).view(spec.shape)


def finish(device: torch.device) -> None:
    """Wait for what this thread has begun on `device`."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


# --- CUDA ----------------------------------------------------------------------------------------------------
class _Block:
    """Memory that is not torch's own, as torch takes it: the tensor made of this keeps it alive."""

    def __init__(self, pointer: int, num_bytes: int, free: Callable[[int], Any]) -> None:
        where = {"shape": (num_bytes,), "typestr": "|u1", "data": (pointer, False), "version": 3}
        self.__cuda_array_interface__ = where
        weakref.finalize(self, free, pointer).atexit = False


def make_memory(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, bytes]:
    """New memory of the GPU, uint8, and the handle by which another process opens it. Raises `OSError`."""
    cuda = _cuda()
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # the context of torch, or cudaMalloc would make another
        pointer = _checked(cuda.cudaMalloc(num_bytes))
        memory = torch.as_tensor(_Block(pointer, num_bytes, cuda.cudaFree), device=device)
        handle = _checked(cuda.cudaIpcGetMemHandle(pointer))
    return memory, ctypes.string_at(handle.getPtr(), _HANDLE_BYTES)


_opened: weakref.WeakValueDictionary[bytes, _Block] = weakref.WeakValueDictionary()
"""A process opens the same memory once, however many connections of a router bring it."""


def open_memory(handle: bytes, num_bytes: int, device: torch.device) -> torch.Tensor:
    """The memory that another process made, uint8. Raises `OSError` where it cannot be reached."""
    cuda = _cuda()
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        block = _opened.get(handle)
        if block is None:
            opened = cuda.cudaIpcMemHandle_t()
            ctypes.memmove(opened.getPtr(), handle, _HANDLE_BYTES)
            pointer = _checked(cuda.cudaIpcOpenMemHandle(opened, cuda.cudaIpcMemLazyEnablePeerAccess))
            block = _opened[handle] = _Block(pointer, num_bytes, cuda.cudaIpcCloseMemHandle)
        return torch.as_tensor(block, device=device)


def _cuda() -> Any:
    """CUDA's runtime, by the binding that a CUDA build of torch brings along."""
    if not torch.cuda.is_available():
        raise OSError("torch sees no GPU here")
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise OSError(f"GPU memory cannot be shared without cuda-bindings ({error})") from None
    return runtime


def _checked(answer: tuple[Any, ...]) -> Any:
    error, *values = answer
    if int(error):
        _cuda().cudaGetLastError()  # or the next call would find it
        raise OSError(f"CUDA says {error.name}")
    return values[0]
