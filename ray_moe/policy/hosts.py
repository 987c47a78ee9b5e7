"""What `ClusterState` should keep to, what it knows of each host, and small sums over what hosts hold.

Values and functions of values; the only one who changes a `HostState` is `cluster_state.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ray_moe.errors import InvalidConfig
from ray_moe.policy.events import Experts
from ray_moe.policy.load import Floats
from ray_moe.policy.planner import Goals
from ray_moe.policy.rows import ExpertKey, Held, Rows
from ray_moe.policy.scaling import ScalingGoals
from ray_moe.types import HostAddress, HostId, LayerPath, LayerSpec

Phase = Literal["starting", "up", "lost"]

Role = Literal["serving", "standby", "leaving"]

MAX_FAILURES = 5
"""A host that could not load so many times in a row is not planned for until it can, or has restarted. Each pause is
twice the one before."""


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What the cluster should keep to."""

    layers: tuple[LayerSpec, ...]
    spare_slots: int = 1
    """Replicas of each layer that a host may hold beyond its equal share."""
    max_bytes: int | None = None
    """Expert weights that each host may hold; None is an equal share and the spare slots."""
    goals: Goals = field(default_factory=Goals)
    balance: bool = True
    """Whether to change the placement without being asked."""
    balance_every_s: float = 1.0
    half_life_s: float = 5.0
    min_tokens_per_s: float = 1.0
    """With less traffic than this there is nothing to balance."""
    drain_s: float = 2.0
    """Routers use a table no longer than this after a newer one was published."""
    return_s: float = 60.0
    """A host that is starting or lost is expected for so long; then plans are made without it."""
    resize_s: float = 300.0
    """The hosts of a resize must have started within this, and those that go must be dispensable within this after they
    have handed over."""
    retry_s: float = 1.0
    """Pause of a host after it could not load."""
    replan_s: float = 10.0
    """Pause after a plan could not be made or carried out."""
    repeat_s: float = 30.0
    """An order, or a request for a plan, that has not been answered for so long is made again."""
    chunk_bytes: int = 2**28
    """Weights that a host loads in one go; what is most needed goes first."""
    preload_standbys: bool = False
    """Whether standbys hold all experts, whatever `max_bytes` says."""
    donors: Literal["node", "any", "none"] = "node"
    """Which living replicas weights are copied from: those on the same node, any, or none (always from the store)."""
    scaling: ScalingGoals | None = None
    can_sleep: bool = False
    """Whether there may be no host at all, because routers compute what nobody holds."""

    def __post_init__(self) -> None:
        if self.scaling is not None and self.scaling.zero_after_s is not None and not self.can_sleep:
            raise InvalidConfig(
                "scaling.zero_after_s is set, but nobody could answer the first request after that; give routers a "
                "lifeboat (router.lifeboat_bytes), or leave scaling.zero_after_s unset"
            )

    @property
    def expert_bytes(self) -> dict[LayerPath, int]:
        return {layer.path: layer.expert_bytes for layer in self.layers}

    @property
    def num_experts(self) -> dict[LayerPath, int]:
        return {layer.path: layer.num_experts for layer in self.layers}


@dataclass(frozen=True, slots=True)
class Operation:
    """What a host is doing."""

    op_id: str
    loads: bool
    experts: Experts
    since_s: float


@dataclass(slots=True)
class HostState:
    """One host, over all its lives. What it holds is in `ClusterState`, by expert and by host."""

    host_id: HostId
    since_s: float
    """When its phase began."""
    role: Role = "serving"
    stays_as: Role = "serving"
    """Its role if it does not leave after all."""
    phase: Phase = "starting"
    address: HostAddress | None = None
    """Of the present or last life."""
    domain: str = ""
    max_bytes: int | None = None
    speed: float | None = None
    """None until it is known."""
    operation: Operation | None = None
    unsure: Held = field(default_factory=dict)
    """Experts that this life may hold, though they do not count as held: it was told to drop them, or was lost or
    failed while it was to load them."""
    given_up: Held = field(default_factory=dict)
    """Experts that this life was told to drop: if it is said to hold one of them, that may have been said before, or
    the order may come after."""
    unnamed_s: float = float("-inf")
    """When a table last stopped naming it for something."""
    retry_at_s: float = float("-inf")
    num_failures: int = 0
    """Loads that have failed since the last that did not."""
    is_new: bool = False
    """Whether it holds nothing and no plan has been made with it yet."""
    is_missed: bool = False
    """Whether it was lost with experts that it has not got again."""
    is_dismissed: bool = False
    """Whether tables name it no more, even for what nobody else holds: everything goes to sleep."""
    num_lives: int = 0
    ended: set[str] = field(default_factory=set)
    """Incarnations that are over: what still comes from them is ignored, as long as the host is up in another."""

    @property
    def incarnation(self) -> str:
        return "" if self.address is None else self.address.incarnation

    @property
    def node(self) -> str:
        return "" if self.address is None else self.address.node_id

    @property
    def standby(self) -> bool:
        return self.role == "standby"

    @property
    def draining(self) -> bool:
        return self.role == "leaving"

    @property
    def is_member(self) -> bool:
        """Whether plans may use it."""
        return self.phase == "up" and self.role == "serving" and self.num_failures < MAX_FAILURES

    def is_gone(self, now_s: float, return_s: float) -> bool:
        """Whether others should stand in for it: it is lost, overdue, or cannot load."""
        if self.phase == "up":
            return self.num_failures > 0
        return self.phase == "lost" or now_s - self.since_s >= return_s


