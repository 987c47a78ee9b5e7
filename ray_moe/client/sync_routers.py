"""The lines of the synchronous client: one gRPC channel for each router, and calls through them.

It starts no thread: who there is is asked beside the first call and then now and then, and gRPC's own thread takes the
answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import sleep
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from ray_moe.client import channel
from ray_moe.client.attempts import Attempts
from ray_moe.client.pool import Question
from ray_moe.client.routers import QUESTION_TIMEOUT_S, Metadata, Routers
from ray_moe.errors import Cancelled, RayMoEError
from ray_moe.wire.v1.admin_pb2_grpc import AdminStub
from ray_moe.wire.v1.inference_pb2 import ListRoutersRequest, ListRoutersResponse
from ray_moe.wire.v1.inference_pb2_grpc import InferenceStub
from ray_moe.wire.v1.training_pb2_grpc import TrainingStub

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)


@dataclass(frozen=True, slots=True)
class SyncLine:
    """To one router."""

    target: str
    metadata: Metadata
    channel: grpc.Channel
    inference: InferenceStub
    admin: AdminStub
    training: TrainingStub


class SyncRouters(Routers[SyncLine]):
    """Of one `Client`."""

    def _open(self, target: str, metadata: Metadata) -> SyncLine:
        if self._credentials is None:
            opened = grpc.insecure_channel(target, self._options(target))
        else:
            opened = grpc.secure_channel(target, self._credentials, self._options(target))
        return SyncLine(target, metadata, opened, InferenceStub(opened), AdminStub(opened), TrainingStub(opened))

    def close(self) -> None:
        """Idempotent."""
        for line in self._close_all():
            line.channel.close()

    def call(
        self,
        method: Callable[[SyncLine], grpc.UnaryUnaryMultiCallable[Q, A]],
        message: Q,
        timeout_s: float | None,
        *,
        repeatable: bool = True,
    ) -> A:
        """The answer of one of the routers to `method`; not `repeatable` is what would change something twice."""
        attempts = self.attempts(timeout_s, repeatable=repeatable)
        while True:
            with self.attempt(attempts) as line:
                return method(line)(message, timeout=attempts.left_s, metadata=line.metadata)

    @contextmanager
    def attempt(self, attempts: Attempts) -> Iterator[SyncLine]:
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
            sleep(pause_s)

    def look_around(self) -> None:
        """Ask who there is, if it is time to: at each attempt of a call, and at what a stream brings."""
        questions, gone = self._chores()
        for line in gone:
            line.channel.close()
        for question, line in questions:
            with channel.errors(line.target, QUESTION_TIMEOUT_S):
                answer = line.inference.ListRouters.future(
                    ListRoutersRequest(), timeout=QUESTION_TIMEOUT_S, metadata=line.metadata
                )
            answer.add_done_callback(partial(self._hear, question))

    def _hear(self, question: Question, answer: grpc.Future[ListRoutersResponse]) -> None:
        try:
            with channel.errors(question.target, QUESTION_TIMEOUT_S):
                self._heard(question, answer.result())
        except RayMoEError as error:
            self._unheard(question, error)
        except grpc.FutureCancelledError:
            self._unheard(question, Cancelled("the client is closed"))
