"""Advice fits the machines, and moves the right way when they or the traffic change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_moe.errors import InsufficientResources, InvalidConfig, UnsupportedModel
from ray_moe.policy.advice import Advice, Hardware, Traffic, explain
from ray_moe.policy.advise import advise, capacity_factor
from ray_moe.policy.anatomy import Anatomy, ExpertGroup

GIB = 2**30


def model(experts: int = 8, layers: int = 4, expert_params: int = 2**24, dense: int = 2**28, k: float = 2) -> Anatomy:
    groups = tuple(ExpertGroup(f"layers.{n}", experts, expert_params, min(k, experts), 1024) for n in range(layers))
    total = dense + layers * experts * expert_params
    return Anatomy(total, 2 * total, groups, kv_bytes_per_token=16384, attention_width=layers * 1024)


models = st.builds(
    model,
    st.sampled_from([1, 2, 7, 8, 16, 60]),
    st.integers(1, 4),
    st.sampled_from([2**18, 2**22, 2**24]),
    st.sampled_from([2**20, 2**27]),
    st.sampled_from([1, 2, 8]),
)
machines = st.builds(
    Hardware,
    st.integers(1, 9),
    st.integers(1, 40).map(lambda n: n * GIB // 2),
    st.sampled_from(["cpu", "gpu"]),
    price_per_hour=st.sampled_from([0.0, 1.5]),
)
traffics = st.builds(
    Traffic,
    st.sampled_from([0.0, 0.5, 4.0, 40.0]),
    st.sampled_from([1, 500]),
    st.sampled_from([1, 100]),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)


def tried(anatomy: Anatomy, hardware: Hardware, traffic: Traffic) -> Advice | None:
    """None where it does not fit."""
    try:
        return advise(anatomy, hardware, traffic)
    except InsufficientResources:
        return None


@settings(max_examples=80, deadline=None)
@given(models, machines, traffics)
def test_what_is_advised_fits(anatomy: Anatomy, hardware: Hardware, traffic: Traffic) -> None:
    advice = tried(anatomy, hardware, traffic)
    if advice is None:
        return
    assert 1 <= advice.num_actors <= hardware.num_hosts
    assert advice.host_bytes + advice.lifeboat_bytes <= hardware.host_bytes * 0.9
    held = advice.experts_per_actor + advice.spare_slots  # what a service lets an actor hold, wherever the router is
    weights = held * anatomy.column_bytes + anatomy.backbone_bytes + advice.kv_cache_bytes
    assert weights <= hardware.host_bytes * 0.9
    assert advice.num_actors * advice.experts_per_actor >= anatomy.num_experts
    assert len(advice.replicas) == anatomy.num_experts
    assert all(1 <= number <= advice.num_actors for number in advice.replicas)
    slots = advice.num_actors * (advice.experts_per_actor + advice.spare_slots)
    assert sum(advice.replicas) <= slots
    assert 1 <= advice.capacity_factor <= max(1.0, anatomy.num_experts / advice.top_k)
    assert advice.cost_per_hour == advice.num_actors * hardware.price_per_hour
    assert 0 < advice.balancedness <= 1 + 1e-9


@settings(max_examples=60, deadline=None)
@given(models, machines, traffics, st.integers(1, 20))
def test_more_memory_never_gives_fewer_experts_per_actor(
    anatomy: Anatomy, hardware: Hardware, traffic: Traffic, more: int
) -> None:
    before = tried(anatomy, hardware, traffic)
    after = tried(anatomy, replace(hardware, host_bytes=hardware.host_bytes + more * GIB // 2), traffic)
    if before is None:
        return
    assert after is not None
    assert after.experts_per_actor >= before.experts_per_actor
    assert after.cost_per_hour <= before.cost_per_hour


@settings(max_examples=60, deadline=None)
@given(models, machines, traffics)
def test_more_traffic_never_gives_fewer_hosts(anatomy: Anatomy, hardware: Hardware, traffic: Traffic) -> None:
    before = tried(anatomy, hardware, traffic)
    after = tried(anatomy, hardware, replace(traffic, requests_per_s=2 * traffic.requests_per_s + 1))
    if before is not None and after is not None:
        assert after.num_actors >= before.num_actors
        assert after.kv_cache_bytes >= before.kv_cache_bytes


@settings(max_examples=40, deadline=None)
@given(models, machines, traffics)
def test_more_hosts_are_not_used_for_nothing(anatomy: Anatomy, hardware: Hardware, traffic: Traffic) -> None:
    """With enough hosts, one more changes nothing. (A single host has no rounds to others, so begin with two.)"""
    hardware = replace(hardware, num_hosts=hardware.num_hosts + 1)
    before = tried(anatomy, hardware, traffic)
    after = tried(anatomy, replace(hardware, num_hosts=hardware.num_hosts + 1), traffic)
    if before is not None and before.num_actors < hardware.num_hosts:
        assert after == before


def test_popular_experts_get_the_replicas() -> None:
    hardware = Hardware(4, 4 * GIB, flops=1e10)
    even = advise(model(), hardware, Traffic(skew=0.0))
    skewed = advise(model(), hardware, Traffic(skew=1.5))
    assert even.num_actors == skewed.num_actors == 4
    assert set(even.replicas) == {1}
    assert skewed.replicas[0] > skewed.replicas[-1] == 1
    assert skewed.balancedness > 0.9


def test_a_capacity_by_the_rule_drops_little() -> None:
    """Against random choices: of 4096 tokens' slots over 64 experts, those beyond the capacity."""
    generator = np.random.default_rng(0)
    for skew in (0.0, 0.5):
        factor = capacity_factor(64, 2, 4096, skew)
        shares = np.arange(1, 65) ** -skew
        counts = generator.multinomial(2 * 4096, shares / shares.sum(), size=50)
        dropped = np.maximum(0, counts - factor * 2 * 4096 / 64).sum() / counts.sum()
        assert dropped < 0.001
    assert capacity_factor(8, 8, 100, 0.0) == 1.0


