"""`ray_moe.v1.Inference`: bytes to checked values, the backend's work, values to bytes.

Messages are parsed here and not by gRPC, so that bytes which are no message get a proper error like any other bad
input. Letters in shapes: T tokens, D width of the layer, K experts per token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from ray_moe.errors import InvalidRequest
from ray_moe.service.backend import Backend, FloatArray
from ray_moe.service.grpc.guard import Context, Guard
from ray_moe.service.grpc.handlers import one_to_many, one_to_one
from ray_moe.service.offload import off_loop
from ray_moe.service.validation import check_gate, check_generate, check_hidden, check_routing, find_layer
from ray_moe.types import GenerateRequest, LayerSpec
from ray_moe.wire import arrays, messages
from ray_moe.wire.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class _Forward:
    """A ForwardRequest, checked."""

    spec: LayerSpec
    hidden: FloatArray
    routing: tuple[NDArray[np.int64], FloatArray] | None
    dtype: pb.DType.ValueType
    request_id: str


class InferenceService:
    """The handlers; one object per server."""

    NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name

    def __init__(self, backend: Backend, guard: Guard, *, max_forward_tokens: int, max_prompt_bytes: int) -> None:
        self._backend = backend
        self._guard = guard
        self._max_forward_tokens = max_forward_tokens
        self._max_prompt_bytes = max_prompt_bytes

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        return grpc.method_handlers_generic_handler(
            self.NAME,
            {
                "Forward": one_to_one(self.forward),
                "ForwardStream": grpc.stream_stream_rpc_method_handler(self.forward_stream),
                "Generate": one_to_many(self.generate),
                "ListRouters": one_to_one(self.list_routers),
            },
        )

    async def forward(self, data: bytes, context: Context) -> bytes:
        async with self._guard.request(context):
            return await self._forward(data)

    async def forward_stream(self, requests: AsyncIterator[bytes], context: Context) -> None:
        async with self._guard.request(context):
            async for data in requests:
                self._guard.caller(context, "infer")  # a key that was revoked ends the stream
                await context.write(await self._forward(data))

    async def generate(self, data: bytes, context: Context) -> None:
        """Writes, and does not yield: a cancelled `write` raises here and now, so the work ends with the call."""
        async with self._guard.request(context):
            with self._guard.payload(len(data)):
                request = await off_loop(len(data), self._read_generate, data)
            request = replace(request, timeout_s=context.time_remaining())
            async with aclosing(self._backend.generate(request)) as chunks:
                async for chunk in chunks:
                    await context.write(messages.chunk_to_proto(chunk).SerializeToString())

    async def list_routers(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context, "infer"):
            messages.parse(pb.ListRoutersRequest, data)
            return messages.routers_to_proto(await self._backend.routers()).SerializeToString()

    def _read_generate(self, data: bytes) -> GenerateRequest:
        request = messages.generate_request_from_proto(messages.parse(pb.GenerateRequest, data))
        check_generate(self._backend, request, self._max_prompt_bytes)
        return request

    async def _forward(self, data: bytes) -> bytes:
        with self._guard.payload(len(data)):
            asked = await off_loop(len(data), self._read, data)
            result: NDArray[Any]
            if len(asked.hidden):
                result = await self._backend.forward(asked.spec.path, asked.hidden, asked.routing)
            else:
                result = np.empty((0, asked.spec.output_size), np.float32)
            return await off_loop(result.nbytes, _write, asked, result)

    def _read(self, data: bytes) -> _Forward:
        message = messages.parse(pb.ForwardRequest, data)
        which = message.WhichOneof("layer")
        spec = find_layer(self._backend, None if which is None else getattr(message, which))
        if not message.HasField("hidden"):
            raise InvalidRequest(f"hidden is missing; layer {spec.path} expects [T, {spec.hidden_size}]")
        hidden = arrays.decode(message.hidden, name="hidden")
        check_hidden(spec, hidden, self._max_forward_tokens)
        routing = None
        if message.HasField("routing"):
            index = arrays.decode(message.routing.index, name="index")
            weight = arrays.decode(message.routing.weight, name="weight")
            check_routing(spec, len(hidden), index, weight)
            routing = (index.astype(np.int64, copy=False), weight)
        else:
            check_gate(self._backend, spec)
        return _Forward(spec, hidden, routing, message.hidden.dtype, message.request_id)


def _write(asked: _Forward, result: NDArray[Any]) -> bytes:
    response = pb.ForwardResponse(request_id=asked.request_id)
    arrays.encode(result, asked.dtype, into=response.hidden, name="hidden")
    return response.SerializeToString()
