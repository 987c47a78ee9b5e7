"""Both clients with one face, so that a test runs with each of them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from ray_moe.client.aio import AsyncClient
from ray_moe.client.sync import Client

Connect = Callable[..., Any]


class Threaded:
    """The synchronous client with the face of the other one: its calls run in threads."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._client: Any = Client(*args, **options)

    @property
    def training(self) -> Any:
        threaded = Threaded.__new__(Threaded)
        threaded._client = self._client.training
        return threaded

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name in ("stream", "forward_stream"):
            return lambda *args, **kwargs: self._pull(method(*args, **kwargs))
        return functools.partial(asyncio.to_thread, method)

    async def _pull(self, items: Any) -> AsyncIterator[Any]:
        try:
            while (item := await asyncio.to_thread(next, items, None)) is not None:
                yield item
        finally:
            items.close()


@pytest.fixture(params=[Threaded, AsyncClient], ids=["sync", "aio"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """Makes a client of the kind under test, closed afterwards."""
    async with contextlib.AsyncExitStack() as stack:

        def make(*args: Any, **options: Any) -> Any:
            client = request.param(*args, **options)
            stack.push_async_callback(client.close)
            return client

        yield make
