"""Tensors of the protocol to numpy and back: raw bytes, or the typed contents. Pure.

bfloat16 is the same numbers in float32 on the way in, and rounded to nearest on the way out, as in `wire/arrays.py`.
BYTES are object arrays of `bytes`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ray_moe.errors import InvalidRequest, WireError
from ray_moe.service.kserve.catalog import Model, TensorInfo
from ray_moe.wire import arrays
from ray_moe.wire.kserve import grpc_service_pb2 as pb
from ray_moe.wire.v1 import inference_pb2


class _Datatype(NamedTuple):
    stored: np.dtype[Any]
    """Of an element of the raw contents."""
    contents: str
    """The field of the typed contents; empty when there is none."""


_DATATYPES = {
    "BOOL": _Datatype(np.dtype("?"), "bool_contents"),
    "INT32": _Datatype(np.dtype("<i4"), "int_contents"),
    "INT64": _Datatype(np.dtype("<i8"), "int64_contents"),
    "UINT32": _Datatype(np.dtype("<u4"), "uint_contents"),
    "UINT64": _Datatype(np.dtype("<u8"), "uint64_contents"),
    "FP16": _Datatype(np.dtype("<f2"), ""),
    "BF16": _Datatype(np.dtype("<u2"), ""),
    "FP32": _Datatype(np.dtype("<f4"), "fp32_contents"),
    "FP64": _Datatype(np.dtype("<f8"), "fp64_contents"),
    "BYTES": _Datatype(np.dtype(object), "bytes_contents"),
}
_WIRE = {
    "INT64": inference_pb2.DTYPE_I64,
    "FP16": inference_pb2.DTYPE_F16,
    "BF16": inference_pb2.DTYPE_BF16,
    "FP32": inference_pb2.DTYPE_F32,
    "FP64": inference_pb2.DTYPE_F64,
}
_HARMLESS = frozenset({"binary_data", "binary_data_size"})
"""Parameters of tensors that say what is so anyway."""

_LENGTH = struct.Struct("<I")
_MAX_NAME = 200  # of a name that comes from outside and goes into a message
_MAX_RANK = 8
_MAX_TEXTS = 1000
"""Elements of BYTES: of what one could send in a message, each would take many times its bytes."""


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor of a request."""

    datatype: str
    array: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor of a response."""

    name: str
    datatype: str
    array: NDArray[Any]


# --- In ------------------------------------------------------------------------------------------------------
def read_inputs(request: pb.ModelInferRequest, model: Model) -> dict[str, Input]:
    """The inputs by name. Those that are there fit the model; whether they belong together is not judged here.

    Raises: `InvalidRequest`, and `WireError` for contents that do not fit their shape.
    """
    infos = {info.name: info for info in model.inputs}
    raw: Sequence[bytes] = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise WireError(
            f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs: give one for each, or none"
        )
    found: dict[str, Input] = {}
    for number, tensor in enumerate(request.inputs):
        info = _known(infos, tensor.name, "input", model)
        if tensor.name in found:
            raise InvalidRequest(f"input {tensor.name!r} is given twice: give it once")
        _check_parameters("input", tensor.name, tensor.parameters)
        _check_kind(info, tensor)
        if raw and tensor.HasField("contents"):
            raise WireError(f"input {tensor.name!r} has contents beside raw_input_contents: give one of them")
        flat = _from_raw(tensor, raw[number]) if raw else _from_contents(tensor)
        try:
            found[tensor.name] = Input(tensor.datatype, flat.reshape(tuple(tensor.shape)))
        except ValueError as exc:  # no elements, yet sizes that numpy cannot count
            raise WireError(f"input {tensor.name!r} has shape {list(tensor.shape)}: {exc}") from exc
    missing = [info.name for info in model.inputs if not info.optional and info.name not in found]
    if missing:
        raise InvalidRequest(f"input {missing[0]!r} is missing; model {model.name} needs it")
    return found


def _known(infos: Mapping[str, TensorInfo], name: str, kind: str, model: Model) -> TensorInfo:
    if name not in infos:
        raise InvalidRequest(f"model {model.name} has no {kind} {name[:_MAX_NAME]!r}; expected {', '.join(infos)}")
    return infos[name]


def _check_parameters(kind: str, name: str, given: Iterable[str]) -> None:
    unknown = sorted(set(given) - _HARMLESS)
    if unknown:
        raise InvalidRequest(
            f"{kind} {name!r} has the parameter {unknown[0][:_MAX_NAME]!r}, which is not supported (nor are shared "
            "memory and classification): leave it out"
        )


def _check_kind(info: TensorInfo, tensor: pb.ModelInferRequest.InferInputTensor) -> None:
    if tensor.datatype not in info.datatypes:
        expected = " or ".join(info.datatypes)
        raise InvalidRequest(f"input {info.name!r} has datatype {tensor.datatype[:_MAX_NAME]!r}; expected {expected}")
    shape = tuple(tensor.shape)
    fits = len(shape) == len(info.shape) and all(
        size >= 0 and expected in (-1, size) for size, expected in zip(shape, info.shape, strict=True)
    )
    if not fits:
        more = f", ... {len(shape)} sizes" if len(shape) > _MAX_RANK else ""
        shown = ", ".join(map(str, shape[:_MAX_RANK])) + more
        raise InvalidRequest(
            f"input {info.name!r} has shape [{shown}]; expected {list(info.shape)}, where -1 is any size"
        )
    if tensor.datatype == "BYTES" and math.prod(shape) > _MAX_TEXTS:
        raise InvalidRequest(f"input {info.name!r} has shape {list(shape)}; expected at most {_MAX_TEXTS:,} texts")


def _from_raw(tensor: pb.ModelInferRequest.InferInputTensor, data: bytes) -> NDArray[Any]:
    count = math.prod(tensor.shape)
    if tensor.datatype == "BYTES":
        return _objects(_split(tensor.name, data, count))
    stored = _DATATYPES[tensor.datatype].stored
    if len(data) != count * stored.itemsize:
        raise WireError(
            f"input {tensor.name!r} has {len(data):,} raw bytes; its shape {list(tensor.shape)} in {tensor.datatype} "
            f"takes {count * stored.itemsize:,}: send row-major bytes without padding"
        )
    sent: NDArray[Any] = np.frombuffer(data, stored)
    if tensor.datatype == "BF16":
        return (sent.astype(np.uint32) << 16).view(np.float32)
    return sent.astype(stored.newbyteorder("="))


def _split(name: str, data: bytes, count: int) -> list[bytes]:
    """Elements of BYTES, each behind its length."""
    elements: list[bytes] = []
    start = 0
    while start < len(data) and len(elements) < count:
        begin = start + _LENGTH.size
        end = begin + _LENGTH.unpack_from(data, start)[0] if begin <= len(data) else begin
        if end > len(data):
            raise WireError(
                f"input {name!r} ends at byte {len(data):,}, inside element {len(elements)}: send for each element "
                "its length in 4 bytes, little-endian, and itself"
            )
        elements.append(data[begin:end])
        start = end
    if len(elements) != count or start != len(data):
        more = " or more" if start != len(data) else ""
        raise WireError(f"input {name!r} has {len(elements)}{more} elements; its shape takes {count:,}")
    return elements


def _from_contents(tensor: pb.ModelInferRequest.InferInputTensor) -> NDArray[Any]:
    stored, expected = _DATATYPES[tensor.datatype]
    if not expected:
        raise WireError(f"input {tensor.name!r} is {tensor.datatype}, which has no typed contents: send it raw")
    filled = {field.name for field, _ in tensor.contents.ListFields()} - {expected}
    if filled:
        raise WireError(f"input {tensor.name!r} is {tensor.datatype}, but has {filled.pop()}: fill {expected}")
    values = getattr(tensor.contents, expected)
    count = math.prod(tensor.shape)
    if len(values) != count:
        raise WireError(
            f"input {tensor.name!r} has {len(values):,} elements in {expected}, its shape {list(tensor.shape)} takes "
            f"{count:,}: fill them in, or give raw_input_contents"
        )
    return _objects(values) if tensor.datatype == "BYTES" else np.array(values, stored.newbyteorder("="))


def _objects(elements: Sequence[bytes]) -> NDArray[Any]:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


# --- Out -----------------------------------------------------------------------------------------------------
def requested_outputs(request: pb.ModelInferRequest, model: Model) -> tuple[str, ...]:
    """Names of the outputs to return, in order.

    Raises: `InvalidRequest` for one that the model does not have.
    """
    infos = {info.name: info for info in model.outputs}
    if not request.outputs:
        return tuple(name for name, info in infos.items() if not info.optional)
    names = []
    for output in request.outputs:
        _known(infos, output.name, "output", model)
        if output.name in names:
            raise InvalidRequest(f"output {output.name!r} is requested twice: request it once")
        _check_parameters("output", output.name, output.parameters)
        names.append(output.name)
    return tuple(names)


def texts(*elements: str) -> NDArray[Any]:
    """A tensor of BYTES."""
    return _objects([element.encode(errors="replace") for element in elements])


def write_output(response: pb.ModelInferResponse, output: Output, raw: bool) -> None:
    """Add an output, all of whose predecessors were added with the same `raw`.

    Raises: `InvalidRequest` when it does not fit in a message, or has no typed contents and is not to be raw.
    """
    contents = None
    if raw:
        response.raw_output_contents.append(_to_raw(output))
    else:
        stored, filled = _DATATYPES[output.datatype]
        if not filled:
            raise InvalidRequest(
                f"output {output.name!r} is {output.datatype}, which has no typed contents: leave out the parameter "
                "binary_data_output"
            )
        with np.errstate(over="ignore"):
            values = output.array.astype(stored, copy=False).ravel().tolist()
        contents = pb.InferTensorContents(**{filled: values})
    response.outputs.add(name=output.name, datatype=output.datatype, shape=output.array.shape, contents=contents)


def _to_raw(output: Output) -> bytes:
    if output.datatype != "BYTES":
        return arrays.encode(output.array, _WIRE[output.datatype], name=output.name).data
    return b"".join(part for element in output.array.flat for part in (_LENGTH.pack(len(element)), element))
