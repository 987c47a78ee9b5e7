"""Capacity: against a plain loop over slots, what holds for any routing, and inside a layer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from ray_moe import MoELayer
from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.ops.capacity import Capacity, CapacitySettings, Overflow, adapt_capacity, factor_for, limit
from ray_moe.ops.gates.base import Routing


def routed(num_tokens: int, num_experts: int, top_k: int, seed: int, holes: float = 0.0, skew: float = 2.0) -> Routing:
    """The K most probable experts, the first experts more probable, some choices of "no expert"."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    logits = logits - skew * torch.arange(num_experts) / num_experts
    weight, index = logits.softmax(-1).topk(top_k, dim=-1)
    index = index.masked_fill(torch.rand(index.shape, generator=generator) < holes, num_experts)
    return Routing(index, weight, logits)


def loop(routing: Routing, num_experts: int, settings: CapacitySettings) -> tuple[list[list[int]], list[list[float]]]:
    """`limit` for policies "drop" and "next", one slot after the other; without any of the package's mathematics."""
    index, weight = routing.index.tolist(), routing.weight.tolist()
    probability = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in routing.logits.tolist()]
    num_tokens, top_k = len(index), routing.index.shape[1]
    num_slots = sum(expert != num_experts for row in index for expert in row)
    capacity = max(math.ceil(settings.factor * num_slots / num_experts - 1e-6), settings.min_capacity)
    tokens = list(range(num_tokens))
    if settings.priority == "probability":
        tokens.sort(key=lambda token: -max(probability[token]))
    slots = [(token, choice) for choice in range(top_k) for token in tokens if index[token][choice] != num_experts]
    load = [0] * num_experts
    waiting = []
    new = [[num_experts] * top_k for _ in tokens]
    for token, choice in slots:
        expert = index[token][choice]
        if load[expert] < capacity:
            load[expert] += 1
            new[token][choice] = expert
        else:
            waiting.append((token, choice))
    for token, choice in waiting:
        open_to = [e for e in range(num_experts) if load[e] < capacity and e not in new[token]]
        if settings.policy == "next" and open_to:
            expert = max(open_to, key=lambda e: probability[token][e])
            load[expert] += 1
            new[token][choice] = expert
            weight[token][choice] *= min(probability[token][expert] / probability[token][index[token][choice]], 1)
        else:
            weight[token][choice] = 0.0
    return new, weight


SIZES = {
    "num_tokens": st.integers(0, 12),
    "num_experts": st.integers(1, 6),
    "top_k": st.integers(1, 6),
    "seed": st.integers(0, 10**6),
    "holes": st.sampled_from([0.0, 0.3, 1.0]),
}
FACTORS = st.sampled_from([0.3, 0.7, 1.0, 1.25, 2.0])
PRIORITIES = st.sampled_from(["position", "probability"])


@given(**SIZES, factor=FACTORS, policy=st.sampled_from(["drop", "next"]), priority=PRIORITIES)
def test_any_routing_is_limited_as_by_the_plain_loop(
    num_tokens, num_experts, top_k, seed, holes, factor, policy, priority
) -> None:
    routing = routed(num_tokens, num_experts, min(top_k, num_experts), seed, holes)
    settings = CapacitySettings(factor, policy=policy, priority=priority, min_capacity=seed % 2)
    limited, overflow = limit(routing, num_experts, settings)
    index, weight = loop(routing, num_experts, settings)
    assert limited.index.tolist() == index
    is_real = routing.index != num_experts
    expected = torch.tensor(weight, dtype=torch.float64).view(is_real.shape)
    torch.testing.assert_close(limited.weight[is_real], expected[is_real])
    lost = (limited.index == num_experts) & is_real
    assert int(overflow.dropped.sum()) == int(lost.sum())


