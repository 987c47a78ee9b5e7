"""The routing table as a router uses it: for each layer, which hosts can compute which expert at this moment.

A `View` is one table and what the router itself has found out since it came: who is out of reach, who is late, who does
not hold what the table says, and which experts the router holds itself. `Routes` has the newest view and lets callers
wait for the next. Never decides a placement and opens no line. Called by `runtime/exchange.py` and `runtime/lines.py`.

Shape legend: E experts of a layer, R replicas, H hosts with an address, m slots. Host numbers are 0..H-1 as in
`View.hosts`, and H is the router's own process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from ray_moe.errors import NotFound
from ray_moe.ops.dispatch import NOWHERE, DeviceOrder, Ints, spread
from ray_moe.policy.split import Replicas, choose_replicas, split_tokens
from ray_moe.types import HostId, LayerPath, Placement, RoutingTable

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

FADING = 0.9
"""What is left, after each batch, of the turns that a host has had."""

FEW_ROWS = 16
"""Rows of an expert up to which its weights take longer to read than to use: a batch where no expert has more is dealt
by what each host must read, and no expert is split."""

Load = Callable[[Sequence[HostId]], tuple[Floats, Floats]]
"""Tells, for the hosts named, the rows and the experts that they are at for this router."""


@dataclass(frozen=True, slots=True, eq=False)
class How:
    """Who may compute which of a batch's slots, and how the answers come."""

    in_order: bool = False
    """Whether the answers come in the order of the shares, so that a sum over them is always the same."""
    only: Ints | None = None
    """Ascending slots to compute; None for all of them."""
    avoid: frozenset[HostId] = frozenset()
    """Hosts that are not asked. What then finds nobody waits only while the table names somebody else, and no longer
    than a host may be silent."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerRoutes:
    """Where the experts of one layer are computed."""

    hosts: tuple[HostId, ...]
    owner: Ints
    """[E + 1] host number of each expert's first replica, H where nobody else can; the last entry is `NOWHERE`."""
    replicas: Replicas | None
    """Replicas by host number; None when no expert has a choice."""
    speed: Floats | None
    """[H + 1] relative; None when all are equal."""
    speed_in_all: float
    """Of the hosts that hold an expert of this layer, added up."""
    turns: Floats
    """[H + 1] fading sum of the parts of each batch that a host got: where all else is equal, replicas take turns. The
    one thing here that changes, and a lost update does no harm."""
    numbers: tuple[int, ...] = ()
    """Of all that compute an expert of this layer, ascending; the router itself is H."""
    _orders: dict[torch.device, DeviceOrder] = field(default_factory=dict, repr=False)

    def order_on(self, device: torch.device) -> DeviceOrder | None:
        """What splits batches on `device`; None where an expert has a choice of hosts."""
        if self.replicas is not None:
            return None
        order = self._orders.get(device)
        if order is None:
            order = self._orders[device] = DeviceOrder(self.owner, device)
        return order

    def hosts_of(self, index: Ints, load: Load) -> tuple[Ints, Ints | None]:
        """[m] expert of each slot (E is the sentinel) -> where they go, as `ops/dispatch.split_by_host` wants it.

        Returns: [E + 1] host number of each expert; and [m] of each slot, which then counts instead, if an expert is
        split, else None.
        """
        replicas = self.replicas
        if replicas is None:
            return self.owner, None
        rows, experts = load(self.hosts)
        num_experts = len(self.owner) - 1
        count = np.bincount(index, minlength=num_experts + 1)[:num_experts]
        if count.max(initial=0) > FEW_ROWS:
            return self.owner, spread(index, replicas.host, split_tokens(count, replicas, self.speed, rows))
        touched = count.nonzero()[0]
        # The turns of a host add up to less than 1 / (1 - FADING), so these stay below one expert.
        chosen = choose_replicas(touched, replicas, self.speed, experts + self.turns * 0.05)
        home = np.full(num_experts + 1, NOWHERE)
        home[touched] = replicas.host[chosen]
        self.turns[:] *= FADING
        self.turns[:] += np.bincount(home[touched], count[touched] / max(1, len(index)), len(self.turns))
        return home, None


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """The replicas of one layer that a table names on hosts with an address, as numbers.

    The same for all views of a table, and with as many hosts and experts as there are what it takes to make a view:
    so whoever is late or lost costs a few numpy calls a layer, and not a look at every name.
    """

    hosts: tuple[HostId, ...]
    """As in `View.hosts`."""
    rows: tuple[tuple[HostId, ...], ...]
    """As the table has them."""
    expert: Ints
    """[R] ascending."""
    host: Ints
    """[R] number of each; within an expert the best first."""

    @classmethod
    def of(
        cls, rows: tuple[tuple[HostId, ...], ...], hosts: tuple[HostId, ...], number_of: Mapping[HostId, int]
    ) -> Named:
        names = [len(row) for row in rows]
        host = np.array([number_of.get(name, NOWHERE) for row in rows for name in row], dtype=np.int64)
        expert = np.repeat(np.arange(len(rows)), names)
        there = host != NOWHERE
        return cls(hosts, rows, expert[there], host[there])


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """One routing table, and what has been found out since."""

    table: RoutingTable
    out: frozenset[HostId] = frozenset()
    """Hosts out of reach."""
    late: frozenset[HostId] = frozenset()
    """Hosts that owe an answer for longer than usual: used where there is nobody else."""
    hung: frozenset[HostId] = frozenset()
    """Of those, the ones so late that the lifeboat is the better way."""
    missing: frozenset[tuple[HostId, tuple[int, LayerPath], int]] = frozenset()
    """Replicas that the table names and the host did not have, by version of the weights and layer."""
    cached: Mapping[tuple[int, LayerPath], frozenset[int]] = field(default_factory=dict)
    """Experts, by version of the weights and layer, that the router computes itself whoever else holds them."""
    aboard: Mapping[tuple[int, LayerPath], frozenset[int]] = field(default_factory=dict)
    """Experts in the router's lifeboat, likewise."""
    has_lifeboat: bool = False
    hosts: tuple[HostId, ...] = field(init=False)
    """Those with an address; their numbers are their places."""
    named: dict[LayerPath, Named] = field(repr=False, default_factory=dict)
    """Filled when first asked for. Of this table or an older one, which counts for layers that are the same."""
    _number_of: dict[HostId, int] = field(init=False, repr=False)
    _made: dict[tuple[LayerPath, int], LayerRoutes] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        hosts = tuple(self.table.addresses)
        known = next(iter(self.named.values()), None)
        # The same tuple where the hosts are the same, so that to compare them costs nothing.
        object.__setattr__(self, "hosts", known.hosts if known is not None and known.hosts == hosts else hosts)
        object.__setattr__(self, "_number_of", {host: number for number, host in enumerate(hosts)})

    @property
    def here(self) -> int:
        """H, the number of the router's own process: the way of last resort."""
        return len(self.hosts)

    def routes(self, layer: LayerPath, avoid: frozenset[HostId] = frozenset(), version: int = 0) -> LayerRoutes:
        """Where the experts of `layer` are computed, leaving out the hosts in `avoid`; made when first asked for.

        All versions of an expert are on the same hosts; what the router holds itself may be of one.

        Raises: `NotFound` for a layer that the table does not have.
        """
        if avoid:
            return self._make(layer, avoid, version)
        made = self._made.get((layer, version))
        if made is None:
            made = self._made[layer, version] = self._make(layer, avoid, version)
        return made

    def has_host(self, layer: LayerPath, expert: int) -> bool:
        """Whether a host in reach holds the expert, late or not, in every version."""
        placed = self.table.placement.hosts_of.get(layer, ())
        lacking = {host for host, (_, path), number in self.missing if (path, number) == (layer, expert)}
        return expert < len(placed) and not lacking.issuperset(self._reachable(placed[expert]))

    def is_named(self, layer: LayerPath, experts: Iterable[int], avoid: frozenset[HostId]) -> bool:
        """Whether the table names a host for each of `experts`, in reach or not, that is not in `avoid`."""
        placed = self.table.placement.hosts_of.get(layer, ())
        return all(expert < len(placed) and not avoid.issuperset(placed[expert]) for expert in experts)

    def _make(self, layer: LayerPath, avoid: frozenset[HostId], version: int) -> LayerRoutes:
        named, here = self._named(layer), self.here
        num_experts, expert, host = len(named.rows), named.expert, named.host
        is_kept = self._is_kept(named, (version, layer), avoid)
        expert, host = expert[is_kept], host[is_kept]
        number = np.bincount(expert, minlength=num_experts)
        alone = np.flatnonzero(number == 0)
        if len(alone):  # the router itself
            expert, host = np.concatenate([expert, alone]), np.concatenate([host, np.full(len(alone), here)])
            order = np.argsort(expert, kind="stable")
            host, number = host[order], np.maximum(number, 1)
        start = np.concatenate([[0], np.cumsum(number)])
        speed = np.ones(here + 1)
        for name, value in self.table.speeds.items():
            if name in self._number_of:
                speed[self._number_of[name]] = value
        return LayerRoutes(
            hosts=self.hosts,
            owner=np.append(host[start[:-1]], NOWHERE),
            replicas=Replicas(start, host, here + 1) if len(host) > num_experts else None,
            speed=None if (speed == 1.0).all() else speed,
            speed_in_all=float(speed[np.bincount(named.host, minlength=here + 1) > 0].sum()),
            turns=np.zeros(here + 1),
            numbers=tuple(np.unique(host).tolist()),
        )

    def _named(self, layer: LayerPath) -> Named:
        rows = self.table.placement.hosts_of.get(layer)
        if rows is None:
            known = sorted(self.table.placement.hosts_of)
            raise NotFound(f"no layer {layer!r} in the routing table; it has {known}")
        named = self.named.get(layer)
        if named is None or named.rows is not rows or named.hosts is not self.hosts:
            named = self.named[layer] = Named.of(rows, self.hosts, self._number_of)
        return named

    def _is_kept(self, named: Named, place: tuple[int, LayerPath], avoid: frozenset[HostId]) -> Bools:
        """[R] which of the replicas may be asked; none of an expert that the router is to compute itself."""
        num_experts, expert, host = len(named.rows), named.expert, named.host

        def there(mask: Bools) -> Bools:
            """[E] experts with any of these replicas."""
            return np.bincount(expert[mask], minlength=num_experts) > 0

        is_live = ~self._mask(self.out | avoid)[host]
        for name, where, lacking in self.missing:
            if where == place:
                is_live &= (expert != lacking) | (host != self._number_of.get(name, NOWHERE))
        is_prompt = is_live & ~self._mask(self.late)[host]
        own = np.zeros(num_experts, dtype=bool)
        own[self._within(self.aboard.get(place, ()), num_experts)] = True
        if self.has_lifeboat:
            own |= ~there(is_live & ~self._mask(self.hung)[host])
        is_kept: Bools = is_prompt | (is_live & ~(there(is_prompt) | own)[expert])
        cached = np.zeros(num_experts, dtype=bool)
        cached[self._within(self.cached.get(place, ()), num_experts)] = True
        return is_kept & ~cached[expert]

    def _mask(self, names: Collection[HostId]) -> Bools:
        """[H] which hosts are among `names`."""
        mask = np.zeros(self.here, dtype=bool)
        mask[[self._number_of[name] for name in names if name in self._number_of]] = True
        return mask

    @staticmethod
    def _within(experts: Collection[int], num_experts: int) -> list[int]:
        return [expert for expert in experts if expert < num_experts]

    def _reachable(self, hosts: Sequence[HostId], avoid: frozenset[HostId] = frozenset()) -> list[HostId]:
        return [host for host in hosts if host in self.table.addresses and host not in self.out and host not in avoid]


