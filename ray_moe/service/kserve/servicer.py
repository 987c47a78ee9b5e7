"""`inference.GRPCInferenceService`, the Open Inference Protocol: bytes to checked values, the work, values to bytes.

It runs in the same server as `ray_moe.v1` and behind the same guard. Messages are parsed here and not by gRPC, so that
bytes which are no message get a proper error. Outputs are raw unless the request says otherwise.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from ray_moe.errors import DeadlineExceeded, Unavailable
from ray_moe.service.backend import Backend
from ray_moe.service.grpc.guard import Context, Guard
from ray_moe.service.grpc.handlers import one_to_one
from ray_moe.service.kserve import catalog, generation, layers, metadata
from ray_moe.service.kserve.catalog import VERSION, Model
from ray_moe.service.kserve.parameters import Options, read_options
from ray_moe.service.kserve.statistics import Statistics, Stopwatch
from ray_moe.service.kserve.streams import Reply, Stream
from ray_moe.service.kserve.tensors import Output, write_output
from ray_moe.service.offload import off_loop
from ray_moe.types import LayerSpec
from ray_moe.wire import messages
from ray_moe.wire.kserve import grpc_service_pb2 as pb

FINAL = "triton_final_response"
WEIGHTS = "weights_version"


class KServeService:
    """The handlers; one object per server."""

    NAME = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

    def __init__(self, backend: Backend, guard: Guard, *, max_forward_tokens: int, max_prompt_bytes: int) -> None:
        self._backend = backend
        self._guard = guard
        self._max_forward_tokens = max_forward_tokens
        self._max_prompt_bytes = max_prompt_bytes
        self._statistics = Statistics()

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        unary = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelInfer": self.model_infer,
            "ModelConfig": self.model_config,
            "ModelStatistics": self.model_statistics,
            "RepositoryIndex": self.repository_index,
        }
        handlers = {name: one_to_one(method) for name, method in unary.items()}
        stream = grpc.stream_stream_rpc_method_handler(self.model_stream_infer)
        return grpc.method_handlers_generic_handler(self.NAME, {**handlers, "ModelStreamInfer": stream})

    # --- What there is ---------------------------------------------------------------------------------------
    async def server_live(self, data: bytes, context: Context) -> bytes:
        async with self._guard.errors(context):
            messages.parse(pb.ServerLiveRequest, data)
            return pb.ServerLiveResponse(live=True).SerializeToString()

    async def server_ready(self, data: bytes, context: Context) -> bytes:
        async with self._guard.errors(context):
            messages.parse(pb.ServerReadyRequest, data)
            return pb.ServerReadyResponse(ready=self._guard.admission.serving).SerializeToString()

    async def model_ready(self, data: bytes, context: Context) -> bytes:
        async with self._guard.errors(context):
            asked = messages.parse(pb.ModelReadyRequest, data)
            ready = self._guard.admission.serving and catalog.has_model(self._backend, asked.name, asked.version)
            return pb.ModelReadyResponse(ready=ready).SerializeToString()

    async def server_metadata(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context):
            messages.parse(pb.ServerMetadataRequest, data)
            return metadata.server().SerializeToString()

    async def model_metadata(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context):
            asked = messages.parse(pb.ModelMetadataRequest, data)
            return metadata.metadata(self._find(asked.name, asked.version)).SerializeToString()

    async def model_config(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context):
            asked = messages.parse(pb.ModelConfigRequest, data)
            return metadata.config(self._find(asked.name, asked.version)).SerializeToString()

    async def model_statistics(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context):
            asked = messages.parse(pb.ModelStatisticsRequest, data)
            if asked.name:
                models = [self._find(asked.name, asked.version)]
            else:
                models = self._models()
                catalog.check_version(asked.version)
            return self._statistics.to_proto(models).SerializeToString()

    async def repository_index(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context):
            asked = messages.parse(pb.RepositoryIndexRequest, data)
            ready = self._guard.admission.serving
            # The one repository has no name, so no other has models.
            models = self._models() if not asked.repository_name and (ready or not asked.ready) else []
            return metadata.index(models, ready).SerializeToString()

    def _find(self, name: str, version: str) -> Model:
        self._check_ready()
        return catalog.find_model(self._backend, name, version)

    def _models(self) -> list[Model]:
        self._check_ready()
        return catalog.list_models(self._backend)

    def _check_ready(self) -> None:
        if not self._backend.ready:
            raise Unavailable("the models are not known before the service is ready: retry, or wait for ServerReady")

    # --- Inference -------------------------------------------------------------------------------------------
    async def model_infer(self, data: bytes, context: Context) -> bytes:
        arrived_ns = time.perf_counter_ns()
        async with self._guard.request(context):
            with ExitStack() as held:
                call = await self._read(data, arrived_ns, held, context.time_remaining(), on_stream=False)
                (answer,) = [each async for each in self._answer(call)]
                return answer

    async def model_stream_infer(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Idle streams do not count against the limit of concurrent requests; each of their requests does."""

        async def read(data: bytes, held: ExitStack) -> Reply:
            call = await self._read(data, time.perf_counter_ns(), held, context.time_remaining(), on_stream=True)
            generates = self._backend.ready and call.request.model_name == self._backend.model_name
            return Reply(call.request.id, not generates, self._answer(call))

        async with self._guard.known(context):
            await Stream(context, self._guard, read).answer(requests)

    async def _read(
        self, data: bytes, arrived_ns: int, held: ExitStack, time_left_s: float | None, *, on_stream: bool
    ) -> _Call:
        held.enter_context(self._guard.payload(len(data)))
        begun_ns, request = await off_loop(len(data), _parse, data)
        return _Call(request, len(data), arrived_ns, begun_ns, held, time_left_s, on_stream)

    async def _answer(self, call: _Call) -> AsyncGenerator[bytes, None]:
        """The responses, in bytes: ModelStreamInferResponses on a stream, else one ModelInferResponse."""
        model = self._find(call.request.model_name, call.request.model_version)
        with self._statistics.request(model, call.arrived_ns) as stopwatch:
            stopwatch.lap("queue", call.begun_ns)
            options = read_options(call.request)
            limits = [limit for limit in (options.timeout_s, call.time_left_s) if limit is not None]
            options = replace(options, timeout_s=min(limits, default=None))
            writer = _Writer(call, model, options)
            if model.layer is not None:
                yield await self._call_layer(call, model, model.layer, writer, stopwatch)
                return
            async with aclosing(self._generate(call, model, writer, stopwatch)) as answers:
                async for answer in answers:
                    yield answer

    async def _call_layer(
        self, call: _Call, model: Model, spec: LayerSpec, writer: _Writer, stopwatch: Stopwatch
    ) -> bytes:
        def read() -> layers.Asked:
            return layers.read(self._backend, call.request, model, spec, max_forward_tokens=self._max_forward_tokens)

        asked = await off_loop(call.num_bytes, read)
        stopwatch.lap("compute_input")
        result = await self._forward(asked, writer.options.timeout_s)
        stopwatch.lap("compute_infer")
        answer = await off_loop(result.nbytes, writer.write, [Output("hidden", asked.datatype, result)], True)
        stopwatch.lap("compute_output")
        return answer

    async def _forward(self, asked: layers.Asked, timeout_s: float | None) -> NDArray[Any]:
        if not len(asked.hidden):
            return np.empty((0, asked.spec.output_size), np.float32)
        computing = self._backend.forward(asked.spec.path, asked.hidden, asked.routing)
        if timeout_s is None:
            return await computing
        try:
            return await asyncio.wait_for(computing, timeout_s)
        except asyncio.TimeoutError as exc:
            raise DeadlineExceeded(
                f"layer {asked.spec.path} gave no answer within {timeout_s:g} s: allow more"
            ) from exc

    async def _generate(
        self, call: _Call, model: Model, writer: _Writer, stopwatch: Stopwatch
    ) -> AsyncGenerator[bytes, None]:
        def read() -> generation.Asked:
            limit = self._max_prompt_bytes
            return generation.read(self._backend, call.request, model, max_prompt_bytes=limit, on_stream=call.on_stream)

        asked = await off_loop(call.num_bytes, read)
        call.held.close()
        stopwatch.lap("compute_input")
        pieces = []
        wanted = replace(asked.request, timeout_s=writer.options.timeout_s)
        async with aclosing(self._backend.generate(wanted)) as chunks:
            async for chunk in chunks:
                stopwatch.lap("compute_infer")
                if not asked.in_pieces:
                    pieces.append(chunk)
                    continue
                outputs = generation.outputs_of(chunk, asked.outputs)
                answer = writer.write(outputs, bool(chunk.finish_reason), chunk.version)
                stopwatch.lap("compute_output")
                yield answer
                stopwatch.lap(None)  # the time of whoever takes it
        if pieces:
            outputs = generation.outputs_of(generation.join(pieces), asked.outputs)
            answer = writer.write(outputs, True, pieces[0].version)
            stopwatch.lap("compute_output")
            yield answer


