"""The expert actors of a service, as its controller sees and tells of them. Used by `controller.py` alone."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ray_moe.actors.spec import HostReport, ServiceSpec
from ray_moe.errors import RayMoEError
from ray_moe.policy import events as ev
from ray_moe.policy.cluster_state import ClusterState
from ray_moe.policy.hosts import HostState, difference, frozen, number_of, union
from ray_moe.policy.rows import Held
from ray_moe.policy.versions import Live, num_copies
from ray_moe.types import HostStatus


@dataclass(slots=True)
class Actor:
    """The expert actor of a host, over all its lives."""

    keeper: asyncio.Task[None] | None = None
    handle: Any = None
    report: HostReport | None = None
    ended: bool = False
    """Whether it has died for good, so that another one must be started in its place."""


def started(report: HostReport, versions: Collection[int]) -> ev.HostStarted:
    """What a host says of itself, as an event. It holds an expert if it does so in all the live `versions`."""
    if report.address is None:
        raise RayMoEError("a host that does not listen has described itself")
    total = union(*report.held.values())
    partial = union(*(difference(total, union(report.held.get(version, {}))) for version in versions))
    return ev.HostStarted(report.address, frozen(total), domain=report.domain, unsettled=frozen(partial))


def weights_bytes(spec: ServiceSpec, experts: Held, versions: Live) -> int:
    """Of `experts` in all of `versions`; what versions have in common takes memory once."""
    if len(versions) == 1:
        return spec.bytes_of(experts)
    expert_bytes = {layer.path: layer.expert_bytes for layer in spec.layers}
    return sum(
        expert_bytes[layer] * num_copies(versions.values(), layer, expert)
        for layer, indices in experts.items()
        for expert in indices
    )


def by_number(hosts: Iterable[HostState]) -> list[HostState]:
    """In the order in which people count them."""
    return sorted(hosts, key=lambda host: number_of(host.host_id))


def host_status(
    spec: ServiceSpec, state: ClusterState, host: HostState, actor: Actor | None, versions: Live
) -> HostStatus:
    """What people are told of a host: what it is to hold, and while it lives what it says of itself."""
    assigned = state.assigned(host.host_id)
    status = HostStatus(
        host_id=host.host_id,
        state=state.phase_name(host),
        restarts=max(0, host.num_lives - 1),
        weight_bytes=weights_bytes(spec, assigned, versions),
        num_experts=sum(len(experts) for experts in assigned.values()),
    )
    report = None if actor is None or host.phase != "up" else actor.report
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
        utilisation=report.busy_fraction,
        queued_rows=report.queued_rows,
    )
