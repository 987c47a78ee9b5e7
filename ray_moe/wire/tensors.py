"""Tensors as bytes: a msgpack header that says what they are, and their raw memory behind it.

A message is ``u32 length of the header | header | zeros to a multiple of 64 | region``. A *region* is a stretch of
memory in which tensors lie one after the other, each on a multiple of 64 bytes: the tail of a message, or a slot of
shared memory. Numbers are little-endian, as on every machine torch runs on. No pickle.

Decoding trusts nothing: bad bytes raise `WireError` and nothing else, and no memory is taken for bytes that did not
come. What a header means is the caller's business (`transport/codec.py`). All of this runs several times for each
token and layer, on cold caches, so it makes few objects and few calls.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray

from ray_moe.errors import WireError

ALIGNMENT: Final = 64
"""Bytes: a cache line, and enough for every vector instruction."""
_HEADER_LENGTH: Final = struct.Struct("<I")
_MAX_DIMENSIONS: Final = 8
_MAX_DIMENSION: Final = 1 << 40
_PADDING: Final = bytes(ALIGNMENT)

# Each dtype, and the numpy dtype in which its bytes are carried (numpy has no bfloat16 and no 8-bit floats).
_CARRIERS: Final[dict[torch.dtype, Any]] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.uint8: np.uint8,
    torch.bfloat16: np.int16,
    torch.float8_e4m3fn: np.int8,
    torch.float8_e4m3fnuz: np.int8,
    torch.float8_e5m2: np.int8,
    torch.float8_e5m2fnuz: np.int8,
    torch.float8_e8m0fnu: np.int8,
}
_DISGUISES: Final = {torch.bfloat16: torch.int16} | {
    dtype: torch.int8 for dtype, carrier in _CARRIERS.items() if carrier is np.int8
}
_NAMES: Final = {dtype: str(dtype).removeprefix("torch.") for dtype in _CARRIERS}
_DTYPES: Final = {name: dtype for dtype, name in _NAMES.items()}

Buffer: TypeAlias = bytes | bytearray | memoryview
"""One-dimensional memory of single bytes."""


class TensorSpec(NamedTuple):
    """What a tensor is, without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int


Specs: TypeAlias = Sequence[TensorSpec | None]
"""The tensors of a message in order; None stands for one that is absent."""


