"""What follows from a wish for another size, for other hosts, or from the notice that a node is going.

Growing: standbys serve from now on and other hosts start; they get their share by a plan, and only then count.
Shrinking and draining: what only the going hosts hold is handed over, and then they end. Falling asleep: all end, and
routers compute for themselves. A notice is no wish: what can be saved is saved, whatever else is under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ray_moe.errors import InsufficientResources, InvalidConfig, NotFound, RayMoEError
from ray_moe.policy import events as ev
from ray_moe.policy.changes import Resize
from ray_moe.policy.cluster import Cluster
from ray_moe.policy.hosts import HostState, number_of
from ray_moe.policy.migration import loads_of
from ray_moe.policy.repair import evacuated
from ray_moe.policy.scaling import Signals, decide
from ray_moe.types import HostId

MOST_HOSTS: Final = 1024
"""As many as plans have been tried with. A slip of the hand must not ask a cluster for a hundred thousand."""


def scale(cluster: Cluster, signals: Signals) -> None:
    """What the service feels, and what it means for the number of hosts."""
    goals, number = cluster.settings.scaling, cluster.num_hosts
    if goals is None or cluster.resize is not None:
        return
    wanted, cluster.scaling = decide(goals, cluster.scaling, signals, number, cluster.now_s)
    if 0 < wanted < number or (wanted and not number):  # as few as can hold every expert, where limits leave a choice
        fewest = min(cluster.fleet.fewest_hosts(), goals.max_hosts)
        wanted = max(wanted, min(fewest, number) if number else fewest)
    if wanted != number:
        cluster.abort("the number of hosts changes", roll_back=False)
        try:
            _change_size(cluster, wanted, "scaling")
        except RayMoEError as error:
            cluster.say("aborted", f"scaling to {wanted} hosts: {error}")


def size_requested(cluster: Cluster, num_hosts: int) -> None:
    """Somebody wants this many hosts. Raises: as `ClusterState.handle`."""
    cluster.refuse_if_changing()
    goals = cluster.settings.scaling
    lowest = 0 if cluster.settings.can_sleep else 1
    low, high, why = lowest, MOST_HOSTS, "as many as one controller plans for"
    if goals is not None:
        low, high, why = max(lowest, goals.min_hosts), goals.max_hosts, "the limits of scaling, which would undo it"
    if not low <= num_hosts <= high:
        raise InvalidConfig(f"{num_hosts} expert actors were asked for; expected {low} to {high}, {why}")
    fewest = cluster.fleet.fewest_hosts()
    if 0 < num_hosts < fewest:
        raise InsufficientResources(
            f"{num_hosts} expert actors cannot hold the {cluster.fleet.widest} experts of a layer, {fewest} can; ask "
            "for as many, or let them hold more (experts.max_bytes)"
        )
    _change_size(cluster, num_hosts, "requested")


def _change_size(cluster: Cluster, num_hosts: int, reason: str) -> None:
    serving = cluster.fleet.with_role("serving")
    text = f"{reason}: {len(serving)} to {num_hosts} hosts"
    if num_hosts > len(serving):
        promoted = _promote(cluster, num_hosts - len(serving))
        started = tuple(cluster.start_host("serving") for _ in range(num_hosts - len(serving) - len(promoted)))
        deadline_s = cluster.now_s + cluster.settings.resize_s
        cluster.begin_resize(Resize(text, deadline_s, added=promoted + started, promoted=promoted))
    elif num_hosts == 0:
        _fall_asleep(cluster, serving, text)
    elif num_hosts < len(serving):
        load = loads_of(cluster.placement, cluster.current_rates())
        # Who is not there anyway, then who gives least, then who came last.
        serving.sort(key=lambda h: (h.phase == "up", load.get(h.host_id, 0.0), -number_of(h.host_id)))
        _let_go(cluster, serving[: len(serving) - num_hosts], text)


def _promote(cluster: Cluster, number: int) -> tuple[HostId, ...]:
    """Up to `number` standbys serve from now on: they are there, where others would have to start."""
    ready = [host for host in cluster.fleet.with_role("standby") if host.phase == "up"][:number]
    for host in ready:
        host.role, host.is_new = "serving", True
        cluster.look_again(host)
    return tuple(host.host_id for host in ready)


def _fall_asleep(cluster: Cluster, serving: Sequence[HostState], reason: str) -> None:
    """Let everything go, those as well that are going already; nobody takes anything over."""
    going = (*serving, *cluster.leaving())
    for host in going:
        host.role, host.is_dismissed = "leaving", True
        cluster.placed.clear(host.host_id)
        cluster.look_again(host)
    cluster.stand_ins.clear()
    removed = tuple(host.host_id for host in going)
    cluster.begin_resize(Resize(reason, cluster.now_s + cluster.settings.resize_s, removed=removed))


def _let_go(cluster: Cluster, going: Sequence[HostState], reason: str) -> None:
    """Have `going` hand over what only they hold, and then end.

    Raises: `InsufficientResources` when the others have no room for it.
    """
    roles = [host.role for host in going]
    for host in going:
        host.role = "leaving"
    _, homeless = evacuated(cluster)
    for host, role in zip(going, roles, strict=True):
        host.role = role
    if homeless:
        missing = sum(cluster.expert_bytes[layer] for layer, _ in homeless)
        raise InsufficientResources(
            f"{', '.join(host.host_id for host in going)} cannot go: the others have no room for {len(homeless)} "
            f"of the experts that only they hold ({missing:,} bytes more are needed); raise experts.max_bytes or "
            "experts.spare_slots, or start others first"
        )
    cluster.set_leaving(going)
    removed = tuple(host.host_id for host in going)
    cluster.begin_resize(Resize(reason, cluster.now_s + cluster.settings.resize_s, removed=removed))


def drain_requested(cluster: Cluster, event: ev.DrainRequested) -> None:
    """Somebody wants hosts to end, or knows that they will. Raises: as `ClusterState.handle`, never for a notice."""
    unknown = [host for host in event.host_ids if host not in cluster.hosts]
    if unknown and not event.notice:
        raise NotFound(f"no expert actors {', '.join(unknown)}; there are {', '.join(cluster.hosts)}")
    going = [cluster.hosts[host] for host in dict.fromkeys(event.host_ids) if host in cluster.hosts]
    going = [host for host in going if not host.draining]
    if not event.notice:
        cluster.refuse_if_changing()
    if not going:
        return
    reason = f"drain of {', '.join(host.host_id for host in going)}"
    roles = [host.role for host in going]
    if event.notice:
        cluster.abort(reason, roll_back=False)
        cluster.say("resizing", f"{reason}: their nodes are going")
        cluster.set_leaving(going)
        for role in roles if event.replace else ():  # not waited for: they get their share when they are up
            cluster.start_host(role)
    elif event.replace:
        added = tuple(cluster.start_host(role) for role in roles)
        removed = tuple(host.host_id for host in going)
        cluster.begin_resize(Resize(reason, cluster.now_s + cluster.settings.resize_s, added=added, removed=removed))
    else:
        _let_go(cluster, going, reason)
