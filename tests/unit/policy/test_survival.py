import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_moe.errors import InvalidConfig
from ray_moe.policy import survival
from ray_moe.policy.survival import group_nodes, nested, p_lossless, p_none_lost
from ray_moe.types import Placement


@st.composite
def families(draw):
    """(sets of nodes, number of nodes, number lost)."""
    num_nodes = draw(st.integers(1, 8))
    nodes = st.frozensets(st.integers(0, num_nodes - 1), min_size=1)
    return draw(st.sets(nodes, max_size=8)), num_nodes, draw(st.integers(0, num_nodes))


def by_brute_force(sets, num_nodes, num_lost):
    ways = [set(lost) for lost in itertools.combinations(range(num_nodes), num_lost)]
    return sum(not any(nodes <= lost for nodes in sets) for lost in ways) / len(ways)


@given(families())
def test_the_chance_is_that_of_all_ways_to_lose_nodes(family):
    assert p_none_lost(*family) == pytest.approx(by_brute_force(*family), abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(families())
def test_an_estimate_is_near_it(family):
    sets, num_nodes, num_lost = family
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survival, "MAX_COUNTED", 0)
        estimate = p_none_lost(sets, num_nodes, num_lost)
        assert estimate == p_none_lost(sets, num_nodes, num_lost)
    assert estimate == pytest.approx(by_brute_force(sets, num_nodes, num_lost), abs=0.015)


def test_many_nodes_in_groups_are_counted_exactly():
    groups = {frozenset(range(begin, begin + 2)) for begin in range(0, 300, 2)}
    assert p_none_lost(groups, 300, 2) == pytest.approx(1 - 150 / (300 * 299 / 2), abs=1e-12)
    assert p_none_lost(groups, 300, 1) == 1.0
    assert p_none_lost(groups, 300, 300) == 0.0


def test_replicas_count_by_node_over_all_layers():
    node_of = {"a": "n0", "b": "n0", "c": "n1", "d": "n2"}
    apart, together = (("a", "c"),), (("a", "b"),)
    assert p_lossless(Placement({"x": apart}), node_of, 1) == 1.0
    assert p_lossless(Placement({"x": apart}), node_of, 2) == pytest.approx(2 / 3)
    assert p_lossless(Placement({"x": apart, "y": together}), node_of, 1) == pytest.approx(2 / 3)
    assert p_lossless(Placement({"x": apart}), node_of, 9) == 0.0
    assert p_lossless(Placement({"x": (("gone",),)}), node_of, 0) == 0.0
    assert p_lossless(Placement({"x": (("gone", "c"),)}), node_of, 1) == pytest.approx(2 / 3)
    assert p_lossless(Placement({}), node_of, 2) == 1.0
    with pytest.raises(InvalidConfig, match="-1"):
        p_lossless(Placement({}), node_of, -1)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_groups_hold_all_experts_and_are_as_few_as_can_be(slots, data):
    num_experts = data.draw(st.integers(0, sum(slots)))
    groups = group_nodes(slots, num_experts)
    assert sorted(node for group in groups for node in group) == list(range(len(slots)))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    assert sum(min(slots[node] for node in group) for group in groups) >= num_experts
    if len(set(slots)) == 1 and num_experts:
        assert len(groups) == -(-num_experts // slots[0])


@given(st.data())
def test_nested_replicas_are_within_slots_and_on_different_nodes(data):
    num_hosts = data.draw(st.integers(1, 6))
    integers = lambda most: st.lists(st.integers(0, most), min_size=num_hosts, max_size=num_hosts)  # noqa: E731
    slots = np.array(data.draw(integers(4)))
    node = np.unique(data.draw(integers(3)), return_inverse=True)[1]
    load = np.array(data.draw(st.lists(st.floats(0, 10), min_size=1, max_size=max(1, int(slots.sum())))))
    slots[0] = max(slots[0], len(load) - slots[1:].sum())
    held = nested(load, slots, np.ones(num_hosts), node)
    assert held.any(-1).all()
    assert (held.sum(0) <= slots).all()
    for homes in held:
        assert len(set(node[homes])) == homes.sum()


def test_nested_replicas_outlive_spread_ones():
    random = np.random.default_rng(0)
    held = nested(np.ones(40), np.full(16, 5), np.ones(16), np.arange(16))
    grouped = {frozenset(np.flatnonzero(homes).tolist()) for homes in held}
    spread = {frozenset(random.choice(16, 2, replace=False).tolist()) for _ in range(40)}
    assert p_none_lost(grouped, 16, 3) > p_none_lost(spread, 16, 3) + 0.2
    assert max(held.sum(0)) == 5
