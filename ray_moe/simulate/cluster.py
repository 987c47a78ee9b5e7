"""A cluster on a virtual clock: the very `ClusterState` of the service, driven by a trace and by faults.

It does for simulated hosts what `actors/controller.py` does for real ones: tells the state what happened, carries out
what comes back, and decides nothing itself. Everything follows from the trace and the seed; only how long the policies
take is measured in real time. Messages are neither lost nor late here (the tests' campaign of faults is for that), and
the cluster begins whole: each host holds its share of the first placement.

Called by `cli/simulate.py`.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from ray_moe.errors import RayMoEError
from ray_moe.policy import events as ev
from ray_moe.policy import planner
from ray_moe.policy.cluster_state import ClusterState
from ray_moe.policy.hosts import ClusterSettings, union
from ray_moe.policy.load import TokenCounts
from ray_moe.policy.scaling import ScalingGoals
from ray_moe.simulate.balance import FEW_ROWS
from ray_moe.simulate.gauge import Gauge, p_lossless
from ray_moe.simulate.hosts import Host, Nodes, Order, copied, living
from ray_moe.simulate.report import Ledger, Report, StepReport
from ray_moe.simulate.scenario import Scenario, check_fit
from ray_moe.simulate.trace import Ints, Step, Trace
from ray_moe.types import HostId, RoutingTable

DETECT_S = 0.05
"""A lost host is noticed after this: its stream has broken."""


class Simulation:
    """See the module. `run` once."""

    def __init__(self, scenario: Scenario, settings: ClusterSettings, trace: Trace) -> None:
        """Raises: `InvalidConfig`, `InsufficientResources` for a cluster that cannot hold the trace's experts."""
        check_fit(scenario, settings, trace)
        self.scenario = scenario
        self.settings = settings
        self.trace = trace
        self.now_s = 0.0
        names = [f"expert-{number}" for number in range(scenario.num_hosts + scenario.num_standbys)]
        self.state = ClusterState(settings, names[: scenario.num_hosts], names[scenario.num_hosts :])
        self.table: RoutingTable = self.state.table
        """As the routers have it."""
        self.hosts: dict[HostId, Host] = {name: Host(name) for name in names}
        """Those that are to be: up, starting, or about to start again."""
        self.nodes = Nodes(scenario.hosts_per_node)
        self.ledger = Ledger()
        scaling = settings.scaling or ScalingGoals(1, 1)
        self.gauge = Gauge(scenario, trace, scaling.target_utilisation, self.ledger)
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._routed: Ints = np.zeros((len(trace.layers), max(trace.num_experts)), dtype=np.int64)
        """[L, E] rows since the beginning."""
        self._num_reports = 0
        self._is_stale = True
        """Whether the gauge has not seen the newest table, or who lives now."""
        self._p_lossless = 1.0
        self._is_new_chance = True

    # --- time ------------------------------------------------------------------------------------------------
    def run(self, on_step: Callable[[StepReport], None] = lambda _: None) -> Report:
        """Go through the trace. Args: on_step: called after each step."""
        begin_s = time.perf_counter()
        self._begin()
        for step in self.trace:
            on_step(self._run_step(step))
        return self.ledger.close(
            shape=(len(self.trace.layers), max(self.trace.num_experts)),
            measured="rows" if self.scenario.tokens_per_batch * self.scenario.top_k > FEW_ROWS else "experts",
            num_lost_nodes=self.num_lost_nodes,
            first_hosts=self.scenario.num_hosts,
            total_s=time.perf_counter() - begin_s,
        )

    def _begin(self) -> None:
        """Every host is up, and holds what it is to hold."""
        for host_id, host in self.hosts.items():
            host.held = union(self.state.assigned(host_id))
            self._bring_up(host)
        self._report_load()
        self.after(self.settings.balance_every_s, self._tick)

    def _run_step(self, step: Step) -> StepReport:
        begin_s, number = self.now_s, self.scenario.batches_per_step
        self.gauge.begin_step(step)
        for batch in range(number if step.rows.any() else 0):
            self.after((batch + 0.5) / number * step.duration_s, self._measure)
        self._run_until(begin_s + step.duration_s)
        self._routed = self._routed + step.rows
        self.ledger.rows += int(step.rows.sum())
        self._report_load()
        self._refresh()
        report = self.gauge.end_step(self.now_s, self._chance())
        self.ledger.steps.append(report)
        return report

    def _run_until(self, end_s: float) -> None:
        while self._agenda and self._agenda[0][0] <= end_s:
            at_s, _, what = heapq.heappop(self._agenda)
            self._pass_time(at_s)
            what()
        self._pass_time(end_s)

    def _pass_time(self, until_s: float) -> None:
        past_s = until_s - self.now_s
        if past_s <= 0:
            return
        self._refresh()
        self.ledger.host_s += past_s * len(self.hosts)
        self.ledger.most_hosts = max(self.ledger.most_hosts, self.state.num_hosts)
        self.gauge.pass_time(past_s)
        self.now_s = until_s

    def after(self, delay_s: float, what: Callable[[], None]) -> None:
        """Have `what` done later."""
        heapq.heappush(self._agenda, (self.now_s + delay_s, next(self._count), what))

    # --- the policies ----------------------------------------------------------------------------------------
    def tell(self, event: ev.Event) -> None:
        """Tell the state what happened, and set about what it answers."""
        begin_s = time.perf_counter()
        instructions = self.state.handle(event, self.now_s)
        self.ledger.wall.policy_s += time.perf_counter() - begin_s
        for instruction in instructions:
            self._carry_out(instruction)

    def _carry_out(self, instruction: ev.Instruction) -> None:
        match instruction:
            case ev.StartHost(host_id):
                host = self.hosts[host_id] = Host(host_id)
                self.after(self.scenario.start_s, partial(self._start, host))
            case ev.StopHost(host_id):
                self._stop(self.hosts.pop(host_id))
            case ev.LoadReplicas() | ev.DropReplicas():
                host = self.hosts[instruction.host_id]
                if host.take(instruction):
                    self._work(host)
            case ev.PlanPlacement():
                self._plan(instruction)
            case ev.PublishTable(table):
                self.table, self._is_stale = table, True
            case ev.Announce(kind):
                self.ledger.told[kind] += 1
                self.ledger.changes.transactions += kind == "planned"

    def _plan(self, order: ev.PlanPlacement) -> None:
        begin_s = time.perf_counter()
        planned: ev.PlacementPlanned
        try:
            placement = planner.plan(order.load, order.hosts, order.current, order.goals)
            planned = ev.PlacementPlanned(order.op_id, placement)
        except RayMoEError as error:
            planned = ev.PlacementPlanned(order.op_id, None, error.message)
        self.ledger.wall.planning_s.append(time.perf_counter() - begin_s)
        self.ledger.changes.plans += 1
        self.after(self.scenario.planning_s, partial(self.tell, planned))

    def _tick(self) -> None:
        self.tell(ev.SignalsReported(self.gauge.signals))
        self.tell(ev.Ticked())
        self.after(self.settings.balance_every_s, self._tick)

    def _report_load(self) -> None:
        """The router's counts, totals since it began."""
        self._num_reports += 1
        totals = {
            layer: tuple(rows[:number].tolist())
            for layer, number, rows in zip(self.trace.layers, self.trace.num_experts, self._routed, strict=True)
        }
        self.tell(ev.LoadReported(TokenCounts("router", "1", self._num_reports, totals), self.table.epoch))

    # --- hosts -----------------------------------------------------------------------------------------------
    def _start(self, host: Host) -> None:
        if self.hosts.get(host.host_id) is host:
            self._bring_up(host)

    def _bring_up(self, host: Host) -> None:
        node, is_new = self.nodes.place(host.host_id)
        self._is_stale = True
        if is_new and self.scenario.losses_per_hour:
            self._doom(node)
        self.tell(host.begin(node))

    def _stop(self, host: Host) -> None:
        if host.is_up:
            self.ledger.faults.evacuated_hosts += host.node in self.nodes.going
            self.nodes.leave(host.node, host.host_id)
            host.end()
        self._is_stale = True

    def _work(self, host: Host) -> None:
        """Begin with the first of its orders."""
        order = host.orders[0]
        missing = host.missing(order)
        num_bytes = sum(copied(order, missing, self.settings.expert_bytes))
        self.after(num_bytes / self.scenario.bandwidth, partial(self._finish, host, order))

    def _finish(self, host: Host, order: Order) -> None:
        if host.incarnation != order.incarnation:
            return
        changes, missing = self.ledger.changes, host.missing(order)
        from_store, from_hosts = copied(order, missing, self.settings.expert_bytes)
        changes.store_bytes += from_store
        changes.copied_bytes += from_hosts
        changes.loaded_replicas += sum(map(len, missing.values()))
        if isinstance(order, ev.DropReplicas):
            changes.dropped_replicas += sum(map(len, order.experts.values()))
        done = host.finish()
        if host.orders:
            self._work(host)
        self.tell(done)

    # --- faults ----------------------------------------------------------------------------------------------
    def _doom(self, node: str) -> None:
        """Draw when a new node will be lost. The same node has the same fate whatever the policies do."""
        number = int(node.rpartition("-")[2])
        random = np.random.default_rng([self.scenario.seed, 2, number])
        lives_s = float(random.exponential(3600.0 / self.scenario.losses_per_hour))
        notice_s = min(self.scenario.notice_s, lives_s)
        if notice_s:
            self.after(lives_s - notice_s, partial(self._announce_loss, node))
        self.after(lives_s, partial(self.lose_node, node))

    def _announce_loss(self, node: str) -> None:
        on_it = tuple(sorted(self.nodes.on.get(node, ())))
        if on_it:
            self.nodes.going.add(node)
            self.tell(ev.DrainRequested(on_it, replace=True, notice=True))

    def lose_node(self, node: str) -> None:
        """A node is gone, with all on it; its hosts start again elsewhere."""
        lost = [self.hosts[host_id] for host_id in sorted(self.nodes.on.pop(node, ()))]
        self.nodes.going.discard(node)
        if not lost:
            return
        before = self._orphans()
        for host in lost:
            self.after(DETECT_S, partial(self.tell, host.end()))
            self.after(self.scenario.start_s, partial(self._start, host))
        self._is_stale = True
        orphaned = self._orphans() - before
        faults = self.ledger.faults
        faults.lost_nodes += 1
        faults.lost_hosts += len(lost)
        faults.survived += not orphaned
        faults.orphaned_experts += len(orphaned)

    def _orphans(self) -> set[tuple[int, int]]:
        self._refresh()
        return self.gauge.orphans()

    # --- what it is like -------------------------------------------------------------------------------------
    def _refresh(self) -> None:
        """Show the gauge what has changed."""
        if self._is_stale:
            self._is_stale, self._is_new_chance = False, True
            known = self.state.hosts
            alive = {host.host_id: known[host.host_id].role == "serving" for host in living(self.hosts)}
            self.gauge.look(self.table.placement, alive)

    def _measure(self) -> None:
        self._refresh()
        self.gauge.measure()

    @property
    def num_lost_nodes(self) -> int:
        """That the chance to lose no expert is about, as in the service's status."""
        return max(1, self.settings.goals.survive_nodes)

    def _chance(self) -> float:
        if self._is_new_chance:
            self._is_new_chance = False
            node_of = {host.host_id: host.node for host in living(self.hosts)}
            self._p_lossless = p_lossless(self.table.placement, node_of, self.num_lost_nodes)
        return self._p_lossless
