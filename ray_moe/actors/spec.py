"""What the actors of one service tell each other. Plain values, pickled by Ray inside one trusted cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ray_moe.config import Config, ServerConfig, TransportConfig
from ray_moe.transport.settings import TransportSettings
from ray_moe.types import HostAddress, HostId, HostStatus, LayerPath, LayerSpec, Placement

Plan = Mapping[LayerPath, list[int]]
"""The experts a host is to hold: ascending global indices by layer."""


class FrontDoor(Protocol):
    """A server that answers clients on behalf of a router (`service/grpc/server.py`)."""

    async def start(self) -> int:
        """Listen; returns the port. Raises `InsufficientResources` when the port is taken."""
        ...

    async def stop(self, grace_s: float) -> None: ...


OpenDoor = Callable[[Any, ServerConfig], FrontDoor]
"""Makes the front door of a router (a `service.backend.Backend`); named by the composition root."""


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """Everything the actors of a service need to know at their birth, and at every rebirth."""

    config: Config
    version: str
    model_type: str
    layers: tuple[LayerSpec, ...]
    placement: Placement
    """The first placement: what each of `hosts` is to hold."""
    hosts: tuple[HostId, ...]
    standbys: tuple[HostId, ...]
    token: str
    """Secret of this service: the expert hosts answer only to those who know it."""
    open_door: OpenDoor

    def bytes_of(self, plan: Plan) -> int:
        """Bytes of the weights of the experts in `plan`."""
        expert_bytes = {layer.path: layer.expert_bytes for layer in self.layers}
        return sum(expert_bytes[path] * len(experts) for path, experts in plan.items())

    @property
    def all_experts(self) -> dict[LayerPath, list[int]]:
        return {layer.path: list(range(layer.num_experts)) for layer in self.layers}

    def actor_name(self, role: str) -> str:
        return f"{self.config.service_name}/{role}"


@dataclass(frozen=True, slots=True)
class HostReport:
    """What an expert actor says of itself."""

    incarnation: str
    node_id: str
    pid: int
    rss_bytes: int
    loaded_bytes: int
    num_calls: int
    num_rows: int
    busy_s: float
    """How long the batch has run that it is computing."""
    held: Plan
    address: HostAddress | None
    """None until it has experts and listens."""


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """What the controller knows."""

    state: str
    """``starting``, ``ready``, ``degraded`` or ``failed``."""
    epoch: int
    hosts: tuple[HostStatus, ...]
    router_port: int
    """Port of the front door; 0 while it does not listen."""
    failure: str = ""
    """Why the service cannot start."""
    failure_class: str = ""
    """Class of that error, in `ray_moe.errors`."""


def transport_settings(config: TransportConfig) -> TransportSettings:
    """The transport's own values out of the user's."""
    return TransportSettings(
        connect_timeout_s=config.connect_timeout_s,
        ping_interval_s=config.ping_interval_s,
        ping_timeout_s=config.ping_timeout_s,
        inline_bytes=config.inline_bytes,
        arena_bytes=config.arena_bytes if config.shared_memory else 0,
        chunk_bytes=config.chunk_bytes,
    )
