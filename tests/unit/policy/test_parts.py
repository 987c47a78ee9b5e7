"""Parts of experts: their numbers, and the hosts that they come to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.policy.ownership import assign
from ray_moe.policy.parts import parts_of, slots_in_parts, whole_of
from ray_moe.policy.placement import place_by_index
from ray_moe.policy.planner import Capacity, plan
from ray_moe.types import Placement

EXPERTS, PARTS = st.integers(1, 40), st.integers(1, 8)


@given(EXPERTS, PARTS)
def test_every_part_has_a_number_of_its_own_and_the_first_that_of_the_expert(num_experts: int, num_parts: int) -> None:
    numbers = [parts_of(expert, num_experts, num_parts) for expert in range(num_experts)]
    assert sorted(number for parts in numbers for number in parts) == list(range(num_experts * num_parts))
    assert [parts[0] for parts in numbers] == list(range(num_experts))
    for expert, parts in enumerate(numbers):
        assert [whole_of(number, num_experts) for number in parts] == [(expert, part) for part in range(num_parts)]


@given(EXPERTS, PARTS, st.data())
def test_a_slot_goes_to_all_parts_of_its_expert_side_by_side_and_nobody_stays_nobody(
    num_experts: int, num_parts: int, data: st.DataObject
) -> None:
    slots = data.draw(st.lists(st.integers(0, num_experts), max_size=50))
    cut = slots_in_parts(np.array(slots, dtype=np.int64), num_experts, num_parts).reshape(len(slots), num_parts)
    for slot, parts in zip(slots, cut.tolist(), strict=True):
        nobody = [num_experts * num_parts] * num_parts
        assert parts == (nobody if slot == num_experts else parts_of(slot, num_experts, num_parts))


def apart(placement: Placement, num_experts: int, num_parts: int) -> bool:
    """Whether no host has two parts of an expert."""
    (homes,) = placement.hosts_of.values()
    first = [hosts[0] for hosts in homes]
    return all(
        len({first[part] for part in parts_of(expert, num_experts, num_parts)}) == num_parts
        for expert in range(num_experts)
    )


@given(EXPERTS, PARTS, st.integers(0, 12))
def test_the_parts_of_an_expert_are_on_different_hosts_where_there_are_as_many(
    num_experts: int, num_parts: int, more: int
) -> None:
    count = num_experts * num_parts
    hosts = [f"expert-{number}" for number in range(min(num_parts + more, count))]
    assert apart(place_by_index({"layer": count}, hosts), num_experts, num_parts)
    assert apart(assign({"layer": count}, hosts), num_experts, num_parts)


@pytest.mark.parametrize("seed", range(8))
def test_a_plan_for_a_skewed_load_keeps_the_parts_of_the_hottest_expert_apart(seed: int) -> None:
    """They have the same load, and the most: together on a host they would be what everybody waits for."""
    rng = np.random.default_rng(seed)
    num_experts, num_parts = 8, 2
    load = rng.zipf(1.7, num_experts).clip(max=200).astype(float)
    hosts = [f"expert-{number}" for number in range(4)]
    before = place_by_index({"layer": num_experts * num_parts}, hosts)
    after = plan({"layer": np.tile(load, num_parts)}, [Capacity(host, 5) for host in hosts], before)
    hottest = parts_of(int(load.argmax()), num_experts, num_parts)
    one, other = (set(after.hosts_of["layer"][part]) for part in hottest)
    assert len(one | other) >= num_parts
    assert one != other or len(one) >= num_parts