def test_every_number_has_its_rule() -> None:
    hardware, traffic = Hardware(4, 8 * GIB, price_per_hour=2.0), Traffic(requests_per_s=2.0)
    advice = advise(model(), hardware, traffic)
    rules = {rule.name: rule for rule in explain(advice, model(), hardware, traffic)}
    assert rules["experts per actor"].value == str(advice.experts_per_actor)
    assert rules["top-k"].why == "the model's own"
    assert f"{advice.num_actors} hosts x 2" in rules["cost"].why
    assert len(rules) == 13
    assert all(rule.value and rule.why for rule in rules.values())


def test_what_does_not_fit_says_what_would() -> None:
    with pytest.raises(InsufficientResources, match=r"8 experts of 128\.0 MiB .* have room for .*would do"):
        advise(model(dense=2**20), Hardware(1, GIB + GIB // 4), Traffic(requests_per_s=0))
    with pytest.raises(InsufficientResources, match="the router needs"):
        advise(model(), Hardware(8, GIB // 2), Traffic())
    with pytest.raises(InsufficientResources, match="a host cannot hold one"):
        advise(model(expert_params=2**28, dense=2**20), Hardware(8, GIB), Traffic(requests_per_s=0))


def test_poor_balance_is_a_warning() -> None:
    small = advise(model(dense=2**20), Hardware(8, GIB), Traffic(requests_per_s=0, skew=2.0))
    assert (small.spare_slots, set(small.replicas)) == (0, {1})
    assert "times the mean load: more hosts, or memory for more slots" in small.warnings[0]
    roomy = advise(model(dense=2**20), Hardware(8, 64 * GIB, flops=1e6), Traffic(requests_per_s=1e-3, skew=2.0))
    assert roomy.balancedness >= 0.95


def test_too_much_traffic_is_a_warning() -> None:
    advice = advise(model(), Hardware(2, 64 * GIB), Traffic(requests_per_s=1e4, prompt_tokens=1, output_tokens=1))
    assert advice.num_actors == 2
    assert "and there are 2" in advice.warnings[0]


@pytest.mark.parametrize(
    ("hardware", "traffic", "said"),
    [
        (Hardware(0, GIB), Traffic(), "number of hosts is 0"),
        (Hardware(1, 0), Traffic(), "memory of a host is 0"),
        (Hardware(1, GIB, "tpu"), Traffic(), "the device is 'tpu'; expected one of cpu, gpu"),  # type: ignore[arg-type]
        (Hardware(1, GIB, bandwidth=float("nan")), Traffic(), "bandwidth is nan"),
        (Hardware(1, GIB, price_per_hour=-1), Traffic(), "price is -1"),
        (Hardware(1, GIB), Traffic(requests_per_s=-1), "requests per second is -1"),
        (Hardware(1, GIB), Traffic(skew=float("inf")), "skew is inf"),
        (Hardware(1, GIB), Traffic(prompt_tokens=0), "prompt tokens is 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(hardware: Hardware, traffic: Traffic, said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        advise(model(), hardware, traffic)


def test_a_dense_model_has_nothing_to_place() -> None:
    with pytest.raises(UnsupportedModel, match="dense"):
        advise(Anatomy(10, 20), Hardware(1, GIB), Traffic())


def test_k_must_be_known_or_said() -> None:
    unknown = model()
    unknown = replace(unknown, groups=tuple(replace(group, top_k=None) for group in unknown.groups))
    with pytest.raises(InvalidConfig, match="--top-k"):
        advise(unknown, Hardware(4, 8 * GIB), Traffic())
    assert advise(unknown, Hardware(4, 8 * GIB), Traffic(), top_k=2).top_k == 2
    with pytest.raises(InvalidConfig, match="top-k is 9; with 8 experts"):
        advise(unknown, Hardware(4, 8 * GIB), Traffic(), top_k=9)
