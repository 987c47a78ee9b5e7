"""The nouns of the service: hosts, layers, placements and the routing table.

Plain immutable values without torch, Ray or I/O; every other module may import them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

HostId = str
"""Name of a host, e.g. ``expert-3``. It outlives the process: a restarted actor keeps its host id."""

LayerPath = str
"""Module path of a layer's experts inside the model, e.g. ``model.layers.3.mlp.experts``.

Experts are keyed by path and not by layer number, because one decoder layer may hold two groups of experts.
"""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One group of routed experts of a model."""

    path: LayerPath
    num_experts: int
    hidden_size: int
    """D, the width of the tokens that go in."""
    output_size: int
    """Width of the rows that come out (D for every known family)."""
    dtype: str
    """Name of the torch dtype of the experts' weights, e.g. ``bfloat16``."""
    expert_bytes: int
    """Bytes of one expert's weights once loaded."""


@dataclass(frozen=True, slots=True)
class HostAddress:
    """Where a host listens, and which life of it this is."""

    host_id: HostId
    incarnation: str
    """Random name of this life of the process: a restarted host has another one."""
    node_id: str
    pid: int
    tcp: str
    """``ip:port``, reachable from other nodes."""
    unix: str
    """gRPC target of the abstract Unix socket (``unix-abstract:NAME``), for peers on the same node."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which host holds which experts: ``hosts_of[layer][expert]`` lists the hosts, best first."""

    hosts_of: Mapping[LayerPath, tuple[tuple[HostId, ...], ...]]

    def experts_on(self, host_id: HostId) -> dict[LayerPath, list[int]]:
        """Ascending expert indices that `host_id` holds, for each layer where it holds any."""
        held: dict[LayerPath, list[int]] = {}
        for layer, experts in self.hosts_of.items():
            mine = [expert for expert, hosts in enumerate(experts) if host_id in hosts]
            if mine:
                held[layer] = mine
        return held


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """A placement as the routers use it. A later table has a higher epoch; a router never goes back.

    A host named by the placement but absent from `addresses` is on its way (starting or restarting).
    """

    epoch: int
    placement: Placement
    addresses: Mapping[HostId, HostAddress] = field(default_factory=dict)
