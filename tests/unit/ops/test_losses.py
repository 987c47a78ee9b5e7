"""Auxiliary losses: worked out by hand, and what the gradients do."""

from __future__ import annotations

import pytest
import torch

from ray_moe.ops.gates.base import Routing
from ray_moe.ops.gates.topk import TopKGate
from ray_moe.ops.losses import load_balancing_loss, router_z_loss


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
