"""Tensors of the public API to numpy arrays and back. Pure, and without torch; used by the servicers and the client.

numpy has no bfloat16. On the way in it becomes the same numbers in float32, exactly; on the way out float32 is rounded
to it (to nearest, ties to even). An array whose dtype is named ``bfloat16`` (the ml_dtypes package has it) goes as is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_moe.errors import InvalidRequest, WireError
from ray_moe.wire.v1 import inference_pb2 as pb

MAX_TENSOR_BYTES = 2**31 - 2**16
"""A protobuf message ends at 2 GiB; the rest of a request needs a little."""

_BF16 = pb.DTYPE_BF16
_STORED: dict[pb.DType.ValueType, np.dtype[Any]] = {
    pb.DTYPE_F64: np.dtype("<f8"),
    pb.DTYPE_F32: np.dtype("<f4"),
    pb.DTYPE_F16: np.dtype("<f2"),
    _BF16: np.dtype("<u2"),
    pb.DTYPE_I64: np.dtype("<i8"),
    pb.DTYPE_I32: np.dtype("<i4"),
}
_FROM_NAME: dict[str, pb.DType.ValueType] = {
    "float64": pb.DTYPE_F64,
    "float32": pb.DTYPE_F32,
    "float16": pb.DTYPE_F16,
    "bfloat16": _BF16,
    "int64": pb.DTYPE_I64,
    "int32": pb.DTYPE_I32,
}
_MAX_RANK = 8


def encode(
    array: NDArray[Any],
    dtype: pb.DType.ValueType | None = None,
    *,
    into: pb.Tensor | None = None,
    name: str = "array",
) -> pb.Tensor:
    """`array` as a message, in the wire type `dtype` (its own when None).

    Args:
        into: an empty field to fill, which spares protobuf one copy of a large tensor; returned.
        name: what to call the array in an error.

    Raises:
        InvalidRequest: a dtype that does not exist on the wire, or too large for one message.
    """
    own = _FROM_NAME.get(array.dtype.name)
    if own is None:
        raise InvalidRequest(f"{name} has dtype {array.dtype}; expected one of {', '.join(_FROM_NAME)}: convert it")
    dtype = own if dtype is None else dtype
    stored = _STORED[dtype]
    if array.size * stored.itemsize > MAX_TENSOR_BYTES:
        raise InvalidRequest(
            f"{name} has {array.size * stored.itemsize:,} bytes; a message holds {MAX_TENSOR_BYTES:,}: send it in parts"
        )
    if dtype == _BF16:
        array = array.view(np.uint16) if own == _BF16 else _round_to_bf16(array)
    with np.errstate(over="ignore"):  # a number that float16 cannot hold becomes infinite, as in any other cast
        data = array.astype(stored, copy=False).tobytes()
    tensor = pb.Tensor() if into is None else into
    tensor.dtype, tensor.data = dtype, data
    tensor.shape.extend(array.shape)
    return tensor


def decode(tensor: pb.Tensor, *, name: str = "tensor") -> NDArray[Any]:
    """The array of a message, its own copy: C-contiguous, writable, native byte order; bfloat16 as float32.

    Raises:
        WireError: an unknown dtype, a negative or absurd shape, or a number of bytes that does not fit the shape.
    """
    stored = _STORED.get(tensor.dtype)
    if stored is None:
        known = ", ".join(pb.DType.Name(dtype) for dtype in _STORED)
        raise WireError(f"{name} has dtype number {tensor.dtype}; expected one of {known}")
    shape, data = tuple(tensor.shape), tensor.data
    if len(shape) > _MAX_RANK or any(size < 0 for size in shape):
        raise WireError(f"{name} has shape {_brief(shape)}; expected at most {_MAX_RANK} sizes, none below 0")
    expected = math.prod(shape) * stored.itemsize
    if len(data) != expected:
        raise WireError(
            f"{name} has {len(data):,} bytes; its shape {_brief(shape)} in {pb.DType.Name(tensor.dtype)} "
            f"takes {expected:,}: send row-major bytes without padding"
        )
    try:
        sent: NDArray[Any] = np.ndarray(shape, stored, buffer=data)
    except ValueError as exc:  # no elements, yet sizes that numpy cannot count
        raise WireError(f"{name} has shape {_brief(shape)}: {exc}") from exc
    if tensor.dtype == _BF16:
        return (sent.astype(np.uint32) << 16).view(np.float32)
    return sent.astype(stored.newbyteorder("="))


def _round_to_bf16(array: NDArray[Any]) -> NDArray[np.uint16]:
    """The upper halves of float32 numbers, rounded to nearest, ties to even."""
    with np.errstate(over="ignore"):
        bits = array.astype(np.float32, copy=False).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    # A NaN may not be rounded: it could become infinite.
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    kept: NDArray[np.uint32] = np.where(nan, (bits >> 16) | np.uint32(0x40), rounded)
    return kept.astype(np.uint16)


def _brief(shape: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, shape[:_MAX_RANK]))
    return f"[{shown}]" if len(shape) <= _MAX_RANK else f"[{shown}, ... {len(shape)} sizes]"
