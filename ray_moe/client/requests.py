"""What a caller gives, as messages, and messages as what a caller gets; shared by both clients. No I/O.

Only what cannot be put into a message is refused here; the service judges the rest. Letters in shapes: T tokens, D
width of the layer, E experts of the layer, K experts per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ray_moe.errors import InvalidRequest, WireError
from ray_moe.types import GenerateChunk, GenerateRequest, LayerPath, TokenLogprob
from ray_moe.wire import arrays, messages
from ray_moe.wire.v1 import admin_pb2
from ray_moe.wire.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Forward:
    """One batch for one MoE layer; the arguments of `forward`, for `forward_stream`."""

    layer: LayerPath | int
    """Path of the layer's experts, or its number among the MoE layers, from 0."""
    hidden: ArrayLike
    """[T, D] of floats; bfloat16 arrays (ml_dtypes) are taken too."""
    index: ArrayLike | None = None
    """[T, K] of integers, 0..E, where E means "no expert". With `weight`: the routed experts only. Without both: the
    model's own block, which is its gate, routed experts and, if it has them, shared experts."""
    weight: ArrayLike | None = None
    """[T, K] of floats."""


class GenerateOptions(TypedDict, total=False):
    """How to continue a prompt; `GenerateRequest` has the defaults."""

    token_ids: Sequence[int] | NDArray[np.integer[Any]] | None
    """The prompt as tokens, instead of text."""
    max_new_tokens: int
    temperature: float
    """0 is greedy; above 0 samples."""
    top_p: float
    """0 < top_p <= 1."""
    seed: int | None
    """Makes sampling repeatable."""
    ignore_eos: bool
    """Go on to `max_new_tokens` whatever is generated."""
    top_k: int
    """Sampling among so many of the likeliest tokens; 0 is among all."""
    min_p: float
    """Sampling among tokens at least this much as likely as the likeliest, 0 to 1."""
    repetition_penalty: float | None
    """Above 1 makes tokens that have occurred less likely; None is what the checkpoint asks for."""
    presence_penalty: float
    """Taken off the logits of tokens that have been generated."""
    frequency_penalty: float
    """Taken off them once for each time."""
    stop: str | Sequence[str]
    """Texts before which the generation ends; they are not part of it."""
    stop_token_ids: Sequence[int]
    """Tokens with which it ends."""
    logprobs: int | None
    """How many of the likeliest tokens are told for each, beside its own log-probability; None: not even that."""
    version: int | None
    """Of the weights; None: the current one."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole continuation."""

    text: str
    """Empty if the model has no tokenizer."""
    token_ids: tuple[int, ...]
    finish_reason: str
    """``stop`` at an end-of-sequence token or a stop, ``length`` at `max_new_tokens`."""
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    """Of those, the first ones that did not have to be computed."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `token_ids`, if they were asked for."""
    version: int = 0
    """Of the weights that computed it."""

    @classmethod
    def of(cls, chunks: Sequence[GenerateChunk]) -> Generation:
        """What the pieces make together."""
        if not chunks or not chunks[-1].finish_reason:
            raise WireError("the stream ended without a finish_reason: the service broke off; ask again")
        return cls(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            finish_reason=chunks[-1].finish_reason,
            num_prompt_tokens=chunks[-1].num_prompt_tokens,
            num_cached_tokens=chunks[-1].num_cached_tokens,
            logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
            version=chunks[-1].version,
        )


def generate_request(prompt: str | None, options: GenerateOptions) -> pb.GenerateRequest:
    """The message, or `InvalidRequest`."""
    token_ids, stop = options.get("token_ids"), options.get("stop", ())
    try:
        tokens = None if token_ids is None else tuple(token_ids)
        lists = {"token_ids": tokens, "stop": (stop,) if isinstance(stop, str) else tuple(stop)}
        request = GenerateRequest(**{**options, "prompt": prompt, **lists})  # type: ignore[arg-type]
    except TypeError as exc:
        raise InvalidRequest(f"the request cannot be made: {exc}") from exc
    return messages.generate_request_to_proto(request)


class ForwardCodec:
    """Requests to messages and responses to arrays, for one call or one stream: responses come in order.

    Of a stream, one thread may encode while another decodes.
    """

    def __init__(self) -> None:
        self._dtypes: deque[np.dtype[Any]] = deque()
        self._num_sent = 0
        self._num_answered = 0

    def encode(self, request: Forward) -> pb.ForwardRequest:
        hidden = _array("hidden", request.hidden)
        if (request.index is None) != (request.weight is None):
            raise InvalidRequest("index and weight go together: give both, or neither for the model's own gate")
        message = pb.ForwardRequest()
        arrays.encode(hidden, into=message.hidden, name="hidden")
        if request.index is not None and request.weight is not None:
            index, weight = _array("index", request.index), _array("weight", request.weight)
            if index.dtype.kind not in "iu" or not np.can_cast(index.dtype, np.int64):
                raise InvalidRequest(f"index has dtype {index.dtype}; expected integers that fit int64: convert it")
            arrays.encode(index.astype(np.int64, copy=False), into=message.routing.index, name="index")
            arrays.encode(weight, into=message.routing.weight, name="weight")
        try:
            if isinstance(request.layer, str):
                message.layer_path = request.layer
            else:
                message.layer_index = request.layer
        except (TypeError, ValueError) as exc:
            raise InvalidRequest(f"layer is {request.layer!r}; expected a path or an index: {exc}") from exc
        message.request_id = str(self._num_sent)
        self._num_sent += 1
        self._dtypes.append(hidden.dtype)
        return message

    def decode(self, message: pb.ForwardResponse) -> NDArray[Any]:
        """[T, D] in the dtype of the request's `hidden`."""
        if not self._dtypes or message.request_id != str(self._num_answered):
            raise WireError(f"response {message.request_id!r} came where {self._num_answered} was due")
        self._num_answered += 1
        return arrays.decode(message.hidden, name="hidden").astype(self._dtypes.popleft(), copy=False)


def resize_request(num_actors: int) -> admin_pb2.ResizeRequest:
    """Raises `InvalidRequest` for what is no number."""
    try:
        return admin_pb2.ResizeRequest(num_actors=num_actors)
    except (TypeError, ValueError) as exc:
        raise InvalidRequest(f"num_actors is {num_actors!r}; expected a whole number: {exc}") from exc


def canary_request(
    layer: LayerPath | int, expert: int, model: str, share: float, mode: str, max_drift: float
) -> admin_pb2.BeginCanaryRequest:
    """Raises `InvalidRequest` for what the message cannot hold."""
    given: dict[str, Any] = {"expert": expert, "model": model, "share": share, "mode": mode, "max_drift": max_drift}
    given["layer_path" if isinstance(layer, str) else "layer_index"] = layer
    try:
        return admin_pb2.BeginCanaryRequest(**given)
    except (TypeError, ValueError) as exc:
        raise InvalidRequest(f"the request cannot be sent: {exc}") from exc


def rollback_request(to: int | None) -> admin_pb2.RollbackRequest:
    """Raises `InvalidRequest` for what is no number."""
    try:
        return admin_pb2.RollbackRequest(version=to)
    except (TypeError, ValueError) as exc:
        raise InvalidRequest(f"version is {to!r}; expected a whole number: {exc}") from exc


def _array(name: str, data: ArrayLike) -> NDArray[Any]:
    try:
        return np.asarray(data)
    except (TypeError, ValueError) as exc:
        raise InvalidRequest(f"{name} is not an array: {exc}") from exc
