"""Which hosts hold which experts: replicas where the load is, so that each batch can be split evenly.

A plan is chosen, layer by layer, among a few that `dealing.py` constructs: what is there, mended; what is there with
replicas added; the fullest and the emptiest hosts dealt anew; everything dealt anew. `forecast.py` says how balanced
the next batches would be on each, and a plan that moves replicas must bring what the moves cost. Applying a plan and
planning again with the same load changes nothing.

Pure: no clock, no I/O; the order of hosts and layers changes nothing. Called by the controller, by the dry run and by
the simulator. Says where replicas are to be, not how they get there (that is `migration.py`).

Shape legend: L layers with the same number of experts, E experts, H hosts in the order of their ids, n of those layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ray_moe.errors import InsufficientResources, InvalidConfig
from ray_moe.policy.dealing import Hosts, choose_counts, deal
from ray_moe.policy.forecast import Bools, drifted, forecast
from ray_moe.policy.mending import mended, with_added
from ray_moe.policy.split import Floats, Ints, Replicas, split_tokens
from ray_moe.types import HostId, LayerPath, Placement

FLOOR = 0.01
"""Least load an expert is planned for, over the mean: one that nobody asked for in the last window may come up."""

LEAST_GAIN = 1e-3
"""Gain in balancedness below which two placements are equally good, whatever the goals say."""

GOOD = 0.95
"""Balancedness from which on it is worth asking whether fewer replicas would do."""

STAYS = 0.1
"""Load, in mean loads of a host, by which a host that holds an expert may exceed the least loaded one and keep it."""

PREDICTED_ROWS = 2**24
"""Rows of the batch whose split `predict` measures: so many that whole rows do not matter."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """One host as the planner sees it."""

    host_id: HostId
    slots: int
    """Replicas of each layer that it may hold; see `slots_in_bytes`."""
    speed: float = 1.0
    """Relative to other hosts."""
    node: str = ""
    """Two replicas of an expert go to different nodes where possible; empty is a node of its own."""
    domain: str = ""
    """Then to different failure domains; empty is a domain of its own."""


@dataclass(frozen=True, slots=True)
class Goals:
    """What a placement is to achieve."""

    min_replicas: int = 1
    """Replicas of every expert, where slots allow."""
    min_gain: float = 0.02
    """A layer whose predicted balancedness would rise by less keeps its placement."""
    cost_per_move: float = 0.001
    """Balancedness that each replica that is moved or added must bring."""
    survive_nodes: int = 0
    """Above 0, the chance that every expert survives the loss of any so many nodes comes first, balance second."""
    drift: float = 0.3
    """Standard deviation of the logarithm of an expert's load, from batch to batch, that placements are made for."""


def slots_in_bytes(max_bytes: int, expert_bytes: Mapping[LayerPath, int]) -> int:
    """Replicas of each layer, the same number for all, that fit into `max_bytes`; 0 if an expert of each does not."""
    return max_bytes // max(1, sum(expert_bytes.values()))


def plan(
    load: Mapping[LayerPath, Floats],
    hosts: Sequence[Capacity],
    current: Placement | None = None,
    goals: Goals = Goals(),
) -> Placement:
    """The placement to have from now on: `current` itself, layer by layer, where no other is worth its moves.

    Args:
        load: [E] tokens per second (or any measure) of each expert of each layer; all zero before there is traffic.
        current: what is there. Hosts it names that are not in `hosts` are gone; layers it lacks are planned anew.

    Raises: `InvalidConfig` for loads that are negative or not finite, hosts named twice, impossible slots or speeds;
        `InsufficientResources` for fewer slots than a layer has experts.
    """
    hosts = sorted(hosts, key=lambda host: host.host_id)
    _check(load, hosts)
    number_of = {host.host_id: number for number, host in enumerate(hosts)}
    now = {} if current is None else current.hosts_of
    planned: dict[LayerPath, tuple[tuple[HostId, ...], ...]] = {}
    for num_experts in sorted({len(tokens) for tokens in load.values()}):
        layers = sorted(layer for layer, tokens in load.items() if len(tokens) == num_experts)
        before = np.zeros((len(layers), num_experts, len(hosts)), dtype=bool)
        for number, layer in enumerate(layers):
            for expert, names in enumerate(now.get(layer, ())[:num_experts]):
                before[number, expert, [number_of[name] for name in names if name in number_of]] = True
        tokens = np.array([load[layer] for layer in layers], dtype=np.float64)
        held = _plan_layers(tokens, before, _as_arrays(hosts, num_experts), goals)
        for number, layer in enumerate(layers):
            planned[layer] = _named(held[number], tokens[number], now.get(layer, ()), hosts)
    return Placement({layer: planned[layer] for layer in load})


