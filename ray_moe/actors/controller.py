"""The actor that keeps a service whole: it brings hosts up, notices their loss, and publishes routing tables.

One task per actor of the service follows its life: describe it, tell it what to hold, wait for its end, again. Routers
ask for the next table and report hosts they cannot reach; a standby host, if there is one, takes over at once. If the
controller itself dies, Ray restarts it, and it takes its picture anew from what the hosts hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from ray_moe.actors.spec import ClusterStatus, HostReport, Plan, ServiceSpec
from ray_moe.errors import RayMoEError
from ray_moe.policy.placement import replace_host
from ray_moe.types import HostAddress, HostId, HostStatus, Placement, RoutingTable

logger = logging.getLogger(__name__)

RETRY_S = 0.05
"""Pause before an actor that is restarting is asked again."""
CHECK_TIMEOUT_S = 2.0
"""A host that a router could not reach and that does not describe itself within this is hung, and put down."""
REPORT_EVERY_S = 0.5
"""How often memory, progress and counts of the hosts are read while somebody looks at the status."""


@dataclass(slots=True)
class _Host:
    """One expert actor, over all its lives."""

    host_id: HostId
    plan: dict[str, list[int]]
    """What it is to hold; empty for a standby."""
    state: str = "starting"
    handle: Any = None
    report: HostReport | None = None
    address: HostAddress | None = None
    num_lives: int = 0
    incarnation: str = ""
    failure: RayMoEError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Controller:
    """Keeps hosts and routers alive and the routing table true."""

    def __init__(self, spec: ServiceSpec) -> None:
        self._spec = spec
        self._launcher = ray.get_actor(spec.actor_name("launcher"))
        self._placement: Placement = spec.placement
        self._epoch = 0
        self._table = RoutingTable(0, spec.placement)
        self._published = asyncio.Condition()
        self._hosts = {
            host_id: _Host(host_id, dict(spec.placement.experts_on(host_id)))
            for host_id in (*spec.hosts, *spec.standbys)
        }
        self._router: Any = None
        self._router_port = 0
        self._last_port = 0
        self._failure: RayMoEError | None = None
        self._was_ready = False
        self._stopping = False
        self._keepers: list[asyncio.Task[None]] = []
        self._background: set[asyncio.Task[None]] = set()
        self._starting = asyncio.Lock()

    # --- asked by the service, the routers and the status ----------------------------------------------------
    async def start(self) -> None:
        """Begin to keep the actors. Idempotent; every method that needs it calls it, also after a restart."""
        async with self._starting:
            if self._keepers or self._stopping:
                return
            for host in self._hosts.values():
                host.handle = await self._launcher.start_host.remote(host.host_id)
            if ray.get_runtime_context().was_current_actor_reconstructed:
                await self._recover()
            self._keepers = [asyncio.create_task(self._keep_host(host)) for host in self._hosts.values()]
            self._keepers.append(asyncio.create_task(self._keep_router()))

    async def table_after(self, epoch: int, timeout_s: float) -> RoutingTable:
        """The routing table, as soon as it is newer than `epoch`, or the present one after `timeout_s`."""
        await self.start()
        if epoch > self._epoch:  # routers remember what a restarted controller has forgotten
            self._epoch = epoch
            await self._publish()
        async with self._published:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._published.wait_for(lambda: self._table.epoch > epoch), timeout_s)
            return self._table

    async def host_lost(self, address: HostAddress) -> None:
        """A router's report that it cannot reach a host. Reports about ended lives are ignored."""
        await self.start()
        host = self._hosts.get(address.host_id)
        if host is None or host.address != address:
            return
        await self._lose(host)
        self._spawn(self._examine(host, address))

    async def status(self) -> ClusterStatus:
        """State, hosts and their counts, as last reported (at most `REPORT_EVERY_S` old)."""
        await self.start()
        await asyncio.gather(*(self._refresh(host) for host in self._hosts.values()))
        failure = self._failure
        return ClusterStatus(
            state=self._state(),
            epoch=self._table.epoch,
            hosts=tuple(self._host_status(host) for host in self._hosts.values()),
            router_port=self._router_port,
            failure="" if failure is None else failure.message,
            failure_class="" if failure is None else type(failure).__name__,
        )

    async def stop(self) -> None:
        """Stop the router (it finishes what it has accepted within its grace), then the hosts."""
        self._stopping = True
        for keeper in (*self._keepers, *self._background):
            keeper.cancel()
        await asyncio.gather(*self._keepers, *self._background, return_exceptions=True)
        await self._stop_actor(self._router)
        await asyncio.gather(*(self._stop_actor(host.handle) for host in self._hosts.values()))
        await self._launcher.end.remote()

    async def _stop_actor(self, handle: Any) -> None:
        """Let an actor end well. One that does not answer, or is not there, the launcher ends all the same."""
        if handle is not None:
            with contextlib.suppress(RayError, asyncio.TimeoutError):
                await asyncio.wait_for(handle.stop.remote(), self._spec.config.server.grace_s + CHECK_TIMEOUT_S)

    # --- the life of a host ----------------------------------------------------------------------------------
    async def _keep_host(self, host: _Host) -> None:
        """Bring `host` up, wait for its end, again and again."""
        while True:
            try:
                report: HostReport = await host.handle.describe.remote()
                if report.incarnation != host.incarnation:
                    host.num_lives += 1
                    host.incarnation = report.incarnation
                host.report = report
                await self._bring_up(host)
                await host.handle.until_lost.remote()
            except ActorDiedError:  # for good: Ray's restarts are used up, or somebody killed the actor
                await self._lose(host)
                host.handle = await self._launcher.start_host.remote(host.host_id)
            except RayActorError:  # restarting
                await self._lose(host)
            except RayTaskError as error:
                await self._fail(host, error)
            await asyncio.sleep(RETRY_S)

    async def _bring_up(self, host: _Host) -> None:
        """Make a fresh life of `host` useful: with its experts, or as a standby."""
        while True:
            plan = host.plan
            host.state = "loading"
            if plan:
                host.address = await host.handle.load.remote(plan)
            elif self._spec.config.experts.standby_preload:
                host.address = await host.handle.load.remote(self._spec.all_experts)
            else:
                await host.handle.prepare.remote()
            if plan == host.plan:  # else: it has taken over from another host meanwhile
                break
        host.state = "ready" if plan else "standby"
        host.changed.set()
        await self._publish()

    async def _lose(self, host: _Host) -> None:
        """Take `host` out of the table; a standby, if there is one, gets its experts."""
        if host.state == "lost":
            return
        was_serving = host.state == "ready"
        host.state, host.address, host.report = "lost", None, None
        heir = next((other for other in self._hosts.values() if other.state == "standby"), None)
        if was_serving and heir is not None:
            self._placement = replace_host(self._placement, host.host_id, heir.host_id)
            heir.plan, host.plan = host.plan, {}
            if heir.address is not None:  # preloaded: it holds every expert already
                heir.state = "ready"
            else:
                heir.state = "loading"
                self._spawn(self._take_over(heir))
        await self._publish()

    async def _take_over(self, heir: _Host) -> None:
        try:
            await self._bring_up(heir)
        except RayActorError:
            return  # its keeper brings it up again, with the same plan
        except RayTaskError as error:
            logger.error("standby %s could not take over: %s", heir.host_id, error.cause)
            ray.kill(heir.handle, no_restart=False)

    async def _examine(self, host: _Host, address: HostAddress) -> None:
        """Is a host that a router could not reach alive after all? A hung one is put down, and so restarted."""
        try:
            report = await asyncio.wait_for(host.handle.describe.remote(), CHECK_TIMEOUT_S)
        except asyncio.TimeoutError:
            ray.kill(host.handle, no_restart=False)
            return
        except RayError:
            return  # its keeper knows
        if report.incarnation != address.incarnation or host.state != "lost":
            return
        if host.plan:
            host.address, host.state = address, "ready"
        else:
            host.state = "standby"
        await self._publish()

    async def _fail(self, host: _Host, error: RayTaskError) -> None:
        """Loading failed. Before the service was ever ready this is the end; afterwards it is tried again."""
        cause = error.cause if isinstance(error.cause, RayMoEError) else RayMoEError(str(error.cause))
        logger.error("%s cannot hold its experts: %s", host.host_id, cause)
        if not self._was_ready:
            self._failure = self._failure or cause
        await self._lose(host)
        await asyncio.sleep(1.0)

    async def _recover(self) -> None:
        """After a restart of the controller: what the living hosts hold is what they are to hold."""
        reports = await asyncio.gather(
            *(asyncio.wait_for(host.handle.describe.remote(), CHECK_TIMEOUT_S) for host in self._hosts.values()),
            return_exceptions=True,
        )
        holders = {
            host.host_id: report.held
            for host, report in zip(self._hosts.values(), reports, strict=True)
            if isinstance(report, HostReport) and report.address is not None
        }
        for host_id in [host_id for host_id in self._spec.hosts if host_id not in holders]:
            host = self._hosts[host_id]
            heir = next((self._hosts[s] for s in self._spec.standbys if holders.get(s) == host.plan), None)
            if heir is not None:
                self._placement = replace_host(self._placement, host_id, heir.host_id)
                heir.plan, host.plan = host.plan, {}

    # --- the router ------------------------------------------------------------------------------------------
    async def _keep_router(self) -> None:
        while True:
            try:
                self._router = await self._launcher.start_router.remote()
                self._router_port = self._last_port = await self._router.start.remote(self._last_port)
                self._was_ready = self._was_ready or self._is_whole
                await self._router.until_lost.remote()
            except RayActorError:
                self._router_port = 0
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, RayMoEError) else RayMoEError(str(error.cause))
                logger.error("the router cannot start: %s", cause)
                if not self._was_ready:
                    self._failure = self._failure or cause
                await asyncio.sleep(1.0)
            await asyncio.sleep(RETRY_S)

    # --- tables and status -----------------------------------------------------------------------------------
    async def _publish(self) -> None:
        addresses = {
            host.host_id: host.address
            for host in self._hosts.values()
            if host.state == "ready" and host.address is not None
        }
        if self._table == RoutingTable(self._epoch, self._placement, addresses):
            return
        self._epoch += 1
        self._table = RoutingTable(self._epoch, self._placement, addresses)
        self._was_ready = self._was_ready or self._is_whole
        async with self._published:
            self._published.notify_all()

    @property
    def _is_whole(self) -> bool:
        return bool(self._router_port) and all(host.state == "ready" for host in self._hosts.values() if host.plan)

    def _state(self) -> str:
        if self._failure is not None:
            return "failed"
        if self._is_whole:
            return "ready"
        return "degraded" if self._was_ready else "starting"

    async def _refresh(self, host: _Host) -> None:
        if host.state in ("starting", "lost"):
            return
        try:
            host.report = await asyncio.wait_for(host.handle.describe.remote(), REPORT_EVERY_S)
        except (RayError, asyncio.TimeoutError):
            return  # busy or going: the last report stands

    def _host_status(self, host: _Host) -> HostStatus:
        preload = self._spec.config.experts.standby_preload and not host.plan
        plan: Plan = self._spec.all_experts if preload else host.plan
        status = HostStatus(
            host_id=host.host_id,
            state=host.state,
            restarts=max(0, host.num_lives - 1),
            weight_bytes=self._spec.bytes_of(plan),
            num_experts=sum(len(experts) for experts in plan.values()),
        )
        report = host.report
        if report is None:
            return status
        return replace(
            status,
            node_id=report.node_id,
            pid=report.pid,
            rss_bytes=report.rss_bytes,
            loaded_bytes=report.loaded_bytes,
            num_calls=report.num_calls,
            num_rows=report.num_rows,
        )

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
