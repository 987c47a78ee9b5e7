"""GPU memory that a router and a host on the same node share, so that hidden states never leave the card.

As in `shared_memory.py` the router makes one arena for each connection and takes a slot in it for each call: the tokens
and room for the rows. The host opens the same memory (CUDA IPC), computes on the tokens where they lie and writes its
rows into the room. Only what is small travels with the message. Each side finishes its own kernels before it sends
one, so the other finds what it says; what follows on the router's side is in the order of its one stream.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final

import msgpack
import torch

from ray_moe.errors import WireError
from ray_moe.transport.free_list import Ledger
from ray_moe.wire import tensors
from ray_moe.wire.tensors import Specs, TensorSpec, aligned

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
        """A slot for these tensors and a reply of `room_bytes`, or None when there is no room now."""
        request_bytes = tensors.region_bytes(request)
        start = self.ledger.allocate(request_bytes + aligned(room_bytes))
        return None if start is None else DeviceSlot(self, start, request, request_bytes, aligned(room_bytes))

    def linger(self) -> None:
        """Keep the memory a little longer, until the host has surely let go of it."""
        timer = threading.Timer(_LINGER_S, lambda memory: None, (self.memory,))
        timer.daemon = True
        timer.start()


class DeviceSlot:
    """A stretch of a `DeviceArena`. Free again after `release`, or when nobody has it any more."""

    __slots__ = ("__weakref__", "_arena", "_give_back", "_middle", "_room_bytes", "placement", "request")

    def __init__(self, arena: DeviceArena, start: int, request: Specs, request_bytes: int, room_bytes: int) -> None:
        self._arena = arena
        self._middle, self._room_bytes = start + request_bytes, room_bytes
        self.placement = (start, request_bytes, room_bytes, tensors.encode_header((), request))
        """What the host must be told."""
        self.request = tensors_in(arena.memory[start : self._middle], request)
        """Where the tensors of the call belong."""
        self._give_back = weakref.finalize(self, arena.ledger.give_back, start, request_bytes + room_bytes)
        self._give_back.atexit = False

    def release(self) -> None:
        """It is free again; once more does nothing."""
        self._give_back()

    def rows(self, spec: TensorSpec) -> torch.Tensor:
        """What the host left in the room. Raises `WireError` when that cannot be in there."""
        if spec.num_bytes > self._room_bytes:
            raise WireError(f"the host answered {spec.num_bytes} bytes where it was offered {self._room_bytes}")
        return tensor_at(self._arena.memory, self._middle, spec)


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


def find(memory: torch.Tensor | None, placement: list[Any]) -> tuple[list[torch.Tensor | None], Specs, torch.Tensor]:
    """The tensors that lie where a router says, their specs, and the room for the reply. Raises `WireError`."""
    if [type(field) for field in placement] != [int, int, int, bytes]:
        raise WireError("a place in GPU memory is its offset, the request's bytes, the reply's bytes and what is there")
    offset, request_bytes, room_bytes, header = placement
    middle, end = offset + request_bytes, offset + request_bytes + room_bytes
    if memory is None or not 0 <= offset <= middle <= end <= len(memory):
        raise WireError(f"no GPU memory is shared from byte {offset} to {end}")
    _, specs, _ = tensors.decode(header)
    return tensors_in(memory[offset:middle], specs), specs, memory[middle:end]


def tensors_in(region: torch.Tensor, specs: Specs) -> list[torch.Tensor | None]:
    """Cut a region [bytes] into the tensors that lie in it, as `wire/tensors.py` does on the CPU."""
    if len(region) != tensors.region_bytes(specs):
        raise WireError(f"these tensors need {tensors.region_bytes(specs)} bytes of GPU memory, not {len(region)}")
    cut: list[torch.Tensor | None] = []
    offset = 0
    for spec in specs:
        cut.append(None if spec is None else tensor_at(region, offset, spec))
        offset += 0 if spec is None else aligned(spec.num_bytes)
    return cut


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


def open_memory(handle: bytes, num_bytes: int, device: torch.device) -> torch.Tensor:
    """The memory that another process made, uint8. Raises `OSError` where it cannot be reached."""
    cuda = _cuda()
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        opened = cuda.cudaIpcMemHandle_t()
        ctypes.memmove(opened.getPtr(), handle, _HANDLE_BYTES)
        pointer = _checked(cuda.cudaIpcOpenMemHandle(opened, cuda.cudaIpcMemLazyEnablePeerAccess))
        return torch.as_tensor(_Block(pointer, num_bytes, cuda.cudaIpcCloseMemHandle), device=device)


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
