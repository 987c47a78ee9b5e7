"""Somebody's own network: its experts on hosts that have never heard of it, its loop, and its weights brought home."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_moe import MoELayer
from ray_moe.errors import InvalidConfig, InvalidRequest, NotFound, RayMoEError, StepRefused
from ray_moe.models.experts import experts_modules, without_experts
from ray_moe.ops.gates.base import Routing
from ray_moe.ops.lora import ExpertAdapters
from ray_moe.ops.losses import load_balancing_loss
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.training.control import LocalControl, LocalHost
from ray_moe.training.group import Group
from ray_moe.training.network import make_trainer, whole_state_dict
from ray_moe.training.reports import StepReport
from ray_moe.training.settings import ExchangeSettings, StepSettings
from ray_moe.training.trainees import Trainees
from ray_moe.training.trainer import Batch, Trainer
from ray_moe.transport.local import LocalTransport
from ray_moe.types import HostId
from tests.tiny_models import build
from tests.training_cluster import ThreadGroup, together

WIDTH, EXPERTS = 8, 5
WAYS = list(itertools.product((1, 2), (1, 3), (1, 2), (False, True)))
"""Workers, hosts, replicas, recompute."""
RATE = 4096.0


class Threshold(nn.Module):
    """A gate that takes every expert above a threshold, up to three: as many as each token wants, or none."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, generator=generator))

    def forward(self, hidden: torch.Tensor) -> Routing:
        logits = hidden @ self.weight.t()
        weight, index = logits.sigmoid().topk(3)
        return Routing(torch.where(weight > 0.6, index, EXPERTS), weight, logits)


