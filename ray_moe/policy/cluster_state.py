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

from collections.abc import Collection, Iterable, Sequence

from ray_moe.errors import InsufficientResources, InvalidConfig, NotFound, RayMoEError, Unavailable
from ray_moe.policy import events as ev
from ray_moe.policy.changes import Resize, Transaction, told
from ray_moe.policy.fleet import Fleet
from ray_moe.policy.hosts import ClusterSettings, HostState, Role, difference, number_of, union
from ray_moe.policy.load import Floats, LoadTracker
from ray_moe.policy.migration import copied_bytes, find_homes, loads_of, moves, rehome, waves
from ray_moe.policy.placement import place_by_index
from ray_moe.policy.planner import Capacity
from ray_moe.policy.recovery import placement_by_holders
from ray_moe.policy.rows import ExpertKey, Held, Rows
from ray_moe.policy.scaling import ScalingMemory, Signals, decide
from ray_moe.policy.tables import SKIPPED_EPOCHS, Tables
from ray_moe.types import HostId, LayerPath, Placement, RoutingTable


class ClusterState:
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
        if not hosts and placement is None:
            raise InsufficientResources("there are no hosts to place experts on; start at least one")
        self.settings = settings
        self.load = LoadTracker(settings.half_life_s, settings.num_experts)
        self.transaction: Transaction | None = None
        self.resize: Resize | None = None
        self._now_s = now_s
        self._fleet = Fleet(settings, hosts, standbys, f"{now_s:.6f}", now_s)
        self._placed = Rows(settings.num_experts)
        self._placed.put_all(placement or place_by_index(settings.num_experts, list(hosts)))
        self._tables = Tables(settings.num_experts, epoch)
        self._first_epoch = epoch
        self._expert_bytes = settings.expert_bytes
        self._stand_ins: dict[ExpertKey, HostId] = {}
        """Hosts that stand in for those an expert is placed on, until one of these is back."""
        self._planning: tuple[str, str, float] | None = None  # operation, reason, when
        self._next_balance_s = now_s
        self._is_unbalanced = True  # whether there may be a better plan even without traffic
        self._seeks_homes = False  # whether there may be room now for experts that nobody holds
        self._is_touched = True
        self._due: dict[HostId, float] = {}  # when to look what each host has to do; the others have what they should
        self._scaling = ScalingMemory()
        self._rates: dict[LayerPath, Floats] | None = None
        self._out: list[ev.Instruction] = []

    @classmethod
    def recovered(
        cls,
        settings: ClusterSettings,
        reports: Sequence[ev.HostStarted],
        hosts: Sequence[HostId],
        standbys: Sequence[HostId],
        fallback: Placement,
        epoch: int,
        now_s: float,
    ) -> ClusterState:
        """After a restart of whoever drives this: what the hosts hold is what they are to hold.

        Experts are placed by `placement_by_holders` on the hosts that are no standbys. Changes that were under way are
        forgotten. The first event, `Ticked` for example, brings the first table, well after `epoch`.

        Args:
            reports: what the hosts say when they have done, or forgotten, all that they were told to before.
            epoch: the newest that a router has; if it is not known, `EpochSeen` may tell it later.
        """
        state = cls(settings, hosts, standbys, Placement({}), epoch + SKIPPED_EPOCHS, now_s)
        for report in reports:
            if report.address.host_id in state.hosts:
                state._host_started(report)
        budgets = {host.host_id: state.budget_bytes(host) for host in state.hosts.values() if host.role == "serving"}
        held, sizes = state._fleet.held, state._expert_bytes
        state._placed.put_all(placement_by_holders(held, budgets, fallback, settings.num_experts, sizes))
        for host in state.hosts.values():
            host.is_new = host.phase == "up" and not state._placed.on(host.host_id)
        return state

    # --- the only mutator ------------------------------------------------------------------------------------
    def handle(self, event: ev.Event, now_s: float) -> list[ev.Instruction]:
        """Take `event` in; what is to be done about it, in order. Time never runs back.

        Raises: only for what people ask for, with the state unchanged: `NotFound` (unknown hosts), `InvalidConfig`,
        `InsufficientResources` (there is no room for it), `Unavailable` (another change is under way).
        """
        self._now_s = max(now_s, self._now_s)
        self._rates, self._out = None, []
        if not self._take_report(event):
            self._take(event)
            self._is_touched = True
        if self._is_touched:
            self._settle()
        return self._out

    def _take_report(self, event: ev.Event) -> bool:
        """Whether `event` only tells something that is used later."""
        match event:
            case ev.LoadReported(counts, epoch):
                self.load.report(counts, self._now_s)
                self._epoch_seen(epoch)
            case ev.EpochSeen(epoch):
                self._epoch_seen(epoch)
            case ev.SpeedReported():
                self._fleet.measured(event)
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
                self._scale(signals)
            case ev.PlacementPlanned(op_id, placement, reason):
                if self._planning is not None and self._planning[0] == op_id:
                    self._planned(placement, reason)
            case ev.PlanRequested():
                self._plan_requested()
            case ev.SizeRequested(num_hosts):
                self._size_requested(num_hosts)
            case ev.DrainRequested():
                self._drain_requested(event)
            case ev.Ticked():
                self._tick()

    # --- what there is ---------------------------------------------------------------------------------------
    @property
    def hosts(self) -> dict[HostId, HostState]:
        return self._fleet.hosts

    @property
    def num_hosts(self) -> int:
        """Hosts that serve or are to serve; standbys and leaving ones apart."""
        return self._fleet.num_hosts

    @property
    def members(self) -> list[HostState]:
        """The hosts that plans may use, in the order of their names."""
        return self._fleet.members

    @property
    def placement(self) -> Placement:
        """Where experts are to be, once a transaction that may be running has ended well or not."""
        return self._placed.placement()

    @property
    def table(self) -> RoutingTable:
        """The newest table."""
        return self._tables.table

    @property
    def is_asleep(self) -> bool:
        """Whether nobody is meant to hold anything."""
        return self.settings.can_sleep and self.num_hosts == 0

    def assigned(self, host_id: HostId) -> Held:
        """What a host is to hold."""
        pending = {} if self.transaction is None else self.transaction.pending.get(host_id, {})
        return union(self._placed.on(host_id), pending) if pending else self._placed.on(host_id)

    def phase_name(self, host: HostState) -> str:
        """``starting``, ``loading``, ``ready``, ``draining``, ``standby`` or ``lost``."""
        if host.phase != "up":
            return host.phase
        if host.role != "serving":
            return {"standby": "standby", "leaving": "draining"}[host.role]
        return "loading" if self._lacks(host) else "ready"

    def budget_bytes(self, host: HostState) -> int:
        """Expert weights that `host` may hold."""
        return self._fleet.budget_bytes(host)

    def capacities(self) -> tuple[Capacity, ...]:
        """The members as the planner sees them."""
        return self._fleet.capacities()

    def _lacks(self, host: HostState) -> Held:
        return difference(self.assigned(host.host_id), self._fleet.held.on(host.host_id))

    def _current_rates(self) -> dict[LayerPath, Floats]:
        if self._rates is None:
            self._rates = self.load.rates(self._now_s)
        return self._rates

    def _say(self, kind: str, text: str) -> None:
        self._out.append(ev.Announce(kind, text))

    # --- what hosts say --------------------------------------------------------------------------------------
    def _host_started(self, event: ev.HostStarted) -> None:
        host = self.hosts.get(event.address.host_id)
        if host is None or event.address.incarnation in host.ended:
            return
        if host.phase == "up" and host.incarnation != event.address.incarnation:
            self._lose(host)  # its end was not noticed
            if host.draining:
                return
        was_up = host.phase == "up"
        self._fleet.started(event, self._now_s)
        self._due[host.host_id] = self._now_s
        if not was_up:
            host.is_new = not self._placed.on(host.host_id)
            self._seeks_homes = self._is_unbalanced = True

    def _host_lost(self, event: ev.HostLost) -> None:
        host = self.hosts.get(event.host_id)
        if host is not None and host.phase == "up" and event.incarnation in ("", host.incarnation):
            self._lose(host)

    def _lose(self, host: HostState) -> None:
        self._say("lost", f"{host.host_id} ({host.incarnation})")
        self._fleet.lose(host, self._now_s)
        self._seeks_homes = self._is_unbalanced = True
        if host.draining:
            self._remove(host)
        elif self.transaction is not None and self.transaction.uses(host.host_id):
            self._abort(f"{host.host_id} was lost")

    def _host_failed(self, event: ev.HostFailed) -> None:
        host = self.hosts.get(event.host_id)
        if host is None or host.phase == "up":
            return
        self._say("failed", f"{host.host_id} cannot start: {event.reason}")
        if self.resize is not None and host.host_id in self.resize.added and not self.resize.planned:
            self._roll_back(f"{host.host_id} cannot start: {event.reason}")

    def _order_done(self, event: ev.ReplicasLoaded | ev.ReplicasDropped) -> None:
        host = self._fleet.doing(event)
        if host is None:
            return
        loaded = self._fleet.done(host)
        self._due[host.host_id] = self._now_s
        self._seeks_homes = True
        if self.transaction is not None:
            self.transaction.loaded(host.host_id, loaded)

    def _order_failed(self, event: ev.ReplicasFailed) -> None:
        host = self._fleet.doing(event)
        if host is None:
            return
        self._say("failed", f"{host.host_id}: {event.reason}")
        about = self._fleet.failed(host, self._now_s)
        self._due[host.host_id] = self._now_s
        self._seeks_homes = self._is_unbalanced = True
        transaction = self.transaction
        if transaction is not None:
            keys = ((layer, expert) for layer, experts in about.items() for expert in experts)
            if any((host.host_id, key) in transaction.waiting for key in keys):
                self._abort(f"{host.host_id} could not load: {event.reason}")

    def _epoch_seen(self, epoch: int) -> None:
        self._tables.epoch_seen(epoch)
        self._is_touched = self._is_touched or self._tables.is_behind

    # --- repair ----------------------------------------------------------------------------------------------
    def _appoint_heirs(self) -> None:
        """Standbys take the places of lost hosts, which will be standbys when they are back."""
        heirs = [host for host in self._fleet.with_role("standby") if host.phase == "up"]
        if not heirs:
            return
        for gone in self._fleet.gone(self._now_s):
            if gone.phase == "up" or not heirs:
                continue
            share = self._placed.on(gone.host_id)
            heir = max(heirs, key=lambda host: (self._overlap(host, share), -number_of(host.host_id)))
            heirs.remove(heir)
            self._placed.replace(gone.host_id, heir.host_id)
            if self.transaction is not None:
                self.transaction.rename(gone.host_id, heir.host_id)
            for key, stand_in in self._stand_ins.items():
                if stand_in == gone.host_id:
                    self._stand_ins[key] = heir.host_id
            gone.role, heir.role = "standby", "serving"
            self._due[heir.host_id] = self._now_s
            self._is_unbalanced = True
            self._say("repaired", f"{heir.host_id} takes the place of {gone.host_id}")

    def _overlap(self, host: HostState, share: Held) -> int:
        held = self._fleet.held.on(host.host_id)
        return sum(len(experts & held.get(layer, set())) for layer, experts in share.items())

    def _appoint_stand_ins(self) -> None:
        """Experts that nobody holds, and nobody is about to, get another host at once, as far as there is room."""
        if not self._seeks_homes:
            return
        self._seeks_homes = False
        if not self._tables.exposed:
            return
        gone = {host.host_id for host in self._fleet.gone(self._now_s)}
        orphans = self._orphans(gone)
        if not orphans:
            return
        room = self._room_bytes(but=gone)
        homes, homeless = self._homes(orphans, room)
        if homeless and self.transaction is not None and self.resize is None and not self._leaving():
            self._abort("experts without a host need the room")
            homes, _ = self._homes(orphans, self._room_bytes(but=gone))
        for (layer, expert), home in sorted(homes.items()):
            others = self._placed.of(layer, expert)
            last = self._stand_ins.pop((layer, expert), None)
            others = tuple(host for host in others if host not in (last, home))
            self._placed.put(layer, expert, (home, *others))
            if others:
                self._stand_ins[layer, expert] = home
        if homes:
            self._is_unbalanced = True

    def _orphans(self, gone: set[HostId]) -> set[ExpertKey]:
        """Experts that only leaving hosts hold, if any, and that are placed on hosts that are gone, if any."""
        orphans = self._placed.empty & self._tables.exposed
        for host in gone:
            for layer, experts in self._placed.on(host).items():
                orphans |= {
                    (layer, expert)
                    for expert in experts
                    if (layer, expert) in self._tables.exposed and gone >= set(self._placed.of(layer, expert))
                }
        if self.transaction is not None:
            orphans -= {(move.layer, move.expert) for move in self.transaction.moves() if move.after}
        return orphans

    def _homes(
        self, orphans: Collection[ExpertKey], room: dict[HostId, int]
    ) -> tuple[dict[ExpertKey, HostId], list[ExpertKey]]:
        rates = self._current_rates()
        return find_homes(orphans, room, loads_of(self.placement, rates), self._expert_bytes, rates, self._fleet.speeds)

    def _room_bytes(self, but: Collection[HostId] = ()) -> dict[HostId, int]:
        """What each member could hold on top of what it holds or is to hold."""
        coming: dict[HostId, Held] = {}
        for move in [] if self.transaction is None else self.transaction.moves():
            for host_id in move.added:
                coming.setdefault(host_id, {}).setdefault(move.layer, set()).add(move.expert)
        room = {}
        for host in self.members:
            if host.host_id not in but:
                used = self._fleet.used_bytes(host, self._placed.on(host.host_id), coming.get(host.host_id, {}))
                room[host.host_id] = max(0, self.budget_bytes(host) - used)
        return room

    def _dismiss_stand_ins(self) -> None:
        """Where a host is back that the expert is placed on, its stand-in gives it up again."""
        for (layer, expert), stand_in in list(self._stand_ins.items()):
            row, held = self._placed.of(layer, expert), self._fleet.held.of(layer, expert)
            others = tuple(host for host in row if host != stand_in)
            if stand_in not in row or not others:
                del self._stand_ins[layer, expert]
            elif any(host in held and self.hosts[host].role == "serving" for host in others):
                del self._stand_ins[layer, expert]
                self._placed.put(layer, expert, others)

    # --- plans and transactions ------------------------------------------------------------------------------
    def _refuse_if_changing(self) -> None:
        if self.resize is not None or self.transaction is not None:
            what = self.resize.reason if self.resize is not None else "a plan is being carried out"
            raise Unavailable(f"another change of the cluster is under way ({what}); retry when it has ended")

    def _plan_requested(self) -> None:
        self._refuse_if_changing()
        slots, widest = sum(host.slots for host in self.capacities()), max(self.settings.num_experts.values())
        if slots < widest:
            raise InsufficientResources(
                f"there is no valid plan: {len(self.members)} expert actors have {slots} slots for {widest} experts of "
                "a layer; start others, or let them hold more (experts.max_bytes, experts.spare_slots)"
            )
        self._plan("requested")

    def _plan(self, reason: str) -> None:
        op_id = self._fleet.new_op()
        self._planning = (op_id, reason, self._now_s)
        self._next_balance_s = self._now_s + self.settings.balance_every_s
        for host in self.members:
            host.is_new = False
        rates, goals = self._current_rates(), self.settings.goals
        self._out.append(ev.PlanPlacement(op_id, rates, self.capacities(), self.placement, goals))

    def _planned(self, placement: Placement | None, why_not: str) -> None:
        reason = "" if self._planning is None else self._planning[1]
        self._planning = None
        if placement is None:
            self._say("aborted", f"no plan ({reason}): {why_not}")
            self._next_balance_s = self._now_s + self.settings.replan_s
            self._roll_back(why_not)
            return
        named = {host for experts in placement.hosts_of.values() for hosts in experts for host in hosts}
        if named <= {host.host_id for host in self.members}:
            self._is_unbalanced = self._begin(reason, placement)
        elif self.resize is not None:  # somebody has left meanwhile
            self.resize.planned = False
        elif reason == "requested":
            self._plan(reason)

    def _begin(self, reason: str, target: Placement) -> bool:
        """Set about a change; false when there is nothing to change."""
        current = self.placement
        changes = moves(current, target)
        if not changes:
            return False
        budgets = {host.host_id: self.budget_bytes(host) for host in self.members}
        steps = waves(current, target, self._expert_bytes, budgets, self._current_rates())
        num_bytes = copied_bytes(changes, self._expert_bytes)
        self._say("planned", f"{reason}: {len(changes)} experts change, {num_bytes:,} bytes to copy")
        self.transaction = Transaction(reason, steps)
        self._prepare(self.transaction)
        return True

    def _prepare(self, transaction: Transaction) -> None:
        transaction.prepare(self._fleet.held)
        self._look_at(transaction.pending)

    def _abort(self, why: str, roll_back: bool = True) -> None:
        """Forget the running transaction. What it has loaded is named by nothing, and so will be dropped."""
        transaction, self.transaction = self.transaction, None
        if transaction is not None:
            self._say("aborted", f"{transaction.reason}: {why}")
            self._next_balance_s = self._now_s + self.settings.replan_s
            self._seeks_homes = self._is_unbalanced = True
            self._look_at(transaction.pending)
        if roll_back:
            self._roll_back(why)
        elif self.resize is not None:
            self.resize.planned = False

    def _commit(self, transaction: Transaction) -> None:
        """The step that is loaded becomes the placement."""
        step = transaction.steps.pop(0)
        for move in step:
            self._stand_ins.pop((move.layer, move.expert), None)
            self._placed.put(move.layer, move.expert, move.after)
        self._look_at(transaction.pending)
        self._out.extend(told(step))
        self._seeks_homes = True
        if transaction.steps:
            self._prepare(transaction)
            return
        self.transaction = None
        if self.resize is not None:
            self.resize.deadline_s = self._now_s + self.settings.resize_s

    # --- size ------------------------------------------------------------------------------------------------
    def _scale(self, signals: Signals) -> None:
        goals = self.settings.scaling
        if goals is None or self.resize is not None or self.transaction is not None:
            return
        wanted, self._scaling = decide(goals, self._scaling, signals, self.num_hosts, self._now_s)
        if wanted != self.num_hosts:
            try:
                self._change_size(wanted, "scaling")
            except RayMoEError as error:
                self._say("aborted", f"scaling to {wanted} hosts: {error}")

    def _size_requested(self, num_hosts: int) -> None:
        self._refuse_if_changing()
        goals = self.settings.scaling
        lowest = 0 if self.settings.can_sleep else 1
        low, high = (lowest, None) if goals is None else (max(lowest, goals.min_hosts), goals.max_hosts)
        if num_hosts < low or (high is not None and num_hosts > high):
            raise InvalidConfig(
                f"{num_hosts} expert actors were asked for; expected {low} "
                + ("or more" if high is None else f"to {high}, the limits of scaling, which would change it again")
            )
        self._change_size(num_hosts, "requested")

    def _change_size(self, num_hosts: int, reason: str) -> None:
        serving = self._fleet.with_role("serving")
        text = f"{reason}: {len(serving)} to {num_hosts} hosts"
        if num_hosts > len(serving):
            added = tuple(self._start_host("serving") for _ in range(num_hosts - len(serving)))
            self._resize(Resize(text, self._now_s + self.settings.resize_s, added=added))
        elif num_hosts == 0:
            self._fall_asleep(serving, text)
        elif num_hosts < len(serving):
            load = loads_of(self.placement, self._current_rates())
            # Who is not there anyway, then who gives least, then who came last.
            serving.sort(key=lambda h: (h.phase == "up", load.get(h.host_id, 0.0), -number_of(h.host_id)))
            self._let_go(serving[: len(serving) - num_hosts], text)

    def _start_host(self, role: Role) -> HostId:
        host_id = self._fleet.add_new(role, self._now_s)
        self._out.append(ev.StartHost(host_id))
        return host_id

    def _resize(self, resize: Resize) -> None:
        self.resize = resize
        self._planning = None  # it knows nothing of this
        self._say("resizing", resize.reason)

    def _fall_asleep(self, serving: Sequence[HostState], reason: str) -> None:
        """Let everything go; nobody takes anything over."""
        for host in serving:
            host.role, host.is_dismissed = "leaving", True
            self._placed.clear(host.host_id)
            self._look_again(host)
        self._stand_ins.clear()
        removed = tuple(host.host_id for host in serving)
        self._resize(Resize(reason, self._now_s + self.settings.resize_s, removed=removed))

    def _let_go(self, going: Sequence[HostState], reason: str) -> None:
        """Have `going` hand over what only they hold, and then end.

        Raises: `InsufficientResources` when the others have no room for it.
        """
        roles = [host.role for host in going]
        for host in going:
            host.role = "leaving"
        _, homeless = self._evacuated()
        if homeless:
            for host, role in zip(going, roles, strict=True):
                host.role = role
            missing = sum(self._expert_bytes[layer] for layer, _ in homeless)
            raise InsufficientResources(
                f"{', '.join(host.host_id for host in going)} cannot go: the others have no room for {len(homeless)} "
                f"of the experts that only they hold ({missing:,} bytes more are needed); raise experts.max_bytes or "
                "experts.spare_slots, or start others first"
            )
        self._set_leaving(going)
        removed = tuple(host.host_id for host in going)
        self._resize(Resize(reason, self._now_s + self.settings.resize_s, removed=removed))

    def _drain_requested(self, event: ev.DrainRequested) -> None:
        unknown = [host for host in event.host_ids if host not in self.hosts]
        if unknown and not event.notice:
            raise NotFound(f"no expert actors {', '.join(unknown)}; there are {', '.join(self.hosts)}")
        going = [self.hosts[host] for host in dict.fromkeys(event.host_ids) if host in self.hosts]
        going = [host for host in going if not host.draining]
        if not event.notice:
            self._refuse_if_changing()
        if not going:
            return
        reason = f"drain of {', '.join(host.host_id for host in going)}"
        roles = [host.role for host in going]
        if event.notice:
            self._abort(reason, roll_back=False)
            self._set_leaving(going)
            for role in roles if event.replace else ():  # not waited for: they get their share when they are up
                self._start_host(role)
        elif event.replace:
            added = tuple(self._start_host(role) for role in roles)
            removed = tuple(host.host_id for host in going)
            self._resize(Resize(reason, self._now_s + self.settings.resize_s, added=added, removed=removed))
        else:
            self._let_go(going, reason)

    def _set_leaving(self, going: Iterable[HostState]) -> None:
        self._planning = None
        for host in going:
            host.role = "leaving"
            self._look_again(host)

    def _look_again(self, host: HostState) -> None:
        """The role of a host has changed: what tables name of it, and what it does, follows."""
        self._due[host.host_id] = self._now_s
        held = self._fleet.held.on(host.host_id)
        keys = [(layer, expert) for layer, experts in held.items() for expert in experts]
        self._tables.route(keys, self._placed, self._fleet.held, self.hosts, self._now_s)

    def _leaving(self) -> list[HostState]:
        return self._fleet.with_role("leaving")

    def _evacuated(self) -> tuple[Placement, list[ExpertKey]]:
        """The placement without the leaving hosts, and the experts for which there is no room then."""
        leaving = {host.host_id for host in self._leaving()}
        gone = {host.host_id for host in self._fleet.gone(self._now_s)}
        room, rates, speeds = self._room_bytes(but=gone), self._current_rates(), self._fleet.speeds
        return rehome(self.placement, leaving, room, self._expert_bytes, rates, speeds, absent=gone)

    def _evacuate(self) -> None:
        """Begin to move what is placed on leaving hosts, hottest first, as far as there is room."""
        leaving = [host.host_id for host in self._leaving() if self._placed.on(host.host_id)]
        if self.transaction is not None or self._planning is not None or not leaving:
            return  # if a plan is being made, it is made without them
        target, homeless = self._evacuated()
        reason = f"{', '.join(leaving)} to go"
        if homeless:
            self._say("homeless", f"{reason}: no room for {len(homeless)} experts")
        self._begin(reason, target)

    def _roll_back(self, why: str) -> None:
        """Undo a resize: hosts that were added end, unless they serve already; hosts that were to go stay."""
        resize, self.resize = self.resize, None
        if resize is None:
            return
        self._say("aborted", f"{resize.reason}: {why}")
        self._planning = None
        self._abort(why)
        added = [self.hosts[host_id] for host_id in resize.added if host_id in self.hosts]
        self._set_leaving([host for host in added if not self._placed.on(host.host_id)])
        for host_id in resize.removed:
            host = self.hosts.get(host_id)
            if host is not None and host.draining and not host.is_dismissed:
                host.role = "serving"
                host.is_new = not self._placed.on(host_id)
                self._look_again(host)
        self._is_unbalanced = True

    def _remove(self, host: HostState) -> None:
        """End a host. What was placed on it is placed elsewhere, or nowhere."""
        self._fleet.remove(host.host_id)
        self._placed.clear(host.host_id)
        self._due.pop(host.host_id, None)
        self._out.append(ev.StopHost(host.host_id))
        self._seeks_homes = self._is_unbalanced = True

    # --- time ------------------------------------------------------------------------------------------------
    def _tick(self) -> None:
        now_s, settings = self._now_s, self.settings
        self._seeks_homes = True
        self._fleet.tell_speeds()
        self._out.extend(self._fleet.repeated_orders(now_s))
        if self._planning is not None and now_s - self._planning[2] >= settings.repeat_s:
            self._planned(None, "no answer")
        resize = self.resize
        if resize is not None and self.transaction is None and self._planning is None and now_s > resize.deadline_s:
            self._roll_back(f"not done within {settings.resize_s:g} s")
        if now_s < self._next_balance_s or not self._is_settled():
            return
        if any(host.is_new for host in self.members):
            self._plan("new hosts")
        elif settings.balance:
            busy = self.load.tokens_per_s(now_s) >= settings.min_tokens_per_s
            if busy or self._is_unbalanced:
                self._plan("balance")

    def _is_settled(self) -> bool:
        """Whether nothing is under way, and nobody is expected to come or to finish loading."""
        if self.resize is not None or self.transaction is not None or self._planning is not None:
            return False
        members = self.members
        expected = any(
            host.phase != "up" and self._now_s - host.since_s < self.settings.return_s
            for host in self._fleet.with_role("serving")
        )
        at_rest = all(host.operation is None and host.host_id not in self._due for host in members)
        return bool(members) and at_rest and not expected

    # --- what follows from the state -------------------------------------------------------------------------
    def _settle(self) -> None:
        """Everything that the state asks for now."""
        self._is_touched = False
        self._route()  # so that it is known what nobody holds
        self._appoint_heirs()
        self._evacuate()
        self._appoint_stand_ins()
        self._advance()
        self._dismiss_stand_ins()
        self._publish()
        self._give_orders()
        self._stop_the_dispensable()
        self._finish_resize()

    def _route(self) -> None:
        keys = {*self._placed.take_changed_rows(), *self._fleet.held.take_changed_rows()}
        self._tables.route(sorted(keys), self._placed, self._fleet.held, self.hosts, self._now_s)
        for host_id in self._tables.named.take_changed_hosts():
            if host_id in self.hosts:
                self._due[host_id] = self._now_s

    def _look_at(self, host_ids: Iterable[HostId]) -> None:
        self._due.update((host_id, self._now_s) for host_id in host_ids if host_id in self.hosts)

    def _publish(self) -> None:
        self._look_at(self._placed.take_changed_hosts())
        self._look_at(self._fleet.held.take_changed_hosts())
        self._route()
        is_first = self.table.epoch == self._first_epoch
        if self._tables.publish(self.hosts, self._fleet.held, self._fleet.speeds):
            if is_first:  # what tables named before is not known
                for host in self.hosts.values():
                    host.unnamed_s = self._now_s
            self._out.append(ev.PublishTable(self.table))

    def _advance(self) -> None:
        """Commit what is loaded; give the new hosts of a resize their share once they are all there."""
        while (transaction := self.transaction) is not None and not transaction.waiting:
            self._commit(transaction)
        resize = self.resize
        if resize is None or resize.planned or not resize.added or self.transaction is not None:
            return
        if all(host in self.hosts and self.hosts[host].phase == "up" for host in resize.added):
            resize.planned = True
            self._set_leaving([self.hosts[host] for host in resize.removed if host in self.hosts])
            self._plan(resize.reason)

    def _give_orders(self) -> None:
        due = sorted(host_id for host_id, at_s in self._due.items() if at_s <= self._now_s)
        for host_id in due:
            host = self.hosts[host_id]
            del self._due[host_id]
            if host.phase != "up" or host.operation is not None:
                continue
            named = self._tables.named
            order = self._fleet.next_order(
                host, self.assigned(host_id), named.on(host_id), named.empty, self._current_rates(), self._now_s
            )
            if isinstance(order, float):
                self._due[host_id] = order
            elif order is not None:
                self._out.append(order)

    def _stop_the_dispensable(self) -> None:
        """End the leaving hosts on which nothing is placed, and which no table names that is in use."""
        for host in self._leaving():
            needed = self._placed.on(host.host_id) or self._tables.named.on(host.host_id)
            in_use = host.phase == "up" and self._now_s < host.unnamed_s + self.settings.drain_s
            if not needed and not in_use:
                self._remove(host)
        self._publish()

    def _finish_resize(self) -> None:
        resize = self.resize
        if resize is None or self.transaction is not None or self._planning is not None:
            return
        if (resize.planned or not resize.added) and not any(host in self.hosts for host in resize.removed):
            self.resize = None
            self._say("resized", resize.reason)

    # --- the rules -------------------------------------------------------------------------------------------
    def validate(self) -> list[str]:
        """Rules that the state breaks now; none is the answer after every event."""
        broken = []
        up = {host_id for host_id, host in self.hosts.items() if host.phase == "up"}
        holders: dict[ExpertKey, set[HostId]] = {}
        for host_id in sorted(up):
            for layer, indices in self._fleet.held.on(host_id).items():
                for expert in indices:
                    holders.setdefault((layer, expert), set()).add(host_id)
        for layer, experts in self.table.placement.hosts_of.items():
            for expert, named in enumerate(experts):
                what, holding, placed = f"{layer} {expert}", holders.get((layer, expert), set()), self._placed
                if not holding.issuperset(named):
                    broken.append(f"{what}: the table names {named}, but {sorted(holding)} hold it")
                if not named and any(not self.hosts[host].is_dismissed for host in holding):
                    broken.append(f"{what}: {sorted(holding)} hold it, but the table names nobody")
                if named != self._tables.row(placed.of(layer, expert), tuple(sorted(holding)), self.hosts):
                    broken.append(f"{what}: the table was not brought up to date")
                if any(host not in self.hosts for host in placed.of(layer, expert)):
                    broken.append(f"{what} is placed on hosts that are not there")
                if len(set(named)) < len(named):
                    broken.append(f"{what}: a host is named twice in {named}")
        for host in self.hosts.values():
            if host.phase != "up" and (self._fleet.held.on(host.host_id) or host.operation):
                broken.append(f"{host.host_id} is {host.phase}, but holds or does something")
            if difference(self._tables.named.on(host.host_id), self._fleet.held.on(host.host_id)):
                broken.append(f"{host.host_id} is named for what it does not hold")
            if host.phase == "up" and self.table.addresses.get(host.host_id) not in (None, host.address):
                broken.append(f"the table has another address of {host.host_id}")
            if host.role == "standby" and self._placed.on(host.host_id):
                broken.append(f"experts are placed on {host.host_id}, which is a standby")
        if not up.issuperset(self.table.addresses):
            broken.append(f"the table has addresses of hosts that are not up: {sorted(set(self.table.addresses) - up)}")
        return broken
