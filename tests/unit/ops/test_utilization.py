"""The collapse monitor: what it reports, that it finds a collapse that is provoked, and that revival cures it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from ray_moe import MoELayer
from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.ops.gates.base import Routing
from ray_moe.ops.revival import RevivalSettings, revive
from ray_moe.ops.utilization import CollapseSettings, LayerReport, Report, UtilizationMonitor


def collapsed(num_experts: int = 8, busy: int = 2, seed: int = 0, pull: float = 3.0) -> MoELayer:
    """A layer whose gate sends (nearly) all tokens around 1 to its last `busy` experts."""
    layer = MoELayer(16, 4, num_experts, 2, seed=seed)
    with torch.no_grad():
        layer.gate.weight[-busy:] += pull / 4
    return layer


def tokens(number: int, seed: int) -> torch.Tensor:
    return 1 + torch.randn(number, 16, generator=torch.Generator().manual_seed(seed))


def looked_at(layer: MoELayer, hidden: torch.Tensor, settings: CollapseSettings | None = None) -> LayerReport:
    monitor = UtilizationMonitor(layer, settings)
    layer(hidden)
    monitor.observe()
    return monitor.report().layers[""]


# --- What is reported ----------------------------------------------------------------------------------------
def test_figures_are_those_of_their_formulas() -> None:
    shares = (0.5, 0.3, 0.18, 0.015, 0.005, 0.0)
    layer = LayerReport(shares, CollapseSettings(underused=0.1, dead=0.04, max_underused=0.5, min_entropy=0.5))
    assert layer.underused == (3, 4, 5)  # below 0.1 / 6
    assert layer.dead == (4, 5)
    assert layer.entropy == pytest.approx(-sum(p * math.log(p) for p in shares[:-1]) / math.log(6))
    assert layer.max_violation == pytest.approx(2)
    assert not layer.collapsed  # three of six is not more than a half, and the entropy is above
    assert LayerReport(shares, CollapseSettings(max_underused=0.4)).collapsed
    assert LayerReport(shares, CollapseSettings(max_underused=1.0, min_entropy=0.7)).collapsed
    assert str(layer) == (
        "sound: 3 of 6 experts under-used (3, 4, 5), 2 dead (4, 5); entropy 0.62; expert 0 has 50% of the slots"
    )


def test_a_layer_of_one_expert_is_sound() -> None:
    layer = LayerReport((1.0,), CollapseSettings())
    assert (layer.entropy, layer.underused, layer.collapsed) == (1.0, (), False)


def test_the_report_of_a_network_says_which_layers_have_collapsed() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(MoELayer(16, 4, 4, seed=0), nn.Linear(16, 16), collapsed(12))
    monitor = UtilizationMonitor(network)
    monitor.add("0", torch.tensor([3, 2, 4, 3]))
    monitor.add("2", torch.tensor([0] * 10 + [30, 50]))
    report = monitor.report()
    assert report.collapsed == ("2",)
    assert report.underused_share == report.dead_share == 10 / 16
    assert str(report).splitlines() == [
        "1 of 2 layers collapsed; of all experts 62.5% under-used, 62.5% dead",
        "  0: sound: 0 of 4 experts under-used, 0 dead; entropy 0.98; expert 2 has 33% of the slots",
        "  2: collapsed: 10 of 12 experts under-used (0, 1, 2, 3, 4, 5, 6, 7, …), 10 dead (0, 1, 2, 3, 4, 5, 6, 7, …); "
        "entropy 0.27; expert 11 has 62% of the slots",
    ]
    assert isinstance(report, Report)


def test_utilization_fades_and_counts_each_observation_alike() -> None:
    monitor = UtilizationMonitor(MoELayer(16, 4, 2, 1), CollapseSettings(decay=0.5))
    monitor.add("", torch.tensor([1, 0]))
    assert monitor.report().layers[""].utilization == (1, 0)  # the first look is not a guess
    monitor.add("", torch.tensor([0, 1000]))
    assert monitor.report().layers[""].utilization == pytest.approx((1 / 3, 2 / 3))
    monitor.add("", torch.zeros(2))
    assert monitor.report().layers[""].utilization == pytest.approx((1 / 3, 2 / 3))
    monitor.forget()
    with pytest.raises(InvalidRequest, match="call observe"):
        monitor.report()


def test_it_looks_at_the_last_call_without_padding_and_no_expert() -> None:
    class Given(nn.Module):
        def forward(self, hidden: torch.Tensor) -> Routing:
            return Routing(torch.tensor([[0, 1], [2, 3], [2, 0]]), torch.ones(3, 2), torch.zeros(3, 3))

    layer = MoELayer(16, 4, 3, gate=Given())
    monitor = UtilizationMonitor(layer)
    monitor.observe()  # no call yet: nothing to see
    layer(torch.randn(3, 16))
    monitor.observe(torch.tensor([True, True, False]))
    assert monitor.report().layers[""].utilization == pytest.approx((1 / 3, 1 / 3, 1 / 3))


# --- Collapse and revival ------------------------------------------------------------------------------------
@pytest.mark.parametrize("busy", [1, 2])
def test_a_provoked_collapse_is_found(busy) -> None:
    # With top 2 and one pulled expert, the second choices are still spread over the others.
    layer = collapsed(busy=busy)
    if busy == 1:
        layer.gate.settings = type(layer.gate.settings)(top_k=1, normalize=False)
    report = looked_at(layer, tokens(200, 0))
    assert report.collapsed
    assert report.underused == report.dead == tuple(range(8 - busy))
    assert not looked_at(MoELayer(16, 4, 8, 2, seed=3), torch.randn(500, 16)).collapsed


@pytest.mark.parametrize("seed", range(4))
def test_revival_divides_the_tokens_of_the_busy_at_once(seed) -> None:
    torch.manual_seed(seed)
    layer = collapsed(seed=seed)
    monitor = UtilizationMonitor(layer)
    layer(tokens(300, seed))
    monitor.observe()
    done = monitor.revive(settings=RevivalSettings(gate_noise=1.0))
    assert sorted(done[""]) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(InvalidRequest):
        monitor.report()  # what was seen of the old gate says nothing
    after = looked_at(layer, tokens(2000, 100 + seed))
    assert after.dead == ()
    assert not after.collapsed
    assert len(after.underused) <= 1


def test_a_network_that_had_collapsed_learns_with_its_experts_in_use() -> None:
    torch.manual_seed(1)
    layer, head = collapsed(pull=2.0), nn.Linear(16, 1)
    network = nn.Sequential(layer, head)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    monitor = UtilizationMonitor(network, CollapseSettings(decay=0.8))
    underused = []
    for step in range(80):
        hidden = tokens(128, step)
        loss = nn.functional.mse_loss(network(hidden), hidden[:, :4].sin().sum(1, keepdim=True))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.observe()
        if step % 10 == 9:
            underused.append(monitor.report().underused_share)
            if monitor.report().collapsed:
                monitor.revive(optimizer)
    assert underused[0] > 0.5
    assert underused[-1] <= 0.125


def test_a_revived_expert_is_a_copy_with_noise_of_the_one_that_it_shares_with() -> None:
    layer = MoELayer(16, 4, 4, 1, bias=True, seed=0)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    assert revive(layer, (0.7, 0.3, 0.0, 0.0), (2, 3), settings=RevivalSettings(noise=0, gate_noise=0)) == {2: 0, 3: 0}
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter[2], before[name][0])
        torch.testing.assert_close(parameter[3], before[name][0])
        torch.testing.assert_close(parameter[:2], before[name][:2])
    revive(layer, (0.7, 0.3, 0.0, 0.0), (2,), settings=RevivalSettings(noise=0.1, gate_noise=0.5))
    for name, parameter in layer.named_parameters():
        assert not torch.equal(parameter[2], before[name][0])
        torch.testing.assert_close(parameter[[0, 1, 3]], before[name][[0, 1, 0]])
    row = before["gate.weight"][0].detach()
    assert abs(float((layer.gate.weight[2].detach() - row) @ row)) < 1e-5  # at right angles: no longer, no shorter


def test_shares_are_halved_one_after_the_other() -> None:
    layer = MoELayer(16, 4, 8, 1, seed=0)
    sources = revive(layer, (1.0, *[0.0] * 7), range(1, 8))
    assert sources == {1: 0, 2: 0, 3: 1, 4: 0, 5: 1, 6: 2, 7: 3}


def test_fresh_experts_are_new_and_the_others_stay() -> None:
    layer = MoELayer(16, 4, 4, 1, seed=0)
    before = layer.experts.down_proj.clone()
    assert revive(layer, (0.7, 0.3, 0.0, 0.0), (2, 3), settings=RevivalSettings("fresh")) == {2: 2, 3: 3}
    down = layer.experts.down_proj
    torch.testing.assert_close(down[:2], before[:2])
    assert not torch.isclose(down[2:], before[2:]).any()
    assert not torch.isclose(down[2:], before[:1]).any()
    assert float(down[2:].detach().abs().max()) <= 4**-0.5
    rows = layer.gate.weight.detach()
    assert float(nn.functional.cosine_similarity(rows[2], rows[0], dim=0)) > 0.5


def test_the_optimizers_state_of_the_revived_is_zero_and_that_of_the_others_stays() -> None:
    layer = MoELayer(16, 4, 4, 2, bias=True, seed=0)
    optimizer = torch.optim.AdamW(layer.parameters())
    for seed in range(3):
        layer(tokens(64, seed)).square().sum().backward()
        optimizer.step()
    before = {name: optimizer.state[parameter]["exp_avg_sq"].clone() for name, parameter in layer.named_parameters()}
    revive(layer, (0.5, 0.3, 0.2, 0.0), (3,), optimizer)
    for name, parameter in layer.named_parameters():
        state: dict[str, Any] = optimizer.state[parameter]
        assert not state["exp_avg"][3].any() and not state["exp_avg_sq"][3].any()
        torch.testing.assert_close(state["exp_avg_sq"][:3], before[name][:3])
        assert before[name][3].any()
        assert float(state["step"]) == 3


def test_a_selection_bias_comes_with_the_row() -> None:
    layer = MoELayer(16, 4, 4, 2, seed=0)
    layer.gate.register_buffer("bias", torch.tensor([0.5, -0.5, 0.0, 2.0]))
    revive(layer, (0.7, 0.2, 0.1, 0.0), (3,))
    assert layer.gate.bias.tolist() == [0.5, -0.5, 0.0, 0.5]


def test_what_cannot_be_revived_says_so_and_stays() -> None:
    elsewhere = MoELayer(16, 4, 4, experts=lambda path, hidden, index, weight: hidden)
    with pytest.raises(InvalidConfig, match="these experts are elsewhere"):
        revive(elsewhere, (1.0, 0, 0, 0), (1,))

    class Rowless(nn.Module):
        def forward(self, hidden: torch.Tensor) -> Routing:
            return Routing(torch.zeros(len(hidden), 1).long(), torch.ones(len(hidden), 1), torch.zeros(len(hidden), 4))

    layer = MoELayer(16, 4, 4, gate=Rowless(), seed=0)
    before = layer.experts.down_proj.clone()
    with pytest.raises(InvalidConfig, match="a Rowless has no row for each of 4 experts"):
        revive(layer, (1.0, 0, 0, 0), (1,))
    assert torch.equal(layer.experts.down_proj, before)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (lambda: CollapseSettings(decay=1), "decay is 1"),
        (lambda: CollapseSettings(underused=0.01, dead=0.02), "dead is 0.02 and underused 0.01"),
        (lambda: CollapseSettings(min_entropy=2), "min_entropy is 2"),
        (lambda: CollapseSettings(max_underused=-1), "max_underused is -1"),
        (
            lambda: RevivalSettings(source="nearest"),  # type: ignore[arg-type]
            "unknown source 'nearest'; give one of busiest, fresh",
        ),
        (lambda: RevivalSettings(gate_noise=-1), "gate_noise is -1"),
        (lambda: UtilizationMonitor(nn.Linear(2, 2)), "no ray_moe.MoELayer"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said) -> None:
    with pytest.raises(InvalidConfig, match=said):
        settings()


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidRequest, match="no MoE layer at 'x'; there are 0"):
        UtilizationMonitor(nn.Sequential(MoELayer(16, 4, 4))).add("x", torch.ones(4))
