"""How likely every expert outlives the loss of some nodes, and the placement that makes it most likely.

With at least f + 1 replicas on different nodes an expert survives any f losses. Where slots do not allow that, it
matters which nodes the experts share: spread at random, nearly every combination of lost nodes takes the last replica
of some expert; with the nodes in groups whose members hold the same experts, only the loss of a whole group does
(copysets: Cidon et al., 2013; for experts: Lazarus, 2024).

Pure: chances are over equally likely sets of lost nodes, exact where they can be counted. Called by `planner.py`, by
the status and by the simulator.

Shape legend: E experts, H hosts, N nodes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ray_moe.errors import InvalidConfig
from ray_moe.policy.forecast import Bools
from ray_moe.policy.split import Floats, Ints
from ray_moe.types import HostId, Placement

MAX_COUNTED = 2**18
"""Sets of lost nodes that are looked at one by one; with more of them the chance is estimated."""

NUM_SAMPLES = 2**15
"""Random sets of lost nodes of an estimate, whose standard error is then below 0.003."""


def p_lossless(placement: Placement, node_of: Mapping[HostId, str], num_lost_nodes: int) -> float:
    """Chance that each expert of each layer still has a replica when `num_lost_nodes` random nodes are lost.

    Args:
        node_of: node of each host that is there; replicas on other hosts do not count.

    Raises: `InvalidConfig` for a negative number of nodes.
    """
    if num_lost_nodes < 0:
        raise InvalidConfig(f"num_lost_nodes is {num_lost_nodes}; it must be 0 or more")
    number_of = {node: number for number, node in enumerate(sorted(set(node_of.values())))}
    homes = {
        frozenset(number_of[node_of[host]] for host in hosts if host in node_of)
        for experts in placement.hosts_of.values()
        for hosts in experts
    }
    return p_none_lost(homes, len(number_of), num_lost_nodes)


def p_none_lost(homes: Collection[frozenset[int]], num_nodes: int, num_lost: int) -> float:
    """Chance that none of the sets `homes` of node numbers is lost whole, when `num_lost` of `num_nodes` are."""
    num_lost = min(num_lost, num_nodes)
    fatal: list[frozenset[int]] = []
    for nodes in sorted(homes, key=len):
        if not any(smaller <= nodes for smaller in fatal):  # a set is lost only after those within it
            fatal.append(nodes)
    fatal = [nodes for nodes in fatal if len(nodes) <= num_lost]
    if not fatal:
        return 1.0
    if not fatal[0]:
        return 0.0
    # Nodes that no set joins are lost independently but for their number: count for each island of nodes the harmless
    # sets of each size, and multiply these counts like polynomials.
    harmless = [1]
    islands = _islands(fatal)
    for island, inside in islands:
        counts = _count_harmless(sorted(island), inside, num_lost)
        if counts is None:
            return _estimate(fatal, num_nodes, num_lost)
        harmless = _multiply(harmless, counts, num_lost)
    rest = num_nodes - sum(len(island) for island, _ in islands)
    harmless = _multiply(harmless, [math.comb(rest, size) for size in range(min(rest, num_lost) + 1)], num_lost)
    return harmless[num_lost] / math.comb(num_nodes, num_lost) if num_lost < len(harmless) else 0.0


def group_nodes(slots: Sequence[int], num_experts: int) -> list[list[int]]:
    """Nodes in as few groups as can hold all experts when all members of a group hold the same ones.

    Few groups are large groups: few combinations of lost nodes that take a whole one.

    Args:
        slots: [N] replicas that each node may hold, each of another expert; together at least `num_experts`.
    """
    order = sorted(range(len(slots)), key=lambda node: (-slots[node], node))
    for num_groups in range(1, len(slots) + 1):
        # Neighbours in size go together, because a group holds what its smallest member can.
        cuts = [len(slots) * group // num_groups for group in range(num_groups + 1)]
        groups = [order[begin:end] for begin, end in itertools.pairwise(cuts)]
        if sum(slots[group[-1]] for group in groups) >= num_experts:
            break
    return groups


def nested(load: Floats, slots: Ints, speed: Floats, node: Ints) -> Bools:
    """[E, H] the placement in which groups of nodes hold the same experts.

    Args:
        load: [E] of each expert.
        slots, speed, node: [H] of each host; nodes are numbered from 0.
    """
    hosts_of = [np.flatnonzero(node == number) for number in range(int(node.max()) + 1)]
    room = [min(int(slots[hosts].sum()), len(load)) for hosts in hosts_of]
    groups = group_nodes(room, len(load))
    left = np.array([min(room[member] for member in group) for group in groups])
    pace = np.array([sum(speed[hosts_of[member]].sum() for member in group) for group in groups])
    carried, level, free = np.zeros(len(groups)), np.zeros(len(slots)), slots.copy()
    held = np.zeros((len(load), len(slots)), dtype=bool)
    for expert in np.argsort(-load, kind="stable"):
        group = int(np.where(left > 0, (carried + load[expert]) / pace, np.inf).argmin())
        left[group] -= 1
        carried[group] += load[expert]
        for member in groups[group]:
            hosts = hosts_of[member]
            host = hosts[np.where(free[hosts] > 0, level[hosts] / speed[hosts], np.inf).argmin()]
            held[expert, host] = True
            level[host] += load[expert] / len(groups[group])
            free[host] -= 1
    return held


def _islands(sets: Sequence[frozenset[int]]) -> list[tuple[set[int], list[frozenset[int]]]]:
    """The sets in parts that share no node: the nodes of each part, and its sets."""
    islands: list[tuple[set[int], list[frozenset[int]]]] = []
    for nodes in sets:
        touched = [island for island in islands if island[0] & nodes]
        islands = [island for island in islands if not island[0] & nodes]
        islands.append(
            (
                set(nodes).union(*(island[0] for island in touched)),
                [nodes, *(s for island in touched for s in island[1])],
            )
        )
    return islands


def _count_harmless(nodes: list[int], sets: list[frozenset[int]], num_lost: int) -> list[int] | None:
    """How many subsets of `nodes`, by size, contain none of `sets` whole; None when they are too many to look at."""
    sizes = range(min(len(nodes), num_lost) + 1)
    if sum(math.comb(len(nodes), size) for size in sizes) > MAX_COUNTED:
        return None
    place = {node: number for number, node in enumerate(nodes)}
    fatal = np.zeros((len(sets), len(nodes)), dtype=np.int64)
    for number, members in enumerate(sets):
        fatal[number, [place[node] for node in members]] = 1
    counts = []
    for size in sizes:
        subsets = np.array(list(itertools.combinations(range(len(nodes)), size)), dtype=np.int64)
        harmed = np.zeros(len(subsets), dtype=bool)
        for row in fatal:
            harmed |= row[subsets].sum(-1) == row.sum()
        counts.append(int((~harmed).sum()))
    return counts


def _multiply(one: list[int], other: list[int], highest: int) -> list[int]:
    """Product of two polynomials, up to a power."""
    product = [0] * min(len(one) + len(other) - 1, highest + 1)
    for i, a in enumerate(one):
        for j, b in enumerate(other[: len(product) - i]):
            product[i + j] += a * b
    return product


def _estimate(fatal: Sequence[frozenset[int]], num_nodes: int, num_lost: int) -> float:
    random = np.random.default_rng(0)
    survived = 0
    batch = max(1, 2**22 // num_nodes)
    for begin in range(0, NUM_SAMPLES, batch):
        size = min(batch, NUM_SAMPLES - begin)
        lost = np.zeros((size, num_nodes), dtype=bool)
        chosen = random.random((size, num_nodes)).argpartition(num_lost - 1, -1)[:, :num_lost]
        np.put_along_axis(lost, chosen, True, -1)
        alive = np.ones(size, dtype=bool)
        for nodes in fatal:
            alive &= ~lost[:, sorted(nodes)].all(-1)
        survived += int(alive.sum())
    return survived / NUM_SAMPLES
