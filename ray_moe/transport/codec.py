"""Expert calls, replies and failures as header fields and tensors, whichever way those travel.

Used by the gRPC and the object-store transport on both ends. What is read here came from another process and is
checked before anybody computes with it.

Shape legend: t tokens sent, n rows (token, expert), D model width.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ray_moe import errors
from ray_moe.errors import ExpertFailed, RayMoEError, WireError
from ray_moe.transport.base import ExpertCall
from ray_moe.wire.tensors import TensorSpec, spec_of

_MAX_ERROR_CHARACTERS = 4000


# --- Calls ---------------------------------------------------------------------------------------------------
def call_fields(call: ExpertCall) -> tuple[Any, ...]:
    """The fields of a call that are not tensors, ready for msgpack."""
    return call.layer, call.epoch, array("I", call.experts).tobytes(), array("I", call.counts).tobytes(), call.call_id


def call_specs(call: ExpertCall) -> list[TensorSpec | None]:
    """What travels, in order: hidden [t, D], token [n], weight [n], grad [n, D]."""
    hidden = TensorSpec(call.hidden.dtype, (call.num_tokens, *call.hidden.shape[1:]))
    return [hidden, *(None if tensor is None else spec_of(tensor) for tensor in (call.token, call.weight, call.grad))]


def call_tensors(call: ExpertCall) -> list[torch.Tensor | None]:
    """The tensors of `call_specs`, gathered."""
    return [call.tokens().detach(), call.token, call.weight, call.grad]


def write_call(call: ExpertCall, views: Sequence[torch.Tensor | None]) -> None:
    """Write the tensors of `call_specs` into `views`; the tokens are gathered straight into place."""
    source = call.hidden.detach()
    if call.gather is not None and source.is_cpu and views[0] is not None:
        torch.index_select(source, 0, call.gather, out=views[0])
        views, sources = views[1:], [call.token, call.weight, call.grad]
    else:
        sources = call_tensors(call)
    for view, tensor in zip(views, sources, strict=True):
        if view is not None and tensor is not None:
            view.copy_(tensor.detach())


def read_call(fields: Sequence[Any], tensors: Sequence[torch.Tensor | None]) -> ExpertCall:
    """The call that was sent, with the tensors given (not copied). Raises `WireError` when it contradicts itself."""
    try:
        layer, epoch, experts, counts, call_id = fields
        hidden, token, weight, grad = tensors
    except ValueError:
        raise WireError(f"a call has 5 fields and 4 tensors, not {len(fields)} and {len(tensors)}") from None
    if not (isinstance(layer, str) and type(epoch) is int and isinstance(call_id, str)):
        raise WireError("a call names its layer (text), its epoch (integer) and its call id (text)")
    call = ExpertCall(
        layer, epoch, _required(hidden), None, token, _indices(experts), _indices(counts), weight, grad, call_id
    )
    _check(call)
    return call


def _required(hidden: torch.Tensor | None) -> torch.Tensor:
    if hidden is None or hidden.dim() != 2 or not hidden.is_floating_point():
        raise WireError("the tokens of a call must be a float tensor [t, D]")
    return hidden


def _indices(data: object) -> list[int]:
    if not isinstance(data, bytes) or len(data) % 4:
        raise WireError("experts and counts travel as 32-bit integers")
    return array("I", data).tolist()


def _check(call: ExpertCall) -> None:
    num_tokens, num_rows = len(call.hidden), call.num_rows
    if len(call.experts) != len(call.counts):
        raise WireError(f"{len(call.experts)} experts but {len(call.counts)} counts of rows")
    if call.token is None:
        if num_rows != num_tokens:
            raise WireError(f"{num_rows} rows are announced for {num_tokens} tokens, and nothing says which is which")
    elif call.token.dtype != torch.int32 or call.token.shape != (num_rows,):
        raise WireError(f"the token of each row must be int32 [{num_rows}], not {_name(call.token)}")
    elif num_rows and int(call.token.numpy().view(np.uint32).max()) >= num_tokens:  # unsigned: negative is huge
        raise WireError(f"a row refers to a token outside the {num_tokens} that were sent")
    if call.weight is not None and (not call.weight.is_floating_point() or call.weight.shape != (num_rows,)):
        raise WireError(f"the routing weights must be floats [{num_rows}], not {_name(call.weight)}")
    width = call.hidden.shape[1]
    if call.grad is not None and not (
        call.grad.is_floating_point() and call.grad.dim() == 2 and len(call.grad) == num_rows
    ):
        raise WireError(f"the gradient must be floats [{num_rows}, {width}], not {_name(call.grad)}")


def _name(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# --- Replies -------------------------------------------------------------------------------------------------
def reply_spec(call: ExpertCall) -> TensorSpec:
    """What the reply to `call` looks like when the experts keep width and dtype: [n, D], or [t, D] when combined."""
    num_rows = call.num_rows if call.weight is None and call.grad is None else call.num_tokens
    return TensorSpec(call.hidden.dtype, (num_rows, *call.hidden.shape[1:]))


def read_reply(tensors: Sequence[torch.Tensor | None], expected: TensorSpec) -> torch.Tensor:
    """The rows of a reply. Raises `WireError` unless they are as many as were asked for (width and dtype are the
    experts' own)."""
    rows = tensors[0] if len(tensors) == 1 else None
    if rows is None or rows.dim() != 2 or len(rows) != expected.shape[0] or not rows.is_floating_point():
        came = "no rows" if rows is None else _name(rows)
        raise WireError(f"the host answered {came} where float rows [{expected.shape[0]}, D] were asked for")
    return rows


# --- Failures ------------------------------------------------------------------------------------------------
def failure_fields(error: Exception) -> tuple[str, str]:
    """(class name, message) of an error; what is not one of ours becomes `ExpertFailed`."""
    if not isinstance(error, RayMoEError):
        error = ExpertFailed(f"{type(error).__name__}: {error}")
    return type(error).__name__, str(error)[:_MAX_ERROR_CHARACTERS]


def read_failure(fields: Sequence[Any]) -> RayMoEError:
    """The error that the other side sent; an unknown class becomes `ExpertFailed`."""
    if len(fields) != 2 or not all(isinstance(field, str) for field in fields):
        raise WireError("a failure has a class name and a message")
    name, message = fields
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, RayMoEError):
        return kind(message)
    return ExpertFailed(f"{name}: {message}")
