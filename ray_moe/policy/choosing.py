"""Which of a few placements a layer gets: the one that gains most, after what its moves cost, over what is there.

The few are constructed by `dealing.py`: what is there, mended where it breaks a rule; that with replicas added; that
with the fullest and the emptiest hosts dealt anew; everything dealt anew. `forecast.py` says how balanced the next
batches would be on each.

Pure arrays. Called by `planner.py`.

Shape legend: L layers with the same number of experts, n of those layers, P candidates, E experts, H hosts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ray_moe.policy.dealing import Hosts, choose_counts, deal
from ray_moe.policy.forecast import Bools, drifted, forecast
from ray_moe.policy.mending import mended, num_nodes, num_short, with_added
from ray_moe.policy.split import Floats, Ints
from ray_moe.policy.survival import nested, p_none_lost

FLOOR = 0.01
"""Least load an expert is planned for, over the mean: one that nobody asked for in the last window may come up."""

LEAST_GAIN = 1e-3
"""Gain in balancedness below which two placements are equally good, whatever the goals say."""

MAX_PASSES = 32
"""Plans that are made upon each other at the most; two or three are usual."""

LEAST_CHANCE = 0.01
"""Gain in the chance to lose no expert that is worth dealing a layer anew; above the error of an estimate."""

GOOD = 0.95
"""Balancedness from which on it is worth asking whether fewer replicas would do."""

STAYS = 0.1
"""Load, in mean loads of a host, by which a host that holds an expert may exceed the least loaded one and keep it."""


@dataclass(frozen=True, slots=True)
class Goals:
    """What a placement is to achieve."""

    min_replicas: int = 1
    """Replicas of every expert, where slots allow."""
    min_gain: float = 0.02
    """A layer whose predicted balancedness would rise by less keeps its placement."""
    cost_per_move: float = 0.008
    """Balancedness that each replica moved or added must bring, divided by the hosts: they load side by side."""
    survive_nodes: int = 0
    """Above 0, the chance that every expert survives the loss of any so many nodes comes first, balance second."""
    drift: float = 0.3
    """Standard deviation of the logarithm of an expert's load, from batch to batch, that placements are made for."""


def choose(tokens: Floats, before: Bools, hosts: Hosts, goals: Goals) -> Bools:
    """What is to be where.

    Args:
        tokens: [L, E] load of each expert, in any measure; all 0 where there is no traffic.
        before: [L, E, H] what is there.

    Returns: [L, E, H]; `before` where nothing else is worth its moves.
    """
    num_hosts = len(hosts.slots)
    idle: Bools = tokens.max(-1) == 0
    load = np.where(idle[:, None], 1.0, tokens)
    load /= load.max(-1, keepdims=True)
    load = np.maximum(load, FLOOR * load.mean(-1, keepdims=True))
    load *= num_hosts / load.sum(-1, keepdims=True)
    target = _target(load.shape[-1], hosts, goals)
    batches = drifted(load, goals.drift)
    held: Bools = before.copy()
    rows = np.arange(len(load))
    # A better plan may make a still better one worth its moves: go on until none is, so that planning again is in vain.
    for _ in range(MAX_PASSES):
        there = held[rows]
        mend = mended(load[rows], there, target, hosts)
        pinned = _shelter(load[rows], mend, target, hosts, goals.survive_nodes)
        again = np.flatnonzero(pinned | (num_short(mend, target, hosts) > 0))
        mend[again] = mended(load[rows[again]], mend[again], target, hosts)
        busy = np.flatnonzero(~idle[rows])
        at = rows[busy]
        mend[busy] = _better(load[at], batches[at], there[busy], mend[busy], pinned[busy], target, hosts, goals)
        held[rows] = mend
        rows = rows[(mend != there).any((-1, -2))]
        if not len(rows):
            break
    return held


