"""What a caller gives for training, as messages; shared by both clients. No I/O.

Ids are made here, once for each call, so that a call that is made again is known for the same. Letters in shapes: B
sequences, S tokens in each.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ray_moe.errors import InvalidRequest
from ray_moe.wire import arrays
from ray_moe.wire.v1 import training_pb2 as pb

Batch = Mapping[str, ArrayLike]
"""A micro-batch, as `transformers` names what is in it: ``input_ids``, [B, S] of integers, tokens of the vocabulary,
and ``labels``, [B, S] of integers, the token that belongs at each position, -100 where it does not count (when they are
left out: `input_ids`)."""


def forward_backward_request(batch: Batch, weight: float, micro_id: str | None) -> pb.ForwardBackwardRequest:
    """Raises: `InvalidRequest` for what the message cannot hold."""
    message = pb.ForwardBackwardRequest()
    _fill(message.batch, batch, weight, micro_id)
    return message


def train_step_request(batches: Batch | Sequence[Batch], options: pb.StepOptions) -> pb.TrainStepRequest:
    """Raises: `InvalidRequest` for what the message cannot hold."""
    message = pb.TrainStepRequest(options=options)
    for batch in [batches] if isinstance(batches, Mapping) else batches:
        _fill(message.batches.add(), batch, None, None)
    return message


def step_options(step: int | None, lr: float | None, clip_norm: float | None, op_id: str | None) -> pb.StepOptions:
    """Raises: `InvalidRequest` for what is no number."""
    try:
        return pb.StepOptions(id=op_id or new_id(), step=step, lr=lr, clip_norm=clip_norm)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"step, lr or clip_norm is no number that can be sent: {error}") from error


def discard_request(ids: Sequence[str]) -> pb.DiscardRequest:
    """Raises: `InvalidRequest` for what is no text."""
    try:
        return pb.DiscardRequest(ids=ids)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"ids are {ids!r}; expected those of micro-batches: {error}") from error


def load_state_request(step: int | None) -> pb.LoadStateRequest:
    """Raises: `InvalidRequest` for what is no number."""
    try:
        return pb.LoadStateRequest(step=step)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"step is {step!r}; expected a whole number: {error}") from error


def new_id() -> str:
    return uuid.uuid4().hex


def _fill(message: pb.MicroBatch, batch: Any, weight: float | None, micro_id: str | None) -> None:
    if not isinstance(batch, Mapping) or "input_ids" not in batch or not batch.keys() <= {"input_ids", "labels"}:
        has = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise InvalidRequest(f"the batch is {has}; expected input_ids and, if they are others, labels")
    for name, tokens in batch.items():
        try:
            array = np.asarray(tokens)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{name} is not an array: {error}") from error
        if array.dtype.kind not in "iu" or not np.can_cast(array.dtype, np.int64):
            raise InvalidRequest(f"{name} has dtype {array.dtype}; expected integers that fit int64: convert it")
        arrays.encode(array.astype(np.int64, copy=False), into=getattr(message, name), name=name)
    try:
        message.id = micro_id or new_id()
        if weight is not None:
            message.weight = weight
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"weight or id cannot be sent: {error}") from error
