"""The actor that keeps a service whole: it brings hosts up, notices their loss, and publishes routing tables.

One task per actor of the service follows its life: describe it, tell it what to hold, wait for its end, again. Routers
ask for the next table and report hosts they cannot reach; a standby host, if there is one, takes over at once. If the
controller itself dies, Ray restarts it, and it takes its picture anew from what the hosts hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from ray_moe.actors.spec import ClusterStatus, HostReport, Plan, ServiceSpec
from ray_moe.errors import RayMoEError
from ray_moe.policy.placement import replace_host
from ray_moe.types import HostAddress, HostId, HostStatus, Placement, RoutingTable

logger = logging.getLogger(__name__)

RETRY_S = 0.05
"""Pause before an actor that is restarting is asked again."""
FAILED_S = 1.0
"""Pause before what failed is tried again."""
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
    ended: bool = False
    """Whether the actor has died for good, so that another one must be started in its place."""

    def meet(self, report: HostReport) -> None:
        """Take note of what the present life says of itself."""
        if report.incarnation != self.incarnation:
            self.num_lives += 1
            self.incarnation = report.incarnation
        self.report = report


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
            if ray.get_runtime_context().was_current_actor_reconstructed:
                await self._recover()
            self._keepers = [asyncio.create_task(self._keep_host(host)) for host in self._hosts.values()]
            self._keepers.append(asyncio.create_task(self._keep_router()))
            for keeper in self._keepers:
                keeper.add_done_callback(_log_end)

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
                if host.handle is None:
                    host.handle = await self._launcher.start_host.remote(host.host_id, host.ended)
                    host.ended = False
                host.meet(await host.handle.describe.remote())
                if host.state not in ("ready", "standby"):  # else: a restarted controller found it so
                    await self._bring_up(host)
                await host.handle.until_lost.remote()
            except ActorUnavailableError:  # Ray restarts it
                await self._lose(host)
            except RayTaskError as error:
                await self._fail(host, error)
            except RayError as error:  # for good: restarts used up, killed, out of memory, its node gone
                logger.warning("%s has ended: %s", host.host_id, error)
                host.handle, host.ended = None, True
                if host.num_lives:
                    await self._lose(host)
                else:  # it cannot even begin
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
        self._assign_heirs()
        await self._publish()

    async def _lose(self, host: _Host) -> None:
        """Take `host` out of the table; a standby, if there is one, gets its experts."""
        if host.state != "lost":
            host.state, host.address, host.report = "lost", None, None
            self._assign_heirs()
            await self._publish()

    def _assign_heirs(self) -> None:
        """Give the experts of lost hosts to standbys, as far as there are any."""
        for lost in [host for host in self._hosts.values() if host.plan and host.state == "lost" and self._was_ready]:
            heir = next((host for host in self._hosts.values() if host.state == "standby"), None)
            if heir is None:
                return
            self._placement = replace_host(self._placement, lost.host_id, heir.host_id)
            heir.plan, lost.plan = lost.plan, {}
            if heir.address is not None:  # preloaded: it holds every expert already
                heir.state = "ready"
            else:
                heir.state = "loading"
                self._spawn(self._take_over(heir))

    async def _take_over(self, heir: _Host) -> None:
        try:
            await self._bring_up(heir)
        except RayTaskError as error:
            logger.error("standby %s could not take over: %s", heir.host_id, error.cause)
            ray.kill(heir.handle, no_restart=False)
        except RayError:
            return  # it has died; its keeper knows, and another standby may be next

    async def _examine(self, host: _Host, address: HostAddress) -> None:
        """Is a host that a router could not reach alive after all? A hung one is put down, and so restarted."""
        handle = host.handle
        try:
            report: HostReport = await asyncio.wait_for(handle.describe.remote(), CHECK_TIMEOUT_S)
        except asyncio.TimeoutError:
            ray.kill(handle, no_restart=False)
            return
        except RayError:
            return  # its keeper knows
        if report.busy_s > self._spec.config.router.expert_call_timeout_s:
            logger.error("%s has been at one batch for %.0f s: it is restarted", host.host_id, report.busy_s)
            ray.kill(handle, no_restart=False)
            return
        if report.incarnation != address.incarnation or host.state != "lost":
            return
        host.state = "ready" if host.plan else "standby"
        host.address = address if host.plan or self._spec.config.experts.standby_preload else None
        self._assign_heirs()
        await self._publish()

    async def _fail(self, host: _Host, error: RayError) -> None:
        """Loading failed. Before the service was ever ready this is the end; afterwards it is tried again."""
        self._note_failure(f"{host.host_id} cannot hold its experts", error)
        await self._lose(host)
        await asyncio.sleep(FAILED_S)

    def _note_failure(self, what: str, error: RayError) -> None:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if not isinstance(cause, RayMoEError):
            cause = RayMoEError(f"{what}: {str(cause).strip()}")
        logger.error("%s: %s", what, cause)
        if not self._was_ready:
            self._failure = self._failure or cause

    async def _recover(self) -> None:
        """After a restart of the controller: what the living hosts hold is what they are to hold.

        Their lines stay up: the first table that is published names them as they are, in an epoch after the routers'.
        """
        for host in self._hosts.values():
            host.handle = await self._launcher.start_host.remote(host.host_id)
        asked = [host.handle.describe.remote() for host in self._hosts.values()]
        with contextlib.suppress(ValueError):  # there is no router
            asked.append(ray.get_actor(self._spec.actor_name("router")).epoch.remote())
        answers = await asyncio.gather(
            *(asyncio.wait_for(answer, CHECK_TIMEOUT_S) for answer in asked), return_exceptions=True
        )
        self._epoch = max([0, *(answer for answer in answers if isinstance(answer, int))])
        reports = {
            host.host_id: answer
            for host, answer in zip(self._hosts.values(), answers, strict=False)
            if isinstance(answer, HostReport) and answer.address is not None
        }
        standbys = [self._hosts[host_id] for host_id in self._spec.standbys if host_id in reports]
        for host in [self._hosts[host_id] for host_id in self._spec.hosts]:
            if host.host_id in reports and _covers(reports[host.host_id].held, host.plan):
                continue
            heir = next((other for other in standbys if _covers(reports[other.host_id].held, host.plan)), None)
            if heir is not None:
                standbys.remove(heir)
                self._placement = replace_host(self._placement, host.host_id, heir.host_id)
                heir.plan, host.plan = host.plan, {}
        for host in self._hosts.values():
            report = reports.get(host.host_id)
            if report is not None and host.plan and _covers(report.held, host.plan):
                host.meet(report)
                host.state, host.address = "ready", report.address
        self._was_ready = bool(reports)
        await self._publish()

    # --- the router ------------------------------------------------------------------------------------------
    async def _keep_router(self) -> None:
        ended = False
        while True:
            try:
                self._router = await self._launcher.start_router.remote(ended)
                ended = False
                self._router_port = self._last_port = await self._router.start.remote(self._last_port)
                self._was_ready = self._was_ready or self._is_whole
                await self._router.until_lost.remote()
            except ActorUnavailableError:  # Ray restarts it
                self._router_port = 0
            except RayError as error:  # for good, or it cannot start
                self._router_port, ended = 0, not isinstance(error, RayTaskError)
                self._note_failure("the router cannot start", error)
                await asyncio.sleep(FAILED_S)
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
        if self._is_whole:
            self._failure = None
            return "ready"
        if self._failure is not None:
            return "failed"
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


def _covers(held: Plan, plan: Plan) -> bool:
    """Whether a host that holds `held` can serve `plan`."""
    return all(set(experts) <= set(held.get(layer, ())) for layer, experts in plan.items())


def _log_end(keeper: asyncio.Task[None]) -> None:
    if not keeper.cancelled():
        logger.error("a keeper has ended, which it must not", exc_info=keeper.exception())
