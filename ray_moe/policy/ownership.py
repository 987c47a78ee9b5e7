"""Which host trains which experts: owners, replicas, and who keeps a copy of whose state.

An expert is stepped on one host, its owner; replicas only share its work. What a host owns is in memory nowhere else
but with its keeper, so owners stay where they are as long as they live and nobody has more than a fair share. Pure: no
Ray, no torch, no clock, no I/O. Called by `training/coordinator.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from ray_moe.errors import InsufficientResources
from ray_moe.types import HostAddress, HostId, LayerPath, Placement

Holders = Mapping[LayerPath, Mapping[int, Collection[HostId]]]
"""Hosts that have the state of an expert in memory, by layer and expert."""


def assign(
    num_experts: Mapping[LayerPath, int],
    hosts: Sequence[HostId],
    before: Placement | None = None,
    holders: Holders | None = None,
    num_replicas: int = 1,
) -> Placement:
    """An owner for every expert, as evenly as whole experts can be dealt, and `num_replicas` - 1 further hosts.

    Args:
        num_experts: of each layer.
        hosts: that live; their order decides between equals.
        before: owners to keep where they live and have no more than their share of the layer.
        holders: who could take an expert over without reading it from elsewhere; preferred.
        num_replicas: hosts that compute an expert's rows, its owner among them; at most all.

    Returns: the owner first, then the replicas.

    Raises: `InsufficientResources` without hosts.
    """
    if not hosts:
        raise InsufficientResources("there is no expert actor to train on; start at least one")
    total: Counter[HostId] = Counter(dict.fromkeys(hosts, 0))
    owners = {}
    for layer, count in num_experts.items():
        old = _owners(before, layer, count)
        held = {} if holders is None else holders.get(layer, {})
        owners[layer] = _deal(count, hosts, old, held, total)
    replicas = min(num_replicas, len(hosts))
    place = {host: number for number, host in enumerate(hosts)}
    return Placement(
        {
            layer: tuple(tuple(hosts[(place[owner] + n) % len(hosts)] for n in range(replicas)) for owner in mine)
            for layer, mine in owners.items()
        }
    )


def _owners(before: Placement | None, layer: LayerPath, count: int) -> list[HostId]:
    experts = () if before is None else before.hosts_of.get(layer, ())
    return [hosts[0] if hosts else "" for hosts in experts] if len(experts) == count else [""] * count


def _deal(
    count: int,
    hosts: Sequence[HostId],
    old: Sequence[HostId],
    held: Mapping[int, Collection[HostId]],
    total: Counter[HostId],
) -> list[HostId]:
    """Owners of one layer's experts; `total` is what each host owns in all layers so far, and is brought up to date."""
    share, more = divmod(count, len(hosts))
    kept = Counter(owner for owner in old if owner in total)
    # Those that own most of this layer keep most of it; then those that have least of the other layers.
    order = sorted(range(len(hosts)), key=lambda n: (-kept[hosts[n]], total[hosts[n]], n))
    room = {hosts[number]: share + (rank < more) for rank, number in enumerate(order)}
    owners = [""] * count
    for expert, owner in enumerate(old):
        if room.get(owner, 0):
            owners[expert] = owner
            room[owner] -= 1
    for known in (True, False):  # first all that somebody holds who has room, then the rest, in contiguous blocks
        for expert in (expert for expert in range(count) if not owners[expert]):
            able = [host for host in hosts if room[host] and (not known or host in held.get(expert, ()))]
            if able:
                owners[expert] = max(able, key=lambda host: room[host]) if known else able[0]
                room[owners[expert]] -= 1
    total.update(owners)
    return owners


def keepers(addresses: Mapping[HostId, HostAddress]) -> dict[HostId, HostId]:
    """For each host, the one that keeps a copy of its state: on another node where there is one, each keeps for few.

    A host alone has none.
    """
    chosen: dict[HostId, HostId] = {}
    given: Counter[HostId] = Counter()
    hosts = list(addresses)
    for number, host in enumerate(hosts):
        others = hosts[number + 1 :] + hosts[:number]
        if not others:
            continue
        node = addresses[host].node_id
        keeper = min(others, key=lambda other: (addresses[other].node_id == node, given[other], others.index(other)))
        chosen[host] = keeper
        given[keeper] += 1
    return chosen