def make_spec(dtype: torch.dtype, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(dtype, shape, dtype.itemsize * prod(shape))


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to the alignment."""
    return (num_bytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def region_bytes(specs: Specs) -> int:
    """Size of the region in which these tensors lie."""
    return sum([aligned(spec.num_bytes) for spec in specs if spec is not None])


# --- Writing -------------------------------------------------------------------------------------------------
def encode(fields: Sequence[Any], tensors: Sequence[torch.Tensor | TensorSpec | None]) -> tuple[list[Buffer], int]:
    """A message with its tensors inside, as the buffers to be joined (or sent one by one) and their length together.

    The tensors' own memory is used, not copied, where they are contiguous and on the CPU. Of one that lies elsewhere,
    as the fields say, there is only its spec. Raises `WireError` for a dtype that has no name on the wire.
    """
    specs: list[tuple[Any, ...] | None] = []
    buffers: list[Buffer] = [b""]
    num_bytes = 0
    for tensor in tensors:
        if isinstance(tensor, TensorSpec):
            specs.append((_NAMES.get(tensor.dtype) or _refuse(tensor.dtype), *tensor.shape))
            continue
        if tensor is None:
            specs.append(None)
            continue
        specs.append((_NAMES.get(tensor.dtype) or _refuse(tensor.dtype), *tensor.shape))
        length = tensor.nbytes
        if length:
            buffers.append(raw(tensor))
            num_bytes += length
            if excess := length % ALIGNMENT:
                buffers.append(_PADDING[excess:])
                num_bytes += ALIGNMENT - excess
    buffers[0] = header = _header(fields, specs)
    return buffers, len(header) + num_bytes


def encode_header(fields: Sequence[Any], specs: Specs) -> bytes:
    """A message whose tensors lie elsewhere; its fields say where."""
    return _header(
        fields,
        [None if spec is None else (_NAMES.get(spec.dtype) or _refuse(spec.dtype), *spec.shape) for spec in specs],
    )


def raw(tensor: torch.Tensor) -> memoryview:
    """The memory of `tensor` (not empty), or of a copy when it is not contiguous or not on the CPU."""
    if tensor.requires_grad or not tensor.is_cpu or not tensor.is_contiguous():
        tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in _DISGUISES:
        tensor = tensor.view(_DISGUISES[tensor.dtype])
    return tensor.numpy().data


def _header(fields: Sequence[Any], specs: Sequence[tuple[Any, ...] | None]) -> bytes:
    packed: bytes = msgpack.packb((fields, specs))
    length = len(packed)
    return b"".join(
        (_HEADER_LENGTH.pack(length), packed, _PADDING[(_HEADER_LENGTH.size + length - 1) % ALIGNMENT + 1 :])
    )


def _refuse(dtype: torch.dtype) -> NoReturn:
    raise WireError(f"tensors of {dtype} cannot be sent; these can: {', '.join(_DTYPES)}")


# --- Reading -------------------------------------------------------------------------------------------------
def decode(message: Buffer) -> tuple[list[Any], list[TensorSpec | None], memoryview]:
    """Split a message into its fields, the specs of its tensors, and its region (empty when they lie elsewhere).

    The specs are valid by themselves; whether a region holds them is checked by `tensors_in`.
    """
    view = memoryview(message)
    start = _HEADER_LENGTH.size
    if len(view) < start:
        raise WireError(f"a message has at least {start} bytes, {len(view)} came")
    end = start + _HEADER_LENGTH.unpack_from(view)[0]
    region_start = aligned(end)
    if len(view) < region_start:
        raise WireError(f"the header of this message ends at byte {region_start}, but only {len(view)} bytes came")
    try:
        fields, wire_specs = msgpack.unpackb(view[start:end])
        specs = [None if spec is None else _read_spec(*spec) for spec in wire_specs]
    except WireError:
        raise
    except Exception as error:  # msgpack documents no closed set of errors for malformed input
        raise WireError(f"the header of this message is not msgpack of (fields, tensors): {error}") from None
    if type(fields) is not list:
        raise WireError("the header of this message must begin with the list of its fields")
    return fields, specs, view[region_start:]


def tensors_in(region: Buffer, specs: Specs) -> list[torch.Tensor | None]:
    """Cut `region` into the tensors that lie in it. They share it and keep it alive; read-only memory is copied first.

    Raises `WireError` when the region is not exactly as long as the tensors need.
    """
    region = _writable(region, region_bytes(specs))
    tensors: list[torch.Tensor | None] = []
    offset = 0
    for spec in specs:
        if spec is None:
            tensors.append(None)
        else:
            tensors.append(tensor_at(region, offset, spec))
            offset = aligned(offset + spec.num_bytes)
    return tensors


def tensor_in(region: Buffer, spec: TensorSpec) -> torch.Tensor:
    """`tensors_in` for a single tensor."""
    return tensor_at(_writable(region, aligned(spec.num_bytes)), 0, spec)


def tensor_at(region: Buffer, offset: int, spec: TensorSpec) -> torch.Tensor:
    """The tensor that lies at `offset` of the writable `region`; it must not reach beyond it."""
    dtype, shape, num_bytes = spec
    try:
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        array: NDArray[Any] = np.ndarray(shape, _CARRIERS[dtype], region, offset)
    except (RuntimeError, TypeError, ValueError) as error:  # more numbers than any memory holds
        raise WireError(f"no tensor of shape {shape} fits here: {error}") from None
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if dtype in _DISGUISES else tensor


def _writable(region: Buffer, num_bytes: int) -> Buffer:
    if len(region) != num_bytes:
        raise WireError(f"the tensors of this message need {num_bytes} bytes, {len(region)} came: send it again whole")
    # torch must not see memory that Python promised never changes.
    writable = type(region) is bytearray or (type(region) is memoryview and not region.readonly)
    return region if writable else bytearray(region)


@lru_cache(maxsize=4096, typed=True)
def _read_spec(name: object, *shape: object) -> TensorSpec:
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise WireError(f"dtype {str(name)[:40]!r} is not one of {', '.join(_DTYPES)}")
    if len(shape) > _MAX_DIMENSIONS:
        raise WireError(f"a tensor has up to {_MAX_DIMENSIONS} dimensions, not {len(shape)}")
    dims: list[int] = []
    for dim in shape:
        if type(dim) is not int or not 0 <= dim <= _MAX_DIMENSION:
            raise WireError(f"dimensions are integers from 0 to {_MAX_DIMENSION}")
        dims.append(dim)
    return make_spec(dtype, tuple(dims))
