"""Lines to the expert actors, for whatever process of a service computes: the transport that the settings ask for."""

from __future__ import annotations

from collections.abc import Callable

import ray

from ray_moe.actors.spec import ServiceSpec, transport_settings
from ray_moe.transport.auto import AutoTransport
from ray_moe.transport.base import Transport
from ray_moe.transport.object_store import ObjectStoreTransport
from ray_moe.transport.stream_transport import StreamTransport
from ray_moe.types import HostAddress


def make_streams(spec: ServiceSpec, device: str, on_lost: Callable[[HostAddress], None]) -> StreamTransport:
    """Streams from this process to the expert actors of a service; see `make_transport`."""
    config = spec.config.transport
    return StreamTransport(
        spec.token,
        node_id=ray.get_runtime_context().get_node_id(),
        sockets=config.kind != "grpc",
        settings=transport_settings(config, device),
        certificate=spec.certificate,
        on_lost=on_lost,
    )


def make_transport(
    spec: ServiceSpec, device: str, on_lost: Callable[[HostAddress], None], streams: StreamTransport | None = None
) -> Transport:
    """Lines from this process to the expert actors of a service.

    Args:
        device: that this process computes on.
        on_lost: told of a line that broke by itself, from any thread.
        streams: what it uses where lines are streams; None makes some.
    """
    config = spec.config.transport
    streams = streams or make_streams(spec, device, on_lost)
    object_store = ObjectStoreTransport(
        lambda address: spec.find(address.host_id),
        settings=transport_settings(config, device),
        on_lost=on_lost,
    )
    kinds: dict[str, Transport] = {"grpc": streams, "object_store": object_store}
    return kinds.get(config.kind) or AutoTransport(streams, object_store)
