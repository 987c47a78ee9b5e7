"""The HTTP front door over a fake backend, and OpenAI's own client of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import openai

from ray_moe.service.admission import Admission
from ray_moe.service.openai.app import make_app
from ray_moe.service.openai.jobs import RequestLimits
from ray_moe.service.openai.server import HttpFrontDoor
from ray_moe.types import GenerateChunk, GenerateRequest, TokenLogprob
from tests.unit.service.fake_backend import FakeBackend

MODEL = "tiny"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


class TellingBackend(FakeBackend):
    """Tells log-probabilities and cached tokens, and can fail late or in one generation only."""

    def __init__(self) -> None:
        super().__init__()
        self.text: str | None = None
        """Of every piece, instead of numbers."""
        self.reason = "length"
        """Why a generation ends."""
        self.num_cached: list[int] = []
        """For each generation in the order of their coming; none are cached beyond."""
        self.late_failure: BaseException | None = None
        """Raised after two pieces by the generations with `failing_seed`."""
        self.failing_seed: int | None = None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        cached = self.num_cached[len(self.requests)] if len(self.requests) < len(self.num_cached) else 0
        chunks = super().generate(request)
        try:
            async for chunk in chunks:
                number = chunk.token_ids[0]
                if self.late_failure is not None and request.seed == self.failing_seed and number == 2:
                    raise self.late_failure
                if request.logprobs is not None:
                    chunk = replace(chunk, logprobs=(logprob(number, request.logprobs),))  # noqa: PLW2901
                text = chunk.text if self.text is None else self.text
                reason = self.reason if chunk.finish_reason else ""
                yield replace(chunk, text=text, finish_reason=reason, num_cached_tokens=cached)
        finally:
            await chunks.aclose()


def logprob(token_id: int, num_top: int) -> TokenLogprob:
    """Less likely by one for each of the likeliest; the second of them is impossible."""
    top = tuple(TokenLogprob(50 + rank, -float("inf") if rank == 1 else -float(rank)) for rank in range(num_top))
    return TokenLogprob(token_id, -0.5, top)


@asynccontextmanager
async def http_door(backend: FakeBackend, limits: RequestLimits | None = None, **admitted: Any) -> AsyncIterator[str]:
    """A server on the loopback, with these arguments of `Admission`; yields its address."""
    door = HttpFrontDoor(backend, port=0, limits=limits, admission=Admission(backend, **admitted))
    port = await door.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await door.stop(0)


def without_server(backend: FakeBackend, limits: RequestLimits | None = None) -> httpx.AsyncClient:
    """A client of the application itself, without a network between them."""
    app = make_app(backend, Admission(backend), limits)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


def async_client(address: str, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, **options)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition()` holds."""

    async def poll() -> None:
        while not condition():  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), 60)
