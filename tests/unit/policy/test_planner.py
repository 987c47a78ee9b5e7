import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_moe.errors import InsufficientResources, InvalidConfig
from ray_moe.policy.placement import place_by_index
from ray_moe.policy.planner import Capacity, Goals, plan, predict, slots_in_bytes
from ray_moe.types import Placement

FREE = Goals(min_gain=0.0, cost_per_move=0.0)


@st.composite
def clusters(draw, most_experts=10, most_hosts=5, most_layers=3):
    """(load, hosts) with slots for all experts."""
    names = draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=most_layers, unique=True))
    tokens = st.floats(0, 1000) | st.just(0.0)
    load = {name: np.array(draw(st.lists(tokens, min_size=1, max_size=most_experts))) for name in names}
    widest = max(map(len, load.values()))
    num_hosts = draw(st.integers(1, most_hosts))
    hosts = [
        Capacity(
            f"host-{number}",
            draw(st.integers(0, widest)),
            draw(st.sampled_from([1.0, 1.0, 0.5, 3.0])),
            draw(st.sampled_from(["", "n1", "n2"])),
            draw(st.sampled_from(["", "d1", "d2"])),
        )
        for number in range(num_hosts)
    ]
    short = widest - sum(min(host.slots, widest) for host in hosts)
    if short > 0:
        hosts.append(Capacity("host-x", widest))
    return load, hosts


goals_st = st.builds(
    Goals,
    min_replicas=st.integers(1, 3),
    min_gain=st.sampled_from([0.0, 0.02]),
    cost_per_move=st.sampled_from([0.0, 0.001]),
    survive_nodes=st.integers(0, 2),
    drift=st.sampled_from([0.0, 0.3]),
)


@st.composite
def currents(draw, load, hosts):
    """Any placement at all, of hosts that are there and one that is gone, or None."""
    names = [host.host_id for host in hosts] + ["gone"]
    homes = st.lists(st.sampled_from(names), max_size=3, unique=True).map(tuple)
    if draw(st.booleans()):
        return None
    return Placement(
        {layer: tuple(draw(st.lists(homes, min_size=len(t), max_size=len(t)))) for layer, t in load.items()}
    )


def check_valid(placement, load, hosts, goals=None):
    slots = {host.host_id: host.slots for host in hosts}
    assert list(placement.hosts_of) == list(load)
    for layer, experts in placement.hosts_of.items():
        assert len(experts) == len(load[layer])
        held = dict.fromkeys(slots, 0)
        for names in experts:
            assert len(names) >= 1
            assert len(set(names)) == len(names)
            for name in names:
                held[name] += 1
        assert all(held[name] <= slots[name] for name in slots)


def replicas_of(placement):
    return {
        (layer, expert, host)
        for layer, experts in placement.hosts_of.items()
        for expert, hosts in enumerate(experts)
        for host in hosts
    }


def zipf(num_experts, exponent=1.0, seed=0):
    return np.random.default_rng(seed).permutation(1000 / np.arange(1, num_experts + 1) ** exponent)


def same(num_hosts, slots, **kwargs):
    return [Capacity(f"host-{number:02}", slots, **kwargs) for number in range(num_hosts)]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_plan_is_valid_final_and_independent_of_order(data):
    load, hosts = data.draw(clusters())
    goals = data.draw(goals_st)
    current = data.draw(currents(load, hosts))
    placement = plan(load, hosts, current, goals)
    check_valid(placement, load, hosts)
    assert plan(load, hosts, placement, goals) == placement
    shuffled = {layer: load[layer] for layer in data.draw(st.permutations(list(load)))}
    assert plan(shuffled, data.draw(st.permutations(hosts)), current, goals) == placement
    for value in predict(load, placement, hosts).values():
        assert 0 < value <= 1 + 1e-6


@settings(max_examples=30, deadline=None)
@given(clusters(), st.integers(1, 4))
def test_every_expert_has_min_replicas_where_slots_allow(cluster, min_replicas):
    load, hosts = cluster
    hosts = [Capacity(host.host_id, 10, host.speed) for host in hosts]
    placement = plan(load, hosts, goals=Goals(min_replicas=min_replicas))
    for experts in placement.hosts_of.values():
        assert min(map(len, experts)) >= min(min_replicas, len(hosts))


def test_min_replicas_take_slots_from_experts_that_have_more():
    hosts = same(4, 2)
    names = [host.host_id for host in hosts]
    current = Placement({"a": (tuple(names), (names[0],), (names[1],), (names[2],))})
    placement = plan({"a": np.array([4.0, 1, 1, 1])}, hosts, current, Goals(min_replicas=2))
    assert [len(homes) for homes in placement.hosts_of["a"]] == [2, 2, 2, 2]
    assert len(replicas_of(placement) - replicas_of(current)) == 3


