"""What the actors of one service tell each other. Plain values, pickled by Ray inside one trusted cluster."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ray_moe.config import Config, ServerConfig, TransportConfig
from ray_moe.errors import RayMoEError
from ray_moe.policy.events import Experts
from ray_moe.policy.hosts import ClusterSettings
from ray_moe.policy.load import TokenCounts
from ray_moe.policy.planner import Goals
from ray_moe.policy.scaling import ScalingGoals
from ray_moe.policy.versions import Drift
from ray_moe.runtime.tracing import Tracer
from ray_moe.transport.settings import MemberCertificate, TransportSettings
from ray_moe.types import (
    ClusterEvent,
    HostAddress,
    HostId,
    HostStatus,
    LayerPath,
    LayerSpec,
    Placement,
    RouterAddress,
    VersionStatus,
)

NAMESPACE = "ray_moe"
"""Of all named actors, whoever starts them."""
TRAINER = "trainer"
"""Role of the actor that trains, if there is one."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Where a router listens; 0 is nowhere."""

    grpc: int = 0
    http: int = 0

    def address(self, router_id: str, server: ServerConfig, node_ip: str) -> RouterAddress:
        """As clients dial it; `node_ip` is what others call the router's node."""
        host = node_ip if server.host in ("0.0.0.0", "::") else server.host
        host = f"[{host}]" if ":" in host else host
        scheme = "https" if server.tls_cert_file else "http"
        http = f"{scheme}://{host}:{self.http}" if self.http else ""
        return RouterAddress(router_id, f"{host}:{self.grpc}", http)


class FrontDoor(Protocol):
    """What answers clients on behalf of a router (`service/doors.py`)."""

    async def start(self) -> Ports:
        """Listen. Raises `InsufficientResources` when a port is taken."""
        ...

    async def stop(self, grace_s: float) -> None: ...

    @property
    def http_app(self) -> Any:
        """What it answers by HTTP, as an ASGI application for another server, whether or not it listens itself."""
        ...

    async def take(self, port: int) -> bool:
        """Speak gRPC on another port too, unless somebody listens there; whether it does now."""
        ...

    async def find(self, method: str, metadata: Any) -> Any:
        """What answers gRPC's `/service/method`, for calls that another server brings."""
        ...


OpenDoor = Callable[[Any, ServerConfig, Tracer | None], FrontDoor]
"""Makes the front door of a router (a `service.backend.Backend`); named by the composition root."""


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """Everything the actors of a service need to know at their birth, and at every rebirth."""

    config: Config
    name: str
    """Prefix of the actors' names; no other service of the cluster has it."""
    version: str
    model_type: str
    layers: tuple[LayerSpec, ...]
    placement: Placement
    """The first placement: what each of `hosts` is to hold."""
    hosts: tuple[HostId, ...]
    standbys: tuple[HostId, ...]
    routers: tuple[str, ...]
    """Those that the service keeps itself; none where Ray Serve does."""
    token: str = field(repr=False)
    """Secret of this service: the expert hosts answer only to those who know it."""
    open_door: OpenDoor
    certificate: MemberCertificate | None = None
    """What its routers and hosts show each other across nodes; None: lines are not encrypted."""

    def bytes_of(self, experts: Mapping[LayerPath, Collection[int]]) -> int:
        """Bytes of the weights of `experts`."""
        expert_bytes = {layer.path: layer.expert_bytes for layer in self.layers}
        return sum(expert_bytes[path] * len(indices) for path, indices in experts.items())

    @property
    def all_experts(self) -> dict[LayerPath, list[int]]:
        return {layer.path: list(range(layer.num_experts)) for layer in self.layers}

    def actor_name(self, role: str) -> str:
        return f"{self.name}/{role}"

    def find(self, role: str) -> Any:
        """The actor's handle. Raises `ValueError` when it is not there."""
        import ray  # the simulator takes the settings from here, without

        return ray.get_actor(self.actor_name(role), NAMESPACE)

    def ports_of(self, router_id: str) -> dict[str, int | None]:
        """Where a router listens, as the configuration of a server has it."""
        server = self.config.server
        if not self.routers:  # Ray Serve puts as many on a node as it likes, and listens for HTTP itself
            return {"port": 0, "http_port": None}
        ahead = 2 * self.routers.index(router_id)
        return {"port": server.port and server.port + ahead, "http_port": server.http_port and server.http_port + ahead}


