"""What a plan takes and what it brings, in numbers that a person can judge. Pure. Called for `ray-moe plan`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from ray_moe.policy.load import Floats
from ray_moe.policy.migration import copied_bytes, moves, waves
from ray_moe.policy.planner import Capacity, predict
from ray_moe.types import HostId, LayerPath, Placement, PlannedMove, PlanSummary

COPY_BYTES_PER_S = 1e9
"""What a host loads, reading files or another host's memory: a cautious round figure for one node."""


def summarise(
    load: Mapping[LayerPath, Floats],
    hosts: Sequence[Capacity],
    current: Placement,
    target: Placement,
    expert_bytes: Mapping[LayerPath, int],
    max_bytes: Mapping[HostId, int],
) -> PlanSummary:
    """The way from `current` (what is routed to now) to `target`.

    Args:
        load: [E] tokens per second of each expert, by layer.
        max_bytes: expert weights that each host may hold.
    """
    changes = moves(current, target)
    loaded: defaultdict[HostId, int] = defaultdict(int)
    for move in changes:
        for host in move.added:
            loaded[host] += expert_bytes[move.layer]
    duration_s = max(loaded.values(), default=0) / COPY_BYTES_PER_S
    stranded = any(not hosts for experts in current.hosts_of.values() for hosts in experts)
    return PlanSummary(
        moves=tuple(PlannedMove(move.layer, move.expert, move.added, move.removed) for move in changes),
        copied_bytes=copied_bytes(changes, expert_bytes),
        num_steps=len(waves(current, target, expert_bytes, max_bytes, load)),
        balancedness_before=_mean(load, current, hosts),
        balancedness_after=_mean(load, target, hosts),
        pause_s=duration_s if stranded else 0.0,
        duration_s=duration_s,
    )


def _mean(load: Mapping[LayerPath, Floats], placement: Placement, hosts: Sequence[Capacity]) -> float:
    """Over the layers that have any load; 1 where there is none."""
    predicted = [value for layer, value in predict(load, placement, hosts).items() if load[layer].any()]
    return sum(predicted) / len(predicted) if predicted else 1.0