def _target(num_experts: int, hosts: Hosts, goals: Goals) -> int:
    """Replicas, on as many nodes, that each expert is to have: what is asked for, as far as there are slots."""
    on_node = np.minimum(np.bincount(hosts.node, hosts.slots), num_experts)
    safe = goals.survive_nodes + 1
    if hosts.num_nodes >= safe and on_node.sum() >= safe * num_experts:
        least = max(goals.min_replicas, safe)
    else:
        least = goals.min_replicas
    return max(1, min(least, len(hosts.slots), int(hosts.slots.sum()) // num_experts))


def _shelter(load: Floats, held: Bools, target: int, hosts: Hosts, num_lost_nodes: int) -> Bools:
    """Nest the replicas of layers (in place) that are likelier to outlive the loss of nodes that way.

    Returns: [L] layers that depend on which nodes their experts share, so that replicas may only be added.
    """
    pinned: Bools = np.zeros(len(held), dtype=bool)
    if num_lost_nodes:
        pinned |= (num_nodes(held, hosts) <= num_lost_nodes).any(-1)
    for layer in np.flatnonzero(pinned):
        other = nested(load[layer], hosts.slots, hosts.speed, hosts.node)
        chance, other_chance = (
            p_none_lost({frozenset(hosts.node[homes].tolist()) for homes in way}, hosts.num_nodes, num_lost_nodes)
            for way in (held[layer], other)
        )
        short, other_short = num_short(np.stack([held[layer], other]), target, hosts)
        if other_chance > chance + LEAST_CHANCE and other_short <= short:
            held[layer] = other
    return pinned


def _better(
    load: Floats,
    batches: Floats,
    before: Bools,
    mend: Bools,
    pinned: Bools,
    target: int,
    hosts: Hosts,
    goals: Goals,
) -> Bools:
    """[n, E, H] for each layer the candidate that gains most over `mend` after the price of its moves, or `mend`."""
    num_hosts = len(hosts.slots)
    if not len(load):
        return mend
    score, time = forecast(mend, batches, hosts.speed)
    moves, broken = _num_replicas(mend > before), num_short(mend, target, hosts)
    nothing, full = _num_replicas(before) == 0, _num_replicas(mend) == hosts.slots.sum()
    rank = time.argsort(-1).argsort(-1)
    best: Bools = mend.copy()
    best_score, best_net = score.copy(), np.zeros(len(load))
    few = max(1, num_hosts // 8)

    def price(moves: Ints) -> Floats:
        least: Floats = max(goals.min_gain, LEAST_GAIN) + goals.cost_per_move / num_hosts * moves.astype(np.float64)
        return least

    for fractions in ((1,), (2, 4)):
        # Whether fewer replicas would do is only asked where all of them already do well.
        tried = np.flatnonzero(best_score >= (GOOD if 2 in fractions else 0.0))
        ways = [(dealt, fraction) for dealt in (0, few, num_hosts) for fraction in fractions]
        rows = np.tile(tried, len(ways))
        dealt, fraction = np.repeat(ways, len(tried), axis=0).T
        sensible = (dealt == num_hosts) | ~nothing[rows]  # nothing is there: nothing to keep
        dealt = np.where(pinned[rows], 0, dealt)
        sensible &= (dealt > 0) | ~full[rows]
        # Balancedness is 1 at most: where not even that would pay without a move, none can.
        sensible &= score[rows] + price(-moves[rows]) + best_net[rows] < 1.0
        rows, dealt, fraction = rows[sensible], dealt[sensible, None], fraction[sensible]
        anew = (rank[rows] < dealt) | (rank[rows] >= num_hosts - dealt)
        candidate = _dealt(load[rows], before[rows], mend[rows] & ~anew[:, None, :], fraction, target, hosts)
        cost = price(_num_replicas(candidate > before[rows]) - moves[rows])
        hopeful = score[rows] + cost + best_net[rows] < 1.0
        hopeful &= (candidate != mend[rows]).any((-1, -2))
        hopeful &= num_short(candidate, target, hosts) <= broken[rows]
        rows, candidate, cost = rows[hopeful], candidate[hopeful], cost[hopeful]
        if not len(rows):
            continue
        reached, _ = forecast(candidate, batches[rows], hosts.speed)
        net = reached - score[rows] - cost
        for at in np.argsort(net, kind="stable"):  # the best last
            if net[at] > best_net[rows[at]]:
                best[rows[at]], best_score[rows[at]], best_net[rows[at]] = candidate[at], reached[at], net[at]
    return best


def _dealt(load: Floats, before: Bools, kept: Bools, fraction: Ints, target: int, hosts: Hosts) -> Bools:
    """[P, E, H] `kept`, and the rest dealt to the other slots, further replicas to one in `fraction` [P] of them."""
    number = np.maximum(kept.sum(-1), 1)
    owed = np.maximum(target - number, 0).sum(-1)
    limit = np.maximum(owed, (int(hosts.slots.sum()) - number.sum(-1)) // fraction)
    number = with_added(number, choose_counts(load, number, limit, target, len(hosts.slots)))
    return deal(load, number, kept, before, STAYS, target, hosts)


def _num_replicas(held: Bools) -> Ints:
    """[n] of each placement."""
    return np.array([np.count_nonzero(one) for one in held], dtype=np.int64)