@dataclass(frozen=True, slots=True)
class _Call:
    """A ModelInferRequest, parsed, and how it came. Times are those of `time.perf_counter_ns`."""

    request: pb.ModelInferRequest
    num_bytes: int
    arrived_ns: int
    begun_ns: int
    """When its reading began."""
    held: ExitStack
    """What is held for its message; closed as soon as that is needed no more."""
    time_left_s: float | None
    """Until the caller's deadline."""
    on_stream: bool


class _Writer:
    """Makes the responses to one request."""

    def __init__(self, call: _Call, model: Model, options: Options) -> None:
        self.options = options
        self._id = call.request.id
        self._on_stream = call.on_stream
        self._model = model

    def write(self, outputs: Iterable[Output], is_last: bool, weights: int | None = None) -> bytes:
        """`weights` is the version of the weights that computed them, where that is known."""
        response = pb.ModelInferResponse(model_name=self._model.name, model_version=VERSION, id=self._id)
        if weights is not None:
            response.parameters[WEIGHTS].int64_param = weights
        for output in outputs:
            write_output(response, output, self.options.raw)
        if not self._on_stream:
            return response.SerializeToString()
        response.parameters[FINAL].bool_param = is_last
        return pb.ModelStreamInferResponse(infer_response=response).SerializeToString()


def _parse(data: bytes) -> tuple[int, pb.ModelInferRequest]:
    """The message, and when its reading began."""
    begun_ns = time.perf_counter_ns()
    return begun_ns, messages.parse(pb.ModelInferRequest, data)
