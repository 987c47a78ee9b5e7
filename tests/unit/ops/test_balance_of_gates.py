"""Capacity, losses, the monitor and revival behind every gate of the package, with experts here and elsewhere."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_moe import MoELayer
from ray_moe.errors import InvalidConfig
from ray_moe.ops.balancing import LossFreeBalancing
from ray_moe.ops.capacity import CapacitySettings
from ray_moe.ops.gates.base import TokenInfo
from ray_moe.ops.losses import LOSSES, auxiliary_loss, auxiliary_losses
from ray_moe.ops.revival import RevivalSettings, revive
from ray_moe.ops.utilization import UtilizationMonitor
from tests.unit.ops.gates.gates import EXPERTS, OPTIONS, WIDTH, settings_of

ALL = dict.fromkeys(LOSSES, 0.1)
WITHOUT_ROWS = {"hash", "multi_task", "multi_task of few"}
"""Gates that have no row for each expert, or several: there is nothing that revival could copy."""


def tokens(seed: int) -> tuple[torch.Tensor, TokenInfo]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (40,), generator=generator)
    hidden = torch.randn(40, WIDTH, generator=generator, dtype=torch.float64) + 0.5
    return hidden, TokenInfo(ids % 3, ids % 2, ids)


def layer_of(kind: str, **options: Any) -> MoELayer:
    return MoELayer(WIDTH, 4, EXPERTS, gate=settings_of(kind), auxiliary=ALL, seed=0, **options).double()


@pytest.mark.parametrize("policy", ["drop", "next", "random"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_every_gate_is_limited_measured_and_watched(kind, policy) -> None:
    layer = layer_of(kind, capacity=CapacitySettings(0.8, policy=policy))
    monitor = UtilizationMonitor(layer)
    out = layer(*tokens(0))
    monitor.observe()
    overflow, routing = layer.overflow, layer.routing
    assert overflow is not None and routing is not None
    assert int(overflow.wanted.sum()) == int((routing.index != EXPERTS).sum()) > 0
    assert torch.equal(overflow.wanted.sum(), overflow.computed.sum() + overflow.dropped.sum())
    assert int(overflow.computed.max()) <= overflow.capacity
    assert sum(monitor.report().layers[""].utilization) == pytest.approx(1)
    (out.square().mean() + auxiliary_loss(layer)).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("kind", OPTIONS)
def test_experts_elsewhere_are_limited_the_same(kind) -> None:
    here = layer_of(kind, capacity=CapacitySettings(0.8, policy="next"))
    experts = copy.deepcopy(here.experts)
    there = copy.deepcopy(here)
    there.experts.answer_with(lambda path, hidden, index, weight: experts(hidden, index, weight), "far")
    hidden, info = tokens(1)
    outs = []
    for layer in (here, there):
        torch.manual_seed(0)
        outs.append(layer(hidden, info))
        (outs[-1].square().sum() + auxiliary_loss(layer)).backward()
    torch.testing.assert_close(*outs)
    for one, other in zip(here.gate.parameters(), there.gate.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(here.experts.down_proj.grad, experts.down_proj.grad)


@pytest.mark.parametrize("kind", OPTIONS)
def test_revival_copies_the_row_of_a_gate_or_says_that_there_is_none(kind) -> None:
    layer = layer_of(kind)
    utilization, settings = (0.9, *[0.1 / (EXPERTS - 1)] * (EXPERTS - 1)), RevivalSettings(noise=0, gate_noise=0)
    before = copy.deepcopy(layer.state_dict())
    if kind in WITHOUT_ROWS:
        with pytest.raises(InvalidConfig, match="no row for each"):
            revive(layer, utilization, (EXPERTS - 1,), settings=settings)
        torch.testing.assert_close(layer.state_dict(), before)
        return
    assert revive(layer, utilization, (EXPERTS - 1,), settings=settings) == {EXPERTS - 1: 0}
    torch.testing.assert_close(layer.gate.weight[-1], layer.gate.weight[0])
    if not kind.startswith(("hierarchical", "modality")):  # there a logit is not a row's alone
        layer.eval()(*tokens(2))
        assert layer.routing is not None
        torch.testing.assert_close(layer.routing.logits[:, -1], layer.routing.logits[:, 0])


def test_a_loss_of_the_gates_own_is_named_like_any_other() -> None:
    layer = MoELayer(8, 4, 4, gate="noisy_topk", auxiliary={"load": 0.01, "importance": 0.01}, seed=0)
    layer(torch.randn(20, 8))
    losses = auxiliary_losses(layer)
    assert layer.routing is not None
    torch.testing.assert_close(losses["load"], 0.01 * layer.routing.losses["load"])
    layer.eval()(torch.randn(20, 8))
    assert list(auxiliary_losses(layer)) == ["importance"]


def test_the_sigmoid_gate_is_balanced_without_a_loss() -> None:
    layer = MoELayer(8, 4, 4, gate="sigmoid", seed=0)
    hidden = torch.randn(300, 8) + 0.5
    with torch.no_grad():
        layer.gate.weight[2] += 0.4
    balancing, monitor = LossFreeBalancing(layer, rate=0.005), UtilizationMonitor(layer)
    most = []
    for _ in range(200):
        layer(hidden)
        balancing.observe()
        balancing.step()
        monitor.forget()
        monitor.observe()
        most.append(monitor.report().layers[""].max_violation)
    assert most[0] > 0.6
    assert most[-1] < 0.15


def test_the_code_of_the_page_about_balance_runs() -> None:
    page = (Path(__file__).parents[3] / "docs" / "methods" / "balance.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    begin, rest = code.split("\nout = layer(hidden)", 1)
    names: dict[str, Any] = {"hidden": torch.randn(4, 20, 64), "loss_of": lambda out: out.square().mean()}
    exec(begin, names)
    layer = names["layer"]
    names["optimizer"] = torch.optim.AdamW(layer.parameters())
    exec(f"out = layer(hidden){rest}", names)
    assert layer.overflow.wanted.sum() == 160
    assert layer.overflow.capacity == 25
    assert layer.gate.bias.any()