def test_replicas_are_on_different_nodes_then_in_different_domains():
    hosts = [Capacity(f"h{n}", 4, node=f"n{n // 2}", domain=f"d{n // 4}") for n in range(8)]
    node = {host.host_id: host.node for host in hosts}
    domain = {host.host_id: host.domain for host in hosts}
    placement = plan({"a": zipf(16)}, hosts, goals=Goals(min_replicas=2))
    for homes in placement.hosts_of["a"]:
        assert len({node[home] for home in homes}) == min(len(homes), 4)
        assert len({domain[home] for home in homes}) == 2


def test_replicas_on_one_node_are_parted():
    hosts = [Capacity(f"h{n}", 4, node=f"n{n // 2}") for n in range(4)]
    current = Placement({"a": (("h0", "h1"), ("h2", "h0"), ("h1", "h3"))})
    placement = plan({"a": np.ones(3)}, hosts, current, Goals(min_replicas=2))
    assert placement.hosts_of["a"][1:] == current.hosts_of["a"][1:]
    assert placement.hosts_of["a"][0] in {("h0", "h2"), ("h0", "h3")}


def test_a_lost_host_costs_only_the_moves_that_are_needed():
    hosts, load = same(8, 10), {"a": zipf(64), "b": zipf(64, seed=1)}
    before = plan(load, hosts)
    left = hosts[:3] + hosts[4:]
    after = plan(load, left, before, Goals(min_gain=1.0))
    check_valid(after, load, left)
    kept = {replica for replica in replicas_of(before) if replica[2] != "host-03"}
    alone = [1 for experts in before.hosts_of.values() for homes in experts if homes == ("host-03",)]
    assert len(replicas_of(after) - kept) == len(alone) > 0


def test_a_new_host_is_used():
    hosts, load = same(8, 10), {"a": zipf(64)}
    before = plan(load, hosts)
    after = plan(load, [*hosts, Capacity("host-99", 10)], before)
    assert after.experts_on("host-99")
    assert predict(load, after, [*hosts, Capacity("host-99", 10)])["a"] > 0.99


def test_a_host_with_fewer_slots_gives_up_what_is_elsewhere_first():
    hosts = [Capacity("h0", 1), Capacity("h1", 3)]
    current = Placement({"a": (("h0", "h1"), ("h0",), ("h1",))})
    assert plan({"a": np.ones(3)}, hosts, current).hosts_of["a"] == (("h1",), ("h0",), ("h1",))


def test_a_small_gain_moves_nothing_and_a_large_one_does():
    hosts = same(4, 3)
    current = Placement({"a": tuple((f"host-{expert // 2:02}",) for expert in range(8))})
    tokens = np.array([10.0, 10, 10, 10.1, 10, 10, 10, 10])
    assert plan({"a": tokens}, hosts, current, Goals(drift=0.0)) == current
    tokens = np.array([100.0, 100, 10, 10, 10, 10, 10, 10])
    after = plan({"a": tokens}, hosts, current, Goals(drift=0.0))
    assert predict({"a": tokens}, current, hosts)["a"] < 0.4
    assert predict({"a": tokens}, after, hosts)["a"] > 0.95
    costly = plan({"a": tokens}, hosts, current, Goals(drift=0.0, cost_per_move=4.0))
    assert costly == current


def test_what_stays_keeps_its_order():
    hosts = same(3, 3)
    current = Placement({"a": (("host-02", "host-00"), ("host-01",), ("host-01",))})
    after = plan({"a": np.array([50.0, 1, 1])}, hosts, current, Goals(min_replicas=2))
    assert after.hosts_of["a"][0][:2] == ("host-02", "host-00")
    assert [homes[0] for homes in after.hosts_of["a"][1:]] == ["host-01", "host-01"]


def test_no_traffic_gives_an_even_placement_and_changes_none():
    hosts, nothing = same(4, 5), {"a": np.zeros(8)}
    placement = plan(nothing, hosts)
    assert [len(homes) for homes in placement.hosts_of["a"]] == [1] * 8
    assert [len(placement.experts_on(host.host_id)["a"]) for host in hosts] == [2] * 4
    lopsided = Placement({"a": tuple(("host-00",) if expert < 5 else ("host-01",) for expert in range(8))})
    assert plan(nothing, hosts, lopsided) == lopsided


def test_no_replica_is_added_that_brings_nothing():
    hosts = same(4, 8)
    even = plan({"a": np.full(8, 10.0)}, hosts, goals=Goals(drift=0.0))
    assert [len(homes) for homes in even.hosts_of["a"]] == [1] * 8
    drifting = plan({"a": np.full(8, 10.0)}, hosts)
    assert 8 < sum(len(homes) for homes in drifting.hosts_of["a"]) <= 20


def test_fewer_experts_than_hosts():
    placement = plan({"a": np.array([90.0, 5, 5])}, same(8, 1))
    assert sum(len(homes) for homes in placement.hosts_of["a"]) > 3
    assert predict({"a": np.array([90.0, 5, 5])}, placement, same(8, 1))["a"] > 0.7


