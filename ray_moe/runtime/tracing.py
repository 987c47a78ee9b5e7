"""Where the time of a request goes: the seam behind which traces are made, or not.

Whoever begins a part of a request asks the span it belongs to for a child. What is not traced has no span, and costs
the look for one. What records and exports spans is `actors/tracing.py`, and only that knows OpenTelemetry.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Protocol

Value = str | int | float | bool | Sequence[str]
Attributes = Mapping[str, Value]

NONE: Attributes = MappingProxyType({})


class Span(Protocol):
    """Something that takes a while. Thread-safe."""

    @property
    def context(self) -> str:
        """How another process is told of it: a W3C `traceparent`."""
        ...

    def child(self, name: str, attributes: Attributes = NONE, links: Sequence[Span] = ()) -> Span | None:
        """A part of it, beginning now, with links to others that it serves as well; None when it is not recorded."""
        ...

    def event(self, name: str, attributes: Attributes = NONE) -> None:
        """Something happened, now."""
        ...

    def set(self, attributes: Attributes) -> None: ...

    def end(self, error: BaseException | str | None = None) -> None:
        """It is over, and failed if there is an `error`. Idempotent."""
        ...


class Tracer(Protocol):
    """What a process records its spans with."""

    def start(self, name: str, carrier: Mapping[str, str], attributes: Attributes = NONE) -> Span | None:
        """What another process asked for begins.

        Args:
            name: of the span.
            carrier: may have the asker's `traceparent` and `tracestate`; what is malformed is passed over.
            attributes: of the span.

        Returns: None when it is not recorded.
        """
        ...

    def close(self) -> None:
        """Export what has been recorded; blocks while it does."""
        ...


current: ContextVar[Span | None] = ContextVar("span", default=None)
"""What this task or thread is at, if that is traced."""


@contextmanager
def within(span: Span | None) -> Iterator[None]:
    """While the block runs `span` is `current`; then it ends."""
    before = current.set(span)
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        current.reset(before)
        if span is not None:
            span.end(error)


class Phases:
    """The spans of one generation, one after the other: ``queue``, ``prefill``, ``decode``."""

    def __init__(self, request: Span) -> None:
        self._request = request
        self._name = "queue"
        self._span = request.child("queue")

    @classmethod
    def of_current(cls) -> Phases | None:
        """Of the request that this task answers; None when that is not traced."""
        request = current.get()
        return None if request is None else cls(request)

    @property
    def span(self) -> Span:
        """Of the present phase."""
        return self._span or self._request

    def enter(self, name: str) -> None:
        """The next phase, unless it is the present one."""
        if name != self._name:
            self.end()
            self._name, self._span = name, self._request.child(name)

    def end(self, error: BaseException | None = None) -> None:
        if self._span is not None:
            self._span.end(error)


def step(phases: Iterable[Phases], attributes: Attributes) -> Span | None:
    """A step of those of its sequences that are traced: a part of the first one's, with links to all."""
    spans = [each.span for each in phases]
    return spans[0].child("step", attributes, spans) if spans else None
