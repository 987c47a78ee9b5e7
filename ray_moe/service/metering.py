"""Between the front doors and what does the work: every generation and layer call is counted for whoever asked for it.

A door says who that is (`calling`) around each request, in the task that answers it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_moe.service.auth import Caller
from ray_moe.service.backend import Backend, FloatArray
from ray_moe.service.requests import current
from ray_moe.types import GenerateChunk, GenerateRequest, LayerPath

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
