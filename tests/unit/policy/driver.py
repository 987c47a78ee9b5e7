"""A cluster that a test plays by hand: it says what hosts and routers say, and keeps what is to be done about it.

Time stands still and nothing is answered until the test says so, or calls `run`, which does everything that is asked.
Placements are written as one string of host numbers per expert: ``["0", "01", ""]`` has expert 0 on ``expert-0``,
expert 1 there and on ``expert-1``, and expert 2 nowhere.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pytest

from ray_moe.errors import RayMoEError
from ray_moe.policy import events as ev
from ray_moe.policy import planner
from ray_moe.policy.cluster_state import ClusterState
from ray_moe.policy.hosts import ClusterSettings
from ray_moe.policy.load import TokenCounts
from ray_moe.types import HostAddress, LayerSpec, Placement

LAYER = "layers.0"
EXPERT_BYTES = 10

Kind = TypeVar("Kind")


def placement(*homes: str, layer: str = LAYER) -> Placement:
    """The placement with these hosts of each expert."""
    return Placement({layer: tuple(tuple(f"expert-{number}" for number in hosts) for hosts in homes)})


def homes(of: Placement, layer: str = LAYER) -> list[str]:
    """The numbers of the hosts of each expert, best first."""
    return ["".join(host.rpartition("-")[2] for host in hosts) for hosts in of.hosts_of[layer]]


def of_kind(instructions: Sequence[object], kind: type[Kind]) -> list[Kind]:
    return [one for one in instructions if isinstance(one, kind)]


def stopped(instructions: Sequence[object]) -> list[str]:
    """The hosts that are to end."""
    return [one.host_id for one in of_kind(instructions, ev.StopHost)]


def settings_of(num_experts: int = 4, num_layers: int = 1, **others: Any) -> ClusterSettings:
    """Nothing is planned unless somebody asks, and a host may hold its equal share and one expert more."""
    layers = tuple(
        LayerSpec(f"layers.{number}", num_experts, 1, 1, "bfloat16", EXPERT_BYTES) for number in range(num_layers)
    )
    defaults: dict[str, Any] = {"balance": False, "drain_s": 2.0, "resize_s": 30.0, "replan_s": 5.0, "repeat_s": 10.0}
    return ClusterSettings(layers=layers, **(defaults | others))


class Driver:
    """See the module."""

    def __init__(
        self,
        num_hosts: int = 2,
        num_standbys: int = 0,
        placed: Placement | None = None,
        told_bytes: int | None = None,
        **settings: Any,
    ) -> None:
        """Args: told_bytes: what hosts say they may hold."""
        names = [f"expert-{number}" for number in range(num_hosts + num_standbys)]
        self.settings = settings_of(**settings)
        self.state = ClusterState(self.settings, names[:num_hosts], names[num_hosts:], placed)
        self.told_bytes = told_bytes
        self.now_s = 0.0
        self.log: list[ev.Instruction] = []
        """All that was to be done, oldest first."""
        self.orders: dict[str, ev.LoadReplicas | ev.DropReplicas] = {}
        """What hosts are doing."""
        self.plans: list[ev.PlanPlacement] = []
        """Plans that are asked for and not answered yet."""
        self.to_start: set[str] = set(names)
        """Hosts that are to start, and have not in this life."""
        self.num_lives: dict[str, int] = {}
        self.sequence = 0

    @classmethod
    def ready(cls, *args: Any, **kwargs: Any) -> Driver:
        """A cluster that is at rest: every host is up and has what it should have, at 10 s."""
        driver = cls(*args, **kwargs)
        driver.run(10.0)
        driver.log.clear()
        return driver

    # --- time ------------------------------------------------------------------------------------------------
    def tell(self, event: ev.Event) -> list[ev.Instruction]:
        """What is to be done about `event`."""
        instructions = self.state.handle(event, self.now_s)
        self.log.extend(instructions)
        for one in instructions:
            match one:
                case ev.LoadReplicas() | ev.DropReplicas():
                    self.orders[one.host_id] = one
                case ev.PlanPlacement():
                    self.plans.append(one)
                case ev.StartHost(host_id):
                    self.to_start.add(host_id)
                case ev.StopHost(host_id):
                    self.to_start.discard(host_id)
                    self.orders.pop(host_id, None)
        assert self.state.validate() == []
        return instructions

    def wait(self, seconds: float) -> list[ev.Instruction]:
        """Time passes, and nobody answers anything."""
        self.now_s += seconds
        return self.tell(ev.Ticked())

    def run(self, seconds: float, starts: bool = True) -> None:
        """Time passes in steps, and all that is to be done is done at once; hosts start if `starts`."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s = min(end_s, self.now_s + 0.5)
            self.tell(ev.Ticked())
            while self.plans or self.orders or (starts and self.to_start):
                for host_id in sorted(self.to_start) if starts else ():
                    self.start(host_id)
                self.load_all()
                if self.plans:
                    self.plan()

    # --- what hosts say --------------------------------------------------------------------------------------
    def incarnation(self, host_id: str, life: int | None = None) -> str:
        return f"{host_id}:{self.num_lives.get(host_id, 0) if life is None else life}"

    def started(self, host_id: str, held: Sequence[int] = (), life: int | None = None) -> ev.HostStarted:
        """What a host says of itself, in its present life unless another is named."""
        address = HostAddress(host_id, self.incarnation(host_id, life), f"node of {host_id}", 1, "", "")
        return ev.HostStarted(address, {LAYER: tuple(held)}, max_bytes=self.told_bytes)

    def start(self, *host_ids: str) -> list[ev.Instruction]:
        """New lives of these hosts, with nothing in them."""
        instructions = []
        for host_id in host_ids:
            self.num_lives[host_id] = self.num_lives.get(host_id, 0) + 1
            self.to_start.discard(host_id)
            instructions += self.tell(self.started(host_id))
        return instructions

    def lose(self, host_id: str) -> list[ev.Instruction]:
        self.orders.pop(host_id, None)
        return self.tell(ev.HostLost(host_id, self.incarnation(host_id)))

    def answer(self, host_id: str, failure: str = "") -> list[ev.Instruction]:
        """The host has carried out its order, or could not."""
        order = self.orders.pop(host_id)
        who = (order.op_id, order.host_id, order.incarnation)
        if failure:
            return self.tell(ev.ReplicasFailed(*who, reason=failure))
        return self.tell(ev.ReplicasLoaded(*who) if isinstance(order, ev.LoadReplicas) else ev.ReplicasDropped(*who))

    def load_all(self) -> None:
        """Hosts carry out what they are told until there is nothing left to do."""
        while self.orders:
            self.answer(min(self.orders))

    # --- what planners and routers say -----------------------------------------------------------------------
    def plan(self, planned: Placement | None = None, why_not: str = "") -> list[ev.Instruction]:
        """The answer to the oldest plan that is asked for: `planned`, none because of `why_not`, or a real one."""
        order = self.plans.pop(0)
        if planned is None and not why_not:
            try:
                planned = planner.plan(order.load, order.hosts, order.current, order.goals)
            except RayMoEError as error:
                why_not = error.message
        return self.tell(ev.PlacementPlanned(order.op_id, planned, why_not))

    def begin(self, planned: Placement) -> list[ev.Instruction]:
        """Have somebody ask for a plan, and this be the answer."""
        self.tell(ev.PlanRequested())
        return self.plan(planned)

    def route(self, *tokens: int, seconds: float = 20.0) -> None:
        """A router has sent so many tokens to each expert of the first layer in each of the last seconds."""
        for total in (tuple(0 for _ in tokens), tuple(int(seconds * rate) for rate in tokens)):
            self.sequence += 1
            counts = TokenCounts("router", "1", self.sequence, {LAYER: total})
            self.tell(ev.LoadReported(counts, self.state.table.epoch))
            if not any(total):
                self.wait(seconds)

    # --- what is seen from outside ---------------------------------------------------------------------------
    def seen(self, kind: type[Kind]) -> list[Kind]:
        """Instructions of a kind that are in the log."""
        return of_kind(self.log, kind)

    @property
    def named(self) -> list[str]:
        """Whom the newest table names for each expert."""
        return homes(self.state.table.placement)

    @property
    def placed(self) -> list[str]:
        return homes(self.state.placement)

    @property
    def phases(self) -> dict[str, str]:
        """By the number of each host."""
        return {name.rpartition("-")[2]: self.state.phase_name(host) for name, host in self.state.hosts.items()}

    def told(self, kind: str) -> list[str]:
        """The announcements of a kind that are in the log."""
        return [one.text for one in self.seen(ev.Announce) if one.kind == kind]


