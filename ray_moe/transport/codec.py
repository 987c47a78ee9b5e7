"""Expert calls, replies and failures as header fields and tensors, whichever way those travel.

Used by the streams and the object-store transport on both ends. What is read here came from another process and is
checked before anybody computes with it.

Shape legend: t tokens sent, n rows (token, expert), D model width.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from ray_moe import errors
from ray_moe.errors import ExpertFailed, RayMoEError, WireError
from ray_moe.transport.base import TRAINING, ExpertCall
from ray_moe.wire.tensors import Specs, TensorSpec, make_spec

# The first field of a reply.
ROWS_FOLLOW: Final = 0
ROWS_IN_ROOM: Final = 1
FAILED: Final = 2

_MAX_ERROR_CHARACTERS: Final = 4000
_TRACE: Final = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

Tensors = Sequence[torch.Tensor | None]


# --- Calls ---------------------------------------------------------------------------------------------------
def call_fields(call: ExpertCall) -> tuple[Any, ...]:
    """The fields of a call that are not tensors, ready for msgpack; the last two only where they say something.

    The sixth is the trace, the seventh the version and whether the host is to keep, or has kept, what goes backward.
    """
    experts, counts = array("I", call.experts).tobytes(), array("I", call.counts).tobytes()
    fields = (call.layer, call.epoch, experts, counts, call.call_id)
    if call.version or call.keep or call.kept:
        return (*fields, call.trace, (call.version, call.keep, call.kept))
    return (*fields, call.trace) if call.trace else fields


def call_tensors(call: ExpertCall) -> Tensors:
    """What travels, in order: hidden [t, D] (gathered), token [n], weight [n], grad [n, D].

    In training hidden and grad may be in 8 bits: uint8 [t, D + 4] and [n, D + 4].
    """
    return call.tokens(), None if call.kept else call.token, call.weight, call.grad


def call_specs(call: ExpertCall) -> list[TensorSpec | None]:
    """What `call_tensors` would be, without gathering."""
    num_tokens = 0 if call.kept else call.num_tokens
    hidden = make_spec(call.hidden.dtype, (num_tokens, *call.hidden.shape[1:]))
    others = (None if call.kept else call.token, call.weight, call.grad)
    return [hidden, *[None if tensor is None else make_spec(tensor.dtype, tuple(tensor.shape)) for tensor in others]]


@torch.no_grad()
def write_call(call: ExpertCall, views: Tensors) -> None:
    """Write what `call_tensors` would be into `views`; the tokens are gathered straight into place."""
    hidden, *others = views
    if hidden is not None:
        if call.kept or call.gather is None or call.hidden.device != hidden.device:
            hidden.copy_(call.tokens())
        else:
            torch.index_select(call.hidden, 0, call.gather.to(hidden.device), out=hidden)
    for view, tensor in zip(others, (None if call.kept else call.token, call.weight, call.grad), strict=True):
        if view is not None and tensor is not None:
            view.copy_(tensor)


def read_call(fields: Sequence[Any], specs: Specs, tensors: Tensors) -> ExpertCall:
    """The call that was sent, with the tensors given (not copied). Raises `WireError` when it contradicts itself."""
    if len(fields) not in (5, 6, 7) or len(specs) != 4:
        raise WireError(f"a call has 5 to 7 fields and 4 tensors, not {len(fields)} and {len(specs)}")
    layer, epoch, experts, counts, call_id, *more = fields
    if type(layer) is not str or type(epoch) is not int or type(call_id) is not str:
        raise WireError("a call names its layer (text), its epoch (integer) and its call id (text)")
    hidden, token, weight, grad = tensors
    if hidden is None or not (_is_float(specs[0], 2) or _is_packed(specs[0])):
        raise WireError(f"the tokens of a call must be floats [t, D], not {_name(specs[0])}")
    call = ExpertCall(layer, epoch, hidden, None, token, _integers(experts), _integers(counts), weight, grad, call_id)
    if more and type(more[0]) is str and _TRACE.fullmatch(more[0]):  # the call is good without it
        call.trace = more[0]
    if len(more) == 2:
        call.version, call.keep, call.kept = _read_training(more[1])
    _check(call, specs)
    return call


def _read_training(field: object) -> tuple[int, bool, bool]:
    if not isinstance(field, list) or [type(each) for each in field] != [int, bool, bool] or field[0] < TRAINING:
        raise WireError("a call's seventh field is its version, and whether to keep and whether it was kept")
    return field[0], field[1], field[2]


def _check(call: ExpertCall, specs: Specs) -> None:
    hidden, token, weight, grad = specs
    if _is_packed(hidden) and (call.version != TRAINING or weight is not None):
        raise WireError("only in training do tokens travel in 8 bits, and without routing weights")
    num_tokens = 0 if hidden is None else hidden.shape[0]
    num_rows = sum(call.counts)
    if len(call.experts) != len(call.counts):
        raise WireError(f"{len(call.experts)} experts but {len(call.counts)} counts of rows")
    if call.kept:
        if num_tokens or token is not None or grad is None or not call.call_id:
            raise WireError("of a call that was kept only the gradient and the call id travel")
    elif call.token is None:
        if num_rows != num_tokens:
            raise WireError(f"{num_rows} rows are announced for {num_tokens} tokens, and nothing says which is which")
    else:
        if token is None or token.dtype is not torch.int32 or token.shape != (num_rows,):
            raise WireError(f"the token of each row must be int32 [{num_rows}], not {_name(token)}")
        # Negative numbers are huge when read without a sign. On a GPU it would be waited for: see `ExpertHost`.
        if num_rows and call.token.is_cpu and int(call.token.numpy().view(np.uint32).max()) >= num_tokens:
            raise WireError(f"a row refers to a token outside the {num_tokens} that were sent")
    if weight is not None and not (_is_float(weight, 1) and weight.shape[0] == num_rows):
        raise WireError(f"the routing weights must be floats [{num_rows}], not {_name(weight)}")
    is_like = _is_packed(grad) if _is_packed(hidden) else _is_float(grad, 2)
    if grad is not None and not (is_like and grad.shape[0] == num_rows):
        raise WireError(f"the gradient must be floats [{num_rows}, D], as the tokens are, not {_name(grad)}")


def _integers(data: object) -> list[int]:
    if type(data) is not bytes or len(data) % 4:
        raise WireError("experts and counts travel as 32-bit integers")
    return array("I", data).tolist()


def _is_float(spec: TensorSpec | None, num_dimensions: int) -> bool:
    return spec is not None and spec.dtype.is_floating_point and len(spec.shape) == num_dimensions


def _is_packed(spec: TensorSpec | None) -> bool:
    """Whether these are rows [n, D + 4] in 8 bits, each with its scale (`ops/compression.py`)."""
    return spec is not None and spec.dtype is torch.uint8 and len(spec.shape) == 2 and spec.shape[1] > 4


def _name(spec: TensorSpec | None) -> str:
    return "absent" if spec is None else f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"


# --- Replies -------------------------------------------------------------------------------------------------
class Wanted(NamedTuple):
    """What the reply to a call must be."""

    num_rows: int
    """n, or t when the host combines or goes backward."""
    packed: bool = False
    """Whether in 8 bits, as the tokens came: uint8 [rows, D + 4]."""


def wanted(call: ExpertCall) -> Wanted:
    num_rows = call.num_rows if call.weight is None and call.grad is None else call.num_tokens
    return Wanted(num_rows, call.hidden.dtype is torch.uint8)


def read_reply(fields: Sequence[Any], specs: Specs, wanted: Wanted) -> tuple[TensorSpec, bool]:
    """The spec of the rows that were answered, and whether they lie in the room that the call offered for them.

    Raises the error that was answered instead, and `WireError` unless there are as many rows as were asked for, in 8
    bits if the tokens were (else their width and dtype are the experts' own).
    """
    kind = fields[0] if fields else None
    if kind == FAILED:
        raise read_failure(fields)
    if kind not in (ROWS_FOLLOW, ROWS_IN_ROOM):
        raise WireError(f"a reply of the unknown kind {str(kind)[:40]!r}")
    rows = specs[0] if len(specs) == 1 else None
    is_like = _is_packed(rows) if wanted.packed else _is_float(rows, 2)
    if rows is None or not is_like or rows.shape[0] != wanted.num_rows:
        kind_of = "packed" if wanted.packed else "float"
        raise WireError(f"the host answered {_name(rows)} where {kind_of} rows [{wanted.num_rows}, D] were asked for")
    return rows, kind == ROWS_IN_ROOM


# --- Failures ------------------------------------------------------------------------------------------------
def failure_fields(error: Exception) -> tuple[int, str, str]:
    """The fields of a reply that is an error; what is not one of ours becomes `ExpertFailed`."""
    if not isinstance(error, RayMoEError):
        error = ExpertFailed(f"{type(error).__name__}: {error}")
    return FAILED, type(error).__name__, str(error)[:_MAX_ERROR_CHARACTERS]


def read_failure(fields: Sequence[Any]) -> RayMoEError:
    """The error that the other side sent; an unknown class becomes `ExpertFailed`."""
    if len(fields) != 3 or type(fields[1]) is not str or type(fields[2]) is not str:
        raise WireError("a failure has a class name and a message")
    _, name, message = fields
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, RayMoEError):
        return kind(message)
    return ExpertFailed(f"{name}: {message}")
