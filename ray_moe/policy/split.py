"""How one batch's rows are divided over the replicas of each expert.

A placement is made for the loads of the last minutes; a batch differs from them, and everybody waits for its slowest
host. So each batch is divided for itself, by water-filling: one expert after the other levels the hosts that hold it,
in a few sweeps. Each step lowers the sum of squared loads, and where that is least, so is the largest load.

Pure: decides from counts, sends nothing, knows no host by name. Called by the router once per layer and batch, so it is
on the hot path. It starts from equal shares, by numpy; the sweeps are a plain loop over the experts that have a choice,
because each must see what the one before did, and up to some hundred of them Python does that sooner than numpy does it
in independent parts (0.3 microseconds an expert and sweep).

Shape legend: E experts, R replicas, H hosts, n experts touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

NOWHERE = -1
"""The replica of an expert that has none."""

MAX_SWEEPS = 64
"""Most sweeps over a batch. Long chains of hosts need them; many batches end after three or four."""

CLOSE_ENOUGH = 1.0005
"""Largest host load over its lower bound, from which on another sweep is not worth its time."""

STILL_FALLING = 0.9995
"""Largest host load over the one two sweeps ago, up to which another sweep is worth its time."""

LEAST_MOVE = 0.05
"""Rows; less is not worth its time."""

MAX_WHOLE_SWEEPS = 4
"""Most sweeps in whole rows, after rounding."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Replicas:
    """The replicas of one layer that can be reached, grouped by expert: those of expert e are start[e]:start[e + 1].

    Made once per view of a routing table. What a split needs to know of it is worked out once, when it is first asked
    for: where replicas are many and hosts come and go, many views are never split over.
    """

    start: Ints
    """[E + 1] ascending, from 0 to R."""
    host: Ints
    """[R] host number of each replica; within an expert all distinct."""
    num_hosts: int
    """H."""

    @cached_property
    def _of_expert(self) -> Ints:
        """[E] how many each expert has."""
        number: Ints = np.diff(self.start)
        return number

    @cached_property
    def expert(self) -> Ints:
        """[R] expert of each replica."""
        return np.repeat(np.arange(len(self._of_expert)), self._of_expert)

    @cached_property
    def rank(self) -> Ints:
        """[R] place of each replica among its expert's."""
        rank: Ints = np.arange(len(self.expert)) - self.start[self.expert]
        return rank

    @cached_property
    def number(self) -> Ints:
        """[R] how many its expert has."""
        number: Ints = self._of_expert[self.expert]
        return number

    @cached_property
    def lone(self) -> Ints:
        """Replicas that are the only ones of their experts: their rows have no choice."""
        lone: Ints = self.start[:-1][self._of_expert == 1]
        return lone

    @cached_property
    def pairs(self) -> list[tuple[int, int, int]]:
        """First replica, its host and the other's host of each expert with two."""
        first = self.start[:-1][self._of_expert == 2].tolist()
        return [(one, self.host_of[one], self.host_of[one + 1]) for one in first]

    @cached_property
    def groups(self) -> list[range]:
        """Replicas of each expert with more."""
        many = np.flatnonzero(self._of_expert > 2)
        return list(map(range, self.start[many].tolist(), self.start[many + 1].tolist()))

    @cached_property
    def host_of(self) -> list[int]:
        """`host`, for loops."""
        of: list[int] = self.host.tolist()
        return of

    @classmethod
    def of(cls, hosts_of: Sequence[Sequence[int]], num_hosts: int) -> Replicas:
        """From the host numbers of each expert's replicas."""
        start = np.cumsum([0, *map(len, hosts_of)], dtype=np.int64)
        host = np.array([host for hosts in hosts_of for host in hosts], dtype=np.int64)
        return cls(start, host, num_hosts)