def later(driver: Driver) -> list[str]:
    """What becomes of a cluster: all is done that is asked; then a host dies, and people want a size and a plan."""
    driver.log.clear()
    driver.run(40.0)
    for event in (ev.HostLost(min(driver.state.hosts), ""), ev.SizeRequested(3), ev.PlanRequested()):
        try:
            driver.tell(event)
        except RayMoEError as error:
            driver.tell(ev.Ticked())
            driver.log.append(ev.Announce("refused", error.message))
        driver.run(20.0)
    return [repr(one) for one in (*driver.log, driver.state.table, driver.state.placement)]


def assert_refused(driver: Driver, event: ev.Event, error: type[RayMoEError], *texts: str) -> None:
    """`event` raises `error`, whose message has all of `texts`, and is as if it had never been."""
    twin = copy.deepcopy(driver)
    with pytest.raises(error) as raised:
        driver.tell(event)
    for text in texts:
        assert text in raised.value.message
    _assert_alike(driver, twin)


def assert_ignored(driver: Driver, *events: ev.Event) -> None:
    """There is nothing to do about `events`, and it is as if they had never been."""
    driver.tell(ev.Ticked())
    twin = copy.deepcopy(driver)
    for event in events:
        assert driver.tell(event) == []
    _assert_alike(driver, twin)


def _assert_alike(driver: Driver, twin: Driver) -> None:
    assert driver.state.table == twin.state.table
    assert driver.state.placement == twin.state.placement
    assert driver.phases == twin.phases
    assert later(driver) == later(twin)


def layers_of(experts: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The experts of the first layer."""
    return experts.get(LAYER, ())
