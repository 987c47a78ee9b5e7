"""Gates that draw: their formulas with the same noise, and how often what is drawn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ray_moe import MoELayer
from ray_moe.ops.gates.gumbel import GumbelSettings
from ray_moe.ops.gates.noisy_topk import NoisyTopKSettings
from ray_moe.ops.gates.registry import make_gate
from ray_moe.ops.gates.topk import TopKSettings
from ray_moe.ops.gates.topk_random import TopKRandomSettings
from ray_moe.ops.losses import smooth_load, squared_variation
from tests.unit.ops.gates.gates import EXPERTS, TOKENS, WIDTH, gate_of, spread, tokens


def biased(settings: Any, logits: list[float], num_tokens: int) -> tuple[Any, torch.Tensor]:
    """A gate that has the same logits for all tokens, and the tokens."""
    gate = make_gate(settings, 1, len(logits))
    gate.weight.data.copy_(torch.tensor(logits)[:, None])
    return gate, torch.ones(num_tokens, 1)


# --- Noisy top-k (arXiv:1701.06538) ---------------------------------------------------------------------------
def test_noise_load_and_loss_are_those_of_the_paper() -> None:
    gate, hidden, top_k = gate_of("noisy_topk"), tokens(), 2
    torch.manual_seed(3)
    noise = torch.randn(TOKENS, EXPERTS, dtype=torch.float64).tolist()
    torch.manual_seed(3)
    routing = gate(hidden)
    load = [0.0] * EXPERTS
    for token in range(TOKENS):
        clean = [(hidden[token] @ row).item() for row in gate.weight]
        std = [math.log1p(math.exp((hidden[token] @ row).item())) + 0.01 for row in gate.noise_weight]
        noisy = [clean[e] + noise[token][e] * std[e] for e in range(EXPERTS)]
        taken = sorted(range(EXPERTS), key=lambda e: -noisy[e])[:top_k]
        total = sum(math.exp(noisy[e]) for e in taken)
        assert routing.index[token].tolist() == taken
        assert routing.weight[token].tolist() == pytest.approx([math.exp(noisy[e]) / total for e in taken])
        for expert in range(EXPERTS):
            others = sorted((noisy[e] for e in range(EXPERTS) if e != expert), reverse=True)
            load[expert] += (1 + math.erf((clean[expert] - others[top_k - 1]) / std[expert] / math.sqrt(2))) / 2
    mean = sum(load) / EXPERTS
    square = sum((each - mean) ** 2 for each in load) / EXPERTS / mean**2
    assert routing.losses["load"].item() == pytest.approx(square)


def test_the_expected_load_is_what_noise_drawn_anew_gives_on_average() -> None:
    torch.manual_seed(1)
    clean, std = torch.randn(1, 5).double(), torch.rand(1, 5).double() + 0.5
    noisy = clean + torch.randn(1, 5).double() * std
    expected = smooth_load(clean, noisy, std, 2)
    for expert in range(5):
        drawn = noisy.repeat(40_000, 1)
        drawn[:, expert] = clean[0, expert] + torch.randn(40_000).double() * std[0, expert]
        share = (drawn.topk(2).indices == expert).any(1).double().mean()
        assert float(expected[expert]) == pytest.approx(float(share), abs=0.012)


def test_a_fresh_noisy_gate_uses_all_experts_and_tells_its_load_in_training_only() -> None:
    gate = make_gate(NoisyTopKSettings(1), WIDTH, EXPERTS)
    counts = gate(torch.randn(3000, WIDTH)).index.flatten().bincount(minlength=EXPERTS)
    assert counts.min() > 400 and counts.max() < 600
    assert "load" in gate(torch.randn(3, WIDTH)).losses
    assert not gate.eval()(torch.randn(3, WIDTH)).losses
    assert squared_variation(torch.tensor([2.0, 2.0])) == 0


def test_the_load_loss_evens_a_collapsed_gate_out() -> None:
    torch.manual_seed(0)
    gate = make_gate(NoisyTopKSettings(1), WIDTH, EXPERTS)
    gate.weight.data[0] = 0.5
    hidden = torch.rand(400, WIDTH) + 0.5
    assert float((gate(hidden).index == 0).float().mean()) > 0.9
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(120):
        optimizer.zero_grad()
        gate(hidden).losses["load"].backward()
        optimizer.step()
    assert float((gate(hidden).index == 0).float().mean()) < 0.3


# --- The most probable and one at random ----------------------------------------------------------------------
LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0]


@pytest.mark.parametrize(("draw", "even"), [("probability", False), ("uniform", True)])
def test_the_random_expert_is_drawn_from_the_others(draw: Any, even: bool) -> None:
    torch.manual_seed(1)
    gate, hidden = biased(TopKRandomSettings(2, draw), LOGITS, 20_000)
    routing = gate(hidden)
    assert bool((routing.index[:, :2] == torch.tensor([0, 1])).all())
    rest = [1.0] * 3 if even else [math.exp(logit) for logit in LOGITS[2:]]
    shares = routing.index[:, 2].bincount(minlength=5)[2:] / 20_000
    assert shares.tolist() == pytest.approx([each / sum(rest) for each in rest], abs=0.012)
    for expert in (2, 3, 4):
        powers = [math.exp(LOGITS[e]) for e in (0, 1, expert)]
        weight = routing.weight[routing.index[:, 2] == expert][0]
        assert weight.tolist() == pytest.approx([power / sum(powers) for power in powers])


def test_as_in_gshard_the_second_is_asked_by_its_weight() -> None:
    torch.manual_seed(1)
    gate, hidden = biased(TopKRandomSettings(1, "next", "by_weight"), LOGITS, 20_000)
    routing = gate(hidden)
    second = 1 / (1 + math.e)
    is_asked = routing.index[:, 1] == 1
    assert bool((routing.index[~is_asked, 1] == 5).all()) and not routing.weight[~is_asked, 1].any()
    assert float(is_asked.float().mean()) == pytest.approx(2 * second, abs=0.012)
    assert routing.weight[:, 0].tolist() == pytest.approx([1 - second] * 20_000)
    assert routing.weight[is_asked, 1].unique().tolist() == pytest.approx([second])


@pytest.mark.parametrize("draw", ["probability", "uniform", "next"])
@pytest.mark.parametrize("dispatch", ["always", "by_weight"])
def test_outside_training_it_is_the_next_most_probable(draw: Any, dispatch: Any) -> None:
    gate, hidden = biased(TopKRandomSettings(2, draw, dispatch), LOGITS, 4)
    usual = biased(TopKSettings(3), LOGITS, 4)[0]
    assert torch.equal(gate.eval()(hidden).index, usual(hidden).index)
    torch.testing.assert_close(gate(hidden).weight, usual(hidden).weight)


# --- Gumbel-softmax (arXiv:1611.01144) ------------------------------------------------------------------------
def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_in_training_an_expert_is_kept_as_far_as_a_gumbel_softmax_of_two_says(temperature: float) -> None:
    gate = gate_of("gumbel")
    gate.temperature.fill_(temperature)
    torch.manual_seed(2)
    uniform = torch.rand(TOKENS, EXPERTS, dtype=torch.float64)
    torch.manual_seed(2)
    got = spread(gate(tokens()))
    for token, logits in enumerate((tokens() @ gate.weight.t()).tolist()):
        scores = []
        for logit, u in zip(logits, uniform[token].tolist(), strict=True):
            # softmax over "kept" and "not" with the noise of both, whose difference is log(u / (1 - u))
            kept, dropped = math.exp((logit + math.log(u)) / temperature), math.exp(math.log(1 - u) / temperature)
            scores.append(kept / (kept + dropped) * sigmoid(logit))
        assert got[token].tolist() == pytest.approx([score / sum(scores) for score in scores])


def test_outside_training_an_expert_is_kept_that_is_more_probable_than_not() -> None:
    gate = gate_of("gumbel").eval()
    gate.weight.data[:, 0] -= 1.5  # so that one token wants none
    routing, hidden = gate(tokens()), tokens()
    numbers = set()
    for token, logits in enumerate((hidden @ gate.weight.t()).tolist()):
        kept = [e for e in range(EXPERTS) if logits[e] > 0] or [max(range(EXPERTS), key=lambda e: logits[e])]
        total = sum(sigmoid(logits[e]) for e in kept)
        wanted = [sigmoid(logits[e]) / total if e in kept else 0 for e in range(EXPERTS)]
        assert spread(routing)[token].tolist() == pytest.approx(wanted)
        assert sorted(e for e in routing.index[token].tolist() if e < EXPERTS) == sorted(kept)
        numbers.add(len(kept))
    assert 1 in numbers and len(numbers) > 2
    expected = sum(sigmoid(logit) for logit in routing.logits.flatten().tolist()) / TOKENS
    assert routing.losses["expected_experts"].item() == pytest.approx(expected)


def test_hard_choices_have_the_gradients_of_soft_ones() -> None:
    soft, hard = (make_gate(GumbelSettings(hard=hard), WIDTH, EXPERTS).double() for hard in (False, True))
    hard.load_state_dict(soft.state_dict())
    factor = torch.randn(TOKENS, EXPERTS, dtype=torch.float64)
    grads, routings = [], []
    for gate in (soft, hard):
        torch.manual_seed(1)
        routing = gate(tokens())
        # by slot, where an expert that is left out keeps its number in one and not in the other
        (routing.weight * factor).sum().backward()
        grads.append(gate.weight.grad)
        routings.append(routing)
    torch.testing.assert_close(*grads)
    is_out = routings[1].index == EXPERTS
    assert bool(is_out.any()) and not routings[1].weight[is_out].any() and bool(routings[0].weight[is_out].all())


def test_the_lower_the_temperature_the_harder() -> None:
    gate = make_gate(GumbelSettings(temperature=2.0, final_temperature=0.02, anneal_steps=100), WIDTH, EXPERTS)
    torch.manual_seed(0)
    hidden, entropies = torch.randn(200, WIDTH), []
    for step in (0, 50, 100, 1000):
        gate.anneal(step)
        torch.manual_seed(1)
        weight = spread(gate(hidden)).clamp(min=1e-9)
        entropies.append(-(weight * weight.log()).sum(1).mean().item())
    assert entropies == sorted(entropies, reverse=True) and entropies[2] == entropies[3]
    assert gate.settings.temperature_at(50) == pytest.approx(0.2)
    assert gate.state_dict()["temperature"] == pytest.approx(0.02)


@pytest.mark.parametrize("hard", [False, True])
def test_it_learns_how_many_experts_to_keep(hard: bool) -> None:
    hidden = torch.cat([torch.randn(100, WIDTH - 1), torch.ones(100, 1)], dim=1)
    kept = []
    for target in (1.5, 4.0):
        torch.manual_seed(0)
        layer = MoELayer(WIDTH, 4, EXPERTS, gate=GumbelSettings(target=target, hard=hard), seed=0)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (layer(hidden) - hidden.sin()).square().mean()
            assert layer.routing is not None
            (loss + layer.routing.losses["expected_experts"]).backward()
            optimizer.step()
        routing = layer.gate.eval()(hidden)
        assert routing.logits.sigmoid().sum(1).mean().item() == pytest.approx(target, abs=0.3)
        kept.append(float((routing.index < EXPERTS).sum(1).float().mean()))
    assert kept[0] < 2.0 and kept[1] > 3.0
