"""Every gate learns with its experts on hosts what it learns with them here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ray_moe import MoELayer
from ray_moe.ops.gates.base import TokenInfo
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.training.control import LocalControl, LocalHost
from ray_moe.training.network import make_trainer, whole_state_dict
from ray_moe.training.settings import StepSettings
from ray_moe.training.trainees import Trainees
from ray_moe.training.trainer import Batch
from ray_moe.transport.local import LocalTransport
from tests.unit.ops.gates.gates import EXPERTS, OPTIONS, WIDTH, settings_of

STEPS = 4


class Network(nn.Module):
    """Two layers behind the same kind of gate."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(MoELayer(WIDTH, 4, EXPERTS, gate=settings_of(kind), seed=n) for n in range(2))
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, info: TokenInfo) -> torch.Tensor:
        hidden = self.first(x)
        for layer in self.layers:
            hidden = hidden + layer(hidden, info)
        out: torch.Tensor = self.last(hidden)
        return out


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    torch.manual_seed(int(batch["seed"]))  # what is random in a micro-batch
    x = batch["x"]
    info = TokenInfo(batch["ids"] % 3, batch["ids"] % 2, batch["ids"])
    loss = nn.functional.mse_loss(model(x, info), x.sum(-1, keepdim=True).sin())
    return loss + sum(0.1 * each for layer in model.layers for each in layer.routing.losses.values())


def batches(step: int) -> list[Batch]:
    made: list[Batch] = []
    for micro in range(2):
        seed = 10 * step + micro
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
        ids = torch.randint(0, 50, (2, 7), generator=generator)
        made.append({"x": x, "ids": ids, "seed": torch.tensor(seed)})
    return made


def _nothing(*_: Any) -> Any:
    raise AssertionError("a host that serves no model is asked for one")


@pytest.mark.parametrize("kind", OPTIONS)
def test_experts_elsewhere_make_no_difference(kind: str) -> None:
    torch.manual_seed(0)
    here = Network(kind).double()
    before = copy.deepcopy(here.state_dict())
    hosts = {f"expert-{n}": Trainees(f"expert-{n}") for n in range(2)}
    transport = LocalTransport({name: ExpertHost(name, each) for name, each in hosts.items()})
    control = LocalControl(
        {name: LocalHost(each, transport.address(name), _nothing, _nothing) for name, each in hosts.items()}
    )
    trainer = make_trainer(
        copy.deepcopy(here),
        loss_of,
        control,
        transport,
        run_id="run",
        optimizer=OptimizerSettings(lr=1e-2),
        settings=StepSettings(clip_norm=None),
    )
    trainer.start()
    elsewhere = [trainer.make_step(batches).loss for _ in range(STEPS)]
    optimizer = torch.optim.AdamW(here.parameters(), lr=1e-2, weight_decay=0.0)
    curve = []
    for step in range(1, STEPS + 1):
        losses = [loss_of(here, batch) for batch in batches(step)]
        curve.append(sum(loss.item() for loss in losses) / len(losses))
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert elsewhere == pytest.approx(curve, rel=1e-9)
    home = whole_state_dict(trainer)
    for name, tensor in here.state_dict().items():
        torch.testing.assert_close(home[name], tensor, rtol=1e-7, atol=1e-9)
    gates = [name for name in before if ".gate.weight" in name]
    assert all(not torch.equal(home[name], before[name]) for name in gates)
    assert gates or kind == "hash"
