"""The state of a cluster of expert hosts, and the one place that changes it: event in, instructions out.

What each host should hold follows from the placement, and from a transaction if one runs; what it does hold, from what
the hosts say. Every event ends in `_settle`, which derives from the difference what is to be done next, so a lost,
late or repeated event leaves nothing half done. Pure: no clock, no I/O; the same log of events gives the same state and
the same instructions. Driven by `actors/controller.py`, `simulate/` and the tests.

The rules, which `validate` states:

- a table names only replicas that living hosts hold, and somebody for every expert that a living host holds;
- a replica is loaded before a table names it, and dropped when no router can name it any more;
- a change of placement is a transaction: all that is new in a step is loaded, or nothing of it is used;
- a host does one thing at a time; what comes from an ended life, a past operation or another plan is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

from ray_moe.errors import InsufficientResources
from ray_moe.policy import events as ev
from ray_moe.policy import repair, sizing
from ray_moe.policy.cluster import Cluster
from ray_moe.policy.hosts import ClusterSettings, HostState
from ray_moe.policy.recovery import placement_by_holders
from ray_moe.policy.rules import broken_rules
from ray_moe.policy.tables import EPOCHS_OF_A_LIFE
from ray_moe.types import HostId, Placement


class ClusterState(Cluster):
    """See the module. `handle` is the only mutator."""

    def __init__(
        self,
        settings: ClusterSettings,
        hosts: Sequence[HostId],
        standbys: Sequence[HostId] = (),
        placement: Placement | None = None,
        epoch: int = 0,
        now_s: float = 0.0,
    ) -> None:
        """Nothing lives yet. Without a `placement` the experts are dealt out evenly by index.

        Raises: `InsufficientResources` for no hosts at all and no placement.
        """
        super().__init__(settings, hosts, standbys, placement, epoch, now_s)
        self._is_touched = True

    @classmethod
    def recovered(
        cls,
        settings: ClusterSettings,
        reports: Sequence[ev.HostStarted],
        hosts: Sequence[HostId],
        standbys: Sequence[HostId],
        fallback: Placement,
        life: int,
        now_s: float,
    ) -> ClusterState:
        """After a restart of whoever drives this: what the hosts hold is what they are to hold.

        Experts are placed by `placement_by_holders` on the hosts that are no standbys. Changes that were under way are
        forgotten. The first event, `Ticked` for example, brings the first table, newer than all of earlier lives.

        Args:
            reports: what the hosts say, with what is `unsettled` yet of the orders from before.
            life: how many lives of whoever drives this there were before.
        """
        state = cls(settings, hosts, standbys, Placement({}), life * EPOCHS_OF_A_LIFE, now_s)
        for report in reports:
            if report.address.host_id in state.hosts:
                state._host_started(report)
        budgets = state.fleet.budgets(host for host in state.hosts.values() if host.role == "serving")
        held, sizes = state.fleet.held, state.expert_bytes
        state.placed.put_all(placement_by_holders(held, budgets, fallback, settings.num_experts, sizes))
        for host in state.hosts.values():
            host.is_new = host.phase == "up" and not state.placed.on(host.host_id)
        return state

    # --- the only mutator -------------------------------------------------------------------------------------
    def handle(self, event: ev.Event, now_s: float) -> list[ev.Instruction]:
        """Take `event` in; what is to be done about it, in order. Time never runs back.

        Raises: only for what people ask for, with the state unchanged: `NotFound` (unknown hosts), `InvalidConfig`,
        `InsufficientResources` (there is no room for it), `Unavailable` (another change is under way).
        """
        self.now_s = max(now_s, self.now_s)
        self.rates, self.out = None, []
        if not self._take_report(event):
            self._take(event)
            self._is_touched = True
        if self._is_touched:
            self._settle()
        return self.out

    def _take_report(self, event: ev.Event) -> bool:
        """Whether `event` only tells something that is used later."""
        match event:
            case ev.LoadReported(counts, epoch):
                self.load.report(counts, self.now_s)
                self._look_at_epoch(epoch)
            case ev.EpochSeen(epoch):
                self._look_at_epoch(epoch)
            case ev.SpeedReported():
                self.fleet.measured(event)
            case _:
                return False
        return True

    def _take(self, event: ev.Event) -> None:
        match event:
            case ev.HostStarted():
                self._host_started(event)
            case ev.HostLost():
                self._host_lost(event)
            case ev.HostFailed():
                self._host_failed(event)
            case ev.ReplicasLoaded() | ev.ReplicasDropped():
                self._order_done(event)
            case ev.ReplicasFailed():
                self._order_failed(event)
            case ev.SignalsReported(signals):
                sizing.scale(self, signals)
            case ev.PlacementPlanned(op_id, placement, reason):
                if self.planning is not None and self.planning.op_id == op_id:
                    self._planned(placement, reason)
            case ev.PlanRequested():
                self._plan_requested()
            case ev.SizeRequested(num_hosts):
                sizing.size_requested(self, num_hosts)
            case ev.DrainRequested():
                sizing.drain_requested(self, event)
            case ev.Ticked():
                self._tick()

    # --- what hosts say ---------------------------------------------------------------------------------------
    def _host_started(self, event: ev.HostStarted) -> None:
        host = self.hosts.get(event.address.host_id)
        if host is None or (host.phase == "up" and event.address.incarnation in host.ended):
            return
        if host.phase == "up" and host.incarnation != event.address.incarnation:
            self.lose(host)  # its end was not noticed
            if host.draining:
                return
        was_up = host.phase == "up"
        self.fleet.started(event, self.now_s)
        self.due[host.host_id] = self.now_s
        self.seen.add(host.host_id)
        if not was_up:
            host.is_new = not self.placed.on(host.host_id)
            self.seeks_homes = self.is_unbalanced = True
            self.look_whether_back(host)

    def _host_lost(self, event: ev.HostLost) -> None:
        host = self.hosts.get(event.host_id)
        if host is not None and host.phase == "up" and event.incarnation in ("", host.incarnation):
            self.lose(host)

    def _host_failed(self, event: ev.HostFailed) -> None:
        host = self.hosts.get(event.host_id)
        if host is None or host.phase == "up":
            return
        self.say("failed", f"{host.host_id} cannot start: {event.reason}")
        if self.resize is not None and host.host_id in self.resize.added and not self.resize.planned:
            self.roll_back(f"{host.host_id} cannot start: {event.reason}")

    def _order_done(self, event: ev.ReplicasLoaded | ev.ReplicasDropped) -> None:
        host = self.fleet.doing(event)
        if host is None:
            return
        loaded = self.fleet.done(host)
        self.look_whether_back(host)
        self.due[host.host_id] = self.now_s
        self.seeks_homes = True
        if self.transaction is not None:
            self.transaction.loaded(host.host_id, loaded)

    def _order_failed(self, event: ev.ReplicasFailed) -> None:
        host = self.fleet.doing(event)
        if host is None:
            return
        self.say("failed", f"{host.host_id}: {event.reason}")
        about = self.fleet.failed(host, self.now_s)
        self.due[host.host_id] = self.now_s
        self.seeks_homes = self.is_unbalanced = True
        transaction = self.transaction
        if transaction is not None:
            keys = ((layer, expert) for layer, experts in about.items() for expert in experts)
            if any((host.host_id, key) in transaction.waiting for key in keys):
                self.abort(f"{host.host_id} could not load: {event.reason}")

    def _look_at_epoch(self, epoch: int) -> None:
        if self.tables.is_behind(epoch):
            self._is_touched = True

    # --- plans ------------------------------------------------------------------------------------------------
    def _plan_requested(self) -> None:
        self.refuse_if_changing()
        slots, widest = sum(host.slots for host in self.capacities()), self.fleet.widest
        if slots < widest:
            raise InsufficientResources(
                f"there is no valid plan: {len(self.members)} expert actors have {slots} slots for {widest} experts of "
                "a layer; start others, or let them hold more (experts.max_bytes, experts.spare_slots)"
            )
        self.plan("requested")

    def _planned(self, placement: Placement | None, why_not: str) -> None:
        reason = "" if self.planning is None else self.planning.reason
        self.planning = None
        if placement is None:
            self.say("aborted", f"no plan ({reason}): {why_not}")
            self.put_off_plans()
            self.roll_back(why_not)
            return
        named = {host for experts in placement.hosts_of.values() for hosts in experts for host in hosts}
        if named <= {host.host_id for host in self.members}:
            self.is_unbalanced = self.begin(reason, placement)
        elif self.resize is not None:  # somebody has left meanwhile
            self.resize.planned = False
        elif reason == "requested":
            self.plan(reason)

    # --- time -------------------------------------------------------------------------------------------------
    def _tick(self) -> None:
        now_s, settings = self.now_s, self.settings
        self.seeks_homes = True
        self.fleet.tell_speeds()
        self.out.extend(self.fleet.repeated_orders(now_s))
        if self.planning is not None and now_s - self.planning.since_s >= settings.repeat_s:
            self.plan(self.planning.reason)
        resize = self.resize
        if resize is not None and self.transaction is None and self.planning is None and now_s > resize.deadline_s:
            self.roll_back(f"not done within {settings.resize_s:g} s; is there room in the cluster for new hosts?")
        if now_s < self.next_balance_s or not self._may_plan():
            return
        if any(host.is_new for host in self.members):
            self.plan("new hosts")
        elif settings.balance:
            busy = self.load.tokens_per_s(now_s) >= settings.min_tokens_per_s
            if busy or self.is_unbalanced:
                self.plan("balance")

    def _may_plan(self) -> bool:
        """Whether nothing is under way, and nobody is expected to come or to finish loading, or not for long now.

        Where hosts come and go all the time, somebody always is: then it is enough to have waited.
        """
        if self.resize is not None or self.transaction is not None or self.planning is not None or not self.members:
            return False
        expected = any(
            host.phase != "up" and self.now_s - host.since_s < self.settings.return_s
            for host in self.fleet.with_role("serving")
        )
        if not expected and not any(map(self._is_loading, self.members)):
            self.waits_since_s = None
            return True
        if self.waits_since_s is None:
            self.waits_since_s = self.now_s
        return self.now_s - self.waits_since_s >= self.settings.return_s

    def _is_loading(self, host: HostState) -> bool:
        """Whether what the host is to hold is not all there. What waits to be dropped is in nobody's way."""
        return host.operation is not None or (host.host_id in self.due and bool(self.lacks(host)))

    # --- what follows from the state --------------------------------------------------------------------------
    def _settle(self) -> None:
        """Everything that the state asks for now."""
        self._is_touched = False
        self._route()  # so that it is known what nobody holds
        repair.appoint_heirs(self)
        repair.evacuate(self)
        repair.appoint_stand_ins(self)
        self._advance()
        repair.dismiss_stand_ins(self)
        self._publish()
        self._give_orders()
        self._stop_the_dispensable()
        self._finish_resize()

    def _route(self) -> None:
        keys = self.placed.take_changed_rows() | self.fleet.held.take_changed_rows()
        self.tables.route(sorted(keys), self.placed, self.fleet.held, self.hosts, self.now_s)
        for host_id in self.tables.named.take_changed_hosts():
            if host_id in self.hosts:
                self.due[host_id] = self.now_s

    def _publish(self) -> None:
        self.look_at(self.placed.take_changed_hosts())
        changed = self.fleet.held.take_changed_hosts()
        self.look_at(changed)
        self._route()
        was_due = self.tables.is_due
        seen, self.seen = self.seen, set()
        if self.tables.publish(self.hosts, self.fleet.held, self.fleet.speeds, changed | seen):
            if was_due:  # what the tables in use name is not known
                for host in self.hosts.values():
                    host.unnamed_s = self.now_s
            self.out.append(ev.PublishTable(self.table))

    def _advance(self) -> None:
        """Commit what is loaded; give the new hosts of a resize their share once they are all there."""
        while (transaction := self.transaction) is not None and not transaction.waiting:
            self.commit(transaction)
        resize = self.resize
        if resize is None or resize.planned or not resize.added or self.transaction is not None:
            return
        if all(host in self.hosts and self.hosts[host].phase == "up" for host in resize.added):
            resize.planned = True
            self.set_leaving([self.hosts[host] for host in resize.removed if host in self.hosts])
            self.plan(resize.reason)

    def _give_orders(self) -> None:
        due = sorted(host_id for host_id, at_s in self.due.items() if at_s <= self.now_s)
        for host_id in due:
            host = self.hosts[host_id]
            del self.due[host_id]
            if host.phase != "up" or host.operation is not None:
                continue
            named = self.tables.named
            order = self.fleet.next_order(
                host, self.assigned(host_id), named.on(host_id), named.empty, self.current_rates(), self.now_s
            )
            if isinstance(order, float):
                self.due[host_id] = order
            elif order is not None:
                self.out.append(order)

    def _stop_the_dispensable(self) -> None:
        """End the leaving hosts on which nothing is placed, and which no table names that is in use."""
        num_hosts = len(self.hosts)
        for host in self.leaving():
            needed = self.placed.on(host.host_id) or self.tables.named.on(host.host_id)
            in_use = host.phase == "up" and self.now_s < host.unnamed_s + self.settings.drain_s
            if not needed and not in_use:
                self.remove(host)
        if len(self.hosts) < num_hosts:
            self._publish()

    def _finish_resize(self) -> None:
        resize = self.resize
        if resize is None or self.transaction is not None or self.planning is not None:
            return
        if (resize.planned or not resize.added) and not any(host in self.hosts for host in resize.removed):
            self.resize = None
            self.say("resized", resize.reason)
            self.replace_standbys(resize)

    def validate(self) -> list[str]:
        """Rules that the state breaks now; none is the answer after every event."""
        return broken_rules(self)
