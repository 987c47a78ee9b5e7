"""What is there, made valid with as few moves as possible: every expert somewhere, as often and as far apart as asked.

Hosts come and go and their slots change, so a placement may name too many experts for a host, leave an expert without
any, or keep its replicas on one node. What breaks no rule stays; where there is no free slot for what is missing, the
replicas that carry least make room.

Pure arrays. Called by `planner.py`.

Shape legend: L layers, E experts, H hosts.
"""

from __future__ import annotations

import numpy as np

from ray_moe.policy.dealing import Hosts, choose_counts, deal
from ray_moe.policy.forecast import Bools
from ray_moe.policy.split import Floats, Ints

STAYS = 10.0
"""Load, in mean loads of a host, by which a host that held an expert may exceed the least loaded and get it back."""


def mended(load: Floats, before: Bools, target: int, hosts: Hosts) -> Bools:
    """[L, E, H] `before` where it is valid, else with the least changes that make it so.

    Args:
        load: [L, E] of each expert, in mean loads of a host.
        before: [L, E, H] which host holds which expert; no expert needs to be anywhere.
        target: replicas, on as many nodes, that each expert is to have. The slots are enough for that.
    """
    held: Bools = before.copy()
    rows = np.arange(len(before))
    while len(rows):
        short = num_short(held[rows], target, hosts)
        rows = rows[(short > 0) | (held[rows].sum(1) > hosts.slots).any(-1)]
        kept = np.array([_kept(load[row], held[row], target, hosts) for row in rows], dtype=bool)
        if not len(rows):
            break
        number = np.maximum(kept.sum(-1), 1)
        owed = np.maximum(target - number, 0).sum(-1)
        number = with_added(number, choose_counts(load[rows], number, owed, target, len(hosts.slots)))
        other = deal(load[rows], number, kept, before[rows], STAYS, target, hosts)
        # Slots may not be where they would have to be: what is no better than before would change for nothing.
        better = (num_short(other, target, hosts) < num_short(held[rows], target, hosts)) | (
            held[rows].sum(1) > hosts.slots
        ).any(-1)
        rows = rows[better]
        held[rows] = other[better]
    for row in np.flatnonzero(num_short(held, target, hosts) > 0):
        _swap(load[row], held[row], target, hosts)
    return held


def _swap(load: Floats, held: Bools, target: int, hosts: Hosts) -> None:
    """Give experts of one layer (in place) replicas they lack, where the only free slots are on hosts that have them.

    Another expert, the coldest that can, moves to such a slot and leaves its own. No expert gets fewer nodes by that.
    """
    node = hosts.node
    for expert in np.repeat(np.arange(len(held)), np.maximum(target - held.sum(-1), 0)):
        free = np.flatnonzero(held[expert] & (held.sum(0) < hosts.slots))
        mine = set(node[held[expert]].tolist())
        options = [
            (load[other], other, home, slot)
            for slot in free
            for home in np.flatnonzero(~held[expert])
            if node[home] not in mine or len(mine) == hosts.num_nodes
            for other in np.flatnonzero(held[:, home] & ~held[:, slot])
            if node[slot] == node[home] or node[slot] not in node[held[other]]
        ]
        if options:
            _, other, home, slot = min(options)
            held[other, home], held[other, slot], held[expert, home] = False, True, True


def num_short(held: Bools, target: int, hosts: Hosts) -> Ints:
    """[L] what is missing: homes of experts without any first, then replicas and nodes of others."""
    homes = held.sum(-1)
    short = np.maximum(target - homes, 0)
    if hosts.shares_nodes:
        short = np.maximum(short, min(target, hosts.num_nodes) - num_nodes(held, hosts))
    missing: Ints = short.sum(-1) + (homes == 0).sum(-1) * held.shape[-1] * held.shape[-2]
    return missing


def with_added(number: Ints, added: Ints) -> Ints:
    """[P, E] replicas of each expert, those of `choose_counts` included."""
    row, step = np.nonzero(added >= 0)
    sum_of: Ints = number.copy()
    np.add.at(sum_of, (row, added[row, step]), 1)
    return sum_of


def num_nodes(held: Bools, hosts: Hosts) -> Ints:
    """[..., E] nodes on which each expert is."""
    if not hosts.shares_nodes:
        number: Ints = held.sum(-1)
        return number
    cell, host = np.divmod(np.flatnonzero(held), held.shape[-1])
    is_there = np.zeros((*held.shape[:-1], hosts.num_nodes), dtype=bool)
    is_there.reshape(-1)[cell * hosts.num_nodes + hosts.node[host]] = True
    nodes: Ints = is_there.sum(-1)
    return nodes


def _kept(load: Floats, before: Bools, target: int, hosts: Hosts) -> Bools:
    """[E, H] the replicas of one layer that stay where they are."""
    kept: Bools = before.copy()
    if hosts.shares_nodes:
        for expert in np.flatnonzero(num_nodes(kept, hosts) < min(target, hosts.num_nodes)):
            homes = np.flatnonzero(kept[expert])
            is_first = np.zeros(len(homes), dtype=bool)
            is_first[np.unique(hosts.node[homes], return_index=True)[1]] = True
            kept[expert, homes[~is_first]] = False
    number = kept.sum(-1)
    for host in np.flatnonzero(kept.sum(0) > hosts.slots):
        mine = np.flatnonzero(kept[:, host])
        # Those that are elsewhere as well go first, then those with the least load.
        leave = mine[np.lexsort((load[mine], number[mine] == 1))][: len(mine) - hosts.slots[host]]
        kept[leave, host] = False
        number[leave] -= 1
    free = int((hosts.slots - kept.sum(0)).sum())
    missing = int(np.maximum(target - number, 0).sum())
    while missing > free:
        spare = np.flatnonzero(number > target)
        expert = spare[(load[spare] / number[spare]).argmin()]
        homes = np.flatnonzero(kept[expert])
        fullest = homes[((load / np.maximum(number, 1)) @ kept[:, homes] / hosts.speed[homes]).argmax()]
        kept[expert, fullest] = False
        number[expert] -= 1
        free += 1
    return kept
