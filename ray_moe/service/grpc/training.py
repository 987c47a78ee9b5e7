"""`ray_moe.v1.Training`: bytes to checked values, the trainer's work, values to bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import grpc
import numpy as np

from ray_moe.service import validation
from ray_moe.service.backend import Backend
from ray_moe.service.grpc.guard import Context, Guard
from ray_moe.service.grpc.handlers import one_to_one
from ray_moe.service.offload import off_loop
from ray_moe.types import GenerateRequest, MicroBatch, StepOptions, StepResult
from ray_moe.wire import arrays, messages
from ray_moe.wire.v1 import inference_pb2
from ray_moe.wire.v1 import training_pb2 as pb


class TrainingService:
    """The handlers; one object per server."""

    NAME = pb.DESCRIPTOR.services_by_name["Training"].full_name

    def __init__(self, backend: Backend, guard: Guard, *, max_tokens: int, max_prompt_bytes: int) -> None:
        """Args: max_tokens: of one micro-batch."""
        self._backend = backend
        self._guard = guard
        self._max_tokens = max_tokens
        self._max_prompt_bytes = max_prompt_bytes

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        return grpc.method_handlers_generic_handler(
            self.NAME,
            {
                "ForwardBackward": one_to_one(self.forward_backward),
                "OptimStep": one_to_one(self.optim_step),
                "TrainStep": one_to_one(self.train_step),
                "Discard": one_to_one(self.discard),
                "Sample": one_to_one(self.sample),
                "SaveState": one_to_one(self.save_state),
                "LoadState": one_to_one(self.load_state),
                "GetState": one_to_one(self.get_state),
                "PublishTrained": one_to_one(self.publish_trained),
            },
        )

    # --- steps ---------------------------------------------------------------------------------------------
    async def forward_backward(self, data: bytes, context: Context) -> bytes:
        async with self._guard.request(context, "train"):
            with self._guard.payload(len(data)):
                micro = await off_loop(len(data), self._read_forward_backward, data)
                report = await self._backend.training.forward_backward(micro)
            return messages.micro_batch_report_to_proto(report).SerializeToString()

    async def optim_step(self, data: bytes, context: Context) -> bytes:
        async with self._guard.request(context, "train"):
            options = read_options(messages.parse(pb.OptimStepRequest, data).options)
            return _result(await self._backend.training.optim_step(options))

    async def train_step(self, data: bytes, context: Context) -> bytes:
        async with self._guard.request(context, "train"):
            with self._guard.payload(len(data)):
                micros, options = await off_loop(len(data), self._read_train_step, data)
                return _result(await self._backend.training.train_step(micros, options))

    async def discard(self, data: bytes, context: Context) -> bytes:
        async with self._guard.request(context, "train"):
            ids = messages.parse(pb.DiscardRequest, data).ids
            return pb.DiscardResponse(ids=await self._backend.training.discard(tuple(ids))).SerializeToString()

    def _read_forward_backward(self, data: bytes) -> MicroBatch:
        return read_micro_batch(self._backend, messages.parse(pb.ForwardBackwardRequest, data).batch, self._max_tokens)

    def _read_train_step(self, data: bytes) -> tuple[Sequence[MicroBatch], StepOptions]:
        request = messages.parse(pb.TrainStepRequest, data)
        micros = [read_micro_batch(self._backend, batch, self._max_tokens) for batch in request.batches]
        validation.check_micro_batches(micros)
        return micros, read_options(request.options)

    # --- what was learned ----------------------------------------------------------------------------------
    async def sample(self, data: bytes, context: Context) -> bytes:
        async with self._guard.request(context, "train"):
            with self._guard.payload(len(data)):
                request = await off_loop(len(data), self._read_sample, data)
            if request.prompt is not None:
                request = replace(request, prompt=None, token_ids=await self._backend.tokenize(request.prompt))
                validation.check_generate(self._backend, request, self._max_prompt_bytes)
            chunk = await self._backend.training.sample(request)
            return messages.chunk_to_proto(chunk).SerializeToString()

    def _read_sample(self, data: bytes) -> GenerateRequest:
        request = messages.generate_request_from_proto(messages.parse(inference_pb2.GenerateRequest, data))
        validation.check_generate(self._backend, request, self._max_prompt_bytes)
        validation.check_sample(request)
        return request

    async def save_state(self, data: bytes, context: Context) -> bytes:
        async with self._guard.request(context, "train"):
            messages.parse(pb.SaveStateRequest, data)
            saved = await self._backend.training.save_state()
            return pb.SaveStateResponse(step=saved.step, folder=saved.folder).SerializeToString()

    async def load_state(self, data: bytes, context: Context) -> bytes:
        async with self._guard.request(context, "train"):
            request = messages.parse(pb.LoadStateRequest, data)
            step = validation.step_number(request.step) if request.HasField("step") else None
            loaded = await self._backend.training.load_state(step)
            return pb.LoadStateResponse(step=loaded.step, folder=loaded.folder).SerializeToString()

    async def get_state(self, data: bytes, context: Context) -> bytes:
        async with self._guard.request(context, "train"):
            messages.parse(pb.GetStateRequest, data)
            return messages.training_state_to_proto(await self._backend.training.state()).SerializeToString()

    async def publish_trained(self, data: bytes, context: Context) -> bytes:
        async with self._guard.request(context, "admin"):
            messages.parse(pb.PublishTrainedRequest, data)
            version, step = await self._backend.training.publish()
            response = pb.PublishTrainedResponse(version=messages.version_to_proto(version), step=step)
            return response.SerializeToString()


def read_micro_batch(backend: Backend, message: pb.MicroBatch, max_tokens: int) -> MicroBatch:
    """Raises: `InvalidRequest`."""
    input_ids = arrays.decode(message.input_ids, name="input_ids")
    labels = arrays.decode(message.labels, name="labels") if message.HasField("labels") else input_ids
    weight = message.weight if message.HasField("weight") else 1.0
    validation.check_tokens(backend, input_ids, labels, max_tokens)
    validation.check_weight(weight)
    return MicroBatch(
        validation.client_id(message.id),
        input_ids.astype(np.int64, copy=False),
        labels.astype(np.int64, copy=False),
        weight,
    )


def read_options(message: pb.StepOptions) -> StepOptions:
    """Raises: `InvalidRequest`."""
    given = {name: getattr(message, name) for name in ("step", "lr", "clip_norm") if message.HasField(name)}
    return validation.step_options(StepOptions(validation.client_id(message.id), **given))


def _result(result: StepResult) -> bytes:
    return messages.step_result_to_proto(result).SerializeToString()
