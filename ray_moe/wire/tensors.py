"""Tensors as bytes: a msgpack header that says what they are, and their raw memory behind it.

A message is ``u32 length of the header | header | zeros to a multiple of 64 | region``. A *region* is a stretch of
memory in which tensors lie one after the other, each on a multiple of 64 bytes; it is the tail of a message, a slot
of shared memory, or one array of a Ray call. Numbers are little-endian, as on every machine torch runs on. No pickle.

Decoding trusts nothing: bad bytes raise `WireError` and nothing else, and no byte is allocated that was not received.
What the header means is the caller's business (`transport/codec.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import prod
from typing import Any, Final, NamedTuple, TypeAlias

import msgpack
import torch

from ray_moe.errors import WireError

ALIGNMENT: Final = 64
"""Bytes: a cache line, and enough for every vector instruction."""
_HEADER_LENGTH: Final = struct.Struct("<I")
_MAX_DIMENSIONS: Final = 8
_MAX_DIMENSION: Final = 1 << 40
_PADDING: Final = bytes(ALIGNMENT)

_DTYPES: Final[dict[str, torch.dtype]] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
        torch.int64,
        torch.int32,
    )
}
_NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in _DTYPES.items()}

Buffer: TypeAlias = bytes | bytearray | memoryview
"""One-dimensional memory of single bytes."""


class TensorSpec(NamedTuple):
    """What a tensor is, without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


Specs: TypeAlias = Sequence[TensorSpec | None]
"""The tensors of a message in order; None stands for one that is absent."""


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to the alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def region_bytes(specs: Specs) -> int:
    """Size of the region in which these tensors lie."""
    return sum(aligned(spec.num_bytes) for spec in specs if spec is not None)


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of `tensor`: its own memory when it is contiguous on the CPU, a copy otherwise."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def region_of(tensors: Sequence[torch.Tensor | None]) -> list[Buffer]:
    """The region of `tensors` as a list of buffers to be joined or sent one by one."""
    buffers: list[Buffer] = []
    for tensor in tensors:
        if tensor is not None:
            array = raw(tensor)
            buffers.append(array)
            if remainder := len(array) % ALIGNMENT:
                buffers.append(_PADDING[remainder:])
    return buffers


def tensor_at(region: Buffer, offset: int, spec: TensorSpec) -> torch.Tensor:
    """The tensor that lies at `offset` of the writable `region`, sharing (and keeping alive) its memory."""
    count = prod(spec.shape)
    if count == 0:
        return _empty(spec)
    return torch.frombuffer(region, dtype=spec.dtype, count=count, offset=offset).view(spec.shape)


def tensors_in(region: Buffer, specs: Specs) -> list[torch.Tensor | None]:
    """Cut `region` into the tensors that lie in it. Writable memory is shared, read-only memory is copied once.

    Raises `WireError` when the region is not exactly as long as the tensors need.
    """
    needed = region_bytes(specs)
    if len(region) != needed:
        raise WireError(f"the tensors of this message need {needed} bytes, {len(region)} came: send it again whole")
    if memoryview(region).readonly:
        region = bytearray(region)  # torch must not see memory that Python promised never changes
    tensors: list[torch.Tensor | None] = []
    offset = 0
    for spec in specs:
        if spec is None:
            tensors.append(None)
        else:
            tensors.append(tensor_at(region, offset, spec))
            offset += aligned(spec.num_bytes)
    return tensors


def encode_header(fields: Sequence[Any], specs: Specs) -> bytes:
    """Everything of a message but its region. Raises `WireError` for a dtype that has no name on the wire."""
    try:
        wire_specs = [None if spec is None else (_NAMES[spec.dtype], *spec.shape) for spec in specs]
    except KeyError as error:
        raise WireError(f"tensors of {error.args[0]} cannot be sent; these can: {', '.join(_DTYPES)}") from None
    packed: bytes = msgpack.packb((fields, wire_specs))
    length = _HEADER_LENGTH.size + len(packed)
    return b"".join((_HEADER_LENGTH.pack(len(packed)), packed, _PADDING[: aligned(length) - length]))


def decode_header(message: Buffer) -> tuple[list[Any], list[TensorSpec | None], memoryview]:
    """Split a message into its fields, the specs of its tensors, and its region (possibly empty).

    The specs are valid by themselves; whether the region holds them is checked by `tensors_in`.
    """
    view = memoryview(message)
    start = _HEADER_LENGTH.size
    if len(view) < start:
        raise WireError(f"a message has at least {start} bytes, {len(view)} came")
    end = start + _HEADER_LENGTH.unpack_from(view)[0]
    if len(view) < aligned(end):
        raise WireError(f"the header of this message ends at byte {aligned(end)}, but only {len(view)} bytes came")
    try:
        fields, wire_specs = msgpack.unpackb(view[start:end])
    except Exception as error:  # msgpack documents no closed set of errors for malformed input
        raise WireError(f"the header of this message is not msgpack of (fields, tensors): {error}") from None
    if not isinstance(fields, list) or not isinstance(wire_specs, list):
        raise WireError("the header of this message must hold two lists, of fields and of tensors")
    return fields, [None if spec is None else _read_spec(spec) for spec in wire_specs], view[aligned(end) :]


def _read_spec(wire: object) -> TensorSpec:
    if not isinstance(wire, list) or not 1 <= len(wire) <= 1 + _MAX_DIMENSIONS:
        raise WireError(f"a tensor is described by its dtype and up to {_MAX_DIMENSIONS} dimensions")
    name, *shape = wire
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise WireError(f"dtype {str(name)[:40]!r} is not one of {', '.join(_DTYPES)}")
    if not all(type(dim) is int and 0 <= dim <= _MAX_DIMENSION for dim in shape):
        raise WireError(f"dimensions must be integers from 0 to {_MAX_DIMENSION}")
    return TensorSpec(dtype, tuple(shape))


def _empty(spec: TensorSpec) -> torch.Tensor:
    try:
        return torch.empty(spec.shape, dtype=spec.dtype)
    except RuntimeError:
        raise WireError(f"no tensor has the shape {spec.shape}") from None
