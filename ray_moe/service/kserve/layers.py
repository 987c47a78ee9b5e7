"""One MoE layer as a model: requests of the protocol to arrays for `Backend.forward`. Pure.

Letters in shapes: T tokens, D width of the layer, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_moe.errors import InvalidRequest
from ray_moe.service.backend import Backend, FloatArray
from ray_moe.service.kserve import parameters
from ray_moe.service.kserve.catalog import Model
from ray_moe.service.kserve.tensors import read_inputs, requested_outputs
from ray_moe.service.validation import check_gate, check_hidden, check_routing
from ray_moe.types import LayerSpec
from ray_moe.wire.kserve import grpc_service_pb2 as pb


@dataclass(frozen=True, slots=True)
class Asked:
    """A call of a layer, checked."""

    spec: LayerSpec
    hidden: FloatArray
    routing: tuple[NDArray[np.int64], FloatArray] | None
    datatype: str
    """In which the answer travels: that of `hidden`."""


def read(
    backend: Backend, request: pb.ModelInferRequest, model: Model, spec: LayerSpec, *, max_forward_tokens: int
) -> Asked:
    """Raises: `InvalidRequest`, `UnsupportedModel` without routing where the gate cannot be called."""
    parameters.check_names(request)
    requested_outputs(request, model)
    given = {tensor.name for tensor in request.inputs}
    if given.isdisjoint({"index", "weight"}):
        check_gate(backend, spec)
    inputs = read_inputs(request, model)
    hidden = inputs["hidden"].array
    check_hidden(spec, hidden, max_forward_tokens)
    if given.isdisjoint({"index", "weight"}):
        return Asked(spec, hidden, None, inputs["hidden"].datatype)
    if not given >= {"index", "weight"}:
        raise InvalidRequest("index and weight belong together: give both, or neither for the layer's own gate")
    index: NDArray[Any] = inputs["index"].array
    weight: FloatArray = inputs["weight"].array
    check_routing(spec, len(hidden), index, weight)
    return Asked(spec, hidden, (index.astype(np.int64, copy=False), weight), inputs["hidden"].datatype)
