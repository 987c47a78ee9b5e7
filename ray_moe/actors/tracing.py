"""Whether, and with what, the actors of a service trace. OpenTelemetry itself is in `otel.py`, imported when wanted."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from ray_moe.config import TracingConfig
from ray_moe.errors import InvalidConfig
from ray_moe.runtime.tracing import Tracer

CLOSE_TIMEOUT_S = 3.0
"""An actor that stops waits no longer for a collector to take the last spans."""


def check(config: TracingConfig) -> None:
    """Whether this machine can trace, if that is wanted.

    Raises:
        InvalidConfig: OpenTelemetry is not installed here.
    """
    if not config.endpoint:
        return
    try:
        import ray_moe.actors.otel  # noqa: F401
    except ImportError as error:
        raise InvalidConfig(
            f"tracing.endpoint is set, but OpenTelemetry is not installed here ({error}): "
            "pip install 'ray-moe[otel]' on every node, or leave tracing.endpoint empty"
        ) from error


def make_tracer(config: TracingConfig, service: str, actor: str, *, begins: bool) -> Tracer | None:
    """What an actor records its spans with; None where there is nothing to record.

    Args:
        config: of the service.
        service: its name.
        actor: such as ``expert-3``.
        begins: whether traces begin here; else it only adds to those of others.

    Raises: `InvalidConfig`, see `check`.
    """
    if not config.endpoint or not (begins or config.detail == "experts"):
        return None
    check(config)
    from ray_moe.actors.otel import OtelTracer, export_to

    processor = export_to(traces_url(config.endpoint))
    ratio = config.sample_ratio if begins else None
    return OtelTracer(processor, service, actor, sample_ratio=ratio, detail=config.detail)


def traces_url(endpoint: str) -> str:
    """Where spans are sent: a collector's bare address stands for all signals, and that of spans is below it."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"


async def close_tracer(tracer: Tracer | None) -> None:
    """Export what is left, within `CLOSE_TIMEOUT_S`."""
    if tracer is not None:
        await asyncio.wait([asyncio.ensure_future(asyncio.to_thread(tracer.close))], timeout=CLOSE_TIMEOUT_S)
