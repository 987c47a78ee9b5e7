"""How balanced the next batches will be on a placement: the score by which `planner.py` chooses.

A placement that fits the last window exactly may still be a bad one: the load of an expert differs from batch to batch,
and what then counts is whether rows can flow from the hosts that got too many to those that got too few. So placements
are scored on drifted batches, each under its best split, for all layers and candidates at once.

Pure, and the same for the same arguments: the drift comes from a generator with a fixed seed. Called by `planner.py`.

Shape legend: P placements, S batches, E experts, H hosts, R replicas of all placements, M most links of a placement.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ray_moe.policy.split import Floats, Ints

Bools = npt.NDArray[np.bool_]

NUM_BATCHES = 8
"""Batches that a placement is scored on. All placements see the same, so that differences are not chance."""

NUM_SWEEPS = 8
"""Sweeps of the split. More of them raise all scores by 0.01 at the most, and hardly change which is higher."""


def where(held: Bools) -> tuple[Ints, Ints, Ints]:
    """Placement, expert and host of each replica, ascending. (`np.nonzero` takes ten times as long.)"""
    cell, host = np.divmod(np.flatnonzero(held), held.shape[-1])
    placement, expert = np.divmod(cell, held.shape[-2])
    return placement, expert, host


def drifted(load: Floats, sigma: float) -> Floats:
    """[L, E] loads of a window -> [L, S, E] of batches: each expert's drifts on its own, by exp(sigma * normal)."""
    if sigma == 0.0:
        return load[:, None, :]
    normal = np.random.default_rng(0).standard_normal((NUM_BATCHES // 2, load.shape[-1]))
    batches = load[:, None, :] * np.exp(sigma * np.concatenate([normal, -normal]))
    scaled: Floats = batches * (load.sum(-1)[:, None, None] / batches.sum(-1, keepdims=True))
    return scaled


def forecast(held: Bools, batches: Floats, speed: Floats) -> tuple[Floats, Floats]:
    """What the hosts will have to do, each batch split as well as can be.

    Args:
        held: [P, E, H] which host holds which expert; every expert is somewhere.
        batches: [P, S, E] load of each expert.
        speed: [H] of each host.

    Returns: [P] balancedness, the mean over batches of mean / max host time; [P, H] mean time of each host.
    """
    num_placements, num_experts, num_hosts = held.shape
    num_batches = batches.shape[1]
    placement, expert, host = where(held)
    cell, row = placement * num_experts + expert, placement * num_hosts + host
    # [R, S]: equal shares to begin with
    share = batches.swapaxes(1, 2).reshape(-1, num_batches).take(cell, 0) / np.bincount(cell)[cell, None]
    cost = 1.0 / speed
    loads = (share * cost[host, None]).T
    # A row for each host of each placement, so that whole rows are taken and put back.
    level = np.stack([np.bincount(row, load, num_placements * num_hosts) for load in loads], 1)
    # Both ends of each step's links are taken and put back at once: two halves.
    steps = [
        (ends, row[ends], cost[host[ends], None].repeat(num_batches, 1))
        for ends in map(np.concatenate, _links(cell, placement, host))
    ]
    ideal = batches.sum(-1) / speed.sum()
    for _ in range(NUM_SWEEPS):
        for ends, rows, costs in steps:
            half = len(ends) // 2
            shares, levels = share.take(ends, 0), level.take(rows, 0)
            move = (levels[:half] - levels[half:]) / (costs[:half] + costs[half:])
            move = np.minimum(np.maximum(move, -shares[half:]), shares[:half])
            shares[:half] -= move
            shares[half:] += move
            levels[:half] -= move * costs[:half]
            levels[half:] += move * costs[half:]
            share[ends], level[rows] = shares, levels
        steps.reverse()
    level = level.reshape(num_placements, num_hosts, -1)
    score: Floats = (ideal / level.max(1)).mean(-1)
    return score, level.mean(-1)


def _links(cell: Ints, placement: Ints, host: Ints) -> list[tuple[Ints, Ints]]:
    """Pairs of replicas of one expert that rows can flow between, in steps within which no host is in two pairs.

    So each pair sees what those of earlier steps did, as in `split.py`. Replicas 1, 2, 4 ... apart are paired, so that
    one sweep reaches all of an expert's from each.

    Args:
        cell: [R] a number for the expert and placement of each replica, ascending.
        placement, host: [R] likewise.
    """
    longest = int(np.bincount(cell).max())
    one, other = [], []
    for apart in (1 << power for power in range((longest - 1).bit_length())):
        one.append(np.flatnonzero(cell[apart:] == cell[:-apart]))
        other.append(one[-1] + apart)
    if not one:
        return []
    here, there = np.concatenate(one), np.concatenate(other)
    order = np.argsort(cell[here], kind="stable")
    here, there = here[order], there[order]
    # Each pair, one of each placement at a time, takes the first step that neither of its hosts has taken.
    turn = np.arange(len(here)) - np.searchsorted(placement[here], placement[here])
    by_turn = np.argsort(turn, kind="stable")
    turn, here, there = turn[by_turn], here[by_turn], there[by_turn]
    at, to = (placement[side] * (int(host.max()) + 1) + host[side] for side in (here, there))
    taken = np.zeros(int(max(at.max(), to.max())) + 1, dtype=np.uint64)
    step = np.empty(len(here), dtype=np.uint64)
    end = np.cumsum(np.bincount(turn)).tolist()
    for pairs in map(slice, [0, *end], end):
        taken_at, taken_to = taken[at[pairs]], taken[to[pairs]]
        free = ~(taken_at | taken_to)
        step[pairs] = free & -free  # the lowest bit
        taken[at[pairs]] = taken_at | step[pairs]
        taken[to[pairs]] = taken_to | step[pairs]
    # Where a host is in more than 64 pairs, the rest have steps of their own.
    number = np.where(step > 0, np.log2(np.maximum(step, 1).astype(np.float64)), 64 + turn).astype(np.int64)
    order = np.argsort(number, kind="stable")
    cuts = np.flatnonzero(np.diff(number[order])) + 1
    return list(zip(np.split(here[order], cuts), np.split(there[order], cuts), strict=True))
