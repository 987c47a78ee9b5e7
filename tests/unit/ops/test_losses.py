"""Auxiliary losses: worked out by hand or in plain loops, what the gradients do, and those of a whole network."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ray_moe import MoELayer
from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.ops.gates.base import Routing
from ray_moe.ops.gates.topk import TopKGate
from ray_moe.ops.losses import (
    LOSSES,
    AuxiliaryLosses,
    UsageLoss,
    auxiliary_loss,
    auxiliary_losses,
    expert_load,
    importance_loss,
    load_balancing_loss,
    load_loss,
    router_z_loss,
    smooth_load,
)


def routed(logits: torch.Tensor, top_k: int) -> Routing:
    weight, index = logits.softmax(-1).topk(top_k, dim=-1)
    return Routing(index, weight, logits)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_an_even_spread_costs_k(top_k) -> None:
    logits = torch.stack([torch.roll(torch.arange(4.0), shift) for shift in range(4)])
    torch.testing.assert_close(load_balancing_loss(routed(logits, top_k)), torch.tensor(float(top_k)))


def test_sending_all_to_one_costs_the_number_of_experts() -> None:
    logits = torch.tensor([[50.0, 0, 0, 0]]).expand(5, 4)
    torch.testing.assert_close(load_balancing_loss(routed(logits, 1)), torch.tensor(4.0))


def test_no_expert_counts_nowhere_and_padding_not_at_all() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    routing = routed(logits, 2)
    without = Routing(routing.index.clone(), routing.weight, logits)
    without.index[:, 1] = 4
    torch.testing.assert_close(load_balancing_loss(without), load_balancing_loss(routed(logits, 1)))
    mask = torch.tensor([True, False, True, True, False, True])
    part = routed(logits[mask], 2)
    torch.testing.assert_close(load_balancing_loss(routing, mask), load_balancing_loss(part))
    torch.testing.assert_close(router_z_loss(logits, mask), router_z_loss(part.logits))


def test_the_z_loss_is_the_mean_square_of_the_logs_of_sums() -> None:
    logits = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    expected = (torch.tensor(2.0).log() ** 2 + (3 + torch.tensor(2.0).log()) ** 2) / 2
    torch.testing.assert_close(router_z_loss(logits), expected)


@pytest.mark.parametrize("mask", [None, torch.zeros(0, dtype=torch.bool)])
def test_no_tokens_cost_nothing(mask) -> None:
    routing = routed(torch.zeros(0, 4), 2)
    assert float(load_balancing_loss(routing, mask)) == float(router_z_loss(routing.logits, mask)) == 0


def test_a_batch_of_padding_costs_nothing() -> None:
    logits, mask = torch.randn(3, 4), torch.zeros(3, dtype=torch.bool)
    assert float(load_balancing_loss(routed(logits, 2), mask)) == float(router_z_loss(logits, mask)) == 0


def test_the_loss_evens_out_a_gate_that_prefers_one_expert() -> None:
    torch.manual_seed(0)
    gate = TopKGate(8, 4, 1)
    hidden = torch.randn(256, 8) + 1
    with torch.no_grad():
        gate.weight[2] += 1  # nearly every token is nearest to it
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    largest = []
    for _ in range(50):
        routing = gate(hidden)
        largest.append(int(routing.index.flatten().bincount(minlength=4).max()))
        (load_balancing_loss(routing) + 0.01 * router_z_loss(routing.logits)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert largest[0] > 220
    assert largest[-1] < 128


def test_low_precision_is_summed_in_float32() -> None:
    logits = torch.randn(5000, 4).bfloat16()
    assert load_balancing_loss(routed(logits, 2)).dtype is router_z_loss(logits).dtype is torch.float32


# --- Importance and load -------------------------------------------------------------------------------------
def random_logits(num_tokens: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)


def variation(values: list[float]) -> float:
    """Squared coefficient of variation."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


@pytest.mark.parametrize("masked", [False, True])
def test_importance_is_the_variation_of_the_sums_of_weights(masked) -> None:
    routing = routed(random_logits(9, 4), 2)
    routing.index[3, 1] = 4  # no expert
    mask = torch.arange(9) % 3 != 1 if masked else None
    sums = [0.0] * 4
    for token in range(9):
        for choice in range(2):
            expert = int(routing.index[token, choice])
            if expert < 4 and (mask is None or mask[token]):
                sums[expert] += float(routing.weight[token, choice])
    assert float(importance_loss(routing, mask)) == pytest.approx(variation(sums))


