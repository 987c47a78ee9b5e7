"""What follows when hosts are lost or leave: heirs, stand-ins, evacuation.

An *heir* is a standby that takes the whole place of a lost host at once. A *stand-in* is a host with room that takes an
expert which nobody holds any more, until a host is back that the expert is placed on. An *evacuation* moves what is
placed on leaving hosts. All three are derived from the state of the `Cluster` after each event.
"""

from __future__ import annotations

from collections.abc import Collection

from ray_moe.policy.cluster import Cluster
from ray_moe.policy.hosts import HostState, number_of
from ray_moe.policy.migration import evict, find_homes, loads_of, rehome
from ray_moe.policy.rows import ExpertKey, Held
from ray_moe.types import HostId, Placement


def appoint_heirs(cluster: Cluster) -> None:
    """Standbys take the places of lost hosts, which will be standbys when they are back."""
    heirs = [host for host in cluster.fleet.with_role("standby") if host.phase == "up"]
    if not heirs:
        return
    for gone in cluster.fleet.gone(cluster.now_s):
        share = cluster.placed.on(gone.host_id)
        if gone.phase == "up" or not share or not heirs:
            continue
        heir = max(heirs, key=lambda host: (_overlap(cluster, host, share), -number_of(host.host_id)))
        heirs.remove(heir)
        cluster.placed.replace(gone.host_id, heir.host_id)
        if cluster.transaction is not None:
            cluster.transaction.rename(gone.host_id, heir.host_id)
        for key, stand_in in cluster.stand_ins.items():
            if stand_in == gone.host_id:
                cluster.stand_ins[key] = heir.host_id
        gone.role, heir.role = "standby", "serving"
        cluster.due[heir.host_id] = cluster.now_s
        cluster.is_unbalanced = True
        cluster.say("repaired", f"{heir.host_id} takes the place of {gone.host_id}")


def _overlap(cluster: Cluster, host: HostState, share: Held) -> int:
    held = cluster.fleet.held.on(host.host_id)
    return sum(len(experts & held.get(layer, set())) for layer, experts in share.items())


def appoint_stand_ins(cluster: Cluster) -> None:
    """Experts that nobody holds, and nobody is about to, get another host at once, as far as there is room."""
    if not cluster.seeks_homes:
        return
    cluster.seeks_homes = False
    gone = {host.host_id for host in cluster.fleet.gone(cluster.now_s)}
    orphans = _orphans(cluster, gone)
    if not orphans:
        return
    there = {key: host for key in orphans if (host := _holder(cluster, key)) is not None}
    orphans -= there.keys()
    room = cluster.room_bytes(but=gone)
    homes, homeless = _homes(cluster, orphans, room)
    if homeless and cluster.transaction is not None and cluster.resize is None and not cluster.leaving():
        cluster.abort("experts without a host need the room")
        homes, homeless = _homes(cluster, orphans, cluster.room_bytes(but=gone))
    if homeless and not cluster.settings.can_sleep and not cluster.leaving() and cluster.transaction is None:
        homes |= _evict(cluster, homeless, homes, gone)
    for (layer, expert), home in sorted((homes | there).items()):
        others = cluster.placed.of(layer, expert)
        last = cluster.stand_ins.pop((layer, expert), None)
        others = tuple(host for host in others if host not in (last, home))
        cluster.placed.put(layer, expert, (home, *others))
        if others:
            cluster.stand_ins[layer, expert] = home
    if homes:
        cluster.is_unbalanced = True


def _orphans(cluster: Cluster, gone: set[HostId]) -> set[ExpertKey]:
    """Experts that are placed nowhere, or on hosts that are gone and held by none that stays."""
    orphans = set(cluster.placed.empty)
    for host in gone:
        for layer, experts in cluster.placed.on(host).items():
            orphans |= {
                (layer, expert)
                for expert in experts
                if (layer, expert) in cluster.tables.exposed and gone >= set(cluster.placed.of(layer, expert))
            }
    if orphans and cluster.transaction is not None:
        orphans -= {(move.layer, move.expert) for move in cluster.transaction.moves() if move.after}
    return orphans


def _holder(cluster: Cluster, key: ExpertKey) -> HostId | None:
    """A serving host that holds the expert, though it is not placed there."""
    serving = (host for host in cluster.fleet.held.of(*key) if cluster.hosts[host].role == "serving")
    return min(serving, default=None)


def _homes(
    cluster: Cluster, orphans: Collection[ExpertKey], room: dict[HostId, int]
) -> tuple[dict[ExpertKey, HostId], list[ExpertKey]]:
    rates = cluster.current_rates()
    return find_homes(
        orphans, room, loads_of(cluster.placement, rates), cluster.expert_bytes, rates, cluster.fleet.speeds
    )


def _evict(
    cluster: Cluster, homeless: list[ExpertKey], homes: dict[ExpertKey, HostId], gone: set[HostId]
) -> dict[ExpertKey, HostId]:
    """Homes where spare replicas are given up for them: nobody else would compute these experts."""
    room = cluster.room_bytes(but=gone)
    for (layer, _), home in homes.items():
        room[home] -= cluster.expert_bytes[layer]
    rates, rows = cluster.current_rates(), cluster.placement.hosts_of
    there = cluster.tables.named.placement()
    others, shorter, _ = evict(homeless, rows, room, cluster.expert_bytes, rates, there)
    for (layer, expert), row in shorter.items():
        cluster.placed.put(layer, expert, row)
    return others


def dismiss_stand_ins(cluster: Cluster) -> None:
    """Where a host is back that the expert is placed on, its stand-in gives it up again."""
    for (layer, expert), stand_in in list(cluster.stand_ins.items()):
        row, held = cluster.placed.of(layer, expert), cluster.fleet.held.of(layer, expert)
        others = tuple(host for host in row if host != stand_in)
        if stand_in not in row or not others:
            del cluster.stand_ins[layer, expert]
        elif any(host in held and cluster.hosts[host].role == "serving" for host in others):
            del cluster.stand_ins[layer, expert]
            cluster.placed.put(layer, expert, others)


def evacuated(cluster: Cluster) -> tuple[Placement, list[ExpertKey]]:
    """The placement without the leaving hosts, and the experts for which there is no room then."""
    leaving = {host.host_id for host in cluster.leaving()}
    gone = {host.host_id for host in cluster.fleet.gone(cluster.now_s)}
    room, rates, speeds = cluster.room_bytes(but=gone), cluster.current_rates(), cluster.fleet.speeds
    there = cluster.tables.named.placement()
    return rehome(cluster.placement, leaving, room, cluster.expert_bytes, rates, speeds, gone, there)


def evacuate(cluster: Cluster) -> None:
    """Begin to move what is placed on leaving hosts, hottest first, as far as there is room."""
    leaving = [host.host_id for host in cluster.leaving() if cluster.placed.on(host.host_id)]
    if cluster.transaction is not None or cluster.planning is not None or not leaving:
        return  # if a plan is being made, it is made without them
    target, homeless = evacuated(cluster)
    reason = f"{', '.join(leaving)} to go"
    if homeless:
        cluster.say("homeless", f"{reason}: no room for {len(homeless)} experts")
    cluster.begin(reason, target)
