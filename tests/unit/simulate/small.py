"""Small clusters to simulate: 4 hosts, 2 layers of 8 experts, top-2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ray_moe.policy.hosts import ClusterSettings
from ray_moe.policy.planner import Goals
from ray_moe.simulate.cluster import Simulation
from ray_moe.simulate.scenario import Scenario
from ray_moe.simulate.trace import SyntheticTrace, Trace
from ray_moe.types import LayerSpec

EXPERT_BYTES = 2**20

TRACE = SyntheticTrace("zipf", 1.0, num_layers=2, experts_per_layer=8, top_k=2, tokens_per_s=2000, seconds=20)
SCENARIO = Scenario(4, bandwidth=2**27, start_s=2.0, tokens_per_batch=256, top_k=2)


def trace(**changes: Any) -> SyntheticTrace:
    return replace(TRACE, **changes)


def scenario(**changes: Any) -> Scenario:
    return replace(SCENARIO, **changes)


def settings(of: Trace = TRACE, goals: Goals = Goals(), **changes: Any) -> ClusterSettings:  # noqa: B008 -- frozen
    layers = tuple(
        LayerSpec(path, number, 0, 0, "", EXPERT_BYTES) for path, number in zip(of.layers, of.num_experts, strict=True)
    )
    return replace(ClusterSettings(layers, spare_slots=2, drain_s=0.5, return_s=5.0, goals=goals), **changes)


def simulation(of: Trace = TRACE, world: Scenario = SCENARIO, **changes: Any) -> Simulation:
    return Simulation(world, settings(of, **changes), of)
