"""EvoMoE: one expert, then many that differ, then a gate that becomes sparse."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from ray_moe import Methods, MoELayer
from ray_moe.errors import InvalidConfig
from ray_moe.ops.gates.dense_to_sparse import DenseToSparseSettings
from ray_moe.ops.methods.evomoe import EvoMoE
from tests.unit.ops.methods.network import EXPERTS, WIDTH, adam, network, rows, train

GATE = DenseToSparseSettings(threshold=0.15, anneal_steps=6, temperature=4.0, noise=0.5)


def evolving() -> Any:
    return network(gate=GATE, bias=True)


def test_at_first_a_network_is_that_of_one_expert() -> None:
    model, single = evolving(), network(num_experts=1, top_k=1, bias=True)
    for mine, other in zip(model.layers, single.layers, strict=True):
        for name, parameter in other.experts.named_parameters():
            parameter.data.copy_(mine.experts.get_parameter(name)[:1])
    single.first.load_state_dict(model.first.state_dict())
    single.last.load_state_dict(model.last.state_dict())
    first, second = adam(model), adam(single)
    methods = Methods(model, [EvoMoE(diversify=5)], first)
    losses = train(model, first, methods, range(5))
    assert losses == pytest.approx(train(single, second, Methods(single, []), range(5)))
    saved = copy.deepcopy(model.state_dict())
    alone = evolving().eval()
    alone.load_state_dict(saved)
    assert torch.equal(alone(rows(0)), model.eval()(rows(0)))  # a checkpoint of this stage needs no methods


def test_then_all_experts_are_masked_copies_with_its_momenta_once() -> None:
    model = evolving()
    optimizer = adam(model)
    method = EvoMoE(diversify=3, mask=0.3, seed=4)
    methods = Methods(model, [method], optimizer)
    train(model, optimizer, methods, range(3))
    before = [{n: p.detach()[0].clone() for n, p in layer.experts.named_parameters()} for layer in model.layers]
    methods.apply(3)
    masks = []
    for layer, firsts in zip(model.layers, before, strict=True):
        for name, parameter in layer.experts.named_parameters():
            assert torch.equal(parameter[0], firsts[name])
            for expert in range(1, EXPERTS):
                is_same = parameter[expert] == firsts[name]
                assert bool((is_same | (parameter[expert] == 0)).all())
                masks.append(float((~is_same).double().mean()))
            state = optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq"):
                assert all(torch.equal(state[key][e], state[key][0]) for e in range(EXPERTS))
                assert bool(state[key].any())
    assert sum(masks) / len(masks) == pytest.approx(0.3, abs=0.1)
    assert not torch.equal(model.layers[0].experts.down_proj[1], model.layers[0].experts.down_proj[2])
    weights = copy.deepcopy(model.state_dict())
    methods.apply(3)
    train(model, optimizer, methods, range(3, 4))
    moved = copy.deepcopy(model.state_dict())
    methods.apply(4)
    methods.apply(3)
    for name in weights:
        if "experts" in name:
            assert torch.equal(model.state_dict()[name], moved[name])  # only once, whatever step is made again


def test_noise_makes_copies_differ_by_as_much_as_it_says() -> None:
    layer: Any = MoELayer(40, 40, 3, gate=GATE)
    methods = Methods(layer, [EvoMoE(diversify=1, mask=0.0, noise=0.2)])
    methods.apply(0)
    first = layer.experts.down_proj[0].detach().clone()
    methods.apply(1)
    error = layer.experts.down_proj[1].detach() - first
    assert float(error.square().mean().sqrt() / first.square().mean().sqrt()) == pytest.approx(0.2, rel=0.1)


def test_a_token_has_all_experts_and_then_fewer_and_then_one() -> None:
    model = evolving().eval()
    methods = Methods(model, [EvoMoE(diversify=2)])
    numbers = []
    for step in range(9):
        methods.apply(step)
        model(rows(0, 200))
        numbers.append(float((model.layers[0].routing.index < EXPERTS).sum()) / 200)
    assert numbers[:2] == [1, 1] and numbers[2] == EXPERTS and numbers[8] == 1
    assert numbers[2:] == sorted(numbers[2:], reverse=True)


@pytest.mark.parametrize("annealed", [False, True])
def test_a_gate_is_the_softmax_of_its_temperature_above_the_threshold(annealed: bool) -> None:
    layer: Any = MoELayer(
        WIDTH, 4, EXPERTS, gate=DenseToSparseSettings(threshold=0.15, anneal_steps=8), seed=0
    ).double()
    layer.eval()
    layer.gate.anneal(8 if annealed else 4)
    temperature = 2.0 * (0.2 / 2.0) ** (1.0 if annealed else 0.5)
    hidden = 3 * torch.randn(50, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer(hidden)
    for token, chosen, weights in zip(
        hidden.tolist(), layer.routing.index.tolist(), layer.routing.weight.tolist(), strict=True
    ):
        logits = [sum(w * h for w, h in zip(row, token, strict=True)) for row in layer.gate.weight.tolist()]
        powers = [math.exp((logit - max(logits)) / temperature) for logit in logits]
        probable = [power / sum(powers) for power in powers]
        best = max(range(EXPERTS), key=probable.__getitem__)
        wanted = {e: p for e, p in enumerate(probable) if e == best or (p >= 0.15 and not annealed)}
        given = {e: w for e, w in zip(chosen, weights, strict=True) if e < EXPERTS}
        assert given == pytest.approx(wanted)


def test_it_learns() -> None:
    model = evolving()
    optimizer = adam(model)
    losses = train(model, optimizer, Methods(model, [EvoMoE(diversify=30)], optimizer), range(90))
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Methods(network(), [EvoMoE(diversify=1)]), 'gate="dense_to_sparse"'),
        (
            lambda: Methods(MoELayer(4, 4, 4, gate=GATE, experts=lambda path, h, i, w: h), [EvoMoE(diversify=1)]),
            "elsewhere",
        ),
        (lambda: EvoMoE(diversify=-1), "diversify"),
        (lambda: EvoMoE(diversify=1, mask=1.0), "mask"),
        (lambda: EvoMoE(diversify=1, noise=-1.0), "noise"),
        (lambda: DenseToSparseSettings(threshold=1.0), "threshold"),
        (lambda: DenseToSparseSettings(temperature=0.1), "final_temperature"),
        (lambda: DenseToSparseSettings(anneal_steps=0), "anneal_steps"),
        (lambda: DenseToSparseSettings(final_k=0), "final_k"),
        (lambda: DenseToSparseSettings(noise=-1.0), "noise"),
        (lambda: MoELayer(4, 4, 4, gate=DenseToSparseSettings(final_k=5)), "top_k is 5"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        make()
