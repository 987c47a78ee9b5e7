import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import InvalidConfig
from ray_moe.policy.placement import choose_num_hosts, place_by_index, replace_host

layers = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 60), min_size=1)


@given(layers, st.integers(1, 60))
def test_every_expert_has_one_host_and_shares_differ_by_one_index(num_experts, num_hosts):
    widest = max(num_experts.values())
    hosts = [f"expert-{number}" for number in range(min(num_hosts, widest))]
    placement = place_by_index(num_experts, hosts)
    for layer, count in num_experts.items():
        assert [len(names) for names in placement.hosts_of[layer]] == [1] * count
    layer = max(num_experts, key=lambda name: num_experts[name])
    shares = [len(placement.experts_on(host)[layer]) for host in hosts]
    assert max(shares) - min(shares) <= 1
    assert sum(shares) == widest


@given(layers)
def test_with_a_host_for_each_expert_an_index_is_on_one_host_over_all_layers(num_experts):
    widest = max(num_experts.values())
    placement = place_by_index(num_experts, [f"expert-{number}" for number in range(widest)])
    for experts in placement.hosts_of.values():
        assert [names[0] for names in experts] == [f"expert-{number}" for number in range(len(experts))]


def test_an_heir_holds_what_the_lost_host_held():
    placement = place_by_index({"a": 5, "b": 3}, ["expert-0", "expert-1"])
    after = replace_host(placement, "expert-1", "expert-2")
    assert after.experts_on("expert-2") == placement.experts_on("expert-1")
    assert after.experts_on("expert-0") == placement.experts_on("expert-0")
    assert after.experts_on("expert-1") == {}


@pytest.mark.parametrize(
    ("num_actors", "experts_per_actor", "slots", "expected"),
    [
        (None, None, 100.0, 8),
        (None, None, 3.0, 3),
        (None, None, 0.0, 1),
        (None, None, float("inf"), 8),
        (5, None, 2.0, 5),
        (None, 3, 2.0, 3),
        (None, 20, 2.0, 1),
    ],
)
def test_how_many_hosts(num_actors, experts_per_actor, slots, expected):
    assert choose_num_hosts(8, num_actors, experts_per_actor, slots) == expected


def test_impossible_numbers_of_hosts_are_refused_with_both_numbers():
    with pytest.raises(InvalidConfig, match="is 9, but the model has 8 experts"):
        choose_num_hosts(8, 9, None, 100)
    with pytest.raises(InvalidConfig, match="both set"):
        choose_num_hosts(8, 2, 2, 100)
