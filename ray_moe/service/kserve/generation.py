"""The model that generates: requests of the protocol to `GenerateRequest`, pieces to output tensors. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ray_moe.errors import InvalidRequest
from ray_moe.service.backend import Backend
from ray_moe.service.kserve import parameters
from ray_moe.service.kserve.catalog import Model
from ray_moe.service.kserve.tensors import Output, read_inputs, requested_outputs, texts
from ray_moe.service.validation import check_generate
from ray_moe.types import GenerateChunk, GenerateRequest
from ray_moe.wire.kserve import grpc_service_pb2 as pb


@dataclass(frozen=True, slots=True)
class Asked:
    """A generation, checked."""

    request: GenerateRequest
    outputs: tuple[str, ...]
    in_pieces: bool
    """Whether each piece is a response; else there is one for all."""


def read(
    backend: Backend, request: pb.ModelInferRequest, model: Model, *, max_prompt_bytes: int, on_stream: bool
) -> Asked:
    """What `request` asks of `model`, answered on a stream or by one response.

    Raises: `InvalidRequest`.
    """
    inputs = read_inputs(request, model)
    settings = parameters.read_settings(request, inputs)
    outputs = requested_outputs(request, model)
    in_pieces = settings.pop("stream", on_stream)
    if in_pieces and not on_stream:
        raise InvalidRequest("stream is true, but ModelInfer answers once: call ModelStreamInfer, or leave it out")
    given: dict[str, Any] = settings
    if "max_tokens" in settings:
        given["max_new_tokens"] = settings.pop("max_tokens")
    if ("text_input" in inputs) == ("token_ids" in inputs):
        expected = "exactly one of text_input and token_ids" if backend.has_tokenizer else "token_ids"
        raise InvalidRequest(f"model {model.name} expects the input {expected}")
    if "text_input" in inputs:
        given["prompt"] = parameters.text_of("text_input", inputs["text_input"].array.item())
    else:
        given["token_ids"] = tuple(inputs["token_ids"].array.tolist())
    wanted = GenerateRequest(**given, logprobs=0 if "logprobs" in outputs else None)
    try:
        check_generate(backend, wanted, max_prompt_bytes)
    except InvalidRequest as error:
        raise InvalidRequest(error.message.replace("max_new_tokens", "max_tokens")) from error
    return Asked(wanted, outputs, in_pieces)


def join(chunks: Sequence[GenerateChunk]) -> GenerateChunk:
    """All pieces of a generation as one."""
    return replace(
        chunks[-1],
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        text="".join(chunk.text for chunk in chunks),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
    )


def outputs_of(chunk: GenerateChunk, names: Iterable[str]) -> list[Output]:
    """The tensors of these names."""
    return [_output(chunk, name) for name in names]


def _output(chunk: GenerateChunk, name: str) -> Output:
    if name == "text_output":
        return Output(name, "BYTES", texts(chunk.text))
    if name == "finish_reason":
        return Output(name, "BYTES", texts(chunk.finish_reason))
    if name == "logprobs":
        return Output(name, "FP32", np.array([each.logprob for each in chunk.logprobs], np.float32))
    values = chunk.token_ids if name == "token_ids" else (getattr(chunk, name),)
    return Output(name, "INT64", np.array(values, np.int64))
