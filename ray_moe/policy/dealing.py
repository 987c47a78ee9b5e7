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
    same_node: Floats | None
    """[H, H] 1 where two hosts are on one node; None when no two are."""
    same_domain: Floats | None
    """[H, H] likewise for failure domains."""

    @property
    def num_nodes(self) -> int:
        return int(self.node.max()) + 1


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
    held: Bools = kept.copy()
    have = kept.sum(-1)
    share = load / number
    placement, expert, host = where(kept)
    at = placement * kept.shape[-1] + host
    level = np.zeros((len(held), held.shape[-1]))
    level += np.bincount(at, share[placement, expert], level.size).reshape(level.shape)
    free = hosts.slots - kept.sum(1)
    closed = np.where(free > 0, 0.0, np.inf)
    island = _islands(kept, have)
    order = _order(share, number, number - have)
    # Where each expert must have several homes and slots are just enough, one may not be wasted: a node with as many
    # free slots as there are experts to come has to get each of them.
    length, to_come = (order >= 0).sum(-1), _experts_to_come(order)
    on_node = (hosts.node[:, None] == np.arange(hosts.num_nodes)).astype(np.float64)
    for step, now in enumerate(order.T):
        rows = np.flatnonzero(now >= 0)
        expert = now[rows]
        mine, part = held[rows, expert], share[rows, expert]
        score = (level[rows] + part[:, None]) / hosts.speed + closed[rows]
        score -= stays * before[rows, expert]
        if target > 1:
            room, others = free[rows] @ on_node, to_come[rows, step, None]
            tight = np.minimum(room, others).sum(-1) <= length[rows] - step
            score += NOT_IN_NEED * (tight[:, None] & (room < others)[:, hosts.node])
        again = have[rows, expert] > 0
        if again.any():
            home = island[rows, mine.argmax(-1)]
            score += SAME_ISLAND * ((island[rows] == home[:, None]) & again[:, None])
            for weight, same in ((SAME_NODE, hosts.same_node), (SAME_DOMAIN, hosts.same_domain)):
                if same is not None:
                    score += weight * (mine @ same)
            np.putmask(score, mine, np.inf)
        host = score.argmin(-1)
        placed = np.isfinite(score[np.arange(len(rows)), host])
        if again.any():
            joined = again & placed
            _join(island, rows[joined], home[joined], island[rows, host][joined])
        if not placed.all():
            rows, expert, host, part = rows[placed], expert[placed], host[placed], part[placed]
        held[rows, expert, host] = True
        have[rows, expert] += 1
        level[rows, host] += part
        free[rows, host] -= 1
        closed[rows, host] = np.where(free[rows, host] > 0, 0.0, np.inf)
    return held


def _order(share: Floats, number: Ints, missing: Ints) -> Ints:
    """[P, N] experts in the order in which their replicas are dealt."""
    order = np.lexsort((-share, number == 1))
    each = np.take_along_axis(missing, order, -1).ravel()
    length = missing.sum(-1)
    sequence = np.full((len(share), int(length.max(initial=0))), -1)
    sequence[np.arange(sequence.shape[1]) < length[:, None]] = np.repeat(order.ravel(), each)
    return sequence


def _experts_to_come(order: Ints) -> Ints:
    """[P, N] how many different experts are dealt from each step on."""
    first = (order >= 0) & (order != np.roll(order, 1, -1))
    if order.shape[-1]:
        first[:, 0] = order[:, 0] >= 0
    seen = first.cumsum(-1)
    to_come: Ints = seen[:, -1:] - seen + 1
    return to_come


def _islands(kept: Bools, have: Ints) -> Ints:
    """[P, H] a number for each host; the same where experts with several homes among `kept` join hosts."""
    island = np.tile(np.arange(kept.shape[-1]), (len(kept), 1))
    placement, expert, host = where(kept & (have > 1)[..., None])
    link = np.flatnonzero((placement[1:] == placement[:-1]) & (expert[1:] == expert[:-1]))
    turn = np.arange(len(link)) - np.searchsorted(placement[link], placement[link])
    for step in range(int(turn.max(initial=-1)) + 1):
        at = link[turn == step]
        rows = placement[at]
        _join(island, rows, island[rows, host[at]], island[rows, host[at + 1]])
    return island


def _join(island: Ints, rows: Ints, into: Ints, other: Ints) -> None:
    """Make one island of two, in each of `rows`."""
    island[rows] = np.where(island[rows] == other[:, None], into[:, None], island[rows])
