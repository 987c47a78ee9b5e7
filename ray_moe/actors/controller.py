"""The actor that keeps a service whole: the shell around `policy/cluster_state.py`.

It turns what it sees into events (hosts that start and end, routers' counts, wishes of people), hands them to the
state, and carries out the instructions that come back. It decides nothing itself. One task per actor follows that
actor's life. If the controller dies, Ray restarts it, and it takes its picture anew from what the hosts hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from ray_moe.actors import logs, nodes
from ray_moe.actors.expert import Copies
from ray_moe.actors.hosts import Actor, by_number, host_status, started
from ray_moe.actors.publisher import Publisher
from ray_moe.actors.routers import FAILED_S, RETRY_S, Routers
from ray_moe.actors.spec import ClusterStatus, HostReport, RouterReport, RouterVersions, ServiceSpec, cluster_settings
from ray_moe.errors import InvalidRequest, NotFound, RayMoEError
from ray_moe.policy import events as ev
from ray_moe.policy import planner
from ray_moe.policy.cluster_state import ClusterState
from ray_moe.policy.summary import summarise
from ray_moe.policy.survival import p_lossless
from ray_moe.policy.versions import Live, Versions
from ray_moe.types import (
    CanaryRequest,
    ChaosRequest,
    ClusterEvent,
    HostAddress,
    HostId,
    PlanSummary,
    RouterAddress,
    RoutingTable,
    VersionStatus,
)

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 2.0
"""A host that a router could not reach and that does not describe itself within this is hung, and put down."""
REPORT_EVERY_S = 0.5
"""How often memory, progress and counts of the hosts are read while somebody looks at the status."""
NUM_TOLD = 1000
"""Reports of training that are remembered for whoever asks."""
NUM_EVENTS = 200
"""Events that are remembered for whoever asks."""


class Controller:
    """Keeps hosts and routers alive and the routing table true."""

    def __init__(self, spec: ServiceSpec) -> None:
        logs.configure(spec.config.logs, "controller")
        self._spec = spec
        self._settings = cluster_settings(spec.config, spec.layers)
        self._launcher = spec.find("launcher")
        self._state = ClusterState(self._settings, spec.hosts, spec.standbys, spec.placement, now_s=time.monotonic())
        self._actors: dict[HostId, Actor] = {}
        self._published = asyncio.Event()
        self._events: deque[ClusterEvent] = deque(maxlen=NUM_EVENTS)
        self._routers = Routers(self._launcher, self._look_whether_ready, self._note_failure)
        self._publisher = Publisher(
            spec, self._launcher, self._routers, self._actors, lambda: self._state, self._announce, self._spawn
        )
        self._num_told = 0
        self._told: deque[Any] = deque(maxlen=NUM_TOLD)
        self._failure: RayMoEError | None = None
        self._was_ready = False
        self._stopping = False
        self._wakes_s: float | None = None
        """When `_wake` is next called."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting = asyncio.Lock()
        self._started = False
        self._life = 0
        """Restarts of this actor, as the launcher counts them."""

    # --- asked by the service and the routers ----------------------------------------------------------------
    async def start(self) -> None:
        """Begin to keep the actors. Idempotent; every method that needs it calls it, also after a restart."""
        async with self._starting:
            if self._started or self._stopping:
                return
            if ray.get_runtime_context().was_current_actor_reconstructed:
                await self._publisher.recover()
                await self._recover()
            self._started = True
            self._spawn(self._watch_launcher())
            for host_id in list(self._state.hosts):
                self._keep(host_id)
            for router_id in self._spec.routers:
                self._spawn(self._routers.keep(router_id))
            self._spawn(self._tick())

    async def table_after(self, epoch: int, timeout_s: float) -> RoutingTable:
        """The routing table, as soon as it is newer than `epoch`, or the present one after `timeout_s`."""
        await self.start()
        if epoch > self._state.table.epoch:  # of an earlier service with this name
            self._handle(ev.EpochSeen(epoch))
        end_s = time.monotonic() + timeout_s
        while self._state.table.epoch <= epoch and time.monotonic() < end_s:
            published = self._published
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(published.wait(), max(0.0, end_s - time.monotonic()))
        return self._state.table

    async def addresses(self) -> dict[HostId, HostAddress]:
        """Where the expert actors are that live and are to stay: those that training can use."""
        await self.start()
        return {
            host.host_id: actor.report.address
            for host in by_number(self._state.hosts.values())
            if host.phase == "up"
            and not host.draining
            and (actor := self._actors.get(host.host_id)) is not None
            and actor.report is not None
            and actor.report.address is not None
        }

    async def host_lost(self, address: HostAddress) -> None:
        """A router's report that it cannot reach a host. Reports about ended lives are ignored."""
        await self.start()
        host, actor = self._state.hosts.get(address.host_id), self._actors.get(address.host_id)
        if host is None or actor is None or host.phase != "up" or host.incarnation != address.incarnation:
            return
        self._handle(ev.HostLost(host.host_id, address.incarnation))
        self._spawn(self._examine(actor, address))

    async def host_slow(self, address: HostAddress, longest_s: float | None = None) -> None:
        """A report that a host keeps missing its deadlines: one that hangs is put down.

        Args: longest_s: that it may be at one batch; None is what routers wait for.
        """
        await self.start()
        actor = self._actors.get(address.host_id)
        if actor is not None:
            self._spawn(self._examine(actor, address, longest_s))

    async def host_corrupt(self, address: HostAddress) -> None:
        """A router's report that a host answered nonsense where another did not: it is put down, and starts anew."""
        await self.start()
        host, actor = self._state.hosts.get(address.host_id), self._actors.get(address.host_id)
        if host is not None and actor is not None and host.incarnation == address.incarnation and host.phase == "up":
            logger.error("%s computes wrongly: it is put down", address.host_id)
            ray.kill(actor.handle, no_restart=False)

    async def report(self, report: RouterReport) -> tuple[RouterAddress, ...]:
        """What a router counts and feels; in return it hears where all of them are."""
        await self.start()
        self._routers.heard(report)
        self._publisher.heard()
        self._handle(ev.LoadReported(report.counts, report.epoch))
        return self._routers.addresses

    async def versions_after(self, revision: int, timeout_s: float) -> Versions:
        """The versions of the weights, as soon as they are newer than `revision`, or the present ones later."""
        await self.start()
        return await self._publisher.versions_after(revision, timeout_s)

    async def router_has(self, router_id: str, versions: RouterVersions) -> None:
        """A router has done what the versions ask of it."""
        await self.start()
        self._routers.has(router_id, versions)
        self._publisher.heard()

    async def router_left(self, router_id: str) -> None:
        """A router that Ray Serve keeps has ended as it should."""
        self._routers.left(router_id)

    async def stop(self) -> None:
        """Stop the routers (they finish what they have accepted within their grace), then the hosts."""
        self._stopping = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(self._stop_actor(handle) for handle in self._routers.handles))
        await asyncio.gather(*(self._stop_actor(actor.handle) for actor in self._actors.values()))
        await self._launcher.end.remote()

    # --- asked by people -------------------------------------------------------------------------------------
    async def status(self) -> ClusterStatus:
        """State, hosts and their counts, as last reported (at most `REPORT_EVERY_S` old)."""
        await self.start()
        await asyncio.gather(*(self._refresh(host_id) for host_id in list(self._actors)))
        failure, state = self._failure, self._state
        change = state.resize.reason if state.resize else state.transaction.reason if state.transaction else ""
        change = change or self._publisher.change
        nodes_of = {host.host_id: host.node for host in state.hosts.values() if host.phase == "up"}
        return ClusterStatus(
            state=self._state_name(),
            epoch=state.table.epoch,
            hosts=tuple(
                host_status(self._spec, state, host, self._actors.get(host.host_id), self._publisher.live)
                for host in by_number(state.hosts.values())
            ),
            routers=self._routers.addresses,
            changing=change,
            events=tuple(self._events),
            p_lossless=p_lossless(state.table.placement, nodes_of, max(1, self._settings.goals.survive_nodes)),
            failure="" if failure is None else failure.message,
            failure_class="" if failure is None else type(failure).__name__,
            versions=self._publisher.statuses,
        )

    async def publish(self, model: str) -> VersionStatus:
        """Make a checkpoint the current version of the weights; see `Publisher.publish`."""
        await self.start()
        return await self._publisher.publish(model)

    async def roll_back(self, to: int | None) -> VersionStatus:
        """Make an older version current; see `Publisher.roll_back`."""
        await self.start()
        return await self._publisher.roll_back(to)

    async def begin_canary(self, request: CanaryRequest) -> VersionStatus:
        """Try out another version of an expert; see `Publisher.begin_canary`."""
        await self.start()
        return await self._publisher.begin_canary(request)

    async def end_canary(self, promote: bool) -> VersionStatus:
        """Make what is tried out the current version, or let it go; see `Publisher.end_canary`."""
        await self.start()
        return await self._publisher.end_canary(promote)

    async def versions(self) -> tuple[VersionStatus, ...]:
        """Of the weights, the oldest first."""
        await self.start()
        return self._publisher.statuses

    async def plan(self, dry_run: bool) -> PlanSummary:
        """A better placement for the present load; unless `dry_run`, it is also carried out, beside the requests.

        Raises: `Unavailable` when another change is under way, `InsufficientResources` when there is no valid plan.
        """
        await self.start()
        state, now_s = self._state, time.monotonic()
        load, hosts = state.load.rates(now_s), state.capacities()
        target = await asyncio.to_thread(planner.plan, load, hosts, state.placement, self._settings.goals)
        budgets = state.fleet.budgets(state.members)
        summary = summarise(load, hosts, state.table.placement, target, self._settings.expert_bytes, budgets)
        if not dry_run:
            self._handle(ev.PlanRequested())
        return summary

    async def resize(self, num_hosts: int) -> None:
        """Change the number of expert actors, beside the requests. Returns at once; the status tells how it goes.

        Raises: `InvalidConfig`, `InsufficientResources`, `Unavailable` (another change is under way).
        """
        await self.start()
        self._handle(ev.SizeRequested(num_hosts))

    async def drain(self, target: str, replace_hosts: bool) -> tuple[HostId, ...]:
        """Let a host, or all on a node, hand over what they hold, and end. Returns them at once.

        Raises: `NotFound`, `InsufficientResources`, `Unavailable`.
        """
        await self.start()
        host_ids = await self.hosts_named(target)
        self._handle(ev.DrainRequested(host_ids, replace=replace_hosts))
        return host_ids

    async def hosts_named(self, target: str) -> tuple[HostId, ...]:
        """The hosts that `target` means: a host, or ``node:ID`` (or a node's id alone, or its beginning).

        Raises: `NotFound`, naming what there is.
        """
        hosts = self._state.hosts
        if target in hosts:
            return (target,)
        node_id = target.removeprefix("node:")
        found = tuple(host.host_id for host in hosts.values() if node_id and host.node.startswith(node_id))
        if not found:
            on = sorted({host.node for host in hosts.values() if host.node})
            raise NotFound(
                f"no expert actor and no node {target!r}; the actors are "
                f"{', '.join(host.host_id for host in by_number(hosts.values()))}, on the nodes "
                f"{', '.join(node[:12] for node in on)}"
            )
        return found

    async def inject(self, request: ChaosRequest, targets: Sequence[HostId]) -> None:
        """Hurt some hosts; a node is killed whole, with everything of Ray's on it."""
        node_ids = {self._state.hosts[host_id].node for host_id in targets}
        whole_node = request.kind == "kill" and request.target.startswith("node:")
        if whole_node and ray.get_runtime_context().get_node_id() in node_ids:
            raise InvalidRequest(
                "the controller is on that node, and the service would end with it; choose another node"
            )
        for host_id in targets:
            handle = self._actors[host_id].handle
            if request.kind == "kill":
                handle.kill.remote(whole_node)
            else:
                await handle.disturb.remote(request.kind, request.duration_s, request.factor, request.seed)

    # --- told and asked by training --------------------------------------------------------------------------
    async def training_told(self, progress: Any) -> None:
        """How far a run of training is (`training.loop.Progress`)."""
        self._num_told += 1
        self._told.append(progress)
        if progress.event:
            self._events.append(ClusterEvent(time.time(), "training", progress.event))

    async def training(self, after: int) -> tuple[int, list[Any]]:
        """How often something was told, and what was after the first `after` times (of the last `NUM_TOLD`)."""
        missed = min(self._num_told - after, len(self._told))
        return self._num_told, list(self._told)[len(self._told) - missed :] if missed > 0 else []

    async def spec(self) -> ServiceSpec:
        """What a process needs to know that joins the service later, or was of an earlier life of it."""
        return self._spec

    # --- events and instructions -----------------------------------------------------------------------------
    def _handle(self, event: ev.Event) -> None:
        """Tell the state of `event`, and set about what it answers."""
        for instruction in self._state.handle(event, time.monotonic()):
            self._carry_out(instruction)
        self._look_whether_ready()
        due_s = self._state.next_due_s
        if due_s is not None and due_s != self._wakes_s:
            self._wakes_s = due_s
            asyncio.get_running_loop().call_later(max(0.0, due_s - time.monotonic()), self._wake, due_s)

    def _look_whether_ready(self) -> None:
        self._was_ready = self._was_ready or self._is_whole

    def _wake(self, due_s: float) -> None:
        """It is time for what waited to be dropped, or to be tried again."""
        if self._wakes_s == due_s and not self._stopping:
            self._wakes_s = None
            self._handle(ev.Ticked())

    def _carry_out(self, instruction: ev.Instruction) -> None:
        match instruction:
            case ev.StartHost(host_id):
                self._keep(host_id)
            case ev.StopHost(host_id):
                self._spawn(self._end_host(host_id))
            case ev.LoadReplicas():
                self._spawn(self._load(instruction))
            case ev.DropReplicas():
                self._spawn(self._drop(instruction))
            case ev.PlanPlacement():
                self._spawn(self._plan(instruction))
            case ev.PublishTable():
                self._published.set()
                self._published = asyncio.Event()
            case ev.Announce(kind, text):
                self._announce(kind, text)

    def _announce(self, kind: str, text: str) -> None:
        logger.info("%s: %s", kind, text)
        self._events.append(ClusterEvent(time.time(), kind, text))

    async def _load(self, order: ev.LoadReplicas) -> None:
        handle = self._actors[order.host_id].handle
        who = (order.op_id, order.host_id, order.incarnation)
        versions: Live = {}
        try:
            while versions != self._publisher.live:  # another may be published meanwhile
                versions = self._publisher.live
                await handle.load.remote(order.experts, self._copies(order, versions), versions)
        except RayTaskError as error:
            self._note_failure(f"{order.host_id} cannot hold its experts", error)
            self._handle(ev.ReplicasFailed(*who, reason=_reason(error)))
        except RayError:
            return  # it has died; its keeper knows
        else:
            self._handle(ev.ReplicasLoaded(*who))

    def _copies(self, order: ev.LoadReplicas, versions: Live) -> Copies:
        copies = {}
        for donor, experts in order.donors.items():
            giver = self._actors.get(donor)
            if giver is not None and giver.handle is not None:
                copies[donor] = (experts, [giver.handle.export.remote(experts, versions)])
        return copies

    async def _drop(self, order: ev.DropReplicas) -> None:
        with contextlib.suppress(RayError):  # dead: then it holds nothing, and its keeper knows
            await self._actors[order.host_id].handle.drop.remote(order.experts)
            self._handle(ev.ReplicasDropped(order.op_id, order.host_id, order.incarnation))

    async def _plan(self, order: ev.PlanPlacement) -> None:
        try:
            placement = await asyncio.to_thread(planner.plan, order.load, order.hosts, order.current, order.goals)
        except RayMoEError as error:
            self._handle(ev.PlacementPlanned(order.op_id, None, error.message))
        else:
            self._handle(ev.PlacementPlanned(order.op_id, placement))

    async def _tick(self) -> None:
        """Time, and what must be looked at: speeds, signals, nodes that are going."""
        while True:
            await asyncio.sleep(self._settings.balance_every_s)
            reports = await asyncio.gather(*(self._refresh(host_id) for host_id in list(self._actors)))
            busy = [report.busy_fraction for report in reports if report is not None]
            for host in list(self._state.members):
                report = self._actors[host.host_id].report
                if report is not None and report.flops_per_s:
                    self._handle(ev.SpeedReported(host.host_id, report.incarnation, report.flops_per_s))
            signals = self._routers.signals(sum(busy) / len(busy) if busy else 0.0)
            if signals is not None:
                self._handle(ev.SignalsReported(signals))
            await self._heed_notices()
            self._handle(ev.Ticked())

    async def _heed_notices(self) -> None:
        """Nodes that Ray says are going (a spot notice, `ray drain-node`): save what is on them, start others."""
        going = await asyncio.to_thread(nodes.draining)
        hosts = tuple(h.host_id for h in self._state.hosts.values() if h.node in going and not h.draining)
        if hosts:
            self._handle(ev.DrainRequested(hosts, replace=True, notice=True))

    async def _watch_launcher(self) -> None:
        """Ray restarts a lost launcher; what it had started is lost with it, and comes back by its keepers."""
        while True:
            try:
                await self._launcher.until_lost.remote()
            except RayError as error:
                logger.error("the launcher is lost, and what it had started: %s", str(error).splitlines()[:1])
                await self._launcher.remember.remote(self._life, self._publisher.kept)
                self._announce("lost", "the launcher, and with it every actor it had started")
            await asyncio.sleep(RETRY_S)

    # --- the life of a host ----------------------------------------------------------------------------------
    def _keep(self, host_id: HostId) -> None:
        actor = self._actors.setdefault(host_id, Actor())
        actor.keeper = self._spawn(self._keep_host(host_id, actor))

    async def _keep_host(self, host_id: HostId, actor: Actor) -> None:
        """Bring the host up, wait for its end, again and again."""
        while True:
            try:
                actor.handle = await self._launcher.start_host.remote(host_id, actor.ended)
                actor.ended = False
                report = actor.report = await actor.handle.start.remote(self._publisher.live)
                self._host_started(report, actor)
                await actor.handle.until_lost.remote()
            except ActorUnavailableError:  # Ray restarts it
                self._handle(ev.HostLost(host_id, ""))
            except RayTaskError as error:
                self._note_failure(f"{host_id} cannot start", error)
                self._handle(ev.HostFailed(host_id, _reason(error)))
                await asyncio.sleep(FAILED_S)
            except RayError as error:  # for good: restarts used up, killed, out of memory, its node gone
                logger.warning("%s has ended: %s", host_id, error)
                actor.ended = True
                self._handle(ev.HostLost(host_id, ""))
                if actor.report is None:  # it cannot even begin
                    self._note_failure(f"{host_id} cannot start", error)
                    self._handle(ev.HostFailed(host_id, _reason(error)))
                    await asyncio.sleep(FAILED_S)
            await asyncio.sleep(RETRY_S)

    async def _end_host(self, host_id: HostId) -> None:
        actor = self._actors.pop(host_id, None)
        if actor is None:
            return
        if actor.keeper is not None:
            actor.keeper.cancel()
        if actor.report is not None:
            await self._stop_actor(actor.handle)
        await self._launcher.stop_host.remote(host_id)

    async def _stop_actor(self, handle: Any) -> None:
        """Let an actor end well. One that does not answer, or is not there, the launcher ends all the same."""
        if handle is not None:
            with contextlib.suppress(RayError, asyncio.TimeoutError):
                await asyncio.wait_for(handle.stop.remote(), self._spec.config.server.grace_s + CHECK_TIMEOUT_S)

    async def _examine(self, actor: Actor, address: HostAddress, longest_s: float | None = None) -> None:
        """Is a host that a router could not reach alive after all? A hung one is put down, and so restarted."""
        handle = actor.handle
        try:
            report: HostReport = await asyncio.wait_for(handle.describe.remote(), CHECK_TIMEOUT_S)
        except asyncio.TimeoutError:
            logger.error("%s does not answer: it is put down", address.host_id)
            ray.kill(handle, no_restart=False)
            return
        except RayError:
            return  # its keeper knows
        if report.busy_s > (longest_s or self._spec.config.router.expert_call_timeout_s):
            logger.error("%s has been at one batch for %.0f s: it is put down", address.host_id, report.busy_s)
            ray.kill(handle, no_restart=False)
            return
        if report.incarnation == address.incarnation:
            self._host_started(report, actor)

    def _host_started(self, report: HostReport, actor: Actor) -> None:
        self._publisher.tidy(report, actor.handle)
        self._handle(started(report, self._publisher.live))

    def _note_failure(self, what: str, error: RayError) -> None:
        """Before the service was ever ready this is the end; afterwards it is tried again."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if not isinstance(cause, RayMoEError):
            cause = RayMoEError(f"{what}: {str(cause).strip()}")
        logger.error("%s: %s", what, cause)
        if not self._was_ready:
            self._failure = self._failure or cause

    async def _recover(self) -> None:
        """After a restart of the controller: what the living hosts hold is what they are to hold.

        Their lines stay up: the first table that is published names them as they are, and is newer than the routers'.
        """
        self._life = await self._launcher.count_restart.remote()
        host_ids: Sequence[HostId] = await self._launcher.hosts.remote()
        for host_id in host_ids:
            self._actors[host_id] = Actor(handle=await self._launcher.start_host.remote(host_id))
        asked = [actor.handle.describe.remote() for actor in self._actors.values()]
        answers = await asyncio.gather(
            *(asyncio.wait_for(answer, CHECK_TIMEOUT_S) for answer in asked), return_exceptions=True
        )
        reports = {
            host_id: answer
            for host_id, answer in zip(host_ids, answers, strict=True)
            if isinstance(answer, HostReport) and answer.address is not None
        }
        for host_id, report in reports.items():
            self._actors[host_id].report = report
            self._publisher.tidy(report, self._actors[host_id].handle)
        empty = [host_id for host_id in host_ids if host_id in reports and not any(reports[host_id].held.values())]
        spare = [*self._spec.standbys] if self._settings.preload_standbys else []
        spare += sorted(empty, key=lambda host_id: host_id not in self._spec.standbys)
        standbys = [host_id for host_id in dict.fromkeys(spare) if host_id in host_ids][: len(self._spec.standbys)]
        self._state = ClusterState.recovered(
            self._settings,
            [started(report, self._publisher.live) for report in reports.values()],
            [host_id for host_id in host_ids if host_id not in standbys],
            standbys,
            self._spec.placement,
            life=self._life,
            now_s=time.monotonic(),
        )
        self._was_ready = bool(reports)
        self._handle(ev.Ticked())

    # --- status ----------------------------------------------------------------------------------------------
    @property
    def _is_whole(self) -> bool:
        """Whether clients are answered and every expert has a living replica (or nobody is meant to have any).

        A start is over when all routers are ready; later any one will do.
        """
        routers = min(1, len(self._spec.routers)) if self._was_ready else len(self._spec.routers)
        return self._routers.num_ready >= routers and (self._state.table.is_complete or self._state.is_asleep)

    def _state_name(self) -> str:
        if self._is_whole:
            self._failure = None
            return "ready"
        if self._failure is not None:
            return "failed"
        return "degraded" if self._was_ready else "starting"

    async def _refresh(self, host_id: HostId) -> HostReport | None:
        actor, host = self._actors.get(host_id), self._state.hosts.get(host_id)
        if actor is None or host is None or host.phase != "up":
            return None
        with contextlib.suppress(RayError, asyncio.TimeoutError):  # busy or going: the last report stands
            actor.report = await asyncio.wait_for(actor.handle.describe.remote(), REPORT_EVERY_S)
        return actor.report

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_end)
        return task


def _reason(error: RayError) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {cause}".strip().splitlines()[0]


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("a task of the controller has failed, which it must not", exc_info=task.exception())