def test_importance_is_nought_when_all_matter_alike_and_passes_gradcheck() -> None:
    even = Routing(torch.arange(4)[:, None], torch.full((4, 1), 0.3), torch.zeros(4, 4))
    assert float(importance_loss(even)) == 0
    one = replace(even, index=torch.zeros(4, 1, dtype=torch.long))
    assert float(importance_loss(one)) == pytest.approx(3)

    def of(logits: torch.Tensor) -> torch.Tensor:
        return importance_loss(routed(logits, 2))

    assert torch.autograd.gradcheck(of, random_logits(6, 4).requires_grad_())


@pytest.mark.parametrize("top_k", [1, 2, 4, 5])
def test_the_smooth_load_is_that_of_the_paper(top_k) -> None:
    clean = random_logits(7, 5)
    std = random_logits(7, 5, seed=1).exp()
    noisy = clean + std * random_logits(7, 5, seed=2)
    load = [0.0] * 5
    for token in range(7):
        for expert in range(5):
            others = sorted((float(noisy[token, e]) for e in range(5) if e != expert), reverse=True)
            if top_k == 5:
                load[expert] += 1
                continue
            z = (float(clean[token, expert]) - others[top_k - 1]) / float(std[token, expert])
            load[expert] += (1 + math.erf(z / math.sqrt(2))) / 2
    assert smooth_load(clean, noisy, std, top_k).tolist() == pytest.approx(load)
    assert float(load_loss(clean, noisy, std, top_k)) == pytest.approx(variation(load))


def test_the_smooth_load_is_how_often_an_expert_is_chosen_when_its_noise_is_drawn_again() -> None:
    clean, std = torch.tensor([[0.3, 0.1, -0.2, 0.0]]), 0.5
    noisy = clean + std * torch.randn(1, 4)
    expected = smooth_load(clean, noisy, torch.tensor(std), 2)
    again = noisy.repeat(20_000, 1)
    again[:, 1] = clean[0, 1] + std * torch.randn(20_000)
    chosen = (again.topk(2).indices == 1).any(1).float().mean()
    assert float(expected[1]) == pytest.approx(float(chosen), abs=0.02)


