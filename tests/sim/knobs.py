"""What differs between two schedules of the campaign: all of it is drawn from the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ray_moe.policy.hosts import ClusterSettings
from ray_moe.policy.planner import Goals
from ray_moe.policy.scaling import ScalingGoals
from ray_moe.types import LayerSpec

QUIET_S = 45.0
"""Then there is so much time until everything must be in order."""

TICK_S = 0.5
DRAIN_S = 1.0
MAX_LAG_S = 0.9
"""A router has a table after this, which is less than `DRAIN_S`."""


@dataclass(frozen=True)
class Knobs:
    settings: ClusterSettings
    chaos_s: float
    """Faults happen and people ask for things until then."""
    num_hosts: int
    num_standbys: int
    num_nodes: int
    num_routers: int
    max_bytes: int | None
    """What hosts say they may hold."""
    real_planner: bool
    signals: bool
    delay_s: float
    """A message takes up to this."""
    load_s: float
    """Loading an expert takes up to this."""
    p_lost: float
    p_twice: float
    p_load_fails: float
    p_start_fails: float
    p_plan_fails: float
    deaths_per_s: float
    hangs_per_s: float
    nodes_per_s: float
    restarts_per_s: float
    """Of the controller."""
    wishes_per_s: float


def draw(rng: random.Random) -> Knobs:
    num_experts = rng.randint(3, 8)
    num_layers = rng.randint(1, 3)
    layers = tuple(
        LayerSpec(f"layers.{i}", max(2, num_experts - rng.randint(0, 1) * i), 1, 1, "bfloat16", rng.choice((10, 10, 7)))
        for i in range(num_layers)
    )
    num_hosts = rng.randint(2, 5)
    share = -(-num_experts // num_hosts)
    slots = share + rng.randint(1, 2)
    max_bytes = rng.choice((None, slots * sum(layer.expert_bytes for layer in layers)))
    from_hosts = rng.random() < 0.3
    can_sleep = rng.random() < 0.4
    scaling = None
    if rng.random() < 0.25:
        scaling = ScalingGoals(
            min_hosts=rng.randint(0, 2),
            max_hosts=num_hosts + 2,
            up_after_s=1.0,
            down_after_s=2.0,
            cool_down_s=1.0,
            zero_after_s=3.0 if can_sleep else None,
        )
    calm = rng.random() < 0.15
    chance = 0.0 if calm else 1.0
    return Knobs(
        settings=ClusterSettings(
            layers=layers,
            spare_slots=rng.randint(1, 2),
            max_bytes=None if from_hosts else max_bytes,
            goals=Goals(min_replicas=rng.choice((1, 1, 2))),
            balance=rng.random() < 0.7,
            balance_every_s=1.0,
            half_life_s=2.0,
            drain_s=DRAIN_S,
            return_s=4.0,
            resize_s=8.0,
            retry_s=0.3,
            replan_s=1.0,
            repeat_s=3.0,
            chunk_bytes=rng.choice((5, 20, 35, 1000)),
            preload_standbys=rng.random() < 0.3,
            donors=rng.choice(("none", "node", "any")),
            scaling=scaling,
            can_sleep=can_sleep,
        ),
        chaos_s=rng.choice((3.0, 3.0, 5.0, 10.0)),
        num_hosts=num_hosts,
        num_standbys=rng.choice((0, 0, 1, 2)),
        num_nodes=rng.randint(1, 4),
        num_routers=rng.randint(1, 2),
        max_bytes=max_bytes if from_hosts else None,
        real_planner=rng.random() < 0.05,
        signals=scaling is not None,
        delay_s=rng.choice((0.01, 0.1, 0.5)),
        load_s=rng.choice((0.02, 0.1, 0.4)),
        p_lost=chance * rng.choice((0.0, 0.05, 0.2)),
        p_twice=chance * rng.choice((0.0, 0.1, 0.3)),
        p_load_fails=chance * rng.choice((0.0, 0.1, 0.4)),
        p_start_fails=chance * rng.choice((0.0, 0.1, 0.4)),
        p_plan_fails=chance * rng.choice((0.0, 0.1)),
        deaths_per_s=chance * rng.choice((0.0, 0.2, 0.6)),
        hangs_per_s=chance * rng.choice((0.0, 0.2, 0.5)),
        nodes_per_s=chance * rng.choice((0.0, 0.1, 0.3)),
        restarts_per_s=chance * rng.choice((0.0, 0.0, 0.2)),
        wishes_per_s=rng.choice((0.2, 0.5, 1.0)),
    )
