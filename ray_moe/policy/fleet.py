"""The hosts of a cluster: who lives, what they hold, what they are doing, how much more they could hold.

The part of `ClusterState` that knows hosts but no plans: it takes in what hosts say, and makes the next order for one
that is idle. A host does one thing at a time; what comes from an ended life or about a past order is ignored. Changed
by `cluster_state.py` only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from ray_moe.policy import events as ev
from ray_moe.policy.hosts import (
    MAX_FAILURES,
    ClusterSettings,
    HostState,
    Operation,
    Role,
    choose_donors,
    difference,
    frozen,
    most_needed,
    number_of,
    relative_speeds,
    size_bytes,
    union,
)
from ray_moe.policy.load import Floats
from ray_moe.policy.planner import Capacity, slots_in_bytes
from ray_moe.policy.rows import ExpertKey, Held, Rows
from ray_moe.types import HostId, LayerPath

SPEED_TOLERANCE = 0.15
"""A speed is told anew when it is this far from what was told."""

About = ev.ReplicasLoaded | ev.ReplicasDropped | ev.ReplicasFailed
"""What hosts say about their orders."""


class Fleet:
    """See the module."""

    def __init__(
        self, settings: ClusterSettings, hosts: Sequence[HostId], standbys: Sequence[HostId], life: str, now_s: float
    ) -> None:
        """Args: life: what the names of orders begin with; another for each life of whoever drives this."""
        self.settings = settings
        self.hosts: dict[HostId, HostState] = {}
        self.held = Rows(settings.num_experts)
        """What hosts that are up are known to hold."""
        self.speeds: dict[HostId, float] = {}
        """Of the members, as told to routers: relative, absent is 1."""
        self._expert_bytes = settings.expert_bytes
        self._num_experts = settings.num_experts
        self._everything: Held = {layer: set(range(count)) for layer, count in self._num_experts.items()}
        self._told_bytes: int | None = None
        self._life = life
        self._num_ops = 0
        for host_id in hosts:
            self.add(host_id, "serving", now_s)
        for host_id in standbys:
            self.add(host_id, "standby", now_s)
        self._num_names = 1 + max((number_of(host) for host in self.hosts), default=-1)

    # --- who there is ----------------------------------------------------------------------------------------
    @property
    def num_hosts(self) -> int:
        """Hosts that serve or are to serve; standbys and leaving ones apart."""
        return sum(host.role == "serving" for host in self.hosts.values())

    @property
    def members(self) -> list[HostState]:
        """The hosts that plans may use, in the order of their names."""
        return sorted((host for host in self.hosts.values() if host.is_member), key=lambda host: host.host_id)

    def with_role(self, role: Role) -> list[HostState]:
        return [host for host in self.hosts.values() if host.role == role]

    def gone(self, now_s: float) -> list[HostState]:
        """The serving hosts that others should stand in for."""
        return [host for host in self.with_role("serving") if host.is_gone(now_s, self.settings.return_s)]

    def add(self, host_id: HostId, role: Role, now_s: float) -> None:
        # What tables named before this, and for how long they are in use, is not known.
        self.hosts[host_id] = HostState(host_id, now_s, role, unnamed_s=now_s)

    def add_new(self, role: Role, now_s: float) -> HostId:
        """A host with a name that none has had."""
        host_id = f"expert-{self._num_names}"
        self._num_names += 1
        self.add(host_id, role, now_s)
        return host_id

    def remove(self, host_id: HostId) -> None:
        self.held.clear(host_id)
        del self.hosts[host_id]

    def started(self, event: ev.HostStarted, now_s: float) -> None:
        """A host that is known, and not up in another life, is up."""
        host = self.hosts[event.address.host_id]
        told, unsettled = self._known(event.held), self._known(event.unsettled)
        if host.incarnation != event.address.incarnation:
            host.ended.discard(event.address.incarnation)
            if host.address is not None:
                host.ended.add(host.incarnation)
            host.num_lives += 1
            host.unsure, host.given_up, host.speed = {}, {}, None
            host.num_failures, host.retry_at_s = 0, float("-inf")
        if host.phase != "up":
            host.phase, host.since_s = "up", now_s
            self.held.add(host.host_id, difference(told, host.given_up, unsettled))
            host.unsure = difference(union(host.unsure, unsettled), self.held.on(host.host_id))
        if host.operation is None:  # if it has more than we know of, that is from an order before our time
            host.unsure = union(host.unsure, difference(told, self.held.on(host.host_id)))
        host.address, host.domain, host.max_bytes = event.address, event.domain, event.max_bytes
        self._told_bytes = event.max_bytes

    def _known(self, experts: ev.Experts) -> Held:
        """Those of `experts` that the model has."""
        return {
            layer: {expert for expert in indices if 0 <= expert < self._num_experts[layer]}
            for layer, indices in experts.items()
            if layer in self._num_experts
        }

    def lose(self, host: HostState, now_s: float) -> None:
        """Nobody can count on the host. If this life comes back, it may have all that it had, whatever it says first.

        That may have been said long ago. Its last order may have been carried out or not.
        """
        doing = {} if host.operation is None else host.operation.experts
        host.unsure = union(host.unsure, self.held.on(host.host_id), doing)
        self.held.clear(host.host_id)
        host.phase, host.since_s, host.operation = "lost", now_s, None

    def measured(self, event: ev.SpeedReported) -> None:
        host = self.hosts.get(event.host_id)
        if host is not None and host.incarnation == event.incarnation and 0 < event.speed < float("inf"):
            host.speed = event.speed

    def tell_speeds(self) -> bool:
        """Whether speeds have changed by so much that routers should know."""
        before = self.speeds
        self.speeds = relative_speeds({h.host_id: h.speed for h in self.members}, before, SPEED_TOLERANCE)
        return self.speeds != before

    # --- room ------------------------------------------------------------------------------------------------
    def budget_bytes(self, host: HostState) -> int:
        """Expert weights that `host` may hold."""
        return self.budgets([host])[host.host_id]

    def budgets(self, hosts: Iterable[HostState]) -> dict[HostId, int]:
        """Expert weights that each of `hosts` may hold."""
        slots = -(-self.widest // max(1, self.num_hosts)) + self.settings.spare_slots
        share = slots * sum(self._expert_bytes.values())
        budgets = {}
        for host in hosts:
            budgets[host.host_id] = min(self._limits(host), default=share)
        return budgets

    def _limits(self, host: HostState) -> list[int]:
        """What must not be exceeded; none where the budget is only a share."""
        return [limit for limit in (host.max_bytes, self.settings.max_bytes) if limit is not None]

    @property
    def widest(self) -> int:
        """Experts of the layer that has most."""
        return max(self._num_experts.values())

    def fewest_hosts(self) -> int:
        """As many as can hold every expert, if all are like the last that told what it may hold."""
        limits = [limit for limit in (self._told_bytes, self.settings.max_bytes) if limit is not None]
        slots = slots_in_bytes(min(limits), self._expert_bytes) if limits else self.widest
        return -(-self.widest // max(1, slots))

    def used_bytes(self, host: HostState, *more: Held) -> int:
        """What the host may be holding or is loading, and `more` of it that it is to hold."""
        doing = {} if host.operation is None else host.operation.experts
        return size_bytes(union(self.held.on(host.host_id), host.unsure, doing, *more), self._expert_bytes)

    def capacities(self) -> tuple[Capacity, ...]:
        """The members as the planner sees them."""
        members = self.members
        budgets = self.budgets(members)
        return tuple(
            Capacity(
                host.host_id,
                slots_in_bytes(budgets[host.host_id], self._expert_bytes),
                self.speeds.get(host.host_id, 1.0),
                host.node,
                host.domain,
            )
            for host in members
        )

    # --- what they do ----------------------------------------------------------------------------------------
    def new_op(self) -> str:
        self._num_ops += 1
        return f"{self._life}.{self._num_ops}"

    def doing(self, event: About) -> HostState | None:
        """The host, if `event` is about what it is doing in its present life."""
        host = self.hosts.get(event.host_id)
        if host is None or host.phase != "up" or host.incarnation != event.incarnation or host.operation is None:
            return None
        return host if host.operation.op_id == event.op_id else None

    def done(self, host: HostState) -> Held:
        """The host has carried out its order; what it has loaded."""
        operation, host.operation = host.operation, None
        host.num_failures, host.retry_at_s = 0, float("-inf")
        experts = union(operation.experts) if operation is not None else {}
        host.unsure = difference(host.unsure, experts)
        if operation is None or not operation.loads:
            return {}
        host.given_up = difference(host.given_up, experts)
        self.held.add(host.host_id, experts)
        return experts

    def failed(self, host: HostState, now_s: float) -> Held:
        """The host could not carry out its order; what it was about. It may have carried out a part."""
        operation, host.operation = host.operation, None
        experts = union(operation.experts) if operation is not None else {}
        host.unsure = union(host.unsure, experts)
        host.retry_at_s = now_s + self.settings.retry_s * 2 ** min(host.num_failures, MAX_FAILURES)
        host.num_failures += 1
        return experts

    def next_order(
        self,
        host: HostState,
        wanted: Held,
        named: Held,
        unserved: Collection[ExpertKey],
        rates: Mapping[LayerPath, Floats],
        now_s: float,
    ) -> ev.LoadReplicas | ev.DropReplicas | float | None:
        """What an idle host is to do next; if that is to wait, until when; None when it has what it should have.

        It loads what it lacks, as long as there is room or nothing to drop; else it drops what nobody asks it for, once
        no table that is in use can name it.

        Args:
            wanted: what it is to hold.
            named: what the table names it for.
            unserved: experts that nobody holds.
        """
        if host.role == "leaving" or (host.standby and not self.settings.preload_standbys):
            return None
        if host.standby:
            wanted = self._everything
        if now_s < host.retry_at_s:
            return host.retry_at_s
        held = self.held.on(host.host_id)
        missing, extra = difference(wanted, held), difference(union(held, host.unsure), wanted, named)
        if missing:
            free = self.settings.chunk_bytes if host.standby else self.budget_bytes(host) - self.used_bytes(host)
            room = min(self.settings.chunk_bytes, free)
            chunk = most_needed(missing, unserved, rates, self._expert_bytes, room)
            if not chunk and not extra:  # larger than a chunk, or one of a ring of full hosts: one at a time
                missing = missing if host.standby else self._bearable(host, missing, free)
                chunk = most_needed(missing, unserved, rates, dict.fromkeys(self._expert_bytes, 1), 1)
            if chunk:
                return self._load(host, chunk, now_s)
        if not extra:
            return None
        if now_s < host.unnamed_s + self.settings.drain_s:
            return host.unnamed_s + self.settings.drain_s
        return self._drop(host, extra, now_s)

    def _bearable(self, host: HostState, missing: Held, free: int) -> Held:
        """Of `missing`, what `host` may have already, and what makes it exceed its limit by an expert at the most."""
        if not self._limits(host):
            return missing
        beyond = free + max(self._expert_bytes.values())
        maybe = {layer: experts & host.unsure.get(layer, set()) for layer, experts in missing.items()}
        return {
            layer: experts if self._expert_bytes[layer] <= beyond else maybe[layer]
            for layer, experts in missing.items()
            if maybe[layer] or self._expert_bytes[layer] <= beyond
        }

    def _load(self, host: HostState, experts: Held, now_s: float) -> ev.LoadReplicas:
        host.operation = Operation(self.new_op(), True, frozen(experts), now_s)
        return self._instruction(host, host.operation)  # type: ignore[return-value]

    def _drop(self, host: HostState, experts: Held, now_s: float) -> ev.DropReplicas:
        # From now on it does not count as held: the order may be carried out at any time.
        self.held.discard(host.host_id, experts)
        host.unsure, host.given_up = union(host.unsure, experts), union(host.given_up, experts)
        host.operation = Operation(self.new_op(), False, frozen(experts), now_s)
        return self._instruction(host, host.operation)  # type: ignore[return-value]

    def _instruction(self, host: HostState, operation: Operation) -> ev.LoadReplicas | ev.DropReplicas:
        order = (operation.op_id, host.host_id, host.incarnation, operation.experts)
        if not operation.loads:
            return ev.DropReplicas(*order)
        donors: Mapping[HostId, ev.Experts] = {}
        if self.settings.donors != "none":
            near = self.settings.donors == "node"
            donors = choose_donors(union(operation.experts), host, self.hosts, self.held, near)
        return ev.LoadReplicas(*order, donors)

    def repeated_orders(self, now_s: float) -> Iterable[ev.LoadReplicas | ev.DropReplicas]:
        """The orders that were not answered for so long that they may have been lost."""
        for host in self.hosts.values():
            operation = host.operation
            if operation is not None and now_s - operation.since_s >= self.settings.repeat_s:
                host.operation = replace(operation, since_s=now_s)
                yield self._instruction(host, host.operation)
