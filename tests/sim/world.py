"""A small cluster on a virtual clock, in which everything goes wrong that can: the world around a `ClusterState`.

Hosts load slowly, fail, hang, die and come back; messages are late, lost, doubled and overtaken; nodes go with or
without notice; routers adopt tables late; the controller restarts; people ask for sizes, drains and plans. All of it
follows from the seed.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray_moe.errors import RayMoEError
from ray_moe.policy import events as ev
from ray_moe.policy import planner
from ray_moe.policy.cluster_state import ClusterState
from ray_moe.policy.load import TokenCounts
from ray_moe.policy.placement import place_by_index
from ray_moe.policy.scaling import Signals
from ray_moe.types import HostAddress, Placement, RoutingTable
from tests.sim.knobs import MAX_LAG_S, QUIET_S, TICK_S, draw
from tests.sim.oracle import Key, Oracle, keys_of


@dataclass
class Actor:
    """The process of a host, over all its lives."""

    host_id: str
    node: str = ""
    incarnation: str = ""
    """Empty while it does not live."""
    is_hung: bool = False
    is_stopped: bool = False
    held: set[Key] = field(default_factory=set)
    orders: list[ev.LoadReplicas | ev.DropReplicas] = field(default_factory=list)
    at: ev.LoadReplicas | ev.DropReplicas | None = None
    """The order it is carrying out."""
    arrives_s: float = 0.0
    """When the last order sent to it arrives: none overtakes another."""
    expert_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def used_bytes(self) -> int:
        return sum(self.expert_bytes[layer] for layer, _ in self.held)


@dataclass
class Router:
    name: str
    table: RoutingTable
    incarnation: int = 0
    sequence: int = 0
    tokens: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Life:
    """One life of the controller: how its state began, and what it was told, for a replay."""

    begin: Callable[[], ClusterState]
    log: list[tuple[float, ev.Event, list[ev.Instruction]]] = field(default_factory=list)


class World:
    def __init__(self, seed: int, make_state: type[ClusterState] = ClusterState) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.knobs = knobs = draw(rng)
        self.settings = knobs.settings
        self.make_state = make_state
        self.now_s = 0.0
        self.looks_s = self.knobs.chaos_s + 11.0
        self.agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.count = itertools.count()
        self.nodes = [f"node-{i}" for i in range(knobs.num_nodes)]
        self.num_nodes = knobs.num_nodes
        self.bytes_per_slot = sum(self.settings.expert_bytes.values())
        hosts = [f"expert-{i}" for i in range(knobs.num_hosts)]
        standbys = [f"expert-{knobs.num_hosts + i}" for i in range(knobs.num_standbys)]
        self.first_placement = place_by_index(self.settings.num_experts, hosts)
        self.actors: dict[str, Actor] = {}
        self.lives: list[Life] = []
        self.last_epoch = 0
        """Of the tables of all lives."""
        self.begin(lambda: make_state(self.settings, hosts, standbys, self.first_placement, now_s=0.0))
        self.routers = [
            Router(
                f"router-{i}",
                RoutingTable(0, Placement({})),
                0,
                0,
                {layer.path: [0] * layer.num_experts for layer in self.settings.layers},
            )
            for i in range(knobs.num_routers)
        ]
        self.weights = {layer.path: self.new_weights(layer.num_experts) for layer in self.settings.layers}
        for host_id in (*hosts, *standbys):
            self.start_actor(host_id)

    def new_weights(self, count: int) -> list[float]:
        return [self.rng.paretovariate(1.0) for _ in range(count)]

    # --- time ------------------------------------------------------------------------------------------------
    def after(self, delay_s: float, what: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.agenda, (self.now_s + delay_s, next(self.count), what, args))

    def later(self) -> float:
        return self.rng.uniform(0.0, self.knobs.delay_s)

    @property
    def is_quiet(self) -> bool:
        return self.now_s >= self.knobs.chaos_s

    def happens(self, chance: float) -> bool:
        return not self.is_quiet and self.rng.random() < chance

    def run(self) -> list[str]:
        """Live it; what was found to be wrong, nothing in the best case."""
        self.after(TICK_S, self.tick)
        self.after(0.2, self.traffic)
        self.after(1.0, self.poll)
        self.schedule_faults()
        while self.agenda[0][0] <= self.knobs.chaos_s + QUIET_S and not self.is_over():
            self.now_s, _, what, args = heapq.heappop(self.agenda)
            what(*args)
            if self.oracle.findings:
                return self.oracle.findings
        self.oracle.check_end()
        if self.knobs.real_planner and not self.state.is_asleep and not self.oracle.findings:
            self.plan_again()
        if self.seed % 4 == 0:
            self.replay()
        return self.oracle.findings

    def is_over(self) -> bool:
        """Whether everything is in order some time after the faults: then nothing will happen any more."""
        if self.now_s < self.looks_s:
            return False
        self.looks_s = self.now_s + 2.0
        self.oracle.check_end()
        is_in_order = not self.oracle.findings
        self.oracle.findings.clear()
        return is_in_order

    def schedule_faults(self) -> None:
        knobs = self.knobs
        for rate, what in (
            (knobs.deaths_per_s, self.kill_somebody),
            (knobs.hangs_per_s, self.hang_somebody),
            (knobs.nodes_per_s, self.lose_a_node),
            (knobs.restarts_per_s, self.restart_controller),
            (knobs.wishes_per_s, self.wish),
            (0.1, self.shift_traffic),
        ):
            at_s = self.rng.expovariate(rate) if rate else self.knobs.chaos_s
            while at_s < self.knobs.chaos_s:
                self.after(at_s, what)
                at_s += self.rng.expovariate(rate)
        self.after(self.knobs.chaos_s + 8.0, self.last_wish)

    # --- the controller --------------------------------------------------------------------------------------
    def begin(self, make: Callable[[], ClusterState]) -> None:
        self.state = make()
        self.lives.append(Life(make))
        self.oracle = Oracle(self)

    def tell(self, event: ev.Event, delay_s: float | None = None, may_be_lost: bool = True) -> None:
        """Send an event to this life of the controller."""
        if may_be_lost and self.happens(self.knobs.p_lost):
            return
        life = len(self.lives)
        self.after(self.later() if delay_s is None else delay_s, self.deliver, life, event)
        if self.happens(self.knobs.p_twice):
            self.after(self.later() + self.rng.uniform(0, 3), self.deliver, life, event)

    def deliver(self, life: int, event: ev.Event) -> None:
        if life == len(self.lives):
            self.handle(event)

    def handle(self, event: ev.Event) -> None:
        asked = isinstance(event, ev.SizeRequested | ev.DrainRequested | ev.PlanRequested)
        before = self.fingerprint() if asked else None
        try:
            instructions = self.state.handle(event, self.now_s)
        except RayMoEError as error:
            if not asked:
                self.oracle.find(f"{event} raised {error!r}")
            elif self.fingerprint() != before:
                self.oracle.find(f"{event} raised {error!r} and changed the state")
            return
        self.lives[-1].log.append((self.now_s, event, instructions))
        self.oracle.told(event)
        for instruction in instructions:
            self.oracle.ordered(instruction)
            self.carry_out(instruction)
        if instructions or not isinstance(event, ev.LoadReported | ev.SpeedReported):
            self.oracle.check()

    def fingerprint(self) -> str:
        state = self.state
        return repr((state.hosts, state.placement, state.table, state.transaction, state.resize))

    def carry_out(self, instruction: ev.Instruction) -> None:
        match instruction:
            case ev.StartHost(host_id):
                self.start_actor(host_id)
            case ev.StopHost(host_id):
                actor = self.actors.pop(host_id)
                actor.is_stopped, actor.incarnation = True, ""
            case ev.LoadReplicas() | ev.DropReplicas():
                actor = self.actors[instruction.host_id]
                actor.arrives_s = max(actor.arrives_s, self.now_s + self.later())
                if not self.happens(self.knobs.p_lost):
                    self.after(actor.arrives_s - self.now_s, self.arrive, actor, len(self.lives), instruction)
            case ev.PlanPlacement():
                self.after(self.later(), self.plan, len(self.lives), instruction)
            case ev.PublishTable(table):
                for router in self.routers:
                    self.after(self.rng.uniform(0, MAX_LAG_S), self.adopt, router, table)

    def plan(self, life: int, order: ev.PlanPlacement) -> None:
        if life != len(self.lives) or self.happens(self.knobs.p_lost):
            return
        if self.happens(self.knobs.p_plan_fails):
            self.tell(ev.PlacementPlanned(order.op_id, None, "no luck"))
            return
        try:
            if self.knobs.real_planner:
                placement = planner.plan(order.load, order.hosts, order.current, order.goals)
            else:
                placement = self.invent(order)
        except RayMoEError as error:
            self.tell(ev.PlacementPlanned(order.op_id, None, error.message))
        else:
            self.tell(ev.PlacementPlanned(order.op_id, placement))

    def invent(self, order: ev.PlanPlacement) -> Placement:
        """Any valid placement, so that much moves; once it is quiet, the present one if that is valid."""
        rows = {}
        for layer, load in order.load.items():
            free = {host.host_id: host.slots for host in order.hosts}
            if sum(free.values()) < len(load):
                raise RayMoEError("too few slots")
            row: list[list[str]] = []
            for expert in range(len(load)):
                stay = [h for h in order.current.hosts_of[layer][expert] if h in free and free[h] > 0]
                stay = stay if self.is_quiet or self.rng.random() < 0.5 else stay[:0]
                for host in stay[: 1 if len(row) < len(load) else None]:
                    free[host] -= 1
                row.append(stay[:1])
            for homes in row:
                if not homes:
                    host = self.rng.choice([host for host, slots in free.items() if slots > 0])
                    free[host] -= 1
                    homes.append(host)
            for expert, homes in enumerate(row):
                for host in order.current.hosts_of[layer][expert] if self.is_quiet else list(free):
                    if free.get(host, 0) > 0 and host not in homes and (self.is_quiet or self.rng.random() < 0.3):
                        free[host] -= 1
                        homes.append(host)
            rows[layer] = tuple(tuple(homes) for homes in row)
        return Placement(rows)

    def restart_controller(self) -> None:
        reports = [self.started(a) for a in self.actors.values() if a.incarnation and not a.is_hung]
        host_ids = list(self.actors)
        if self.settings.can_sleep and not host_ids:
            return
        empty = [report.address.host_id for report in reports if not keys_of(report.held)]
        standbys = empty[: self.knobs.num_standbys]
        hosts = [host_id for host_id in host_ids if host_id not in standbys]
        life, now_s, make = len(self.lives), self.now_s, self.make_state
        settings, fallback = self.settings, self.first_placement
        self.begin(lambda: make.recovered(settings, reports, hosts, standbys, fallback, life, now_s))
        for report in reports:
            self.oracle.told(report)
        self.handle(ev.Ticked())

    # --- hosts -----------------------------------------------------------------------------------------------
    def budget_bytes(self, host_id: str) -> int | None:
        host = self.state.hosts.get(host_id)
        if host is None or self.settings.preload_standbys:
            return None
        limits = [limit for limit in (self.knobs.max_bytes, self.settings.max_bytes) if limit is not None]
        return min(limits) if limits else None

    def started(self, actor: Actor) -> ev.HostStarted:
        held = {
            layer: tuple(e for e in range(n) if (layer, e) in actor.held)
            for layer, n in self.settings.num_experts.items()
        }
        unsettled: dict[str, set[int]] = {}
        for order in [*([] if actor.at is None else [actor.at]), *actor.orders]:
            for layer, expert in keys_of(order.experts):
                if ((layer, expert) in actor.held) == isinstance(order, ev.DropReplicas):
                    unsettled.setdefault(layer, set()).add(expert)
        address = HostAddress(actor.host_id, actor.incarnation, actor.node, 1, "", "")
        return ev.HostStarted(
            address,
            held,
            max_bytes=self.knobs.max_bytes,
            unsettled={layer: tuple(sorted(experts)) for layer, experts in unsettled.items()},
        )

    def start_actor(self, host_id: str) -> None:
        actor = self.actors[host_id] = Actor(host_id, expert_bytes=self.settings.expert_bytes)
        self.after(self.rng.uniform(0.05, 1.0), self.spawn, actor)

    def spawn(self, actor: Actor) -> None:
        if actor.is_stopped or actor.incarnation:
            return
        if self.happens(self.knobs.p_start_fails):
            self.tell(ev.HostFailed(actor.host_id, "no luck"))
            self.after(self.rng.uniform(0.1, 1.0), self.spawn, actor)
            return
        actor.node = self.rng.choice(self.nodes)
        actor.incarnation = f"{actor.host_id}:{next(self.count)}"
        actor.held, actor.orders, actor.at, actor.is_hung = set(), [], None, False
        self.tell(self.started(actor))

    def poll(self) -> None:
        """Whoever keeps the hosts looks at them now and then; a message that was lost is made up for."""
        for actor in self.actors.values():
            if actor.incarnation and not actor.is_hung:
                self.tell(self.started(actor))
        for host in self.state.hosts.values():
            actor = self.actors[host.host_id]
            if host.phase == "up" and (actor.incarnation != host.incarnation or actor.is_hung):
                self.tell(ev.HostLost(host.host_id, host.incarnation))
        self.after(2.0, self.poll)

    def arrive(self, actor: Actor, life: int, order: ev.LoadReplicas | ev.DropReplicas) -> None:
        if actor.incarnation == order.incarnation and life == len(self.lives):
            actor.orders.append(order)
            self.work(actor)

    def work(self, actor: Actor) -> None:
        if actor.at is not None or not actor.orders:
            return
        order = actor.at = actor.orders.pop(0)
        num_new = len(keys_of(order.experts) - actor.held) if isinstance(order, ev.LoadReplicas) else 0
        self.after(num_new * self.rng.uniform(0.1, 1) * self.knobs.load_s, self.finish, actor, len(self.lives), order)

    def finish(self, actor: Actor, life: int, order: ev.LoadReplicas | ev.DropReplicas) -> None:
        if actor.incarnation != order.incarnation:
            return
        if actor.is_hung:
            self.after(0.2, self.finish, actor, life, order)
            return
        experts = keys_of(order.experts)
        who = (order.op_id, order.host_id, order.incarnation)
        answer: ev.Event
        if isinstance(order, ev.DropReplicas):
            actor.held -= experts
            answer = ev.ReplicasDropped(*who)
        elif self.happens(self.knobs.p_load_fails):
            actor.held |= {key for key in sorted(experts) if self.rng.random() < 0.5}
            answer = ev.ReplicasFailed(*who, reason="no luck")
        else:
            actor.held |= experts
            answer = ev.ReplicasLoaded(*who)
        if life == len(self.lives):  # else nobody is there any more who wants to know
            self.tell(answer)
        actor.at = None
        self.work(actor)

    # --- faults ----------------------------------------------------------------------------------------------
    def alive(self) -> list[Actor]:
        return [actor for actor in self.actors.values() if actor.incarnation]

    def kill(self, actor: Actor) -> None:
        incarnation, actor.incarnation = actor.incarnation, ""
        actor.held, actor.orders = set(), []
        self.tell(ev.HostLost(actor.host_id, self.rng.choice((incarnation, ""))))
        self.after(self.rng.choice((0.1, 1.0, 6.0)), self.spawn, actor)

    def kill_somebody(self) -> None:
        if self.alive():
            self.kill(self.rng.choice(self.alive()))

    def hang_somebody(self) -> None:
        alive = [actor for actor in self.alive() if not actor.is_hung]
        if alive:
            actor = self.rng.choice(alive)
            actor.is_hung = True
            self.tell(ev.HostLost(actor.host_id, actor.incarnation))
            self.after(self.rng.uniform(0.1, 3.0), self.wake, actor, actor.incarnation)

    def wake(self, actor: Actor, incarnation: str) -> None:
        if actor.incarnation == incarnation:
            actor.is_hung = False
            self.tell(self.started(actor))

    def lose_a_node(self) -> None:
        """With or without notice; another node comes in its place."""
        node = self.rng.choice(self.nodes)
        self.num_nodes += 1
        self.nodes[self.nodes.index(node)] = f"node-{self.num_nodes}"
        if self.rng.random() < 0.3:
            self.end_node(node)
            return
        on_it = tuple(actor.host_id for actor in self.alive() if actor.node == node)
        self.tell(ev.DrainRequested(on_it, replace=self.rng.random() < 0.7, notice=True), may_be_lost=False)
        self.after(self.rng.uniform(0.1, 4.0), self.end_node, node)

    def end_node(self, node: str) -> None:
        for actor in self.alive():
            if actor.node == node:
                self.kill(actor)

    # --- people and traffic ----------------------------------------------------------------------------------
    def wish(self) -> None:
        hosts = list(self.state.hosts)
        match self.rng.randint(0, 4):
            case 0 | 1:
                self.handle(ev.SizeRequested(self.rng.randint(0, 7)))
            case 2 if hosts:
                who = tuple(self.rng.sample(hosts, self.rng.randint(1, min(2, len(hosts)))))
                self.handle(ev.DrainRequested(who, replace=self.rng.random() < 0.5))
            case 3:
                self.handle(ev.DrainRequested(("expert-99",)))
            case _:
                self.handle(ev.PlanRequested())

    def last_wish(self) -> None:
        """Enough hosts, so that what was homeless can have a home."""
        state, widest = self.state, max(self.settings.num_experts.values())
        slots = sum(host.slots for host in state.capacities())
        if slots < widest and not state.is_asleep and state.resize is None and state.transaction is None:
            high = 99 if self.settings.scaling is None else self.settings.scaling.max_hosts
            self.handle(ev.SizeRequested(min(max(state.num_hosts + 1, 4), high)))
        if self.now_s < self.knobs.chaos_s + 30:
            self.after(1.0, self.last_wish)

    def shift_traffic(self) -> None:
        self.weights = {layer: self.new_weights(len(weights)) for layer, weights in self.weights.items()}

    def traffic(self) -> None:
        for router in self.routers:
            if self.happens(0.02):
                router.incarnation, router.sequence = router.incarnation + 1, 0
                router.tokens = {layer: [0] * len(tokens) for layer, tokens in router.tokens.items()}
            for layer, weights in self.weights.items():
                router.tokens[layer] = [n + int(10 * w) for n, w in zip(router.tokens[layer], weights, strict=True)]
            router.sequence += 1
            tokens = {layer: tuple(counts) for layer, counts in router.tokens.items()}
            counts = TokenCounts(router.name, str(router.incarnation), router.sequence, tokens)
            self.tell(ev.LoadReported(counts, router.table.epoch))
        self.after(1.0, self.traffic)

    def tick(self) -> None:
        for host in self.rng.sample(
            list(self.state.hosts.values()), 0 if self.is_quiet else min(1, self.state.num_hosts)
        ):
            self.handle(ev.SpeedReported(host.host_id, host.incarnation, self.rng.choice((1e9, 1e9, 2e9))))
        if self.knobs.signals:
            idle_s = self.rng.choice((0.0, 0.0, 9.0)) if not self.is_quiet else 0.0
            busy = self.rng.random() if not self.is_quiet else 0.6
            self.handle(
                ev.SignalsReported(Signals(busy, self.rng.choice((0.0, 2.0)) if not self.is_quiet else 0.0, idle_s))
            )
        self.handle(ev.Ticked())
        self.after(TICK_S if not self.is_quiet else 1.0, self.tick)

    def adopt(self, router: Router, table: RoutingTable) -> None:
        if table.epoch > router.table.epoch:
            router.table = table

    # --- the end ---------------------------------------------------------------------------------------------
    def plan_again(self) -> None:
        """A plan for what was just planned for changes nothing."""
        state = self.state
        load, hosts = state.load.rates(self.now_s), state.capacities()
        planned = planner.plan(load, hosts, state.placement, self.settings.goals)
        again = planner.plan(load, hosts, planned, self.settings.goals)
        if again != planned:
            self.oracle.find("planning again changes the plan")

    def replay(self) -> None:
        """The same events give the same instructions."""
        for number, life in enumerate(self.lives):
            state = life.begin()
            for now_s, event, instructions in life.log:
                if repr(state.handle(event, now_s)) != repr(instructions):
                    self.oracle.find(f"life {number}: another answer to {event} at {now_s:.3f} s when it is replayed")
                    return