@given(
    **SIZES,
    factor=FACTORS,
    policy=st.sampled_from(["drop", "next", "random"]),
    priority=PRIORITIES,
    training=st.booleans(),
)
def test_nothing_is_lost_uncounted_and_nobody_is_overrun(
    num_tokens, num_experts, top_k, seed, holes, factor, policy, priority, training
) -> None:
    routing = routed(num_tokens, num_experts, min(top_k, num_experts), seed, holes)
    settings = CapacitySettings(factor, policy=policy, priority=priority)
    limited, overflow = limit(routing, num_experts, settings, training=training)
    real = int((routing.index != num_experts).sum())
    kept = int((limited.index != num_experts).sum())
    assert kept == int(overflow.computed.sum())
    assert kept + int(overflow.dropped.sum()) == int(overflow.wanted.sum()) == real
    assert int(overflow.computed.max()) <= overflow.capacity
    assert torch.equal(overflow.dropped + overflow.moved, overflow.over)
    assert bool((limited.index[routing.index == num_experts] == num_experts).all())
    for row in limited.index.tolist():
        chosen = [expert for expert in row if expert != num_experts]
        assert len(chosen) == len(set(chosen))
    if policy == "random" and not training:
        torch.testing.assert_close(
            limited.index,
            limit(routing, num_experts, CapacitySettings(factor, policy="next", priority=priority))[0].index,
        )


@given(**SIZES, factor=FACTORS, policy=st.sampled_from(["drop", "next"]))
def test_by_probability_the_order_of_tokens_does_not_matter(
    num_tokens, num_experts, top_k, seed, holes, factor, policy
) -> None:
    routing = routed(num_tokens, num_experts, min(top_k, num_experts), seed, holes)
    if num_experts == 1:
        return  # all are as probable as each other, and position decides
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
    shuffled = Routing(routing.index[order], routing.weight[order], routing.logits[order])
    settings = CapacitySettings(factor, policy=policy, priority="probability")
    one, other = (limit(each, num_experts, settings)[0] for each in (routing, shuffled))
    assert torch.equal(one.index[order], other.index)
    assert torch.equal(one.weight[order], other.weight)


@given(**SIZES, factor=FACTORS)
def test_by_position_the_numbers_that_are_dropped_do_not_depend_on_the_order(
    num_tokens, num_experts, top_k, seed, holes, factor
) -> None:
    routing = routed(num_tokens, num_experts, min(top_k, num_experts), seed, holes)
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
    shuffled = Routing(routing.index[order], routing.weight[order], routing.logits[order])
    one, other = (limit(each, num_experts, CapacitySettings(factor))[1] for each in (routing, shuffled))
    assert torch.equal(one.dropped, other.dropped)


def test_first_choices_come_before_second_ones_and_earlier_tokens_before_later() -> None:
    index = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 1]])
    routing = Routing(index, torch.ones(4, 2), torch.zeros(4, 2))
    limited, overflow = limit(routing, 2, CapacitySettings(0.5))
    assert overflow.capacity == 2
    assert limited.index.tolist() == [[0, 1], [0, 2], [1, 2], [2, 2]]
    assert (overflow.wanted.tolist(), overflow.dropped.tolist()) == ([4, 4], [2, 2])
    assert str(overflow) == "8 slots, room for 2 an expert: 4 over, 0 moved, 4 dropped (50.0%)"
    assert (overflow.over_share, overflow.dropped_share) == (0.5, 0.5)


def test_a_moved_slot_never_takes_the_room_of_an_own_choice() -> None:
    logits = torch.tensor([[3.0, 2, 0], [3, 2, 0], [0, 3, 0]])
    routing = Routing(torch.tensor([[0], [0], [1]]), torch.ones(3, 1), logits)
    limited, overflow = limit(routing, 3, CapacitySettings(1.0, policy="next"))
    assert limited.index[:, 0].tolist() == [0, 2, 1]  # expert 1 would be better for the second, but the third chose it
    assert overflow.moved.tolist() == [1, 0, 0]


def test_the_weight_of_a_moved_slot_is_the_probability_of_its_new_expert_and_learns() -> None:
    logits = torch.tensor([[2.0, 1, 0], [2, 1.5, 0]], dtype=torch.float64, requires_grad=True)
    probability = logits.softmax(-1)
    weight, index = probability.topk(1)
    limited, _ = limit(Routing(index, weight, logits), 3, CapacitySettings(1.0, policy="next"))
    assert limited.index.tolist() == [[0], [1]]
    torch.testing.assert_close(limited.weight[1, 0], probability[1, 1])
    (ours,) = torch.autograd.grad(limited.weight[1, 0], logits, retain_graph=True)
    (expected,) = torch.autograd.grad(probability[1, 1], logits)
    torch.testing.assert_close(ours, expected)


