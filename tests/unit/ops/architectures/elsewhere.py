"""Training a network with its experts on hosts, and the same in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.training.control import LocalControl, LocalHost
from ray_moe.training.network import make_trainer, whole_state_dict
from ray_moe.training.settings import StepSettings
from ray_moe.training.trainees import Trainees
from ray_moe.transport.local import LocalTransport

Batch = dict[str, torch.Tensor]
LEARNING_RATE = 1e-2


def trainer_of(model: nn.Module, loss_of: Callable[[Any, Any], torch.Tensor], num_hosts: int = 2, **how: Any) -> Any:
    """One that has given the experts of `model` to hosts that serve nothing."""
    hosts = {f"expert-{n}": Trainees(f"expert-{n}") for n in range(num_hosts)}
    transport = LocalTransport({name: ExpertHost(name, each) for name, each in hosts.items()})
    control = LocalControl(
        {name: LocalHost(each, transport.address(name), _nothing, _nothing) for name, each in hosts.items()}
    )
    options: dict[str, Any] = {
        "optimizer": OptimizerSettings(lr=LEARNING_RATE),
        "settings": StepSettings(clip_norm=None),
    } | how
    return make_trainer(model, loss_of, control, transport, run_id="run", **options)


def _nothing(*_: Any) -> Any:
    raise AssertionError("a host that serves no model is asked for one")


def same_elsewhere(
    model: nn.Module, loss_of: Callable[[Any, Any], torch.Tensor], batch_of: Callable[[int], Batch], steps: int = 4
) -> None:
    """Two micro-batches a step, in float64: the losses and at last all weights are those of one process."""
    here = model.double()
    before = copy.deepcopy(here.state_dict())
    trainer = trainer_of(copy.deepcopy(here), loss_of)
    trainer.start()

    def batches(step: int) -> list[Batch]:
        return [batch_of(10 * step + micro) for micro in range(2)]

    elsewhere = [trainer.make_step(batches).loss for _ in range(steps)]
    optimizer = torch.optim.AdamW(here.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    curve = []
    for step in range(1, steps + 1):
        losses = [loss_of(here, batch) for batch in batches(step)]
        curve.append(sum(loss.item() for loss in losses) / len(losses))
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert elsewhere == pytest.approx(curve, rel=1e-9)
    home = whole_state_dict(trainer)
    assert home.keys() == before.keys()
    for name, tensor in here.state_dict().items():
        torch.testing.assert_close(home[name], tensor, rtol=1e-7, atol=1e-9)
    moved = [name for name in before if ".experts." in name and not torch.equal(home[name], before[name])]
    assert moved


def regression(seed: int, *shape: int) -> Batch:
    """x [*shape] and what to make of it [..., 1]."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"x": x, "y": x.sum(-1, keepdim=True).sin()}


class Network(nn.Module):
    """A MoE layer of any architecture between linear layers."""

    def __init__(self, width: int, layer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer, self.last = nn.Linear(3, width), layer, nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        out: torch.Tensor = self.last(hidden + self.layer(hidden))
        return out


def loss_of(model: Any, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])
