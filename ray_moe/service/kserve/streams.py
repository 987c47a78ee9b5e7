"""Many requests on one stream: each is admitted, answered and, if need be, refused by itself.

A request is begun when those before it are answered, but for generations, which run side by side.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from ray_moe.service.grpc.guard import Context, Guard
from ray_moe.service.requests import part
from ray_moe.wire.kserve import grpc_service_pb2 as pb

MAX_OPEN_REQUESTS = 256
"""Of one stream: further ones are not read before one of them has ended, so that a client that reads no answers takes
no memory without end."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What comes of a request that could be read."""

    request_id: str
    in_order: bool
    """Whether it has to be answered before the next request is read."""
    answers: AsyncGenerator[bytes, None]
    """ModelStreamInferResponses; may raise."""


Read = Callable[[bytes, ExitStack], Awaitable[Reply]]
"""Of a request's bytes, and what is to be closed when the request has ended. May raise."""


class _Refused(Exception):
    """The guard ended a request."""


class _OneRequest:
    """The context of a call as one of its requests sees it: what would end the call ends that request alone."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def abort(self, code: object, details: str = "", trailing_metadata: object = ()) -> NoReturn:
        raise _Refused(details)


class Stream:
    """One call of ModelStreamInfer."""

    def __init__(self, context: Context, guard: Guard, read: Read) -> None:
        self._context = context
        self._one_request = cast(Context, _OneRequest(context))
        self._guard = guard
        self._read = read
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None

    async def answer(self, requests: AsyncIterator[bytes]) -> None:
        """Until the client has sent its last request and got its last answer."""
        try:
            async for data in requests:
                await self._begin(data)
                await self._wait(until_open=MAX_OPEN_REQUESTS - 1)
            await self._wait(until_open=0)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _begin(self, data: bytes) -> None:
        next_may_begin = asyncio.Event()
        task = asyncio.create_task(self._answer_request(data, next_may_begin))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        await next_may_begin.wait()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._failure = self._failure or task.exception()

    async def _wait(self, until_open: int) -> None:
        while len(self._tasks) > until_open and self._failure is None:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        if self._failure is not None:
            raise self._failure

    async def _answer_request(self, data: bytes, next_may_begin: asyncio.Event) -> None:
        with part():
            await self._answer_one(data, next_may_begin)

    async def _answer_one(self, data: bytes, next_may_begin: asyncio.Event) -> None:
        request_id = ""
        try:
            with ExitStack() as held:
                async with self._guard.errors(self._one_request):
                    reply = await self._read(data, held)
                request_id = reply.request_id
                if not reply.in_order:
                    next_may_begin.set()
                async with self._guard.request(self._one_request), aclosing(reply.answers) as answers:
                    async for answer in answers:
                        await self._write(answer)
        except _Refused as refused:
            response = pb.ModelStreamInferResponse(error_message=str(refused))
            response.infer_response.id = request_id
            await self._write(response.SerializeToString())
        finally:
            next_may_begin.set()

    async def _write(self, answer: Any) -> None:
        async with self._writing:
            await self._context.write(answer)