def split_tokens(
    count: Ints, replicas: Replicas, speed: Floats | None = None, background: Floats | None = None
) -> Ints:
    """How many rows each replica computes, so that the host that takes longest takes as little time as can be.

    Args:
        count: [E] rows of each expert in this batch.
        speed: [H] relative, above 0; None when all are equal.
        background: [H] rows that the hosts have already; None for none.

    Returns: [R] whole numbers; those of an expert add up to its count. Experts without replicas get none.
    """
    of_expert = count[replicas.expert]
    rows = of_expert // replicas.number
    rows += replicas.rank < of_expert - rows * replicas.number
    if not (replicas.pairs or replicas.groups):
        return rows
    num_hosts = replicas.num_hosts
    if background is None:
        background = np.zeros(num_hosts)
    load = background + np.bincount(replicas.host, weights=rows, minlength=num_hosts)
    stuck = background + np.bincount(replicas.host[replicas.lone], weights=rows[replicas.lone], minlength=num_hosts)
    if speed is None:
        speed = np.ones(num_hosts)
    level, cost = (load / speed).tolist(), (1.0 / speed).tolist()
    # No split is better than equal loads, nor than the rows without a choice.
    enough = CLOSE_ENOUGH * max(float(load.sum() / speed.sum()), float((stuck / speed).max()))
    at = rows.astype(np.float64).tolist()
    pairs = [(i, a, b, 1.0 / (cost[a] + cost[b])) for i, a, b in replicas.pairs if at[i]]
    groups = [group for group in replicas.groups if at[group[0]]]
    before_last, last = float("inf"), max(level)
    for _ in range(MAX_SWEEPS):
        if last <= enough or not _sweep(at, pairs, groups, replicas.host_of, level, cost, LEAST_MOVE):
            break
        most = max(level)
        if most > STILL_FALLING * before_last:
            break
        before_last, last = last, most
        pairs.reverse()  # so that load travels along chains of hosts both ways
    # Fractions first: whole rows stick where neighbours in a long chain of hosts differ by one row each.
    at = _whole(at, of_expert, pairs, groups)
    level = ((background + np.bincount(replicas.host, weights=at, minlength=num_hosts)) / speed).tolist()
    for _ in range(MAX_WHOLE_SWEEPS):
        if not _sweep(at, pairs, groups, replicas.host_of, level, cost, 1):
            break
    return np.array(at, dtype=np.int64)


def _whole(
    at: list[float], of_expert: Ints, pairs: list[tuple[int, int, int, float]], groups: list[range]
) -> list[float]:
    """[R] whole rows, each expert's adding up to its count `of_expert` [R]: the largest remainders are rounded up."""
    rows = [float(int(part)) for part in at]
    for i, *_ in pairs:
        rows[i] = float(round(at[i]))
        rows[i + 1] = int(of_expert[i]) - rows[i]
    for group in groups:
        left = int(of_expert[group[0]] - sum(rows[replica] for replica in group))
        for replica in sorted(group, key=lambda replica: rows[replica] - at[replica])[:left]:
            rows[replica] += 1
    return rows


def _sweep(
    at: list[float],
    pairs: list[tuple[int, int, int, float]],
    groups: list[range],
    host_of: list[int],
    level: list[float],
    cost: list[float],
    least: float,
) -> bool:
    """Bring the hosts of each expert closer to one level; false when nothing moved.

    Args:
        at: [R] rows of each replica, changed.
        pairs: first replica, its host, the other's host and rows per level between them, of experts with two.
        groups: replicas of experts with more.
        host_of: [R] host of each replica.
        level: [H] time each host takes, (rows + background) / speed; changed.
        cost: [H] 1 / speed.
        least: rows worth moving; with 1 only whole rows are moved.
    """
    whole = least == 1
    moved = False
    for group in groups:
        # The highest level with the lowest, the second highest with the second lowest, and so on.
        order = sorted(group, key=lambda replica: level[host_of[replica]])
        i, j = 0, len(order) - 1
        while i < j:
            low, high = order[i], order[j]
            j -= 1
            if at[high]:
                a, b = host_of[low], host_of[high]
                move = min((level[b] - level[a]) / (cost[a] + cost[b]), at[high])
                if whole:
                    move = float(int(move))
                if move < least:
                    break
                at[high] -= move
                at[low] += move
                level[b] -= move * cost[b]
                level[a] += move * cost[a]
                moved = True
                i += 1
    for i, a, b, share in pairs:
        move = (level[a] - level[b]) * share
        if move >= least or move <= -least:
            if whole:
                move = float(int(move))
            if move > at[i]:
                move = at[i]
            elif -move > at[i + 1]:
                move = -at[i + 1]
            if move:
                at[i] -= move
                at[i + 1] += move
                level[a] -= move * cost[a]
                level[b] += move * cost[b]
                moved = True
    return moved