# --- Sums over what hosts hold -------------------------------------------------------------------------------
def difference(these: Held, *those: Held) -> Held:
    """What is in `these` and in none of `those`. To be read only: sets may be those of `these`."""
    rest: Held = {}
    for layer, experts in these.items():
        for other in those:
            if layer in other:
                experts = experts - other[layer]  # noqa: PLW2901
        if experts:
            rest[layer] = experts
    return rest


def union(*helds: Mapping[LayerPath, Collection[int]]) -> Held:
    """What is in any of `helds`."""
    total: Held = {}
    for held in helds:
        for layer, experts in held.items():
            if experts:
                total.setdefault(layer, set()).update(experts)
    return total


def size_bytes(held: Mapping[LayerPath, Collection[int]], expert_bytes: Mapping[LayerPath, int]) -> int:
    return sum(expert_bytes[layer] * len(experts) for layer, experts in held.items())


def frozen(held: Mapping[LayerPath, Collection[int]]) -> Experts:
    return {layer: tuple(sorted(experts)) for layer, experts in sorted(held.items())}


def most_needed(
    missing: Held,
    unserved: Collection[ExpertKey],
    rates: Mapping[LayerPath, Floats],
    expert_bytes: Mapping[LayerPath, int],
    max_bytes: int,
) -> Held:
    """The part of `missing` to load first: what nobody serves, then the hottest, as far as it fits in `max_bytes`."""
    order = sorted(
        ((layer, expert) for layer, experts in missing.items() for expert in experts),
        key=lambda one: (one not in unserved, -rates[one[0]][one[1]], one),
    )
    chosen: Held = {}
    for layer, expert in order:
        max_bytes -= expert_bytes[layer]
        if max_bytes < 0:
            break
        chosen.setdefault(layer, set()).add(expert)
    return chosen


def choose_donors(
    experts: Held, receiver: HostState, hosts: Mapping[HostId, HostState], held: Rows, nearby_only: bool
) -> dict[HostId, Experts]:
    """Who of the living gives what to `receiver`: somebody of its own node if possible, the least asked of them."""
    donors: defaultdict[HostId, Held] = defaultdict(dict)
    asked: defaultdict[HostId, int] = defaultdict(int)
    for layer, wanted in experts.items():
        for expert in sorted(wanted):
            holders = [host for host in held.of(layer, expert) if host != receiver.host_id]
            near = [host for host in holders if hosts[host].node == receiver.node]
            able = near or ([] if nearby_only else holders)
            if able:
                donor = min(able, key=lambda host: (asked[host], host))
                donors[donor].setdefault(layer, set()).add(expert)
                asked[donor] += 1
    return {donor: frozen(experts) for donor, experts in sorted(donors.items())}


ALIKE = 2.0
"""Hosts whose speeds differ by no more than this factor are taken for equal machines."""


def relative_speeds(
    speeds: Mapping[HostId, float | None], told: Mapping[HostId, float], tolerance: float
) -> dict[HostId, float]:
    """Speeds relative to the median of those that are known, to tenths; 1 is left out.

    What was told before stays as it is within `tolerance`: noise is no reason for a new table. Hosts within a factor of
    `ALIKE` of the median count as equal: measured speed rises with the size of the batches, so that telling small
    differences would give the host with more rows ever more of them.
    """
    known = sorted(speed for speed in speeds.values() if speed is not None)
    median = known[(len(known) - 1) // 2] if known else 1.0
    relative = {}
    for host, speed in speeds.items():
        now, before = 1.0 if speed is None else speed / median, told.get(host, 1.0)
        if 1 / ALIKE <= now <= ALIKE:
            now = 1.0
        relative[host] = before if abs(now - before) <= tolerance * before else max(0.1, round(now, 1))
    return {host: speed for host, speed in relative.items() if speed != 1.0}


def number_of(host_id: HostId) -> int:
    """The number at the end of a host's name; 0 where there is none."""
    tail = host_id.rpartition("-")[2]
    return int(tail) if tail.isdecimal() else 0
