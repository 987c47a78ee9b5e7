"""Which hosts hold which experts: replicas where the load is, so that each batch can be split evenly.

Here host ids become numbers and a plan becomes a placement; `choosing.py` decides. A plan that moves replicas must
bring what the moves cost. Applying a plan and planning again with the same load changes nothing.

Pure: no clock, no I/O; the order of hosts and layers changes nothing. Called by the controller, by the dry run and by
the simulator. Says where replicas are to be, not how they get there (that is `migration.py`).

Shape legend: E experts, H hosts in the order of their ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ray_moe.errors import InsufficientResources, InvalidConfig
from ray_moe.policy.choosing import Goals, choose
from ray_moe.policy.dealing import Hosts
from ray_moe.policy.forecast import Bools
from ray_moe.policy.split import Floats, Ints, Replicas, split_tokens
from ray_moe.types import HostId, LayerPath, Placement

__all__ = ["Capacity", "Goals", "plan", "predict", "slots_in_bytes"]

GONE = -1
"""Number of a host that is not there."""

PREDICTED_ROWS = 2**20
"""Rows of the hottest expert in the batch whose split `predict` measures: so many that whole rows do not matter."""


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


def slots_in_bytes(max_bytes: int, expert_bytes: Mapping[LayerPath, int]) -> int:
    """Replicas of each layer, the same number for all, that fit into `max_bytes`; 0 if an expert of each does not."""
    return max_bytes // max(1, sum(expert_bytes.values()))


def plan(
    load: Mapping[LayerPath, Floats],
    hosts: Sequence[Capacity],
    current: Placement | None = None,
    goals: Goals = Goals(),  # noqa: B008 -- frozen
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
    for num_experts in sorted(set(map(len, load.values()))):
        layers = sorted(layer for layer, tokens in load.items() if len(tokens) == num_experts)
        before = np.zeros((len(layers), num_experts, len(hosts)), dtype=bool)
        for held, layer in zip(before, layers, strict=True):
            homes = now.get(layer, ())[:num_experts]
            expert = np.repeat(np.arange(len(homes)), [len(names) for names in homes])
            host = np.array([number_of.get(name, GONE) for names in homes for name in names], dtype=np.int64)
            held[expert[host != GONE], host[host != GONE]] = True
        tokens = np.array([load[layer] for layer in layers], dtype=np.float64)
        chosen = choose(tokens, before, _as_arrays(hosts, num_experts), goals)
        for number, layer in enumerate(layers):
            planned[layer] = _named(chosen[number], tokens[number], now.get(layer, ()), hosts)
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
        most = float(np.max(tokens))
        if len(homes) < len(tokens) or not all(homes):
            predicted[layer] = 0.0
        elif most == 0.0:
            predicted[layer] = 1.0
        else:
            replicas = Replicas.of(homes, len(hosts))
            rows = split_tokens(np.rint(tokens / most * PREDICTED_ROWS).astype(np.int64), replicas, speed)
            time = np.bincount(replicas.host, rows, len(hosts)) / speed
            predicted[layer] = float(rows.sum() / speed.sum() / time.max())
    return predicted


def _named(
    held: Bools, tokens: Floats, names: Sequence[Sequence[HostId]], hosts: Sequence[Capacity]
) -> tuple[tuple[HostId, ...], ...]:
    """[E, H] -> host ids of each expert: those that hold it already in their order, then the least loaded first."""
    expert, host = np.divmod(np.flatnonzero(held), len(hosts))
    number = np.bincount(expert, minlength=len(held))
    time = np.bincount(host, (tokens / number)[expert], len(hosts)) / [one.speed for one in hosts]
    order = np.lexsort((time[host], expert))
    ids = [hosts[home].host_id for home in host[order].tolist()]
    end = np.cumsum(number).tolist()
    homes = [tuple(ids[i:j]) for i, j in itertools.pairwise([0, *end])]
    for one, old in enumerate(names[: len(homes)]):
        if len(homes[one]) > 1 and homes[one] != old:
            homes[one] = tuple(sorted(homes[one], key=lambda name: old.index(name) if name in old else len(old)))
    return tuple(homes)


def _as_arrays(hosts: Sequence[Capacity], num_experts: int) -> Hosts:
    def numbered(places: Sequence[str]) -> Ints:
        # A place without a name is one of its own.
        first: dict[str | int, int] = {}
        return np.array([first.setdefault(place or number, len(first)) for number, place in enumerate(places)])

    speed = np.array([host.speed for host in hosts])
    return Hosts(
        slots=np.array([min(host.slots, num_experts) for host in hosts]),
        speed=speed / speed.mean(),
        node=numbered([host.node for host in hosts]),
        domain=numbered([host.domain for host in hosts]),
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
    slots = {number: sum(min(host.slots, number) for host in hosts) for number in set(map(len, load.values()))}
    for layer, tokens in load.items():
        if not len(tokens):
            raise InvalidConfig(f"layer {layer!r} has no experts; leave it out")
        bad = np.flatnonzero(~(np.isfinite(tokens) & (np.asarray(tokens) >= 0)))
        if len(bad):
            raise InvalidConfig(
                f"the load of expert {bad[0]} of layer {layer!r} is {tokens[bad[0]]}; "
                "loads must be finite and 0 or more"
            )
        if slots[len(tokens)] < len(tokens):
            raise InsufficientResources(
                f"layer {layer!r} has {len(tokens)} experts, but the hosts have {slots[len(tokens)]} slots for them; "
                "add hosts, or let them hold more bytes"
            )
