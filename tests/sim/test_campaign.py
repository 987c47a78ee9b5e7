"""Thousands of seeded fault schedules on a virtual clock: no rule is ever broken, and in the end all is in order.

A schedule that fails names its seed; `RAY_MOE_SIM_SEEDS=17:18 pytest tests/sim` runs that one alone, and a wider range
runs as many as there is time for.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from ray_moe.policy.cluster_state import ClusterState
from ray_moe.policy.hosts import ClusterSettings
from tests.sim.world import World

FIRST, LAST = (int(number) for number in os.environ.get("RAY_MOE_SIM_SEEDS", "0:2000").split(":"))
BLOCK = 200


@pytest.mark.parametrize("first", range(FIRST, LAST, BLOCK))
def test_no_schedule_of_faults_breaks_a_rule(first):
    for seed in range(first, min(first + BLOCK, LAST)):
        found = World(seed).run()
        assert found == [], f"again: RAY_MOE_SIM_SEEDS={seed}:{seed + 1} pytest tests/sim"


class Hasty(ClusterState):
    """Drops what a table has just ceased to name, without waiting for the routers."""

    def __init__(self, settings: ClusterSettings, *args: Any, **kwargs: Any) -> None:
        super().__init__(replace(settings, drain_s=0.0), *args, **kwargs)


class Forgetful(ClusterState):
    """Never notices that a host is lost."""

    def _host_lost(self, event: object) -> None: ...


@pytest.mark.parametrize("broken", [Hasty, Forgetful])
def test_the_campaign_finds_a_planted_bug(broken):
    assert any(World(seed, broken).run() for seed in range(60))