@dataclass(frozen=True, slots=True)
class HostReport:
    """What an expert actor says of itself."""

    incarnation: str
    node_id: str
    domain: str
    """Failure domain of its node, empty when there are none."""
    pid: int
    rss_bytes: int
    loaded_bytes: int
    num_calls: int
    num_rows: int
    busy_s: float
    """How long the batch has run that it is computing."""
    busy_fraction: float
    """Share of the last seconds in which it was computing."""
    flops_per_s: float
    """How fast it computes when it does; 0 while it has not."""
    queued_rows: int
    held: Mapping[int, Experts]
    """By version of the weights."""
    address: HostAddress | None
    """None until it listens."""


@dataclass(frozen=True, slots=True)
class RouterVersions:
    """Which versions of the weights a router has."""

    revision: int
    """Of what it was told last, and has done."""
    loaded: frozenset[int]
    in_use: frozenset[int]
    """Those that requests are computed with."""
    failed: int | None = None
    """A version that it cannot load, and why."""
    failure: RayMoEError | None = None
    drift: Drift | None = None
    """Of the canary, as far as it has measured."""


@dataclass(frozen=True, slots=True)
class RouterReport:
    """What a router feels, sent to the controller now and then."""

    router: RouterAddress
    counts: TokenCounts
    epoch: int
    """Of the table in use."""
    queue_age_s: float
    """How long the oldest request has waited that is not being computed."""
    idle_s: float
    """Time since there was a request; 0 while there is one."""
    versions: RouterVersions | None = None
    """None until its model is loaded."""


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """What the controller knows."""

    state: str
    """``starting``, ``ready``, ``degraded`` or ``failed``."""
    epoch: int
    hosts: tuple[HostStatus, ...]
    routers: tuple[RouterAddress, ...] = ()
    changing: str = ""
    """The change of the cluster that is under way; empty when there is none."""
    events: tuple[ClusterEvent, ...] = ()
    """What happened last, oldest first."""
    p_lossless: float = 1.0
    """Chance that every expert survives the loss of `balance.survive_nodes` nodes (one, if that is 0)."""
    failure: str = ""
    """Why the service cannot start."""
    failure_class: str = ""
    """Class of that error, in `ray_moe.errors`."""
    versions: tuple[VersionStatus, ...] = ()


def transport_settings(config: TransportConfig, device: str) -> TransportSettings:
    """The transport's own values out of the user's, for a process that computes on `device`."""
    return TransportSettings(
        connect_timeout_s=config.connect_timeout_s,
        ping_interval_s=config.ping_interval_s,
        ping_timeout_s=config.ping_timeout_s,
        inline_bytes=config.inline_bytes,
        arena_bytes=config.arena_bytes if config.shared_memory else 0,
        device=device if device.startswith("cuda") else "",
        device_arena_bytes=config.gpu_arena_bytes if config.shared_memory else 0,
        chunk_bytes=config.chunk_bytes,
    )


def cluster_settings(config: Config, layers: tuple[LayerSpec, ...]) -> ClusterSettings:
    """The policies' own values out of the user's, for a model with these layers."""
    experts, balance, scaling = config.experts, config.balance, config.scaling
    goals = Goals(
        min_replicas=balance.min_replicas,
        min_gain=balance.min_gain,
        cost_per_move=balance.cost_per_move,
        survive_nodes=balance.survive_nodes,
    )
    return ClusterSettings(
        layers=layers,
        spare_slots=experts.spare_slots,
        max_bytes=experts.max_bytes,
        goals=goals,
        balance=balance.enabled,
        balance_every_s=balance.every_s,
        half_life_s=balance.half_life_s,
        drain_s=balance.drain_s,
        return_s=balance.return_s,
        resize_s=scaling.start_timeout_s,
        preload_standbys=experts.standby_preload,
        donors=experts.copy_from if experts.offload != "disk" else "none",  # the files are where all of them read
        can_sleep=bool(config.router.lifeboat_bytes),
        scaling=None
        if not scaling.enabled
        else ScalingGoals(
            min_hosts=scaling.min_actors,
            max_hosts=scaling.max_actors,
            target_utilisation=scaling.target_utilisation,
            max_queue_age_s=scaling.max_queue_age_s,
            up_after_s=scaling.up_after_s,
            down_after_s=scaling.down_after_s,
            cool_down_s=scaling.cool_down_s,
            zero_after_s=scaling.zero_after_s,
        ),
    )
