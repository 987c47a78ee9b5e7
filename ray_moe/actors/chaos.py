"""A fault on purpose, and the report on how the service got over it. Runs in the router, where clients' pain is felt.

Off unless the configuration allows it. The same seed chooses the same target among the same hosts.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

import ray

from ray_moe.errors import InvalidRequest, Unavailable
from ray_moe.runtime.vitals import Vitals
from ray_moe.types import ChaosReport, ChaosRequest, HostId, ServiceStatus

if TYPE_CHECKING:
    from ray_moe.transport.partition import PartitionedTransport

POLL_S = 0.05
GIVE_UP_S = 120.0
"""A service that is not whole after this, counted from the end of the fault, is reported as not repaired."""
WATCH_S = 1.0
"""Traffic is watched for so long after the repair, for the balancedness it has then."""

Ask = Callable[[Callable[[Any], Awaitable[Any]]], Awaitable[Any]]


class Patient(Protocol):
    """The service, as the fault sees it (the router)."""

    async def status(self) -> ServiceStatus: ...


async def run_chaos(
    request: ChaosRequest, patient: Patient, network: PartitionedTransport, vitals: Vitals, ask: Ask
) -> ChaosReport:
    """Wait until the time has come, hurt the service, wait until it is whole again, and tell.

    Raises: `InvalidRequest` for a fault that the target cannot have, `NotFound` for a target that is not there.
    """
    await asyncio.sleep(request.at_s)
    before = await patient.status()
    targets = await _choose(request, before, ask)
    began_s = time.monotonic()
    await _strike(request, targets, network, ask)
    if request.kind != "kill":
        await asyncio.sleep(request.duration_s)
    repaired = await _await_whole(request, targets, before, patient)
    repaired_s = time.monotonic() - began_s if repaired else -1.0
    stall_s = vitals.longest_pause_s(began_s)
    await asyncio.sleep(WATCH_S)
    after = await patient.status()
    return ChaosReport(
        kind=request.kind,
        targets=targets,
        stall_s=stall_s,
        failed_requests=after.router.failed_requests - before.router.failed_requests,
        repaired_s=repaired_s,
        balancedness_before=before.router.balancedness,
        balancedness_after=after.router.balancedness,
        retried_calls=after.router.retried_calls - before.router.retried_calls,
        hedged_calls=after.router.hedged_calls - before.router.hedged_calls,
        lifeboat_loads=after.router.lifeboat_loads - before.router.lifeboat_loads,
    )


async def _choose(request: ChaosRequest, status: ServiceStatus, ask: Ask) -> tuple[str, ...]:
    if request.target == "controller":
        if request.kind != "kill":
            raise InvalidRequest(f"the controller can only be killed; {request.kind} is for expert actors")
        return ("controller",)
    if request.target != "random":
        targets: tuple[HostId, ...] = await ask(lambda controller: controller.hosts_named.remote(request.target))
        return targets
    ready = sorted(host.host_id for host in status.hosts if host.state == "ready")
    if not ready:
        raise Unavailable("no expert actor is ready to be hurt; retry when one is")
    return (random.Random(request.seed).choice(ready),)


async def _strike(request: ChaosRequest, targets: tuple[str, ...], network: PartitionedTransport, ask: Ask) -> None:
    if targets == ("controller",):
        await ask(_kill)
    elif request.kind == "partition":
        for host_id in targets:
            network.cut_off(host_id, request.duration_s)
    else:
        await ask(lambda controller: controller.inject.remote(request, targets))


async def _kill(controller: Any) -> None:
    ray.kill(controller, no_restart=False)


async def _await_whole(
    request: ChaosRequest, targets: tuple[str, ...], before: ServiceStatus, patient: Patient
) -> bool:
    """Whether the service came to have what it had: every host ready, nothing under way, the killed in a new life."""
    end_s = time.monotonic() + GIVE_UP_S
    restarts = {host.host_id: host.restarts for host in before.hosts}
    while time.monotonic() < end_s:
        status = await patient.status()
        hosts = {host.host_id: host for host in status.hosts}
        killed = targets if request.kind == "kill" and targets != ("controller",) else ()
        reborn = all(name not in hosts or hosts[name].restarts > restarts.get(name, 0) for name in killed)
        there = all(host.state in ("ready", "standby") for host in status.hosts) and len(hosts) >= len(before.hosts)
        if status.state == "ready" and there and reborn and not status.changing:
            return True
        await asyncio.sleep(POLL_S)
    return False
