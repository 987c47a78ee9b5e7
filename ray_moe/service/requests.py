"""One request at a front door: its id, its line in the log, and its span.

Every door wraps `handling` around what it answers; what is found out meanwhile (who calls, how many tokens, how it
ended) is told to the request that is `current`. Nothing of prompts, outputs and keys is kept. Knows neither gRPC nor
HTTP. Used by `grpc/requests.py`, `kserve/streams.py`, `openai/requests.py`, `admission.py` and `metering.py`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from ray_moe.actors import logs
from ray_moe.runtime import tracing
from ray_moe.runtime.tracing import Attributes, Span, Tracer
from ray_moe.types import GenerateChunk, GenerateRequest
from ray_moe.wire.status import REQUEST_ID_KEY

logger = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[!-~](?:[ -~]{0,126}[!-~])?")
_FAULTS = re.compile(r"5\d\d|UNKNOWN|DEADLINE_EXCEEDED|UNIMPLEMENTED|INTERNAL|UNAVAILABLE|DATA_LOSS")
"""Ends of which the span counts as failed: the others are the caller's doing."""


class Request:
    """What is known of it."""

    def __init__(self, request_id: str, door: str, method: str) -> None:
        """Args:
        request_id: the caller's; empty: one is made.
        door: ``grpc``, ``kserve`` or ``openai``.
        method: what is asked for, as the door calls it.
        """
        self.name = secrets.token_hex(12)
        """Of its own, whatever its id is."""
        self.id = request_id or f"req-{self.name}"
        self.door = door
        self.method = method
        self.caller = ""
        self.status = ""
        """How it ended, as the door calls it; empty while it goes on."""
        self.error = ""
        """Class of the error that it ended with."""
        self.num_prompt_tokens = 0
        self.num_tokens = 0
        self.span: Span | None = None
        self.num_parts = 0
        self._began_s = time.monotonic()
        self._has_answer = False
        self.log_fields: dict[str, object] = {"request_id": self.id}

    def from_caller(self, name: str) -> None:
        """Whose it is."""
        self.caller = self.log_fields["caller"] = name

    def asks(self, model: str, request: GenerateRequest) -> None:
        """It wants a generation, perhaps one of several."""
        if self.span is not None:
            self.span.set(_of_request(model, request, "chat" if "chat" in self.method else "text_completion"))

    def got(self, chunk: GenerateChunk, is_first: bool) -> None:
        """A piece of a generation; `is_first` of that generation."""
        self.num_prompt_tokens += chunk.num_prompt_tokens if is_first else 0
        self.num_tokens += len(chunk.token_ids)
        if self.span is not None:
            if not self._has_answer:
                self.span.event("first token")
                self.span.set({"gen_ai.response.time_to_first_chunk": time.monotonic() - self._began_s})
            if chunk.finish_reason:
                self.span.set({"gen_ai.response.finish_reasons": [chunk.finish_reason]})
        self._has_answer = True

    def failed(self, error: BaseException, status: str = "") -> None:
        """It ends with `error`; the first one that is told of counts."""
        self.error = self.error or type(error).__name__
        self.status = status or self.status

    def begin(self, span: Span | None) -> None:
        """Args: span: its own; None when it is not traced."""
        self.span = span
        if span is not None:
            self.log_fields["trace_id"] = span.context.split("-")[1]

    def end(self, level: int) -> None:
        """Write its line, and end its span."""
        tokens = {"tokens_in": self.num_prompt_tokens, "tokens_out": self.num_tokens}
        known = {
            "door": self.door,
            "method": self.method,
            "status": self.status,
            "duration_s": round(time.monotonic() - self._began_s, 6),
            **{name: number for name, number in tokens.items() if number},
            **({"error": self.error} if self.error else {}),
        }
        logger.log(level, "request", extra=known)
        if self.span is not None:
            usage = {"gen_ai.usage.input_tokens": self.num_prompt_tokens, "gen_ai.usage.output_tokens": self.num_tokens}
            self.span.set({**usage, "ray_moe.status": self.status, "ray_moe.caller": self.caller})
            self.span.end((self.error or self.status) if _FAULTS.fullmatch(self.status) else None)


_current: ContextVar[Request | None] = ContextVar("request", default=None)


def current() -> Request | None:
    """The request that this task answers."""
    return _current.get()


def failed(error: BaseException, status: str = "") -> None:
    """The request that this task answers ends with `error`."""
    request = _current.get()
    if request is not None:
        request.failed(error, status)


@contextmanager
def handling(
    door: str,
    method: str,
    headers: Mapping[str, str],
    tracer: Tracer | None = None,
    *,
    span_name: str = "",
    is_probe: bool = False,
) -> Iterator[Request]:
    """Around all that is done for a request, in the task that does it.

    Args:
        door: see `Request`.
        method: see `Request`.
        headers: by names in lower case: the caller's id, and the trace that the request belongs to.
        tracer: None: it is not traced.
        span_name: one of few; empty: `method`.
        is_probe: it is asked again and again: no span, and its line is written at the level of debugging.
    """
    request = Request(_id_of(headers), door, method)
    if tracer is not None and not is_probe:
        attributes = {"ray_moe.door": door, "ray_moe.request_id": request.id}
        request.begin(tracer.start(span_name or method, headers, attributes))
    with _answering(request, logging.DEBUG if is_probe else logging.INFO):
        yield request


@contextmanager
def part() -> Iterator[Request | None]:
    """Around one of several requests that came in one call, in a task of its own: it has its own line and span.

    Yields: None outside of any request.
    """
    whole = _current.get()
    if whole is None:
        yield None
        return
    whole.num_parts += 1
    request = Request(f"{whole.id}/{whole.num_parts}", whole.door, whole.method)
    request.begin(whole.span and whole.span.child(whole.method, {"ray_moe.request_id": request.id}))
    with _answering(request, logging.INFO):
        yield request


@contextmanager
def _answering(request: Request, level: int) -> Iterator[None]:
    before = _current.set(request), logs.fields.set(request.log_fields), tracing.current.set(request.span)
    try:
        yield
    except asyncio.CancelledError:
        request.status = request.status or "CANCELLED"
        raise
    except BaseException as error:
        if not request.status:
            request.failed(error, "UNKNOWN")
        raise
    finally:
        request.status = request.status or "OK"
        request.end(level)
        _current.reset(before[0])
        logs.fields.reset(before[1])
        tracing.current.reset(before[2])


def _id_of(headers: Mapping[str, str]) -> str:
    """The caller's, if it fits into a header and a line; else empty."""
    given = headers.get(REQUEST_ID_KEY, "").strip()
    return given if _SANE_ID.fullmatch(given) else ""


def _of_request(model: str, request: GenerateRequest, operation: str) -> Attributes:
    """By OpenTelemetry's semantic conventions for generative AI, as far as they have names for it."""
    asked: dict[str, str | int | float] = {
        "gen_ai.provider.name": "ray_moe",
        "gen_ai.operation.name": operation,
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": request.max_new_tokens,
        "gen_ai.request.temperature": request.temperature,
        "gen_ai.request.top_p": request.top_p,
    }
    if request.seed is not None:
        asked["gen_ai.request.seed"] = request.seed
    return asked
