"""Which host gets which replica: the construction behind `planner.py`, for many layers and variants at once.

Replicas are dealt one by one to the host with the least load, in an order and with a preference that serve the split of
each batch (`split.py`) rather than the last window:

- Experts with more homes than one come first, hottest replica first. So every host gets its part of the load that can
  flow elsewhere; dealt together with the others, some hosts would have none of it and be stuck with what they hold.
- The next home of an expert is looked for among the hosts that no flow joins to it yet. With as many spare slots as
  hosts that joins all hosts: an island of two hosts would have to bear its batches alone.

Pure arrays. Called by `planner.py`.

Shape legend: P placements, E experts, H hosts, N replicas to deal (the most of a placement; shorter ones end in -1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ray_moe.policy.forecast import Bools, where
from ray_moe.policy.split import Floats, Ints

FLATTEN = 0.9
"""A further replica goes to the expert with the most load / replicas**FLATTEN: a little below 1, so that somewhat more
go to the hottest experts, whose homes reach furthest. Measured on drifting batches, see `benchmarks/balance.py`."""

OWED = 1e6
"""Outweighs any load: the expert has fewer replicas than each is to have."""

CELLS_AT_ONCE = 2**14
"""Placements times hosts that are dealt side by side. Each step looks at all of them a dozen times: of more, memory is
what takes time, and of fewer, numpy's calls."""

# What a host's load is raised by in the comparison, in mean loads of a host: each outweighs all that follow.
SAME_NODE, NOT_IN_NEED, SAME_DOMAIN, SAME_ISLAND = 1e5, 1e4, 1e2, 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Hosts:
    """The hosts as arrays, in the order of their ids."""

    slots: Ints
    """[H] replicas of a layer that each may hold."""
    speed: Floats
    """[H] relative; their mean is 1."""
    node: Ints
    """[H] number of the node that each is on."""
    domain: Ints
    """[H] number of the failure domain."""

    @property
    def num_nodes(self) -> int:
        return int(self.node.max()) + 1

    @property
    def shares_nodes(self) -> bool:
        """Whether two hosts are on one node."""
        return self.num_nodes < len(self.node)

    @property
    def apart(self) -> tuple[tuple[float, Ints], ...]:
        """What replicas of an expert are to be kept apart by, with its weight: [H] places that several hosts share."""
        weighted = ((SAME_NODE, self.node), (SAME_DOMAIN, self.domain))
        return tuple((weight, place) for weight, place in weighted if int(place.max()) + 1 < len(place))


def choose_counts(load: Floats, number: Ints, limit: Ints, target: int, num_hosts: int) -> Ints:
    """Which experts get further replicas, the most needed first.

    Args:
        load: [P, E] of each expert.
        number: [P, E] replicas of each so far, at least 1.
        limit: [P] how many may be added.
        target: replicas that each expert is to have before any gets more.

    Returns: [P, N] the expert of each further replica; -1 from where no more can be added.
    """
    number = number.copy()
    rows = np.arange(len(load))
    added = np.full((len(load), int(limit.max(initial=0))), -1)
    need = np.where(number < num_hosts, load / number**FLATTEN + OWED * (number < target), -1.0)
    for step in range(added.shape[1]):
        expert = need.argmax(-1)
        there = (limit > step) & (need[rows, expert] >= 0)
        added[there, step] = expert[there]
        number[rows, expert] += there
        now = number[rows, expert]
        need[rows, expert] = np.where(now < num_hosts, load[rows, expert] / now**FLATTEN + OWED * (now < target), -1.0)
    return added