def test_experts_that_a_gate_forbids_are_not_given_moved_slots() -> None:
    logits = torch.tensor([[3.0, -math.inf, 1.0]]).expand(4, 3)
    routing = Routing(torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), logits)
    for policy in ("next", "random"):
        limited, overflow = limit(routing, 3, CapacitySettings(1.0, policy=policy))
        assert sorted(limited.index[:, 0].tolist()) == [0, 0, 2, 2]
        assert overflow.computed.tolist() == [2, 0, 2]


def test_random_moves_are_spread_and_are_the_same_from_the_same_seed() -> None:
    routing = Routing(torch.zeros(400, 1, dtype=torch.long), torch.ones(400, 1), torch.zeros(400, 5))
    settings = CapacitySettings(2.0, policy="random")

    def once(seed: int) -> Routing:
        torch.manual_seed(seed)
        return limit(routing, 5, settings)[0]

    one = once(1)
    assert torch.equal(one.index, once(1).index)
    assert not torch.equal(one.index, once(2).index)
    counts = one.index.flatten().bincount(minlength=5)
    assert counts[0] == 160
    assert all(40 < count < 80 for count in counts[1:])
    assert bool((one.weight == 1).all())


def test_none_only_counts_and_infinity_is_no_limit() -> None:
    routing = routed(20, 4, 2, seed=0, skew=20)
    same, overflow = limit(routing, 4, CapacitySettings(1.0, policy="none"))
    assert same is routing
    assert int(overflow.over.sum()) == 20
    assert int(overflow.dropped.sum()) == 0
    same, overflow = limit(routing, 4, CapacitySettings(math.inf))
    assert same is routing
    assert overflow.over_share == 0


def test_a_capacity_is_rounded_up_but_not_for_floating_point() -> None:
    routing = routed(10, 1, 1, seed=0)
    assert limit(routing, 1, CapacitySettings(1.1))[1].capacity == 11
    assert limit(routing, 1, CapacitySettings(1.11))[1].capacity == 12
    assert limit(routing, 1, CapacitySettings(0.1, min_capacity=4))[1].capacity == 4


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.sampled_from([0.0, 0.01, 0.2, 0.9]))
def test_the_factor_for_a_target_is_the_least_that_meets_it(loads, target) -> None:
    if not sum(loads):
        return

    def over(factor: float) -> float:
        return sum(max(load - factor * sum(loads) / len(loads), 0) for load in loads) / sum(loads)

    factor = factor_for(torch.tensor(loads), target)
    assert over(factor) <= target + 1e-9
    assert over(0.999 * factor) > target


# --- In a layer ----------------------------------------------------------------------------------------------
def skewed(**capacity) -> MoELayer:
    """A layer whose gate prefers expert 0."""
    layer = MoELayer(8, 4, 4, 2, capacity=CapacitySettings(**capacity), seed=0)
    with torch.no_grad():
        layer.gate.weight[0] += 1
    return layer


def test_a_layer_counts_and_tokens_without_an_expert_get_nothing() -> None:
    layer, hidden = skewed(factor=0.5), torch.randn(2, 6, 8) + 1
    assert skewed(factor=0.5).overflow is None
    out = layer(hidden)
    assert layer.overflow is not None
    assert layer.overflow.computed.tolist() == [3, *layer.overflow.wanted.clamp(max=3)[1:].tolist()]
    assert int(layer.overflow.dropped.sum()) > 0
    assert layer.routing is not None  # as the gate chose: what the auxiliary losses are about
    assert layer.routing.index.flatten().bincount(minlength=4).tolist() == layer.overflow.wanted.tolist()
    limited, _ = limit(layer.routing, 4, CapacitySettings(0.5))
    torch.testing.assert_close(out.view(12, 8), layer.experts(hidden.view(12, 8), limited.index, limited.weight))
    nowhere = (limited.index == 4).all(1)
    assert bool(nowhere.any())
    assert not out.view(12, 8)[nowhere].any()


def test_evaluation_has_a_factor_of_its_own() -> None:
    layer, hidden = skewed(factor=0.5, eval_factor=math.inf), torch.randn(12, 8) + 1
    layer(hidden)
    assert layer.overflow is not None and layer.overflow.capacity == 3
    layer.eval()(hidden)
    assert layer.overflow.capacity == math.inf


def test_without_room_for_all_it_passes_gradcheck() -> None:
    for policy in ("drop", "next"):
        layer = skewed(factor=0.5, policy=policy).double()
        hidden = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, hidden)
        assert layer.overflow is not None and layer.overflow.over_share > 0


