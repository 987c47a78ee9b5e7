"""What must be true of a cluster at every moment, stated from what can be seen from outside: messages and memories.

Knows nothing of how `ClusterState` works: only the events it was told, the instructions it gave, and what really is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_moe.policy import events as ev

if TYPE_CHECKING:
    from tests.sim.world import World

Key = tuple[str, int]


def keys_of(experts) -> set[Key]:
    return {(layer, expert) for layer, indices in experts.items() for expert in indices}


class Believed:
    """What anybody who heard the same messages would believe of one host."""

    def __init__(self) -> None:
        self.incarnation = ""
        self.is_up = False
        self.ended: set[str] = set()
        self.held: set[Key] = set()
        self.doubtful: set[Key] = set()
        """Told to be dropped in this life, and not loaded since: not to be counted on."""
        self.order: ev.LoadReplicas | ev.DropReplicas | None = None

    def lose(self) -> None:
        self.is_up, self.held, self.order = False, set(), None


class Oracle:
    """Checks each step. A finding is text; no finding is what everybody wants."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.believed: dict[str, Believed] = {}
        self.findings: list[str] = []

    def find(self, text: str) -> None:
        self.findings.append(f"{self.world.now_s:.3f} s: {text}")

    # --- what was said ---------------------------------------------------------------------------------------
    def told(self, event: ev.Event) -> None:
        match event:
            case ev.HostStarted(address, held):
                self._started(address.host_id, address.incarnation, keys_of(held) - keys_of(event.unsettled))
            case ev.HostLost(host_id, incarnation):
                host = self.believed.get(host_id)
                if host is not None and host.is_up and incarnation in ("", host.incarnation):
                    host.lose()
            case ev.ReplicasLoaded() | ev.ReplicasDropped() | ev.ReplicasFailed():
                host = self.believed.get(event.host_id)
                if host is None or host.order is None or host.order.op_id != event.op_id:
                    return
                if host.incarnation != event.incarnation:
                    return
                about = keys_of(host.order.experts)
                if isinstance(event, ev.ReplicasLoaded):
                    host.held |= about
                    host.doubtful -= about
                host.order = None

    def _started(self, host_id: str, incarnation: str, held: set[Key]) -> None:
        host = self.believed.setdefault(host_id, Believed())
        if host.is_up and (incarnation in host.ended or host.incarnation == incarnation):
            return
        if host.is_up:
            host.lose()
        if host_id not in self.world.state.hosts:
            return
        if host.incarnation != incarnation:
            host.ended.discard(incarnation)
            host.ended.add(host.incarnation)
            host.doubtful, host.order = set(), None
        host.incarnation, host.is_up, host.held = incarnation, True, held - host.doubtful

    # --- what was ordered ------------------------------------------------------------------------------------
    def ordered(self, instruction: ev.Instruction) -> None:
        match instruction:
            case ev.LoadReplicas() | ev.DropReplicas():
                self._order(instruction)
            case ev.StopHost(host_id):
                self._stop(host_id)
            case ev.PublishTable(table):
                if table.epoch <= self.world.last_epoch:
                    self.find(f"epoch {table.epoch} after {self.world.last_epoch}")
                self.world.last_epoch = table.epoch

    def _order(self, order: ev.LoadReplicas | ev.DropReplicas) -> None:
        host = self.believed.get(order.host_id)
        if host is None or not host.is_up or host.incarnation != order.incarnation:
            self.find(f"{order.host_id} is not up, but gets {order}")
            return
        if host.order is not None and host.order.op_id != order.op_id:
            self.find(f"{order.host_id} gets {order} while it is at {host.order}")
        is_new = host.order is None
        host.order = order
        if isinstance(order, ev.DropReplicas) and is_new:
            self._give_up(order.host_id, keys_of(order.experts), "drops")
            host.held -= keys_of(order.experts)
            host.doubtful |= keys_of(order.experts)
        elif isinstance(order, ev.LoadReplicas):
            for donor, experts in order.donors.items():
                giver = self.believed.get(donor)
                if giver is None or not keys_of(experts) <= giver.held:
                    self.find(f"{donor} is to give {experts}, which it does not hold")

    def _stop(self, host_id: str) -> None:
        host = self.believed.get(host_id)
        if host is not None and host.is_up:
            self._give_up(host_id, host.held, "ends with")
        self.believed.pop(host_id, None)

    def _give_up(self, host_id: str, keys: set[Key], how: str) -> None:
        """Nobody may be sent there any more, and somebody else must hold what can be counted on there."""
        state = self.world.state
        for layer, expert in sorted(keys):
            for router in self.world.routers:
                if host_id in router.table.placement.hosts_of.get(layer, {expert: ()})[expert]:
                    self.find(
                        f"{host_id} {how} {layer} {expert}, which a table in use names (epoch {router.table.epoch})"
                    )
            others = [h for h, host in self.believed.items() if h != host_id and (layer, expert) in host.held]
            counted = (layer, expert) in self.believed.get(host_id, Believed()).held
            if counted and not others and not state.is_asleep:
                self.find(f"{host_id} {how} the last replica of {layer} {expert}")

    # --- what is ---------------------------------------------------------------------------------------------
    def check(self) -> None:
        state, table = self.world.state, self.world.state.table
        for broken in state.validate():
            self.find(broken)
        holders: dict[Key, set[str]] = {}
        for host_id, host in self.believed.items():
            for key in host.held:
                holders.setdefault(key, set()).add(host_id)
        actors, addresses = self.world.actors, table.addresses
        for layer, experts in table.placement.hosts_of.items():
            for expert, named in enumerate(experts):
                holding = holders.get((layer, expert), set())
                if not holding.issuperset(named):
                    self.find(f"{layer} {expert} is named on {named}, but held by {sorted(holding)}")
                if holding and not named and not state.is_asleep:
                    self.find(f"{layer} {expert} is held by {sorted(holding)} and named nowhere")
                for host_id in named:
                    address, actor = addresses.get(host_id), actors.get(host_id)
                    if address is None:
                        self.find(f"{host_id} is named for {layer} {expert}, and has no address")
                    elif actor is None or actor.incarnation != address.incarnation:
                        pass  # it has died, and nobody knows
                    elif (layer, expert) not in actor.held:
                        self.find(f"{host_id} is named for {layer} {expert}, and does not have it")
        for actor in actors.values():
            budget = self.world.budget_bytes(actor.host_id)
            if budget is not None and actor.used_bytes > budget + self.world.bytes_per_slot:
                self.find(f"{actor.host_id} holds {actor.used_bytes} bytes, and may hold {budget}")

    def check_end(self) -> None:
        """After the faults, and some time: everything is as it should be."""
        state = self.world.state
        if state.transaction is not None or state.resize is not None:
            self.find(f"still under way: {state.resize or state.transaction}")
        if state.stand_ins:
            self.find(f"stand-ins are not given back: {state.stand_ins}")
        if state.hosts and all(host.draining for host in state.hosts.values()):
            return  # all are to go and none is to come: those that hold the last of something stay while they can
        for host in state.hosts.values():
            if host.phase != "up" or host.operation is not None or host.draining:
                self.find(f"not at rest: {host}")
        if not state.is_asleep:
            for layer, experts in state.placement.hosts_of.items():
                for expert, hosts in enumerate(experts):
                    if not hosts:
                        self.find(f"{layer} {expert} is placed nowhere")
        if state.placement != state.table.placement and not state.is_asleep:
            self.find("the table is not the placement")
        self.check_holders_at_end()

    def check_holders_at_end(self) -> None:
        """The hosts hold what is placed on them, and the routers know it."""
        state, world = self.world.state, self.world
        for host_id, actor in world.actors.items():
            there = state.hosts.get(host_id)
            if there is None:
                self.find(f"{host_id} lives, and is not known")
            elif not there.standby and actor.held != keys_of(state.placement.experts_on(host_id)):
                self.find(f"{host_id} holds {sorted(actor.held)}, not {state.placement.experts_on(host_id)}")
        for router in world.routers:
            if router.table.epoch != state.table.epoch:
                self.find(f"a router is at epoch {router.table.epoch}, and the newest is {state.table.epoch}")