class Routes:
    """The newest view. Thread-safe; whoever changes something makes a new view."""

    def __init__(self, has_lifeboat: bool = False) -> None:
        self._changed = threading.Condition()
        self.view = View(RoutingTable(epoch=0, placement=Placement({})), has_lifeboat=has_lifeboat)

    def update(self, table: RoutingTable) -> bool:
        """Use `table` from now on; false for one that is not newer, which is ignored.

        A host that is out of reach or late stays so while its address is the same: whether it can be reached is what
        this router finds out, not the table.
        """
        with self._changed:
            before = self.view
            if table.epoch <= before.table.epoch:
                return False

            def same(hosts: frozenset[HostId]) -> frozenset[HostId]:
                return frozenset(h for h in hosts if table.addresses.get(h) == before.table.addresses.get(h))

            self._show(
                replace(
                    before,
                    table=table,
                    out=same(before.out),
                    late=same(before.late),
                    hung=same(before.hung),
                    missing=frozenset(),
                    named=dict(before.named),
                )
            )
            return True

    def set_out(self, host_id: HostId, is_out: bool) -> None:
        """A host went out of reach (and is not late any more), or is back."""
        with self._changed:
            view, one = self.view, frozenset((host_id,))
            self._show(
                replace(
                    view, out=view.out | one if is_out else view.out - one, late=view.late - one, hung=view.hung - one
                )
            )

    def set_late(self, host_id: HostId, is_late: bool, is_hung: bool = False) -> None:
        """A host owes an answer for longer than usual, or has given it."""
        with self._changed:
            view, one = self.view, frozenset((host_id,))
            late = view.late | one if is_late else view.late - one
            hung = view.hung | one if is_late and is_hung else view.hung - one
            if (late, hung) != (view.late, view.hung):
                self._show(replace(view, late=late, hung=hung))

    def add_missing(self, host_id: HostId, layer: LayerPath, expert: int, version: int = 0) -> None:
        """The host does not hold the expert, whatever the table says."""
        with self._changed:
            self._show(replace(self.view, missing=self.view.missing | {(host_id, (version, layer), expert)}))

    def forget_missing(self, layer: LayerPath) -> None:
        """Ask again for what was missing of a layer: by now it may be there."""
        with self._changed:
            kept = frozenset(entry for entry in self.view.missing if entry[1][1] != layer)
            if kept != self.view.missing:
                self._show(replace(self.view, missing=kept))

    def set_own(
        self,
        cached: Mapping[tuple[int, LayerPath], frozenset[int]],
        aboard: Mapping[tuple[int, LayerPath], frozenset[int]],
    ) -> None:
        """The router holds these experts itself from now on."""
        with self._changed:
            if (cached, aboard) != (self.view.cached, self.view.aboard):
                self._show(replace(self.view, cached=cached, aboard=aboard))

    def wait_changed(self, view: View, timeout_s: float) -> bool:
        """Wait for another view than `view`; false when `timeout_s` passed first."""
        with self._changed:
            return self._changed.wait_for(lambda: self.view is not view, timeout_s)

    def _show(self, view: View) -> None:
        self.view = view
        self._changed.notify_all()