def deal(load: Floats, number: Ints, kept: Bools, before: Bools, stays: float, target: int, hosts: Hosts) -> Bools:
    """Give hosts to the replicas that have none yet.

    Args:
        load: [P, E] of each expert, in mean loads of a host.
        number: [P, E] replicas that each expert is to have; their sum is within the slots.
        kept: [P, E, H] replicas that are where they are to be.
        before: [P, E, H] replicas that are there now.
        stays: load by which a host that holds the expert now may exceed the least loaded one.
        target: replicas, on as many nodes, that each expert is to have.

    Returns: [P, E, H] `kept` and what was dealt. Every expert has a host; a further replica for which each host with a
        free slot holds the expert already is left out.
    """
    size = max(1, CELLS_AT_ONCE // len(hosts.slots))
    parts = [slice(begin, begin + size) for begin in range(0, len(load), size)]
    if len(parts) > 1:
        return np.concatenate(
            [_deal(load[at], number[at], kept[at], before[at], stays, target, hosts) for at in parts], dtype=bool
        )
    return _deal(load, number, kept, before, stays, target, hosts)


def _deal(load: Floats, number: Ints, kept: Bools, before: Bools, stays: float, target: int, hosts: Hosts) -> Bools:
    """`deal` for so many placements that what a step looks at stays in the cache."""
    num_placements, num_experts, num_hosts = kept.shape
    placement, expert, host = where(kept)
    cell, spot = placement * num_experts + expert, placement * num_hosts + host
    have = np.bincount(cell, minlength=number.size).reshape(number.shape)
    free = hosts.slots - np.bincount(spot, minlength=num_placements * num_hosts).reshape(num_placements, num_hosts)
    share = load / number
    level = np.where(free > 0, np.bincount(spot, share.ravel()[cell], free.size).reshape(free.shape), np.inf)
    island = np.tile(np.arange(num_hosts), (num_placements, 1))
    several = have.ravel()[cell] > 1
    _join_homes(island, placement[several], expert[several], host[several])
    order = _order(share, number, number - have)
    # Those with the most to deal come first: at each step, the ones not yet done are the first so many.
    longest = np.argsort(-(order >= 0).sum(-1), kind="stable")
    order, level, free, island = np.ascontiguousarray(order[longest].T), level[longest], free[longest], island[longest]
    busy, length, to_come = (order >= 0).sum(-1), (order >= 0).sum(0), _experts_to_come(order)
    cell = longest * num_experts + order
    part, again = share.ravel()[cell], have.ravel()[cell] > 0
    again[1:] |= order[1:] == order[:-1]
    on_node = (hosts.node[:, None] == np.arange(hosts.num_nodes)).astype(np.float64)
    held: Bools = kept.copy()
    homes, old_homes = held.reshape(-1, num_hosts), before.reshape(-1, num_hosts)
    first, places = np.arange(num_placements) * num_hosts, hosts.apart
    for step, now in enumerate(busy.tolist()):
        at, more = cell[step, :now], np.flatnonzero(again[step, :now])
        score = (level[:now] + part[step, :now, None]) / hosts.speed
        np.subtract(score, stays, out=score, where=old_homes.take(at, 0))
        if target > 1:
            # Where each expert must have several homes and slots are just enough, one may not be wasted: a node with
            # as many free slots as there are experts to come has to get each of them.
            room, others = free[:now] @ on_node, to_come[step, :now, None]
            tight = np.minimum(room, others).sum(-1) <= length[:now] - step
            score += NOT_IN_NEED * (tight[:, None] & (room < others)[:, hosts.node])
        if len(more):
            mine, apart = homes.take(at[more], 0), score.take(more, 0)
            home = island[more, mine.argmax(-1)]
            apart += SAME_ISLAND * (island.take(more, 0) == home[:, None])
            for weight, place in places:
                apart += weight * _num_beside(mine, place)
            apart[mine] = np.inf
            score[more] = apart
        host = score.argmin(-1)
        spot, added = first[:now] + host, part[step, :now]
        if len(more):
            placed = np.isfinite(score.ravel()[spot])
            joined = placed[more]
            _join(island, more[joined], home[joined], island.ravel()[spot[more[joined]]])
            at, host, spot, added = at[placed], host[placed], spot[placed], added[placed]
        homes[at, host] = True
        level.ravel()[spot] += added
        free.ravel()[spot] -= 1
        level.ravel()[spot[free.ravel()[spot] <= 0]] = np.inf
    return held


def _num_beside(held: Bools, place: Ints) -> Ints:
    """[n, H] for each host, how many of those that are `held` are in the same place ([H], numbered from 0)."""
    row, host = np.divmod(np.flatnonzero(held), held.shape[-1])
    num_places = int(place.max()) + 1
    number = np.bincount(row * num_places + place[host], minlength=len(held) * num_places)
    return number.reshape(len(held), num_places).take(place, 1)


def _order(share: Floats, number: Ints, missing: Ints) -> Ints:
    """[P, N] experts in the order in which their replicas are dealt."""
    order = np.lexsort((-share, number == 1))
    each = np.take_along_axis(missing, order, -1).ravel()
    length = missing.sum(-1)
    sequence = np.full((len(share), int(length.max(initial=0))), -1)
    sequence[np.arange(sequence.shape[1]) < length[:, None]] = np.repeat(order.ravel(), each)
    return sequence


def _experts_to_come(order: Ints) -> Ints:
    """[N, P] how many different experts are dealt from each step on."""
    first = order >= 0
    first[1:] &= order[1:] != order[:-1]
    seen = first.cumsum(0)
    to_come: Ints = seen[-1:] - seen + 1
    return to_come


def _join_homes(island: Ints, placement: Ints, expert: Ints, host: Ints) -> None:
    """Make one island of the homes of each expert, given the placement, expert and host of each replica, ascending."""
    link = np.flatnonzero((placement[1:] == placement[:-1]) & (expert[1:] == expert[:-1]))
    turn = np.arange(len(link)) - np.searchsorted(placement[link], placement[link])
    for step in range(int(turn.max(initial=-1)) + 1):
        at = link[turn == step]
        rows = placement[at]
        _join(island, rows, island[rows, host[at]], island[rows, host[at + 1]])


def _join(island: Ints, rows: Ints, into: Ints, other: Ints) -> None:
    """Make one island of two, in each of `rows`."""
    mine = island.take(rows, 0)
    island[rows] = np.where(mine == other[:, None], into[:, None], mine)
