"""The routers of a service with a line to each, and the attempts of the calls that are made to them.

What the clients share: `sync_routers.py` and `aio_routers.py` open lines, call and wait. Thread-safe.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from random import random
from time import monotonic
from typing import Final, Generic, Protocol, TypeVar

from ray_moe.client import channel
from ray_moe.client.access import Access, name_in
from ray_moe.client.attempts import Attempts
from ray_moe.client.continuation import Diverged
from ray_moe.client.pool import Pool, Question
from ray_moe.errors import Cancelled, InvalidConfig, Overloaded, RayMoEError, Unavailable
from ray_moe.wire import messages
from ray_moe.wire.v1 import inference_pb2

QUESTION_TIMEOUT_S: Final = 5.0

Metadata = tuple[tuple[str, str], ...]


class Line(Protocol):
    """A connection to one router."""

    @property
    def target(self) -> str: ...


L = TypeVar("L", bound=Line)


class Routers(ABC, Generic[L]):
    """Of one client."""

    def __init__(self, target: str | Sequence[str], access: Access, *, discover: bool, max_attempts: int) -> None:
        """Opens no line yet.

        Raises:
            InvalidConfig: see `Client`.
        """
        if max_attempts < 1:
            raise InvalidConfig(f"max_attempts is {max_attempts}; expected at least 1, which is no retry")
        self.given = channel.targets_of(target)
        for one in self.given:
            access.metadata(one)
        self._access = access.settled()
        self._credentials = access.credentials()
        self._max_attempts = max_attempts
        self._pool = Pool(self.given, discover=discover)
        self._lines: dict[str, L] = {}
        self._lock = threading.RLock()  # an abandoned stream may end wherever garbage is collected
        self._is_closed = False

    @abstractmethod
    def _open(self, target: str, metadata: Metadata) -> L:
        """A line; it need not connect yet."""

    def _options(self, target: str) -> list[tuple[str, int | str]]:
        """Of the channel. A listed router has to prove the name under which the service was given, if it has one: an
        address is seldom in a certificate.
        """
        name = name_in(self.given[0])
        if self._credentials is None or target in self.given or not name:
            return channel.OPTIONS
        return [*channel.OPTIONS, ("grpc.ssl_target_name_override", name)]

    def line(self, target: str) -> L:
        """The one line to `target`. Raises: `Cancelled` after the client was closed."""
        with self._lock:
            return self._line(target)

    def _line(self, target: str) -> L:
        self._check_open()
        if target not in self._lines:
            self._lines[target] = self._open(target, self._access.metadata(target))
        return self._lines[target]

    def _check_open(self) -> None:
        if self._is_closed:
            raise Cancelled(f"the client of {', '.join(self.given)} is closed: make another")

    def _close_all(self) -> list[L]:
        """Those that were open."""
        with self._lock:
            self._is_closed = True
            lines = list(self._lines.values())
            self._lines.clear()
            return lines

    # --- the attempts of a call ------------------------------------------------------------------------------
    def attempts(self, timeout_s: float | None, *, repeatable: bool = True, unit: str = "") -> Attempts:
        """Of a new call; a call that is not `repeatable` has one."""
        return Attempts(self._max_attempts if repeatable else 1, timeout_s, monotonic(), unit)

    def _begin(self, attempts: Attempts) -> L:
        with self._lock:
            now_s = monotonic()
            target = self._pool.pick(now_s, attempts.tried)
            try:
                line = self._line(target)
            except Cancelled:
                self._pool.release(target)
                raise
            attempts.begin(target, now_s)
            return line

    def _succeeded(self, line: L, attempts: Attempts) -> None:
        with self._lock:
            self._pool.answered(line.target, attempts.began_s)

    def _failed(self, line: L, attempts: Attempts, error: RayMoEError) -> float:
        """Seconds until the next attempt. Raises the error if there is none."""
        if isinstance(error, Diverged):
            raise error
        with self._lock:
            now_s = monotonic()
            if isinstance(error, Unavailable | Overloaded):
                self._pool.failed(line.target, now_s, random(), error.retry_after_s)
            if attempts.is_over:
                return 0.0
            if isinstance(error, Unavailable):
                self._check_open()
            pause_s = attempts.pause_s(error, self._pool.has_other(now_s, attempts.tried), now_s, random())
        if pause_s is None:
            raise attempts.last(error) from error.__cause__
        return pause_s

    def _ended(self, line: L) -> None:
        with self._lock:
            self._pool.release(line.target)

    # --- who there is ----------------------------------------------------------------------------------------
    def _chores(self) -> tuple[list[tuple[Question, L]], list[L]]:
        """Questions to ask now, and lines that are of no more use: to close."""
        with self._lock:
            if self._is_closed:
                return [], []
            gone = [self._lines.pop(target) for target in self._pool.gone() if target in self._lines]
            return [(question, self._line(question.target)) for question in self._pool.questions(monotonic())], gone

    def _heard(self, question: Question, response: inference_pb2.ListRoutersResponse) -> None:
        routers = self._access.believed(messages.routers_from_proto(response), question.target)
        with self._lock:
            self._pool.heard(question, routers, monotonic(), random())

    def _unheard(self, question: Question, error: RayMoEError) -> None:
        with self._lock:
            self._pool.unheard(question, error, monotonic(), random())
