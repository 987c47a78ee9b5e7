"""Between the front doors and what does the work: every generation, layer call and micro-batch is counted for whoever
asked for it.

A door says who that is (`calling`) around each request, in the task that answers it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_moe.service.auth import Caller
from ray_moe.service.backend import Backend, FloatArray, Training
from ray_moe.service.requests import current
from ray_moe.types import (
    GenerateChunk,
    GenerateRequest,
    LayerPath,
    MicroBatch,
    MicroBatchReport,
    StepOptions,
    StepResult,
)

_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


@contextmanager
def calling(caller: Caller) -> Iterator[None]:
    """While the block runs, what this task and those it starts ask for is for `caller`, within their limits.

    Raises: `Overloaded` when a limit on requests is reached.
    """
    with caller.request():
        before = _caller.set(caller)
        try:
            yield
        finally:
            _caller.reset(before)


class MeteredBackend:
    """A `Backend` that counts tokens, and tells the one behind it for whom they are. All else goes through."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    @property
    def training(self) -> Training:
        return MeteredTraining(self._backend.training)

    async def forward(
        self, layer: LayerPath, hidden: FloatArray, routing: tuple[NDArray[np.int64], FloatArray] | None
    ) -> FloatArray:
        caller, asked = _caller.get(), current()
        if asked is not None:
            asked.num_prompt_tokens += len(hidden)
        if caller is not None:
            caller.spend(len(hidden))
        return await self._backend.forward(layer, hidden, routing)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        caller, asked = _caller.get(), current()
        if caller is not None:
            caller.spend(0)
            request = replace(request, caller=caller.name)
        if asked is not None:
            asked.asks(self._backend.model_name, request)
        has_begun = False
        async with aclosing(self._backend.generate(request)) as chunks:
            async for chunk in chunks:
                if caller is not None:
                    of_prompt = 0 if has_begun else chunk.num_prompt_tokens
                    caller.spend(of_prompt + len(chunk.token_ids), begun=True)
                if asked is not None:
                    asked.got(chunk, is_first=not has_begun)
                has_begun = True
                yield chunk


class MeteredTraining:
    """A `Training` that counts tokens. All else goes through."""

    def __init__(self, training: Training) -> None:
        self._training = training

    def __getattr__(self, name: str) -> Any:
        return getattr(self._training, name)

    async def forward_backward(self, micro: MicroBatch) -> MicroBatchReport:
        _spend(micro.input_ids.size)
        return await self._training.forward_backward(micro)

    async def train_step(self, micros: Sequence[MicroBatch], options: StepOptions) -> StepResult:
        _spend(sum(micro.input_ids.size for micro in micros))
        return await self._training.train_step(micros, options)

    async def sample(self, request: GenerateRequest) -> GenerateChunk:
        _spend(0)
        chunk = await self._training.sample(request)
        _spend(chunk.num_prompt_tokens + len(chunk.token_ids), begun=True)
        return chunk


def _spend(num_tokens: int, *, begun: bool = False) -> None:
    caller, asked = _caller.get(), current()
    if asked is not None:
        asked.num_prompt_tokens += num_tokens
    if caller is not None:
        caller.spend(num_tokens, begun=begun)
