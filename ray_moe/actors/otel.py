"""Spans of OpenTelemetry behind `runtime/tracing.py`. The only module that needs its SDK; `tracing.py` imports it.

A span that is not recorded is none at all, so that nothing below it is made either.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, TraceIdRatioBased
from opentelemetry.trace import Link, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ray_moe import __version__
from ray_moe.config import TraceDetail
from ray_moe.runtime.tracing import NONE, Attributes, Span

MAX_WAITING_SPANS = 2**14
"""More than that are dropped, which the SDK tells in the log."""

EXPORT_TIMEOUT_S = 5.0

_DEPTHS: Mapping[TraceDetail, int] = {"requests": 0, "steps": 1, "experts": 2}
_DEPTH_OF = {"step": 1, "experts.exchange": 2}
_CLIENTS = ("experts.exchange",)


def export_to(url: str) -> SpanProcessor:
    """Sends spans to a collector, in batches, from a thread of its own."""
    return BatchSpanProcessor(OTLPSpanExporter(url, timeout=EXPORT_TIMEOUT_S), max_queue_size=MAX_WAITING_SPANS)


class OtelTracer:
    """A `Tracer`."""

    def __init__(
        self, processor: SpanProcessor, service: str, actor: str, *, sample_ratio: float | None, detail: TraceDetail
    ) -> None:
        """
        Args:
            processor: takes the spans that have ended.
            service: its name.
            actor: such as ``expert-3``.
            sample_ratio: share of the traces without a beginning elsewhere that are recorded; None begins none.
            detail: how deep they go.
        """
        resource = {
            "service.name": service,
            "service.version": __version__,
            "service.instance.id": f"{actor}/{os.getpid()}",
            "ray_moe.actor": actor,
        }
        roots = ALWAYS_OFF if sample_ratio is None else TraceIdRatioBased(sample_ratio)
        self._provider = TracerProvider(
            sampler=ParentBased(roots), resource=Resource.create(resource), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("ray_moe", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._depth = _DEPTHS[detail]

    def start(self, name: str, carrier: Mapping[str, str], attributes: Attributes = NONE) -> Span | None:
        parent = self._propagator.extract(carrier, Context())
        span = self._tracer.start_span(name, parent, kind=SpanKind.SERVER, attributes=attributes)
        return OtelSpan(span, self._tracer, self._depth) if span.is_recording() else None

    def close(self) -> None:
        self._provider.shutdown()


class OtelSpan:
    """A `Span` that is recorded."""

    def __init__(self, span: trace.Span, tracer: trace.Tracer, depth: int) -> None:
        self._span = span
        self._tracer = tracer
        self._depth = depth

    @property
    def context(self) -> str:
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def child(self, name: str, attributes: Attributes = NONE, links: Sequence[Span] = ()) -> Span | None:
        if _DEPTH_OF.get(name, 0) > self._depth:
            return None
        span = self._tracer.start_span(
            name,
            trace.set_span_in_context(self._span),
            kind=SpanKind.CLIENT if name in _CLIENTS else SpanKind.INTERNAL,
            attributes=attributes,
            links=[Link(link._span.get_span_context()) for link in links if isinstance(link, OtelSpan)],
        )
        return OtelSpan(span, self._tracer, self._depth)

    def event(self, name: str, attributes: Attributes = NONE) -> None:
        if self._span.is_recording():
            self._span.add_event(name, attributes)

    def set(self, attributes: Attributes) -> None:
        if self._span.is_recording():
            self._span.set_attributes(attributes)

    def end(self, error: BaseException | str | None = None) -> None:
        if not self._span.is_recording():  # it has ended
            return
        if error is not None:
            self._span.set_attribute("error.type", error if isinstance(error, str) else type(error).__name__)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()
