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


def make_transport(spec: ServiceSpec, device: str, on_lost: Callable[[HostAddress], None]) -> Transport:
    """Lines from this process to the expert actors of a service.

    Args:
        device: that this process computes on.
        on_lost: told of a line that broke by itself, from any thread.
    """
    config = spec.config.transport
    settings = transport_settings(config, device)
    streams = StreamTransport(
        spec.token,
        node_id=ray.get_runtime_context().get_node_id(),
        sockets=config.kind != "grpc",
        settings=settings,
        certificate=spec.certificate,
        on_lost=on_lost,
    )
    object_store = ObjectStoreTransport(
        lambda address: spec.find(address.host_id),
        settings=settings,
        on_lost=on_lost,
    )
    kinds: dict[str, Transport] = {"grpc": streams, "object_store": object_store}
    return kinds.get(config.kind) or AutoTransport(streams, object_store)
