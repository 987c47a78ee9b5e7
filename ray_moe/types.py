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
    """Which host holds which experts: ``hosts_of[layer][expert]`` lists the hosts of its replicas, best first.

    A host stands at most once in a list. An empty list is an expert that nobody holds.
    """

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
    speeds: Mapping[HostId, float] = field(default_factory=dict)
    """How fast each host computes, relative to the others; absent is 1."""

    @property
    def is_complete(self) -> bool:
        """Whether every expert has a replica that is there."""
        layers = self.placement.hosts_of.values()
        there = self.addresses.keys()
        return bool(layers) and all(not there.isdisjoint(hosts) for experts in layers for hosts in experts)


# --- What the service tells about itself ---------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class HostStatus:
    """One expert host, as the controller knows it and as the host reports itself."""

    host_id: HostId
    state: str
    """``starting``, ``loading``, ``ready``, ``standby`` or ``lost``."""
    node_id: str = ""
    pid: int = 0
    restarts: int = 0
    """Lives of this host before the present one."""
    rss_bytes: int = 0
    weight_bytes: int = 0
    """Bytes of expert weights it is to hold."""
    loaded_bytes: int = 0
    """Of those, loaded so far."""
    num_experts: int = 0
    """(layer, expert) pairs it is to hold."""
    num_calls: int = 0
    num_rows: int = 0
    """(token, expert) rows computed in this life."""


@dataclass(frozen=True, slots=True)
class RouterStatus:
    """The router that answers."""

    pid: int
    rss_bytes: int
    backbone_bytes: int
    """Bytes of the weights it holds (everything but the routed experts)."""
    active_requests: int
    queued_requests: int
    generated_tokens: int
    retried_calls: int
    """Calls to hosts that were sent again after a host was lost or did not hold the expert."""


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """Everything `ray-moe status` shows."""

    model: str
    model_type: str
    version: str
    state: str
    """``starting``, ``ready``, ``degraded`` (an expert has no live host, or the router is being replaced) or
    ``failed`` (an actor cannot start)."""
    uptime_s: float
    epoch: int
    router: RouterStatus
    hosts: tuple[HostStatus, ...]
    tokens_per_expert: Mapping[LayerPath, tuple[int, ...]]
    """Tokens routed to each expert since the router started."""


# --- Generation ----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt to continue. Exactly one of `prompt` and `token_ids` is set."""

    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy; above 0 samples."""
    top_p: float = 1.0
    """Nucleus sampling keeps the smallest set of tokens whose probability reaches this (Holtzman et al., 2020)."""
    seed: int | None = None
    ignore_eos: bool = False
    """Go on to `max_new_tokens` whatever is generated."""


@dataclass(frozen=True, slots=True)
class GenerateChunk:
    """A piece of a generation, in order. The last one has a `finish_reason`."""

    token_ids: tuple[int, ...]
    text: str
    """Text these tokens complete (a multi-token character waits for its last token); empty without tokenizer."""
    finish_reason: str = ""
    """Empty while it goes on; ``stop`` at an end-of-sequence token, ``length`` at `max_new_tokens`."""
    num_prompt_tokens: int = 0
