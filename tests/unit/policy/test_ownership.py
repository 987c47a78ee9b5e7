"""Who trains what: whatever the hosts are, and were."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import InsufficientResources
from ray_moe.policy.ownership import assign, keepers
from ray_moe.types import HostAddress, Placement

HOSTS = [f"expert-{number}" for number in range(9)]
LAYERS = st.dictionaries(st.sampled_from(["first", "second", "third"]), st.integers(1, 24), min_size=1)
SOME = st.lists(st.sampled_from(HOSTS), min_size=1, unique=True)


def owners(placement: Placement) -> dict[str, list[str]]:
    return {layer: [hosts[0] for hosts in experts] for layer, experts in placement.hosts_of.items()}


@given(LAYERS, SOME, SOME, st.integers(1, 4), st.data())
def test_everybody_has_a_fair_share_and_owners_stay_where_they_may(
    layers: dict[str, int], before: list[str], hosts: list[str], num_replicas: int, data: Any
) -> None:
    old = assign(layers, before, num_replicas=data.draw(st.integers(1, 4)))
    new = assign(layers, hosts, old, num_replicas=num_replicas)
    assert new == assign(layers, hosts, old, num_replicas=num_replicas)
    for layer, count in layers.items():
        mine = Counter(owners(new)[layer])
        share, more = divmod(count, len(hosts))
        assert sorted(mine[host] for host in hosts) == [share] * (len(hosts) - more) + [share + 1] * more
        # As many stay as the shares allow: the larger shares are for those that have most.
        had = sorted((Counter(owners(old)[layer])[host] for host in hosts), reverse=True)
        most = sum(min(num, share + (rank < more)) for rank, num in enumerate(had))
        stay = sum(a == b for a, b in zip(owners(old)[layer], owners(new)[layer], strict=True))
        assert stay == most
        for experts in new.hosts_of[layer]:
            assert len(set(experts)) == len(experts) == min(num_replicas, len(hosts))
            assert set(experts) <= set(hosts)


@given(LAYERS, SOME)
def test_with_the_same_hosts_nothing_moves_and_all_layers_together_are_even(
    layers: dict[str, int], hosts: list[str]
) -> None:
    placement = assign(layers, hosts)
    assert assign(layers, hosts, placement) == placement
    total = Counter(host for experts in owners(placement).values() for host in experts)
    assert max(total[host] for host in hosts) - min(total[host] for host in hosts) <= 1


@given(st.integers(1, 24), SOME, st.data())
def test_who_has_the_state_of_an_expert_takes_it_over(count: int, hosts: list[str], data: Any) -> None:
    held = {expert: [data.draw(st.sampled_from(HOSTS))] for expert in range(count) if data.draw(st.booleans())}
    mine = owners(assign({"layer": count}, hosts, None, {"layer": held}))["layer"]
    share, more = divmod(count, len(hosts))
    for host in hosts:
        holds = [expert for expert, by in held.items() if by == [host]]
        took = sum(mine[expert] == host for expert in holds)
        assert took >= min(len(holds), share)
    assert max(Counter(mine).values()) <= share + (more > 0)


@given(LAYERS, SOME)
def test_an_old_placement_of_another_shape_is_passed_over(layers: dict[str, int], hosts: list[str]) -> None:
    old = assign({layer: count + 1 for layer, count in layers.items()}, HOSTS)
    assert assign(layers, hosts, old) == assign(layers, hosts)


def test_without_hosts_there_is_nobody_to_train_on() -> None:
    with pytest.raises(InsufficientResources, match="start at least one"):
        assign({"layer": 3}, [])


@given(st.lists(st.integers(0, 3), max_size=9))
def test_a_copy_is_kept_by_another_host_on_another_node_if_there_is_one(nodes: list[int]) -> None:
    addresses = {
        host: HostAddress(host, "1", f"node-{node}", 1, "", "") for host, node in zip(HOSTS, nodes, strict=False)
    }
    chosen = keepers(addresses)
    assert chosen.keys() == (addresses.keys() if len(addresses) > 1 else set())
    for host, keeper in chosen.items():
        assert keeper != host
        if len(set(nodes)) > 1:
            assert addresses[keeper].node_id != addresses[host].node_id
    if len(set(nodes)) in (1, len(nodes)):  # all on one node, or each on its own: each keeps for one
        assert set(Counter(chosen.values()).values()) <= {1}