def choose_replicas(
    touched: Ints, replicas: Replicas, speed: Floats | None = None, background: Floats | None = None
) -> Ints:
    """Decoding: one replica for each expert, so that no host reads the weights of many experts.

    A batch of a few tokens costs a host the experts it reads, not the rows it computes, so no expert is split. Experts
    are given to their least loaded hosts, those with the fewest homes first; then a host with the most passes an expert
    on, if need be along a chain of hosts, as long as that lowers the most (Harvey et al., Semi-matchings, 2003: with
    equal speeds the result is optimal).

    Args:
        touched: [n] distinct experts.
        speed: [H] relative, above 0; None when all are equal.
        background: [H] experts that the hosts read already; None for none.

    Returns: [n] replica of each, `NOWHERE` for an expert without any.
    """
    num_hosts = replicas.num_hosts
    cost = [1.0] * num_hosts if speed is None else (1.0 / speed).tolist()
    level = [0.0] * num_hosts if background is None else [n * c for n, c in zip(background.tolist(), cost, strict=True)]
    host = replicas.host
    starts, ends = replicas.start[touched].tolist(), replicas.start[touched + 1].tolist()
    homes = [host[i:j].tolist() for i, j in zip(starts, ends, strict=True)]
    chosen = [NOWHERE] * len(homes)
    held: dict[int, set[int]] = {}
    for item in sorted(range(len(homes)), key=lambda item: len(homes[item])):
        if homes[item]:
            least = min(homes[item], key=lambda home: level[home] + cost[home])
            chosen[item] = least
            level[least] += cost[least]
            held.setdefault(least, set()).add(item)
    while _pass_on(chosen, homes, held, level, cost):
        pass
    return np.array(
        [NOWHERE if at == NOWHERE else i + own.index(at) for i, own, at in zip(starts, homes, chosen, strict=True)],
        dtype=np.int64,
    )


def _pass_on(
    chosen: list[int], homes: list[list[int]], held: dict[int, set[int]], level: list[float], cost: list[float]
) -> bool:
    """Move an expert off the most loaded host, each next one of a chain making room; false when none lowers the most.

    Args (all changed but `homes` and `cost`):
        chosen: [n] host of each item; homes: [n] its hosts; held: items on each host; level, cost: [H].
    """
    if not held:
        return False
    top = max(held, key=level.__getitem__)
    most = level[top]
    if all(level[host] + cost[host] >= most - 1e-9 for host in set(itertools.chain.from_iterable(homes))):
        return False
    came_by: dict[int, int] = {top: NOWHERE}  # host -> item that would move there
    queue = [top]
    for giver in queue:
        for item in sorted(held.get(giver, ())):
            for taker in homes[item]:
                if taker in came_by:
                    continue
                came_by[taker] = item
                if level[taker] + cost[taker] < most - 1e-9:
                    while came_by[taker] != NOWHERE:
                        item = came_by[taker]  # noqa: PLW2901
                        source = chosen[item]
                        held[source].remove(item)
                        held.setdefault(taker, set()).add(item)
                        level[source] -= cost[source]
                        level[taker] += cost[taker]
                        chosen[item] = taker
                        taker = source  # noqa: PLW2901
                    return True
                queue.append(taker)
    return False
