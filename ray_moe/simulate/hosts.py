"""Simulated hosts: they start, load and drop one order at a time, and go when their node does. They decide nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ray_moe.policy import events as ev
from ray_moe.policy.hosts import difference, size_bytes, union
from ray_moe.policy.rows import Held
from ray_moe.types import HostAddress, HostId, LayerPath

Order = ev.LoadReplicas | ev.DropReplicas


@dataclass(slots=True)
class Host:
    """The process of a host, over all its lives."""

    host_id: HostId
    incarnation: str = ""
    """Empty while it does not live."""
    node: str = ""
    num_lives: int = 0
    held: Held = field(default_factory=dict)
    orders: deque[Order] = field(default_factory=deque)
    """The first is being carried out."""

    @property
    def is_up(self) -> bool:
        return bool(self.incarnation)

    def begin(self, node: str) -> ev.HostStarted:
        """A new life, in which it holds nothing yet."""
        self.num_lives += 1
        self.incarnation, self.node = f"{self.host_id}:{self.num_lives}", node
        return self.started()

    def started(self) -> ev.HostStarted:
        """What it says of itself."""
        held = {layer: tuple(sorted(experts)) for layer, experts in self.held.items()}
        return ev.HostStarted(HostAddress(self.host_id, self.incarnation, self.node, 1, "", ""), held)

    def end(self) -> ev.HostLost:
        """Its life is over, and with it all that it held and was at."""
        lost = ev.HostLost(self.host_id, self.incarnation)
        self.incarnation, self.node, self.held = "", "", {}
        self.orders.clear()
        return lost

    def take(self, order: Order) -> bool:
        """Take an order in; whether it is free to begin with it. The same order given again changes nothing."""
        if order.incarnation != self.incarnation or any(order.op_id == other.op_id for other in self.orders):
            return False
        self.orders.append(order)
        return len(self.orders) == 1

    def missing(self, order: Order) -> Held:
        """What it has to load for an order."""
        return difference(union(order.experts), self.held) if isinstance(order, ev.LoadReplicas) else {}

    def finish(self) -> ev.ReplicasLoaded | ev.ReplicasDropped:
        """The first order is carried out; what it says then."""
        order = self.orders.popleft()
        if isinstance(order, ev.LoadReplicas):
            self.held = union(self.held, order.experts)
            return ev.ReplicasLoaded(order.op_id, order.host_id, order.incarnation)
        self.held = union(difference(self.held, union(order.experts)))
        return ev.ReplicasDropped(order.op_id, order.host_id, order.incarnation)


@dataclass(slots=True)
class Nodes:
    """The machines that hosts are on. A new one comes whenever a host finds no room."""

    hosts_per_node: int
    on: dict[str, set[HostId]] = field(default_factory=dict)
    going: set[str] = field(default_factory=set)
    """Those whose end has been announced."""
    num_ever: int = 0

    def place(self, host_id: HostId) -> tuple[str, bool]:
        """A node for a host, and whether it is a new one."""
        for node, hosts in reversed(self.on.items()):
            if len(hosts) < self.hosts_per_node and node not in self.going:
                hosts.add(host_id)
                return node, False
            if self.hosts_per_node == 1:
                break
        node = f"node-{self.num_ever}"
        self.num_ever += 1
        self.on[node] = {host_id}
        return node, True

    def leave(self, node: str, host_id: HostId) -> None:
        """A host is there no longer; a node without hosts is given back."""
        hosts = self.on.get(node, set())
        hosts.discard(host_id)
        if not hosts:
            self.on.pop(node, None)
            self.going.discard(node)


def copied(order: Order, missing: Held, expert_bytes: Mapping[LayerPath, int]) -> tuple[int, int]:
    """Bytes that an order has a host read, from the store and from other hosts."""
    if not isinstance(order, ev.LoadReplicas):
        return 0, 0
    given = size_bytes(union(*order.donors.values()), expert_bytes)
    return max(0, size_bytes(missing, expert_bytes) - given), given


def living(hosts: Mapping[HostId, Host]) -> Iterator[Host]:
    return (host for host in hosts.values() if host.is_up)