def test_speed_and_slots_of_each_host_count():
    hosts = [Capacity("fast", 6, 4.0), Capacity("slow", 6, 1.0), Capacity("tiny", 1, 1.0)]
    load = {"a": zipf(8, 0.5)}
    placement = plan(load, hosts)
    assert predict(load, placement, hosts)["a"] > 0.95
    assert len(placement.experts_on("tiny").get("a", [])) <= 1


def test_the_split_of_drifted_batches_is_even():
    """Shared experts join all hosts: with one spare slot a host no island of hosts is left alone."""
    for num_experts, num_hosts, slots in ((64, 8, 9), (64, 8, 10), (256, 64, 5)):
        for exponent in (0.5, 1.2):
            load = {"a": zipf(num_experts, exponent)}
            placement = plan(load, same(num_hosts, slots))
            joined = {name: {name} for name in (host.host_id for host in same(num_hosts, slots))}
            for homes in placement.hosts_of["a"]:
                island = set().union(*(joined[home] for home in homes))
                joined.update(dict.fromkeys(island, island))
            assert max(map(len, joined.values())) >= 0.9 * num_hosts
            assert predict(load, placement, same(num_hosts, slots))["a"] > 0.96


def test_nested_replicas_survive_more_often():
    hosts, load = same(9, 4), {"a": zipf(12), "b": zipf(12, seed=1)}
    placement = plan(load, hosts, goals=Goals(survive_nodes=2))
    for experts in placement.hosts_of.values():  # as many replicas as losses, and one more
        assert min(map(len, experts)) == 3
    tight = plan(load, same(6, 4), goals=Goals(survive_nodes=2))
    sets = {frozenset(homes) for experts in tight.hosts_of.values() for homes in experts}
    assert len(sets) == 3
    assert all(len(homes) == 2 for homes in sets)


def test_a_spread_placement_is_nested_when_that_is_asked_for():
    hosts, load = same(6, 4), {"a": zipf(12)}
    spread = plan(load, hosts, goals=Goals(min_replicas=2))
    assert len({frozenset(homes) for homes in spread.hosts_of["a"]}) > 3
    nested = plan(load, hosts, spread, Goals(survive_nodes=2))
    assert len({frozenset(homes) for homes in nested.hosts_of["a"]}) == 3


def test_prediction_of_what_cannot_be_served_and_of_no_load():
    hosts = same(2, 2)
    placement = Placement({"a": (("host-00",), ("gone",)), "b": (("host-00",), ("host-01",))})
    load = {"a": np.ones(2), "b": np.zeros(2), "c": np.ones(1)}
    assert predict(load, placement, hosts) == {"a": 0.0, "b": 1.0, "c": 0.0}
    skewed = predict({"b": np.array([3.0, 1.0])}, placement, hosts)["b"]
    assert math.isclose(skewed, 2 / 3, rel_tol=1e-4)


def test_slots_in_bytes():
    assert slots_in_bytes(100, {"a": 20, "b": 10}) == 3
    assert slots_in_bytes(29, {"a": 20, "b": 10}) == 0


@pytest.mark.parametrize(
    ("load", "hosts", "error", "message"),
    [
        ([1.0] * 5, same(2, 2), InsufficientResources, "has 5 experts, but the hosts have 4 slots"),
        ([1.0] * 3, [Capacity("h", 0)], InsufficientResources, "has 3 experts, but the hosts have 0 slots"),
        ([1.0], [], InsufficientResources, "no host"),
        ([1.0], [Capacity("h", 1), Capacity("h", 2)], InvalidConfig, "'h' is named twice"),
        ([1.0, -2.0], same(1, 2), InvalidConfig, "expert 1 of layer 'a' is -2.0"),
        ([math.nan, 1.0], same(1, 2), InvalidConfig, "expert 0 of layer 'a' is nan"),
        ([math.inf], same(1, 2), InvalidConfig, "is inf"),
        ([1.0], [Capacity("h", 1, 0.0)], InvalidConfig, "speed 0.0"),
        ([1.0], [Capacity("h", -1)], InvalidConfig, "-1 slots"),
        ([], same(1, 1), InvalidConfig, "no experts"),
    ],
)
def test_impossible_requests_are_refused_with_the_numbers(load, hosts, error, message):
    with pytest.raises(error, match=message):
        plan({"a": np.array(load)}, hosts)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(32, 8, 2), (12, 4, 2), (12, 6, 3)]))
def test_just_enough_slots_are_enough_for_every_replica_from_where_a_service_begins(seed, size):
    num_experts, num_hosts, least = size
    hosts = same(num_hosts, least * num_experts // num_hosts)
    current = place_by_index({"a": num_experts}, [host.host_id for host in hosts])
    tokens = np.random.default_rng(seed).permutation(1.0 / np.arange(1, num_experts + 1))
    after = plan({"a": tokens}, hosts, current, Goals(min_replicas=least))
    assert [len(names) for names in after.hosts_of["a"]] == [least] * num_experts
