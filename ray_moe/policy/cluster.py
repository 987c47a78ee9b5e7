"""What is known of a cluster and what is under way in it, and the elementary changes of both.

The ground under `cluster_state.py`, which says what each event means, and under `repair.py` and `sizing.py`, which say
what follows from a loss and from a wish for another size. Pure, as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ray_moe.errors import InsufficientResources, Unavailable
from ray_moe.policy import events as ev
from ray_moe.policy.changes import Resize, Transaction, told
from ray_moe.policy.fleet import Fleet
from ray_moe.policy.hosts import ClusterSettings, HostState, Role, difference, union
from ray_moe.policy.load import Floats, LoadTracker
from ray_moe.policy.migration import copied_bytes, moves, waves
from ray_moe.policy.placement import place_by_index
from ray_moe.policy.planner import Capacity
from ray_moe.policy.rows import ExpertKey, Held, Rows
from ray_moe.policy.scaling import ScalingMemory
from ray_moe.policy.tables import Tables
from ray_moe.types import HostId, LayerPath, Placement, RoutingTable


@dataclass(frozen=True, slots=True)
class Planning:
    """A plan that is being made."""

    op_id: str
    reason: str
    since_s: float


class Cluster:
    """See the module."""

    def __init__(
        self,
        settings: ClusterSettings,
        hosts: Sequence[HostId],
        standbys: Sequence[HostId],
        placement: Placement | None,
        epoch: int,
        now_s: float,
    ) -> None:
        """See `ClusterState`."""
        if not hosts and placement is None:
            raise InsufficientResources("there are no hosts to place experts on; start at least one")
        self.settings = settings
        self.load = LoadTracker(settings.half_life_s, settings.num_experts)
        self.transaction: Transaction | None = None
        self.resize: Resize | None = None
        self.now_s = now_s
        self.fleet = Fleet(settings, hosts, standbys, f"{now_s:.6f}", now_s)
        self.placed = Rows(settings.num_experts)
        self.placed.put_all(placement or place_by_index(settings.num_experts, list(hosts)))
        self.tables = Tables(settings.num_experts, epoch)
        self.expert_bytes = settings.expert_bytes
        self.stand_ins: dict[ExpertKey, HostId] = {}
        """Hosts that stand in for those an expert is placed on, until one of these is back."""
        self.planning: Planning | None = None
        self.next_balance_s = now_s
        self.waits_since_s: float | None = None
        """Since when plans wait for somebody who is expected."""
        self.is_unbalanced = True
        """Whether there may be a better plan even without traffic."""
        self.seeks_homes = False
        """Whether there may be room now for experts that nobody holds."""
        self.seen: set[HostId] = set()
        """Hosts that have said where they are, or whose role has changed, since the last look at the table."""
        self.due: dict[HostId, float] = {}
        """When to look what each host has to do; the others have what they should."""
        self.scaling = ScalingMemory()
        self.rates: dict[LayerPath, Floats] | None = None
        """Load at the present event; None until somebody asks."""
        self.out: list[ev.Instruction] = []
        """What is to be done about the present event."""

    # --- what there is ----------------------------------------------------------------------------------------
    @property
    def num_hosts(self) -> int:
        """Hosts that serve or are to serve; standbys and leaving ones apart."""
        return self.fleet.num_hosts

    @property
    def members(self) -> list[HostState]:
        """The hosts that plans may use, in the order of their names."""
        return self.fleet.members

    @property
    def hosts(self) -> dict[HostId, HostState]:
        return self.fleet.hosts

    @property
    def placement(self) -> Placement:
        """Where experts are to be, once a transaction that may be running has ended well or not."""
        return self.placed.placement()

    @property
    def table(self) -> RoutingTable:
        """The newest table."""
        return self.tables.table

    @property
    def is_asleep(self) -> bool:
        """Whether nobody is meant to hold anything."""
        return self.settings.can_sleep and self.num_hosts == 0

    def assigned(self, host_id: HostId) -> Held:
        """What a host is to hold."""
        pending = {} if self.transaction is None else self.transaction.pending.get(host_id, {})
        return union(self.placed.on(host_id), pending) if pending else self.placed.on(host_id)

    def phase_name(self, host: HostState) -> str:
        """``starting``, ``loading``, ``ready``, ``draining``, ``standby`` or ``lost``."""
        if host.phase != "up":
            return host.phase
        if host.role != "serving":
            return {"standby": "standby", "leaving": "draining"}[host.role]
        return "loading" if self.lacks(host) else "ready"

    def capacities(self) -> tuple[Capacity, ...]:
        """The members as the planner sees them."""
        return self.fleet.capacities()

    def lacks(self, host: HostState) -> Held:
        """What it is to hold and does not."""
        return difference(self.assigned(host.host_id), self.fleet.held.on(host.host_id))

    def current_rates(self) -> dict[LayerPath, Floats]:
        """[E] tokens per second of each expert, by layer."""
        if self.rates is None:
            self.rates = self.load.rates(self.now_s)
        return self.rates

    @property
    def next_due_s(self) -> float | None:
        """When there will be something to do, if nothing happens before; None when that is not known."""
        return min(self.due.values(), default=None)

    # --- what there is room for -------------------------------------------------------------------------------
    def room_bytes(self, but: Collection[HostId] = ()) -> dict[HostId, int]:
        """What each member could hold on top of what it holds or is to hold."""
        coming: dict[HostId, Held] = {}
        for move in [] if self.transaction is None else self.transaction.moves():
            for host_id in move.added:
                coming.setdefault(host_id, {}).setdefault(move.layer, set()).add(move.expert)
        room, members = {}, self.members
        budgets = self.fleet.budgets(members)
        for host in members:
            if host.host_id not in but:
                used = self.fleet.used_bytes(host, self.placed.on(host.host_id), coming.get(host.host_id, {}))
                room[host.host_id] = max(0, budgets[host.host_id] - used)
        return room

    def leaving(self) -> list[HostState]:
        return self.fleet.with_role("leaving")

    # --- hosts ------------------------------------------------------------------------------------------------
    def say(self, kind: str, text: str) -> None:
        self.out.append(ev.Announce(kind, text))

    def lose(self, host: HostState) -> None:
        """Nobody can count on `host` any more."""
        self.say("lost", f"{host.host_id} ({host.incarnation})")
        host.is_missed = bool(self.placed.on(host.host_id))
        self.fleet.lose(host, self.now_s)
        self.seeks_homes = self.is_unbalanced = True
        if host.draining:
            self.remove(host)
        elif self.transaction is not None and self.transaction.uses(host.host_id):
            self.abort(f"{host.host_id} was lost")

    def look_whether_back(self, host: HostState) -> None:
        """Say so when a host that was lost has all again that is placed on it."""
        share, held = self.placed.on(host.host_id), self.fleet.held.on(host.host_id)
        if host.is_missed and share and all(experts <= held.get(layer, set()) for layer, experts in share.items()):
            host.is_missed = False
            self.say("repaired", f"{host.host_id} has its experts again")

    def remove(self, host: HostState) -> None:
        """End a host. What was placed on it is placed elsewhere, or nowhere."""
        self.fleet.remove(host.host_id)
        self.placed.clear(host.host_id)
        if self.transaction is not None:
            self.transaction.forget(host.host_id)
        self.due.pop(host.host_id, None)
        self.out.append(ev.StopHost(host.host_id))
        self.seeks_homes = self.is_unbalanced = True
        resize = self.resize
        if resize is not None and host.host_id in resize.added and not resize.planned:
            resize.added = tuple(other for other in resize.added if other != host.host_id)
            if resize.removed and not resize.added:
                self.roll_back(f"{host.host_id} has gone again")

    def start_host(self, role: Role) -> HostId:
        """One host more."""
        host_id = self.fleet.add_new(role, self.now_s)
        self.out.append(ev.StartHost(host_id))
        return host_id

    def replace_standbys(self, resize: Resize) -> None:
        """Start others in place of the standbys that serve now."""
        for host_id in resize.promoted:
            if host_id not in self.hosts or self.hosts[host_id].role != "standby":
                self.start_host("standby")

    def set_leaving(self, going: Iterable[HostState]) -> None:
        """From now on these hand over what they hold; they end when nobody needs them."""
        self.planning = None  # it counts on them
        for host in going:
            if not host.draining:
                host.stays_as = host.role
            host.role = "leaving"
            self.look_again(host)

    def look_again(self, host: HostState) -> None:
        """The role of a host has changed: what tables name of it, and what it does, follows."""
        self.due[host.host_id] = self.now_s
        self.seen.add(host.host_id)
        held = self.fleet.held.on(host.host_id)
        keys = [(layer, expert) for layer, experts in held.items() for expert in experts]
        self.tables.route(keys, self.placed, self.fleet.held, self.hosts, self.now_s)

    def look_at(self, host_ids: Iterable[HostId]) -> None:
        """What these hosts are to hold has changed."""
        self.due.update((host_id, self.now_s) for host_id in host_ids if host_id in self.hosts)

    # --- plans, transactions, resizes -------------------------------------------------------------------------
    def refuse_if_changing(self) -> None:
        """Raises: `Unavailable` when somebody else's change is under way."""
        if self.resize is not None or self.transaction is not None:
            what = self.resize.reason if self.resize is not None else "a plan is being carried out"
            raise Unavailable(f"another change of the cluster is under way ({what}); retry when it has ended")

    def plan(self, reason: str) -> None:
        """Have a plan made."""
        op_id = self.fleet.new_op()
        self.planning = Planning(op_id, reason, self.now_s)
        self.next_balance_s = self.now_s + self.settings.balance_every_s
        self.waits_since_s = None
        for host in self.members:
            host.is_new = False
        rates, goals = self.current_rates(), self.settings.goals
        self.out.append(ev.PlanPlacement(op_id, rates, self.capacities(), self.placement, goals))

    def begin(self, reason: str, target: Placement) -> bool:
        """Set about a change, or as much of it as there is room for; false when there is nothing to change."""
        current = self.placement
        changes = moves(current, target)
        if not changes:
            return False
        budgets = self.fleet.budgets(self.members)
        used = {host.host_id: self.fleet.used_bytes(host, self.placed.on(host.host_id)) for host in self.hosts.values()}
        steps = waves(current, target, self.expert_bytes, budgets, self.current_rates(), used)
        if not steps:
            self.say("aborted", f"{reason}: there is no room to begin with")
            self.put_off_plans()
            return True
        num_bytes = copied_bytes(changes, self.expert_bytes)
        self.say("planned", f"{reason}: {len(changes)} experts change, {num_bytes:,} bytes to copy")
        self.transaction = Transaction(reason, steps)
        self.prepare(self.transaction)
        return True

    def prepare(self, transaction: Transaction) -> None:
        """Set about the first of its steps."""
        transaction.prepare(self.fleet.held, {host.host_id for host in self.members})
        self.look_at(transaction.pending)

    def commit(self, transaction: Transaction) -> None:
        """The step that is loaded becomes the placement."""
        step = transaction.steps.pop(0)
        for move in step:
            self.stand_ins.pop((move.layer, move.expert), None)
            self.placed.put(move.layer, move.expert, move.after)
        self.look_at(transaction.pending)
        self.out.extend(told(step))
        self.seeks_homes = True
        if transaction.steps:
            self.prepare(transaction)
            return
        self.transaction = None
        if self.resize is not None:
            self.resize.deadline_s = self.now_s + self.settings.resize_s

    def abort(self, why: str, roll_back: bool = True) -> None:
        """Forget the running transaction, and undo the resize it belongs to or, unless `roll_back`, have it begin anew.

        What was loaded for it is named by nothing, and so will be dropped.
        """
        resize = self.resize
        if resize is not None and roll_back and (resize.planned or not resize.added):
            self.roll_back(why)
            return
        if resize is not None:
            resize.planned = False
        if self.transaction is not None:
            self.say("aborted", f"{self.transaction.reason}: {why}")
            self.drop_transaction()

    def drop_transaction(self) -> None:
        """See `abort`."""
        transaction, self.transaction = self.transaction, None
        if transaction is not None:
            self.put_off_plans()
            self.seeks_homes = True
            self.look_at(transaction.pending)

    def put_off_plans(self) -> None:
        """One has failed: others are made after a while, and with the hosts that it was to give a share."""
        self.next_balance_s = self.now_s + self.settings.replan_s
        self.is_unbalanced = True
        for host in self.members:
            host.is_new = host.is_new or not self.placed.on(host.host_id)

    def begin_resize(self, resize: Resize) -> None:
        """Set about a change of the hosts."""
        self.resize = resize
        self.planning = None  # it knows nothing of this
        self.say("resizing", resize.reason)

    def roll_back(self, why: str) -> None:
        """Undo a resize: hosts that were added end, unless they serve already; hosts that were to go stay.

        Standbys that were to serve are standbys again, unless they do.
        """
        if self.resize is None:
            return
        self.say("aborted", f"{self.resize.reason}: {why}")
        resize, self.resize, self.planning = self.resize, None, None
        self.drop_transaction()
        added = [self.hosts[host_id] for host_id in resize.added if host_id in self.hosts]
        idle = [host for host in added if not self.placed.on(host.host_id)]
        self.set_leaving([host for host in idle if host.host_id not in resize.promoted])
        for idler in idle:
            if idler.host_id in resize.promoted:
                idler.role, idler.is_new = "standby", False
                self.look_again(idler)
        self.replace_standbys(resize)
        for host_id in resize.removed:
            host = self.hosts.get(host_id)
            if host is not None and host.draining and not host.is_dismissed:
                host.role = host.stays_as
                host.is_new = host.role == "serving" and not self.placed.on(host_id)
                self.look_again(host)
        self.is_unbalanced = True