def predict(
    load: Mapping[LayerPath, Floats], placement: Placement, hosts: Sequence[Capacity]
) -> dict[LayerPath, float]:
    """Balancedness, mean / max of host load / speed, of each layer when `load` is split as well as can be.

    0 for a layer with an expert that none of `hosts` holds, 1 for one without load.
    """
    number_of = {host.host_id: number for number, host in enumerate(hosts)}
    speed = np.array([host.speed for host in hosts])
    predicted: dict[LayerPath, float] = {}
    for layer, tokens in load.items():
        homes = [[number_of[n] for n in names if n in number_of] for names in placement.hosts_of.get(layer, ())]
        total = float(np.sum(tokens))
        if len(homes) < len(tokens) or not all(homes):
            predicted[layer] = 0.0
        elif total == 0.0:
            predicted[layer] = 1.0
        else:
            replicas = Replicas.of(homes, len(hosts))
            rows = split_tokens(np.rint(tokens * (PREDICTED_ROWS / total)).astype(np.int64), replicas, speed)
            time = np.bincount(replicas.host, rows, len(hosts)) / speed
            predicted[layer] = float(rows.sum() / speed.sum() / time.max())
    return predicted


def _plan_layers(tokens: Floats, before: Bools, hosts: Hosts, goals: Goals) -> Bools:
    """[L, E] loads and [L, E, H] what is there -> [L, E, H] what is to be there."""
    num_hosts = len(hosts.slots)
    idle = tokens.sum(-1) == 0
    load = np.where(idle[:, None], 1.0, tokens)
    load = np.maximum(load, FLOOR * load.mean(-1, keepdims=True))
    load *= num_hosts / load.sum(-1, keepdims=True)
    target = min(max(goals.min_replicas, 1), num_hosts, int(hosts.slots.sum()) // load.shape[-1])
    held = mended(load, before, target, hosts)
    rows = np.flatnonzero(~idle)
    batches = drifted(load, goals.drift)
    # A better plan may make a still better one worth its moves: go on until none is, so that planning again is in vain.
    while len(rows):
        there = held[rows]
        better = _better(load[rows], batches[rows], before[rows], there, target, hosts, goals)
        held[rows] = better
        before[rows] = better
        rows = rows[(better != there).any((-1, -2))]
    return held


def _better(
    load: Floats, batches: Floats, before: Bools, mend: Bools, target: int, hosts: Hosts, goals: Goals
) -> Bools:
    """[n, E, H] for each layer the candidate that gains most over `mend` after the cost of its moves, or `mend`."""
    num_hosts = len(hosts.slots)
    score, time = forecast(mend, batches, hosts.speed)
    moves = _num_moves(before, mend)
    best: Bools = mend.copy()
    best_score, best_net = score.copy(), np.zeros(len(load))
    rank = time.argsort(-1).argsort(-1)
    few = max(1, num_hosts // 8)
    for dealt, fraction in ((0, 1), (few, 1), (num_hosts, 1), (0, 2), (num_hosts, 2), (num_hosts, 4)):
        rows = np.arange(len(load)) if fraction == 1 else np.flatnonzero(best_score >= GOOD)
        anew = (rank[rows] < dealt) | (rank[rows] >= num_hosts - dealt)
        kept = mend[rows] & ~anew[:, None, :]
        number = np.maximum(kept.sum(-1), 1)
        owed = np.maximum(target - number, 0).sum(-1)
        limit = np.maximum(owed, (int(hosts.slots.sum()) - number.sum(-1)) // fraction)
        number = with_added(number, choose_counts(load[rows], number, limit, target, num_hosts))
        candidate = deal(load[rows], number, kept, before[rows], np.full(len(rows), STAYS), hosts)
        price = np.maximum(goals.min_gain, LEAST_GAIN) + goals.cost_per_move * (
            _num_moves(before[rows], candidate) - moves[rows]
        )
        # Balancedness is 1 at most: what could not pay for its moves even then needs no forecast.
        hopeful = (score[rows] + price + best_net[rows] < 1.0) & (candidate != mend[rows]).any((-1, -2))
        rows, candidate, price = rows[hopeful], candidate[hopeful], price[hopeful]
        if not len(rows):
            continue
        reached, _ = forecast(candidate, batches[rows], hosts.speed)
        net = reached - score[rows] - price
        wins = net > best_net[rows]
        best[rows[wins]], best_score[rows[wins]], best_net[rows[wins]] = candidate[wins], reached[wins], net[wins]
    return best


def _num_moves(before: Bools, after: Bools) -> Ints:
    """[n] replicas that are to be loaded."""
    moves: Ints = (after & ~before).sum((-1, -2))
    return moves


def _named(
    held: Bools, tokens: Floats, names: Sequence[Sequence[HostId]], hosts: Sequence[Capacity]
) -> tuple[tuple[HostId, ...], ...]:
    """[E, H] -> host ids of each expert: those that hold it already in their order, then the least loaded first."""
    share = tokens / held.sum(-1)
    time = (share @ held) / [host.speed for host in hosts]
    number_of = {host.host_id: number for number, host in enumerate(hosts)}
    named = []
    for expert in range(len(held)):
        homes = np.flatnonzero(held[expert]).tolist()
        old = [number_of[name] for name in (names[expert] if expert < len(names) else ()) if name in number_of]
        stay = [home for home in dict.fromkeys(old) if held[expert, home]]
        new = sorted(set(homes) - set(stay), key=lambda home: (time[home], home))
        named.append(tuple(hosts[home].host_id for home in [*stay, *new]))
    return tuple(named)


def _as_arrays(hosts: Sequence[Capacity], num_experts: int) -> Hosts:
    def same(places: Sequence[str]) -> Floats | None:
        if len(set(filter(None, places))) == sum(map(bool, places)):
            return None
        place = np.array([place or f"\0{number}" for number, place in enumerate(places)])
        alike: Floats = (place[:, None] == place).astype(np.float64)
        return alike

    speed = np.array([host.speed for host in hosts])
    nodes = [host.node or (host.host_id,) for host in hosts]
    return Hosts(
        slots=np.array([min(host.slots, num_experts) for host in hosts]),
        speed=speed / speed.mean(),
        same_node=same([host.node for host in hosts]),
        same_domain=same([host.domain for host in hosts]),
        num_nodes=len(set(nodes)),
    )


def _check(load: Mapping[LayerPath, Floats], hosts: Sequence[Capacity]) -> None:
    if not hosts:
        raise InsufficientResources("no host to place experts on (0, at least 1 is needed); add hosts")
    for one, other in itertools.pairwise(hosts):
        if one.host_id == other.host_id:
            raise InvalidConfig(f"host {one.host_id!r} is named twice; each host may be named once")
    for host in hosts:
        if host.slots < 0 or not 0 < host.speed < float("inf"):
            raise InvalidConfig(
                f"host {host.host_id!r} has {host.slots} slots and speed {host.speed}; "
                "slots must be 0 or more, speed finite and above 0"
            )
    for layer, tokens in load.items():
        if not len(tokens):
            raise InvalidConfig(f"layer {layer!r} has no experts; leave it out")
        bad = np.flatnonzero(~(np.isfinite(tokens) & (np.asarray(tokens) >= 0)))
        if len(bad):
            raise InvalidConfig(
                f"the load of expert {bad[0]} of layer {layer!r} is {tokens[bad[0]]}; "
                "loads must be finite and 0 or more"
            )
        slots = sum(min(host.slots, len(tokens)) for host in hosts)
        if slots < len(tokens):
            raise InsufficientResources(
                f"layer {layer!r} has {len(tokens)} experts, but the hosts have {slots} slots for them; "
                "add hosts, or let them hold more bytes"
            )
