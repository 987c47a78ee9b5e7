"""The lines of the client for asyncio: what `sync_routers.py` is, in one event loop.

Who there is is asked in a task of its own.
"""

from __future__ import annotations

import asyncio
from asyncio import sleep
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.message import Message

from ray_moe.client import channel
from ray_moe.client.access import Access
from ray_moe.client.attempts import Attempts
from ray_moe.client.pool import Question
from ray_moe.client.routers import QUESTION_TIMEOUT_S, Metadata, Routers
from ray_moe.errors import Cancelled, RayMoEError
from ray_moe.wire.v1.admin_pb2_grpc import AdminStub
from ray_moe.wire.v1.inference_pb2 import ListRoutersRequest
from ray_moe.wire.v1.inference_pb2_grpc import InferenceStub
from ray_moe.wire.v1.training_pb2_grpc import TrainingStub

if TYPE_CHECKING:
    from ray_moe.wire.v1.admin_pb2_grpc import AdminAsyncStub
    from ray_moe.wire.v1.inference_pb2_grpc import InferenceAsyncStub
    from ray_moe.wire.v1.training_pb2_grpc import TrainingAsyncStub

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)


@dataclass(frozen=True, slots=True)
class AioLine:
    """To one router; belongs to the event loop in which it was opened."""

    target: str
    metadata: Metadata
    channel: grpc.aio.Channel
    inference: InferenceAsyncStub
    admin: AdminAsyncStub
    training: TrainingAsyncStub


class AioRouters(Routers[AioLine]):
    """Of one `AsyncClient`."""

    def __init__(self, target: str | Sequence[str], access: Access, *, discover: bool, max_attempts: int) -> None:
        super().__init__(target, access, discover=discover, max_attempts=max_attempts)
        self._tasks: set[asyncio.Task[None]] = set()

    def _open(self, target: str, metadata: Metadata) -> AioLine:
        if self._credentials is None:
            opened = grpc.aio.insecure_channel(target, self._options(target))
        else:
            opened = grpc.aio.secure_channel(target, self._credentials, self._options(target))
        return AioLine(target, metadata, opened, InferenceStub(opened), AdminStub(opened), TrainingStub(opened))

    async def close(self) -> None:
        """Idempotent."""
        lines = self._close_all()
        for task in self._tasks:
            task.cancel()
        for line in lines:
            await line.channel.close(None)

    async def call(
        self,
        method: Callable[[AioLine], grpc.aio.UnaryUnaryMultiCallable[Q, A]],
        message: Q,
        timeout_s: float | None,
        *,
        repeatable: bool = True,
    ) -> A:
        """The answer of one of the routers to `method`; not `repeatable` is what would change something twice."""
        attempts = self.attempts(timeout_s, repeatable=repeatable)
        while True:
            async with self.attempt(attempts) as line:
                return await method(line)(message, timeout=attempts.left_s, metadata=line.metadata)

    @asynccontextmanager
    async def attempt(self, attempts: Attempts) -> AsyncIterator[AioLine]:
        """One attempt of a call, at the router that is given. After an error it ends when the next one is due."""
        line = self._begin(attempts)
        pause_s = 0.0
        try:
            self.look_around()
            with channel.errors(line.target, attempts.timeout_s):
                yield line
        except RayMoEError as error:
            pause_s = self._failed(line, attempts, error)
        else:
            self._succeeded(line, attempts)
        finally:
            self._ended(line)
        if pause_s > 0:
            await sleep(pause_s)

    def look_around(self) -> None:
        """Ask who there is, if it is time to: at each attempt of a call, and at what a stream brings."""
        questions, gone = self._chores()
        chores = [self._ask(question, line) for question, line in questions]
        chores += [line.channel.close(None) for line in gone]
        for chore in chores:
            task = asyncio.ensure_future(chore)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask(self, question: Question, line: AioLine) -> None:
        try:
            with channel.errors(line.target, QUESTION_TIMEOUT_S):
                answer = await line.inference.ListRouters(
                    ListRoutersRequest(), timeout=QUESTION_TIMEOUT_S, metadata=line.metadata
                )
            self._heard(question, answer)
        except RayMoEError as error:
            self._unheard(question, error)
        except asyncio.CancelledError:
            self._unheard(question, Cancelled("the client is closed"))
            raise
