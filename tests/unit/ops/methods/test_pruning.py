"""Layers that become smaller: by measured use in stages, and by a search."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ray_moe import Methods, MoELayer
from ray_moe.errors import InvalidConfig
from ray_moe.ops.gates.hard_concrete import HardConcreteSettings
from ray_moe.ops.losses import auxiliary_losses
from ray_moe.ops.methods.pruning import fit_to, keep_experts
from ray_moe.ops.methods.search import Search
from ray_moe.ops.methods.sparsify import Sparsify, Stage
from tests.unit.ops.methods.network import EXPERTS, WIDTH, adam, loss_of, network, rows, train


@pytest.mark.parametrize("gate", ["topk", "noisy_topk", "sigmoid", "switch", "gumbel", "dynamic_k", "dense_to_sparse"])
def test_what_stays_computes_as_if_the_others_were_never_chosen(gate: str) -> None:
    layer: Any = MoELayer(WIDTH, 4, EXPERTS, gate=gate, bias=True, seed=0).double().eval()
    nn.init.normal_(layer.gate.weight)
    small = copy.deepcopy(layer)
    keep_experts(small, [4, 1, 2])
    rows_that_stay = torch.tensor([1, 2, 4])
    assert small.experts.num_experts == 3
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, layer.get_parameter(name)[rows_that_stay])
    hidden = torch.randn(40, WIDTH, dtype=torch.float64)
    hidden[:, -1] = 1
    layer.gate.weight.data[[0, 3]] = 0
    layer.gate.weight.data[[0, 3], -1] = -1e4  # so these are never probable
    torch.testing.assert_close(small(hidden), layer(hidden))


def test_the_optimizer_goes_on_with_the_rows_that_stay() -> None:
    model = network(auxiliary={"usage": 0.1})
    optimizer = adam(model)
    train(model, optimizer, Methods(model, []), range(3))
    layer = model.layers[0]
    before = {
        name: (parameter, parameter.detach().clone(), copy.deepcopy(optimizer.state[parameter]))
        for name, parameter in layer.named_parameters()
    }
    left_over = model(rows(0))  # whose graph is still there
    keep_experts(layer, [0, 3], optimizer, top_k=1)
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert stepped == {id(parameter) for parameter in model.parameters()}
    assert set(optimizer.state) == set(model.parameters())
    for name, parameter in layer.named_parameters():
        _, weights, state = before[name]
        assert torch.equal(parameter, weights[[0, 3]])
        assert optimizer.state[parameter]["step"] == state["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][key], state[key][[0, 3]])
    assert layer.gate.settings.top_k == 1 and len(layer.auxiliary.stateful["usage"].usage) == 2
    other = model.layers[1].experts.down_proj
    assert len(other) == len(optimizer.state[other]["exp_avg"]) == EXPERTS
    losses = train(model, optimizer, Methods(model, []), range(3, 40))
    del left_over
    assert sum(losses[-8:]) < sum(losses[:8])


def test_a_smaller_network_is_saved_and_loaded() -> None:
    model, fresh = network(), network()
    keep_experts(model.layers[1], [2, 3, 4])
    fit_to(fresh, model.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(rows(0)), model(rows(0)))
    with pytest.raises(InvalidConfig, match=r"layers\.1 has 3 experts, 5 were saved"):
        fit_to(model, network().state_dict())


def rarity(counts: list[int], expert: int) -> tuple[int, int]:
    return (-counts[expert], expert)


def test_stages_keep_what_is_used_most_and_say_what_it_cost() -> None:
    model = network(top_k=3)
    optimizer = adam(model)
    methods: Any = None

    def evaluate() -> float:
        return float(loss_of(model, 1000).detach())

    sparsify = Sparsify([Stage(4, 4, top_k=2), Stage(8, 2, top_k=1)], evaluate)
    methods = Methods(model, [sparsify], optimizer)
    train(model, optimizer, methods, range(4))
    assert sparsify.reports == []
    model.train()
    wanted: dict[str, list[int]] = {}
    model(rows(1000))
    for number, layer in enumerate(model.layers):
        counts = [0] * EXPERTS
        for chosen in layer.routing.index.flatten().tolist():
            counts[chosen] += 1
        wanted[f"layers.{number}"] = sorted(sorted(range(EXPERTS), key=partial(rarity, counts))[:4])
    loss = evaluate()
    methods.apply(4)
    methods.apply(4)
    (report,) = sparsify.reports
    assert report.kept == wanted and model.training
    assert report.loss_before == loss and report.loss_after == evaluate()
    expert, gate = 2 * WIDTH * 4 + 4 * WIDTH, WIDTH
    assert report.parameters_before == 2 * EXPERTS * (expert + gate)
    assert report.parameters_after == 2 * 4 * (expert + gate)
    assert report.flops_before == 2 * 2 * (EXPERTS * gate + 3 * expert)
    assert report.flops_after == 2 * 2 * (4 * gate + 2 * expert)
    assert "step 4: 4 experts stay; loss" in str(report)
    train(model, optimizer, methods, range(4, 10))
    assert [layer.experts.num_experts for layer in model.layers] == [2, 2]
    assert [layer.gate.settings.top_k for layer in model.layers] == [1, 1]
    assert [report.step for report in sparsify.reports] == [4, 8]


def test_a_stage_after_a_restart_is_not_made_again() -> None:
    model, fresh = network(), network()
    made = Sparsify([Stage(2, 3, top_k=1)], lambda: float(loss_of(model, 9)))
    Methods(model, [made]).apply(5)  # also when its own step was passed over
    fit_to(fresh, model.state_dict())
    fresh.load_state_dict(model.state_dict())
    again = Sparsify([Stage(2, 3, top_k=1)], lambda: float(loss_of(fresh, 9)))
    Methods(fresh, [again]).apply(6)
    assert again.reports == [] and fresh.layers[0].gate.settings.top_k == 1
    assert torch.equal(fresh(rows(0)), model(rows(0)))


def test_by_weight_counts_what_experts_are_multiplied_by() -> None:
    layer: Any = MoELayer(1, 1, 3, 3, seed=0).double()
    layer.gate.weight.data[:] = torch.tensor([[0.0], [1.0], [2.0]])  # all are asked; these weights differ

    def evaluate() -> float:
        return float(layer(torch.ones(4, 1, dtype=torch.float64)).sum())

    sparsify = Sparsify([Stage(0, 2)], evaluate, by="weight")
    Methods(layer, [sparsify]).apply(0)
    assert sparsify.reports[0].kept == {"": [1, 2]}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: keep_experts(MoELayer(4, 4, 4), []), "name some of 0 to 3"),
        (lambda: keep_experts(MoELayer(4, 4, 4), [4]), "name some of 0 to 3"),
        (lambda: keep_experts(MoELayer(4, 4, 4), [1], top_k=2), "top_k is 2; with 1 experts"),
        (lambda: keep_experts(MoELayer(4, 4, 4, gate="switch"), [1], top_k=1), "a SwitchGate has none"),
        (lambda: keep_experts(MoELayer(4, 4, 4, gate="hash"), [1]), "no row of its own"),
        (lambda: keep_experts(MoELayer(4, 4, 4, gate="hierarchical"), [1]), "no row of its own"),
        (lambda: keep_experts(MoELayer(4, 4, 4, gate="modality"), [1]), "no row of its own"),
        (lambda: keep_experts(MoELayer(4, 4, 4, experts=lambda path, h, i, w: h), [1]), "elsewhere"),
        (lambda: Sparsify([], float), "no stages"),
        (lambda: Sparsify([Stage(2, 3), Stage(2, 2)], float), "comes later"),
        (lambda: Sparsify([Stage(2, 2), Stage(3, 3)], float), "no more experts"),
        (lambda: Sparsify([Stage(2, 2, top_k=3)], float), "top_k of 1 to that many"),
        (lambda: Sparsify([Stage(2, 2)], float, by="age"), "slots, weight"),  # type: ignore[arg-type]
        (lambda: Methods(network(), [Sparsify([Stage(0, 2)], lambda: 0.0)]).apply(0), "did not run the network"),
        (lambda: Methods(network(), [Search(3)]), 'gate="hard_concrete"'),
        (lambda: HardConcreteSettings(top_k=0), "top_k"),
        (lambda: HardConcreteSettings(initial=1.0), "initial"),
        (lambda: HardConcreteSettings(temperature=1.0), "temperature"),
        (lambda: HardConcreteSettings(stretch=(0.0, 1.1)), "stretch"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        make()


def test_how_many_experts_are_open_is_as_often_as_the_loss_says() -> None:
    layer: Any = MoELayer(WIDTH, 4, 6, gate=HardConcreteSettings(top_k=1)).double()
    layer.gate.log_alpha.data[:] = torch.tensor([-3.0, -1, 0, 0.5, 1, 3])
    torch.manual_seed(0)
    drawn = torch.stack([layer.gate.openness().detach() for _ in range(4000)])
    layer(torch.randn(2, WIDTH, dtype=torch.float64))
    wanted = [1 / (1 + math.exp(-(a - 2 / 3 * math.log(0.1 / 1.1)))) for a in layer.gate.log_alpha.tolist()]
    assert layer.routing.losses["expected_experts"].item() == pytest.approx(sum(wanted))
    # Where all are shut one is open nevertheless, which is rare with these numbers.
    assert (drawn > 0).double().mean(0).tolist() == pytest.approx(wanted, abs=0.03)
    assert float((drawn == 1).double().mean()) > 0.1
    layer.eval()
    z = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-a)) - 0.1)) for a in layer.gate.log_alpha.tolist()]
    assert layer.gate.openness().tolist() == pytest.approx(z)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_end_of_a_search_leaves_the_layer_with_its_open_experts_as_it_was(normalize: bool) -> None:
    layer: Any = MoELayer(WIDTH, 4, 6, gate=HardConcreteSettings(top_k=2, normalize=normalize), seed=0).double().eval()
    layer.gate.log_alpha.data[:] = torch.tensor([-4.0, 2.0, 0.3, -5, 4, -3])
    hidden = torch.randn(30, WIDTH, dtype=torch.float64)
    wanted = layer(hidden)
    methods = Methods(layer, [Search(end=10)])
    methods.apply(9)
    assert layer.experts.num_experts == 6
    methods.apply(10)
    methods.apply(11)
    assert layer.experts.num_experts == len(layer.gate.weight) == 3
    torch.testing.assert_close(layer(hidden), wanted)
    layer.train()
    torch.testing.assert_close(layer(hidden), wanted)  # without noise from then on
    assert "gate.log_alpha" in layer.state_dict() and "gate.log_alpha" not in dict(layer.named_parameters())
    fresh = MoELayer(WIDTH, 4, 6, gate=HardConcreteSettings(top_k=2, normalize=normalize)).double()
    fit_to(fresh, layer.state_dict())
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(hidden), wanted)


def test_a_search_with_all_shut_keeps_the_best() -> None:
    layer: Any = MoELayer(WIDTH, 4, 3, gate="hard_concrete").double()
    layer.gate.log_alpha.data[:] = torch.tensor([-9.0, -7, -8])
    layer.eval()
    hidden = torch.randn(5, WIDTH, dtype=torch.float64)
    wanted = layer(hidden)
    assert set(layer.routing.index.flatten().tolist()) == {1, 3}
    Methods(layer, [Search(end=0)]).apply(0)
    assert layer.experts.num_experts == 1
    torch.testing.assert_close(layer(hidden), wanted)


def test_a_price_shuts_experts_and_none_leaves_them_open() -> None:
    left = []
    for price in (0.0, 0.3):
        model = network(gate=HardConcreteSettings(top_k=2), auxiliary={"expected_experts": price})
        optimizer = adam(model, lr=0.05)
        methods = Methods(model, [Search(end=80)], optimizer)
        torch.manual_seed(0)
        for step in range(90):
            methods.apply(step)
            loss = loss_of(model, step)
            (loss + sum(auxiliary_losses(model).values())).backward()
            optimizer.step()
            optimizer.zero_grad()
        left.append(sum(layer.experts.num_experts for layer in model.layers))
    assert left[1] < left[0]
    assert float(loss.detach()) < 0.6
