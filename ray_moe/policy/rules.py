"""The rules that a `Cluster` keeps after every event, worked out anew from what hosts hold. Called by tests."""

from __future__ import annotations

from collections.abc import Iterator

from ray_moe.policy.cluster import Cluster
from ray_moe.policy.hosts import difference
from ray_moe.policy.rows import ExpertKey
from ray_moe.types import HostId


def broken_rules(cluster: Cluster) -> list[str]:
    """What is wrong, one sentence each."""
    return [*_of_experts(cluster), *_of_hosts(cluster)]


def _of_experts(cluster: Cluster) -> Iterator[str]:
    holders: dict[ExpertKey, set[HostId]] = {}
    for host_id, host in cluster.hosts.items():
        for layer, indices in cluster.fleet.held.on(host_id).items() if host.phase == "up" else ():
            for expert in indices:
                holders.setdefault((layer, expert), set()).add(host_id)
    for layer, experts in cluster.table.placement.hosts_of.items():
        for expert, named in enumerate(experts):
            holding = holders.get((layer, expert), set())
            if not holding.issuperset(named):
                yield f"{layer} {expert}: the table names {named}, but {sorted(holding)} hold it"
            if not named and any(not cluster.hosts[host].is_dismissed for host in holding):
                yield f"{layer} {expert}: {sorted(holding)} hold it, but the table names nobody"
            if named != cluster.tables.row(cluster.placed.of(layer, expert), tuple(sorted(holding)), cluster.hosts):
                yield f"{layer} {expert}: the table was not brought up to date"
            if len(named) > 1 and len(set(named)) < len(named):
                yield f"{layer} {expert}: a host is named twice in {named}"


def _of_hosts(cluster: Cluster) -> Iterator[str]:
    addresses = cluster.table.addresses
    for host in cluster.hosts.values():
        held = cluster.fleet.held.on(host.host_id)
        if host.phase != "up" and (held or host.operation):
            yield f"{host.host_id} is {host.phase}, but holds or does something"
        if difference(cluster.tables.named.on(host.host_id), held):
            yield f"{host.host_id} is named for what it does not hold"
        address = addresses.get(host.host_id)
        if host.phase == "up" and address not in (None, host.address):
            yield f"the table has another address of {host.host_id}"
        if host.phase == "up" and held and not host.is_dismissed and address is None:
            yield f"the table has no address of {host.host_id}, which holds experts"
        if host.standby and cluster.placed.on(host.host_id):
            yield f"experts are placed on {host.host_id}, which is a standby"
    for host_id in cluster.placed.hosts() - cluster.hosts.keys():
        yield f"experts are placed on {host_id}, which is not there"
    for host_id in addresses:
        if host_id not in cluster.hosts or cluster.hosts[host_id].phase != "up":
            yield f"the table has an address of {host_id}, which is not up"