@pytest.mark.parametrize("policy", ["drop", "next", "random"])
def test_a_pass_that_is_computed_again_is_limited_the_same(policy) -> None:
    layer, hidden = skewed(factor=0.7, policy=policy, adaptive=True, min_factor=0.5), torch.randn(32, 8)
    torch.manual_seed(5)
    layer(hidden).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in layer.parameters()]  # type: ignore[union-attr]
    layer.zero_grad()
    torch.manual_seed(5)
    checkpoint(layer, hidden, use_reentrant=False).square().sum().backward()
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_an_adaptive_factor_follows_what_overflows_and_stays_within_its_bounds() -> None:
    layer = skewed(factor=1.0, adaptive=True, target=0.05, rate=0.5, max_factor=3.0)
    capacity = layer.capacity
    assert capacity is not None
    hidden = torch.randn(200, 8) + 1
    for _ in range(20):
        layer(hidden)
        factors = adapt_capacity(layer)
    assert layer.overflow is not None
    assert factors == {"": pytest.approx(factor_for(layer.overflow.wanted, 0.05), rel=1e-3)}
    layer(hidden)
    assert 0.04 < layer.overflow.over_share <= 0.05
    for _ in range(3):
        factor = capacity.adapt(torch.tensor([100, 0, 0, 0]))
    assert factor == 3
    for _ in range(20):
        capacity.adapt(torch.tensor([5, 5, 5, 5]))
    assert float(capacity.factor) == pytest.approx(1, abs=1e-4)
    capacity.adapt(torch.zeros(4))  # a batch of nothing says nothing
    assert float(capacity.factor) == pytest.approx(1, abs=1e-4)


def test_an_adaptive_factor_is_saved_survives_low_precision_and_is_the_same_for_all_workers() -> None:
    network = nn.Sequential(skewed(adaptive=True), nn.Linear(8, 8), skewed(factor=2.0)).bfloat16()
    network(torch.randn(64, 8).bfloat16() + 1)
    factors = adapt_capacity(network, reduce=lambda load: 2 * load)
    assert list(factors) == ["0"]
    assert float(network.state_dict()["0.capacity.factor"]) == factors["0"] != 1.25
    assert network.state_dict()["0.capacity.factor"].dtype is torch.float64
    other = nn.Sequential(skewed(adaptive=True), nn.Linear(8, 8), skewed(factor=2.0))
    other.load_state_dict(network.state_dict())
    other(torch.randn(64, 8) + 1)
    assert adapt_capacity(other)["0"] != 1.25
    assert "2.capacity.factor" not in network.state_dict()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"factor": 0}, "factor of a capacity is 0; it must be more than 0"),
        ({"eval_factor": -1.0}, "eval_factor of a capacity is -1.0"),
        ({"factor": math.nan}, "factor of a capacity is nan"),
        ({"min_capacity": -1}, "min_capacity is -1"),
        ({"policy": "throw"}, "unknown policy 'throw' of a capacity; give one of drop, next, random, none"),
        ({"priority": "age"}, "unknown priority 'age'"),
        ({"target": 1.0}, "target of a capacity is 1.0"),
        ({"rate": 0.0}, "rate of a capacity is 0.0"),
        ({"adaptive": True, "factor": 9.0}, "factor 9.0 of an adaptive capacity is not within 1.0"),
        ({"adaptive": True, "max_factor": math.inf}, "both finite"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, said) -> None:
    with pytest.raises(InvalidConfig, match=said):
        CapacitySettings(**options)


def test_what_cannot_be_adapted_says_so() -> None:
    with pytest.raises(InvalidConfig, match="not adaptive"):
        Capacity(CapacitySettings()).adapt(torch.ones(4))
    with pytest.raises(InvalidRequest, match="a load is a vector"):
        Capacity(CapacitySettings(adaptive=True)).adapt(torch.tensor([1.0, -1]))


def test_its_text_says_what_it_is() -> None:
    text = str(MoELayer(8, 4, 4, capacity=CapacitySettings(1.5, policy="next")))
    assert "Capacity(factor=1.5, policy=next, priority=position)" in text
    assert isinstance(limit(routed(0, 4, 2, 0), 4, CapacitySettings())[1], Overflow)
