"""Methods that only touch gates work with experts on hosts: the same curve as with them here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from ray_moe import Methods
from ray_moe.ops.methods.base import Ramp
from ray_moe.ops.methods.curriculum import ActiveExperts
from ray_moe.ops.methods.dropout import ExpertDropout
from ray_moe.ops.methods.warmup import RandomRouting
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.training.control import LocalControl, LocalHost
from ray_moe.training.network import make_trainer
from ray_moe.training.settings import StepSettings
from ray_moe.training.trainees import Trainees
from ray_moe.transport.local import LocalTransport
from tests.unit.ops.methods.network import loss_of, network

METHODS = (ActiveExperts(Ramp(1, 3, steps=4)), RandomRouting(2), ExpertDropout(0.4, seed=1))
STEPS = 5


def _nothing(*_: Any) -> Any:
    raise AssertionError("a host that serves no model is asked for one")


def on_hosts(model: Any) -> Any:
    hosts = {f"expert-{n}": Trainees(f"expert-{n}") for n in range(2)}
    transport = LocalTransport({name: ExpertHost(name, each) for name, each in hosts.items()})
    control = LocalControl(
        {name: LocalHost(each, transport.address(name), _nothing, _nothing) for name, each in hosts.items()}
    )
    return make_trainer(
        model,
        lambda model, batch: loss_of(model, int(batch["step"])),
        control,
        transport,
        run_id="run",
        optimizer=OptimizerSettings(lr=1e-2),
        settings=StepSettings(clip_norm=None),
    )


def test_the_curve_with_experts_on_hosts_is_that_with_them_here() -> None:
    here = network()
    elsewhere = copy.deepcopy(here)
    optimizer = torch.optim.AdamW(here.parameters(), lr=1e-2, weight_decay=0.0)
    methods = Methods(here, METHODS)
    wanted = []
    for step in range(STEPS):
        methods.apply(step)
        loss = loss_of(here, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        wanted.append(loss.item())
    trainer = on_hosts(elsewhere)
    trainer.start()
    methods = Methods(elsewhere, METHODS)
    given = []
    for _ in range(STEPS):
        methods.apply(trainer.step)  # which goes back when a host is lost
        given.append(trainer.make_step(lambda step: [{"step": torch.tensor(step - 1)}]).loss)
    assert given == pytest.approx(wanted, rel=1e-9)