class Network(nn.Module):
    """Two kinds of experts between linear layers, the second behind a gate of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.gated = MoELayer(WIDTH, 6, EXPERTS, 2, bias=True, seed=1)
        self.plain = MoELayer(WIDTH, 7, EXPERTS, gated=False, activation="gelu", gate=Threshold(generator), seed=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        hidden = hidden + self.gated(hidden)
        hidden = hidden + self.plain(hidden)
        out: torch.Tensor = self.last(hidden)
        return out


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss = nn.functional.mse_loss(model(batch["x"]), batch["y"])
    routing: Any = model.gated.routing  # type: ignore[union-attr]
    return loss + 0.01 * load_balancing_loss(routing)


def batches(step: int, rank: int, dtype: torch.dtype = torch.float64, num: int = 2) -> list[Batch]:
    """`num` micro-batches, the same for a worker whenever they are asked for."""
    made: list[Batch] = []
    for micro in range(num):
        generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
        x = torch.randn(4, 7, 3, generator=generator, dtype=torch.float64)
        made.append({"x": x.to(dtype), "y": torch.stack([x.sum(-1).sin(), x[..., 0] * x[..., 1]], -1).to(dtype)})
    return made


class Hosts:
    """Hosts in this process that serve no model."""

    def __init__(self, num_hosts: int) -> None:
        self.trainees: dict[HostId, Trainees] = {f"expert-{n}": Trainees(f"expert-{n}") for n in range(num_hosts)}
        self.transport = LocalTransport({name: ExpertHost(name, each) for name, each in self.trainees.items()})
        self.control = LocalControl({})
        for name in self.trainees:
            self.admit(name)
        self.transport.on_kill = self.control.local.__delitem__

    def admit(self, name: HostId) -> None:
        self.control.local[name] = LocalHost(
            self.trainees[name], self.transport.address(name), _knows_none, _knows_none
        )

    def revive(self, name: HostId) -> None:
        self.trainees[name] = Trainees(name)
        self.transport.revive(name, ExpertHost(name, self.trainees[name]))
        self.admit(name)

    def trainer(self, model: nn.Module, group: Group | None = None, **how: Any) -> Trainer:
        options: dict[str, Any] = {"run_id": "run", "optimizer": OptimizerSettings(lr=3e-3)} | how
        return make_trainer(model, loss_of, self.control, self.transport, group=group, **options)


def _knows_none(*_: Any) -> Any:
    raise NotFound("a host that serves no model has nothing to load")


def train(trainers: Sequence[Trainer], last: int, dtype: torch.dtype = torch.float64) -> list[StepReport]:
    """Up to step `last`; what the first worker reports of the steps that were made."""

    def loop(trainer: Trainer) -> list[StepReport]:
        reports = []
        while trainer.step < last:
            reports.append(trainer.make_step(lambda step: batches(step, trainer.rank, dtype)))
        return [report for report in reports if report.outcome == "made"]

    made: list[StepReport] = together(trainers, loop)[0]
    return made


def reference_step(model: nn.Module, step: int, num_workers: int, dtype: torch.dtype = torch.float64) -> float:
    every = [batch for rank in range(num_workers) for batch in batches(step, rank, dtype)]
    losses = [loss_of(model, batch) for batch in every]
    for loss in losses:
        (loss / len(losses)).backward()
    return sum(loss.item() for loss in losses) / len(losses)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize(("num_workers", "num_hosts", "num_replicas", "recompute"), WAYS)
def test_loss_and_every_gradient_equal_one_process(
    num_workers: int, num_hosts: int, num_replicas: int, recompute: bool, dtype: torch.dtype, within: float
) -> None:
    theirs = Network().to(dtype)
    before = copy.deepcopy(theirs.state_dict())
    hosts = Hosts(num_hosts)
    how = {
        "optimizer": OptimizerSettings(kind="sgd", lr=RATE),
        "settings": StepSettings(num_replicas=num_replicas, clip_norm=None),
        "exchange": ExchangeSettings(recompute=recompute),
    }
    members = ThreadGroup(num_workers).members
    trainers = together(members, lambda member: hosts.trainer(copy.deepcopy(theirs), member, **how))
    together(trainers, lambda trainer: trainer.start())
    (report,) = train(trainers, 1, dtype)
    assert report.loss == pytest.approx(reference_step(theirs, 1, num_workers, dtype), rel=within)
    assert report.num_dropped > 0  # some tokens went to nobody
    after = whole_state_dict(trainers[0])
    assert after.keys() == before.keys()
    for name, parameter in theirs.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = (before[name] - after[name]) / RATE
        torch.testing.assert_close(gradient, wanted, rtol=within, atol=within * float(wanted.abs().max()))


@pytest.mark.parametrize("numbers", [(3, 1), (0, 2), (1, 0, 4)])
def test_all_micro_batches_weigh_the_same_however_many_each_worker_has(numbers: tuple[int, ...]) -> None:
    theirs = Network().double()
    before = copy.deepcopy(theirs.state_dict())
    hosts, members = Hosts(2), ThreadGroup(len(numbers)).members
    how = {"optimizer": OptimizerSettings(kind="sgd", lr=RATE), "settings": StepSettings(clip_norm=0.01)}
    trainers = together(members, lambda member: hosts.trainer(copy.deepcopy(theirs), member, **how))
    together(trainers, lambda trainer: trainer.start())
    report, *others = together(
        trainers, lambda trainer: trainer.make_step(lambda step: batches(step, trainer.rank, num=numbers[trainer.rank]))
    )
    every = [batch for rank, num in enumerate(numbers) for batch in batches(1, rank, num=num)]
    losses = [loss_of(theirs, batch) for batch in every]
    torch.stack(losses).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
    assert report.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-10)
    assert report.grad_norm == pytest.approx(norm.item(), rel=1e-10)
    assert {other.loss for other in others} == {report.loss}
    after = whole_state_dict(trainers[0])
    for name, parameter in theirs.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = (before[name] - after[name]) / RATE
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))


def test_a_step_without_any_micro_batch_is_refused() -> None:
    trainer = Hosts(1).trainer(Network())
    trainer.start()
    with pytest.raises(InvalidRequest, match="no micro-batch"):
        trainer.make_step(lambda step: [])


def test_a_worker_that_fails_takes_the_others_along() -> None:
    hosts, members = Hosts(2), ThreadGroup(2).members
    trainers = together(members, lambda member: hosts.trainer(Network().double(), member))
    together(trainers, lambda trainer: trainer.start())

    def step(trainer: Trainer) -> None:
        def of(step: int) -> list[Batch]:
            if trainer.rank == 1:
                raise ValueError("the data is gone")
            return batches(step, 0)

        with pytest.raises(RayMoEError, match="worker 1: ValueError: the data is gone"):
            trainer.make_step(of)

    together(trainers, step)
    assert train(trainers, 1)  # nothing has changed


def test_the_coordinator_that_came_last_goes_on_and_the_one_before_ends() -> None:
    hosts = Hosts(2)
    calm = Hosts(2).trainer(Network().double())
    calm.start()
    curve = [report.loss for report in train([calm], 5)]
    before, after = (hosts.trainer(Network().double()) for _ in range(2))
    before.start()
    assert [report.loss for report in train([before], 2)] == pytest.approx(curve[:2])
    after.start()
    assert after.step == 2
    assert [report.loss for report in train([after], 4)] == pytest.approx(curve[2:4])
    with pytest.raises(StepRefused, match="'run' since"):
        train([before], 5)
    assert [report.loss for report in train([after], 5)] == pytest.approx(curve[4:])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_twenty_steps_stay_on_the_curve_of_one_process_and_come_home(num_workers: int) -> None:
    theirs = Network()
    hosts = Hosts(3)
    members = ThreadGroup(num_workers).members
    how = {"settings": StepSettings(num_replicas=2, clip_norm=0.5)}
    # What other workers bring does not count.
    models = [Network(seed=member.rank) for member in members]
    trainers = together(members, lambda member: hosts.trainer(models[member.rank], member, **how))
    together(trainers, lambda trainer: trainer.start())
    reports = train(trainers, 20, torch.float32)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-3, weight_decay=0.0)
    for step, report in zip(range(1, 21), reports, strict=True):
        optimizer.zero_grad()
        loss = reference_step(theirs, step, num_workers, torch.float32)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        assert report.loss == pytest.approx(loss, rel=1e-4)
        assert report.grad_norm == pytest.approx(float(norm), rel=1e-3)
    home = Network(seed=5)
    home.load_state_dict(whole_state_dict(trainers[0]))
    x = torch.randn(6, 3)
    torch.testing.assert_close(home(x), theirs(x), rtol=1e-3, atol=1e-4)


def test_a_run_that_loses_hosts_goes_on_and_one_that_loses_all_begins_anew() -> None:
    calm = Hosts(3).trainer(Network().double())
    calm.start()
    curve = [report.loss for report in train([calm], 6)]
    hosts = Hosts(3)
    trainer = hosts.trainer(Network().double(), settings=StepSettings(num_replicas=2))
    trainer.start()
    losses = [report.loss for report in train([trainer], 2)]
    hosts.transport.kill("expert-1")
    losses += [report.loss for report in train([trainer], 4)]
    assert losses == pytest.approx(curve[:4])
    for name in ("expert-0", "expert-2"):
        hosts.transport.kill(name)
        hosts.revive(name)
    report = trainer.make_step(lambda step: batches(step, 0))
    assert report.recovery is not None
    assert (report.recovery.step, report.recovery.source) == (0, "model")
    assert [report.loss for report in train([trainer], 6)] == pytest.approx(curve)


def test_a_run_goes_on_from_its_checkpoint_on_other_hosts(tmp_path: Path) -> None:
    calm = Hosts(3).trainer(Network().double())
    calm.start()
    curve = [report.loss for report in train([calm], 6)]
    first = Hosts(3).trainer(Network().double(), checkpoints=tmp_path)
    first.start()
    train([first], 4)
    first.save()
    assert first.finish_save() is not None
    again = Hosts(2).trainer(Network(seed=7).double(), checkpoints=tmp_path)
    assert again.start().source == "checkpoint"
    assert [report.loss for report in train([again], 6)] == pytest.approx(curve[4:])


def test_adapters_of_experts_change_their_weights_by_no_more_than_their_rank() -> None:
    model = Network().double()
    before = copy.deepcopy(model.state_dict())
    trainer = Hosts(2).trainer(model, adapters=ExpertAdapters(rank=2, alpha=4.0))
    trainer.start()
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole_state_dict(trainer).items())
    train([trainer], 3)
    after = whole_state_dict(trainer)
    assert after.keys() == before.keys()
    for name in (name for name in before if ".experts." in name):
        change = after[name] - before[name]
        if name.endswith("bias"):
            assert not change.any()
        else:
            assert torch.linalg.matrix_rank(change, rtol=1e-9).max() == 2


def test_a_newer_run_takes_the_hosts_over_and_one_that_is_over_leaves_nothing() -> None:
    hosts = Hosts(2)
    older, newer = (hosts.trainer(Network(), run_id=name) for name in ("older", "newer"))
    older.start()
    train([older], 1, torch.float32)
    newer.start()
    train([newer], 2, torch.float32)
    with pytest.raises(StepRefused, match="run 'newer' since"):
        train([older], 2, torch.float32)
    assert {trainees.report().run_id for trainees in hosts.trainees.values()} == {"newer"}
    newer.forget()
    assert not any(trainees.report().held for trainees in hosts.trainees.values())


def test_a_model_of_transformers_is_a_network_too() -> None:
    model = build("mixtral")
    theirs = copy.deepcopy(model)
    hosts = Hosts(2)
    trainer = make_trainer(
        model,
        lambda model, batch: model(**batch).loss,
        hosts.control,
        hosts.transport,
        run_id="hf",
        optimizer=OptimizerSettings(kind="sgd", lr=0.5),
        settings=StepSettings(clip_norm=None),
    )
    trainer.start()
    ids = torch.arange(3, 30)[None]
    batch = {"input_ids": ids, "labels": ids}
    report = trainer.make_step(lambda step: [batch])
    loss = theirs(**batch).loss
    loss.backward()
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    after = whole_state_dict(trainer)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(after[name], parameter - 0.5 * parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_how_experts_compute_can_be_pickled_and_weighs_nothing(name: str) -> None:
    for module in experts_modules(build(name)).values():
        assert len(pickle.dumps(without_experts(module))) < 20_000


def test_a_network_without_experts_in_it_is_refused() -> None:
    hosts = Hosts(1)
    with pytest.raises(InvalidConfig, match="no experts"):
        hosts.trainer(nn.Linear(2, 2))
    model = Network()
    hosts.trainer(model)
    with pytest.raises(InvalidConfig, match=r"gated\.experts.*elsewhere already"):
        hosts.trainer(model)


def test_only_the_first_worker_can_bring_the_weights_home() -> None:
    hosts = Hosts(1)
    trainers = together(ThreadGroup(2).members, lambda member: hosts.trainer(Network(), member))
    with pytest.raises(InvalidConfig, match="first worker"):
        whole_state_dict(trainers[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: StepSettings(num_replicas=0),
        lambda: StepSettings(clip_norm=0.0),
        lambda: StepSettings(clip_norm=float("nan")),
        lambda: StepSettings(snapshot_every=-1),
        lambda: StepSettings(max_attempts=0),
        lambda: ExchangeSettings(call_timeout_s=0.0),
        lambda: ExchangeSettings(wire="float8"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_cannot_be_are_refused(make: Any) -> None:
    with pytest.raises(InvalidConfig, match=r"(num_replicas|clip_norm|snapshot_every|max_attempts|timeout|wire)"):
        make()