def test_the_load_loss_passes_gradcheck_and_leaves_padding_out() -> None:
    clean, std, noise = random_logits(6, 4), random_logits(6, 4, 1).exp(), random_logits(6, 4, 2)

    def of(clean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        return load_loss(clean, clean + noise * std, std, 2)

    assert torch.autograd.gradcheck(of, (clean.clone().requires_grad_(), std.clone().requires_grad_()))
    mask = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    noisy = clean + noise * std
    torch.testing.assert_close(
        smooth_load(clean, noisy, std, 2, mask), smooth_load(clean[mask], noisy[mask], std[mask], 2)
    )


# --- Usage ---------------------------------------------------------------------------------------------------
def test_usage_is_an_average_that_fades_and_costs_its_standard_deviation() -> None:
    loss, usage = UsageLoss(3, decay=0.8).double(), [1 / 3] * 3
    for seed in range(4):
        routing = routed(random_logits(5, 3, seed), 2)
        routing.index[0, 0] = 3  # no expert
        counts = [float((routing.index == expert).sum()) for expert in range(3)]
        usage = [0.8 * old + 0.2 * count / 9 for old, count in zip(usage, counts, strict=True)]
        expected = math.sqrt(variation(usage))
        assert float(loss(routing)) == pytest.approx(expected, rel=1e-6)
    assert loss.usage.tolist() == pytest.approx(usage)


def test_usage_learns_through_the_probabilities_whatever_its_decay() -> None:
    logits = random_logits(5, 3).requires_grad_()
    loss = UsageLoss(3, decay=0.9)
    (ours,) = torch.autograd.grad(loss(routed(logits, 1)), logits)
    usage = loss.usage.double()
    spread = ((usage - usage.mean()) ** 2).mean().sqrt()
    by_usage = (usage - usage.mean()) / (3 * spread) / usage.mean()  # of std / mean; the sum of usages stays 1
    (expected,) = torch.autograd.grad((by_usage * logits.softmax(-1).mean(0)).sum(), logits)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_usage_changes_in_training_alone_and_stays_precise() -> None:
    loss, routing = UsageLoss(3), routed(random_logits(5, 3), 1)
    before = loss.usage
    loss.eval()(routing)
    loss.train()
    with torch.no_grad():
        loss(routing)
    loss(replace(routing, index=torch.full((5, 1), 3)))  # nobody was used: nothing to learn from
    assert torch.equal(loss.usage, before)
    loss.bfloat16()(routing)
    assert loss.usage.dtype is torch.float32
    even = UsageLoss(2, decay=0.0)
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(even(routed(logits, 1)), logits)
    assert torch.isfinite(gradient).all()
    with pytest.raises(InvalidConfig, match="decay is 1"):
        UsageLoss(3, decay=1)


@pytest.mark.parametrize("name", ["importance", "usage"])
def test_each_loss_evens_out_a_gate_that_prefers_one_expert(name) -> None:
    layer = MoELayer(8, 4, 4, 2, auxiliary={name: 0.5}, seed=0)
    hidden = torch.randn(256, 8) + 1
    with torch.no_grad():
        layer.gate.weight[2] += 0.5
    optimizer = torch.optim.SGD(layer.gate.parameters(), lr=0.1)
    largest = []
    for _ in range(280):
        layer(hidden)
        assert layer.routing is not None
        largest.append(int(expert_load(layer.routing).max()))
        auxiliary_loss(layer).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert largest[0] > 220
    assert largest[-1] < 180


# --- Of a network --------------------------------------------------------------------------------------------
class Telling(nn.Module):
    """A gate with a loss of its own, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TopKGate(8, 4, 2)

    def forward(self, hidden: torch.Tensor) -> Routing:
        routing = self.inner(hidden)
        return replace(routing, losses={"size": routing.logits.square().mean()} if self.training else {})


def network() -> Any:
    """Three layers one after the other."""
    coefficients = {"load_balancing": 0.01, "router_z": 0.001, "importance": 0.1, "usage": 0.2}
    return nn.Sequential(
        MoELayer(8, 4, 4, auxiliary=coefficients, seed=0),
        MoELayer(8, 4, 4, seed=1),  # none
        MoELayer(8, 4, 4, gate=Telling(), auxiliary={"size": 0.5, "router_z": 1.0}, seed=2),
    )


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_of_a_network_is_the_sum_over_its_layers(masked) -> None:
    model, hidden = network(), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]) if masked else None
    usage = copy.deepcopy(model[0].auxiliary.stateful["usage"])
    model(hidden)
    first, last = model[0].routing, model[2].routing
    flat = None if mask is None else mask.flatten()
    expected = {
        "load_balancing": 0.01 * load_balancing_loss(first, flat),
        "router_z": 0.001 * router_z_loss(first.logits, flat) + router_z_loss(last.logits, flat),
        "importance": 0.1 * importance_loss(first, flat),
        "usage": 0.2 * usage(first, flat),
        "size": 0.5 * last.logits.square().mean(),
    }
    losses = auxiliary_losses(copy_state(model), mask)
    assert set(losses) == set(expected)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])
    total = auxiliary_loss(model, mask)
    torch.testing.assert_close(total, sum(losses.values()))
    total.backward()
    assert model[0].gate.weight.grad is not None and model[2].gate.inner.weight.grad is not None


def copy_state(model: Any) -> Any:
    """A network with the routings of `model` and losses of its own: what looking does to the usage stays there."""
    twin = copy.deepcopy(model)
    for one, other in zip(model, twin, strict=True):
        other.routing = one.routing
    return twin


def test_a_gate_that_tells_nothing_outside_of_training_costs_nothing_there() -> None:
    layer = MoELayer(8, 4, 4, gate=Telling(), auxiliary={"size": 0.5}).eval()
    layer(torch.randn(3, 8))
    assert float(auxiliary_loss(layer)) == 0


def test_the_losses_of_a_checkpointed_pass_are_the_same_and_learn_the_same() -> None:
    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        model, hidden = network(), torch.linspace(-1, 1, 80).view(10, 8)
        out = checkpoint(model, hidden, use_reentrant=False) if again else model(hidden)
        (out.square().mean() + auxiliary_loss(model)).backward()
        grads.append([p.grad for p in model.parameters()])
        assert model[0].auxiliary.stateful["usage"].usage[0] != 0.25
    torch.testing.assert_close(*grads)


def test_losses_are_saved_where_they_remember_and_shown() -> None:
    keys = network().state_dict()
    assert [key for key in keys if "auxiliary" in key] == ["0.auxiliary.stateful.usage.usage"]
    assert "load_balancing=0.01, router_z=0.001" in str(network())


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InvalidConfig, match="no MoE layer here has an auxiliary loss"):
        auxiliary_loss(nn.Sequential(MoELayer(8, 4, 4), nn.Linear(8, 8)))
    with pytest.raises(InvalidRequest, match="has been called yet"):
        auxiliary_loss(network())
    layer = MoELayer(8, 4, 4, auxiliary={"balance": 1.0})
    layer(torch.randn(3, 8))
    with pytest.raises(InvalidConfig, match=f"named 'balance'; there are {', '.join(LOSSES)}, and from this gate none"):
        auxiliary_loss(layer)
    with pytest.raises(InvalidConfig, match="coefficient of usage is nan"):
        AuxiliaryLosses({"usage": math.nan}, 4)
    with pytest.raises(InvalidConfig, match="names no loss"):
        MoELayer(8, 4, 4, auxiliary={})
