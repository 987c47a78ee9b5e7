"""Training on the expert actors of a running service, against one process of PyTorch, with actors killed meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_moe.actors.training import make_trainer
from ray_moe.client.sync import Client
from ray_moe.service.composition import Service
from ray_moe.training.group import Alone
from ray_moe.training.reports import StepReport
from ray_moe.training.trainer import Trainer
from tests.ray.support import PROMPT, await_status, has_actors, serving
from tests.tiny_models import save

NUM_STEPS = 8
OPTIMIZER = {"lr": 3e-3, "weight_decay": 0.01, "no_decay": []}


def batches(step: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 96, (2, 9), generator=generator)
    return [{"input_ids": ids, "labels": ids}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    save("qwen3_moe", made)
    return made


@pytest.fixture(scope="module")
def curve(folder: Path) -> list[float]:
    """The losses of one process of PyTorch."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    losses = []
    for step in range(1, NUM_STEPS + 1):
        optimizer.zero_grad()
        loss = model(**batches(step)[0]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@contextmanager
def training(folder: Path, **train: Any) -> Iterator[tuple[Service, Trainer]]:
    with serving(folder, experts={"num_actors": 3}, train={"optimizer": OPTIMIZER, **train}) as service:
        assert service.spec is not None
        trainer = make_trainer(service.spec, Alone())
        try:
            trainer.start()
            await_hosts(trainer)
            yield service, trainer
        finally:
            trainer.close()


def await_hosts(trainer: Trainer) -> None:
    """Train on all three actors: one may have been late, and what is kept where counts."""
    give_up_s = time.monotonic() + 60
    while len(trainer.dispatcher.table.addresses) < 3:
        assert time.monotonic() < give_up_s
        time.sleep(0.2)
        trainer.start()


def run(trainer: Trainer, last: int = NUM_STEPS, before: Callable[[int], None] = lambda step: None) -> list[StepReport]:
    reports = []
    while trainer.step < last:
        before(trainer.step + 1)
        reports.append(trainer.make_step(batches))
    return reports


def losses(reports: list[StepReport]) -> list[float]:
    made = {report.step: report.loss for report in reports if report.outcome == "made"}
    return [made[step] for step in sorted(made)]


def test_the_curve_is_that_of_one_process_and_an_actors_death_does_not_change_it(
    folder: Path, curve: list[float], tmp_path: Path
) -> None:
    with (
        training(folder, checkpoints={"folder": str(tmp_path), "every": 4}) as (service, trainer),
        Client(service.address) as client,
    ):
        before = client.generate(token_ids=PROMPT, max_new_tokens=8, ignore_eos=True).token_ids
        pids = {host.host_id: host.pid for host in client.status().hosts}

        def kill(step: int) -> None:
            if step == 4 and (pid := pids.pop("expert-1", 0)):
                os.kill(pid, signal.SIGKILL)

        reports = run(trainer, before=kill)
        trainer.save()
        assert losses(reports) == pytest.approx(curve, rel=1e-5)
        (interrupted,) = [report for report in reports if report.outcome == "interrupted"]
        assert interrupted.recovery is not None
        assert (interrupted.recovery.step, interrupted.recovery.source) == (3, "memory")
        assert trainer.finish_save() == tmp_path / f"step-{NUM_STEPS:08d}"
        # What is served is what was there before: nothing has been published.
        assert client.generate(token_ids=PROMPT, max_new_tokens=8, ignore_eos=True).token_ids == before
        await_status(client, has_actors(3), what="three actors")


def orders(trainer: Trainer, then: Callable[[int, str, str], None]) -> None:
    """`then` is told of each order before it goes out: the next step, the method, the host."""
    assert trainer.coordinator is not None
    control = trainer.coordinator._control
    order = control.order

    def tell(host_id: str, method: str, *arguments: Any) -> Any:
        then(trainer.step + 1, method, host_id)
        return order(host_id, method, *arguments)

    control.order = tell  # type: ignore[method-assign]


def test_actors_that_are_killed_around_a_commit_make_no_step_twice(folder: Path, curve: list[float]) -> None:
    at = {
        (2, "sums", "expert-0"): "expert-2",  # nobody has made step 2
        (4, "apply", "expert-1"): "expert-1",  # one has been told to make step 4, and the third one will be
        (6, "snapshot", "expert-0"): "expert-0",  # all have made step 5, and nothing is kept of it
    }
    with training(folder) as (service, trainer), Client(service.address) as client:

        def kill(step: int, method: str, host_id: str) -> None:
            victim = at.pop((step, method, host_id), None)
            if victim is not None:
                os.kill(next(h.pid for h in client.status().hosts if h.host_id == victim), signal.SIGKILL)

        orders(trainer, kill)

        def whole(step: int) -> None:
            await_status(client, has_actors(3))
            await_hosts(trainer)

        reports = run(trainer, before=whole)
        assert not at
        assert losses(reports) == pytest.approx(curve, rel=1e-5)
        gone_back = [(report.step, report.recovery) for report in reports if report.recovery is not None]
        assert [(step, r.step, r.undone, r.source) for step, r in gone_back] == [
            (2, 1, 0, "memory"),
            (4, 3, 0, "memory"),
            (6, 4, 1, "memory"),
        ]


def test_actors_that_hang_in_a_step_are_started_anew(folder: Path, curve: list[float]) -> None:
    """Long before an order would be given up, which is later than this test's time-out."""
    with training(folder, call_timeout_s=3) as (service, trainer), Client(service.address) as client:
        pids = {host.host_id: host.pid for host in client.status().hosts}
        backward = trainer.dispatcher.backward_rows

        def hang(host_id: str) -> None:
            if pid := pids.pop(host_id, 0):
                os.kill(pid, signal.SIGSTOP)

        def hanging(*arguments: Any, **more: Any) -> torch.Tensor:
            if trainer.step == 2:
                hang("expert-1")
            return backward(*arguments, **more)

        trainer.dispatcher.backward_rows = hanging  # type: ignore[method-assign]
        orders(trainer, lambda step, method, host_id: hang("expert-2") if (step, method) == (6, "apply") else None)
        reports, took_s = [], []
        while trainer.step < NUM_STEPS:
            begun_s = time.monotonic()
            reports += run(trainer, trainer.step + 1)
            took_s.append(time.monotonic() - begun_s)
        print("with one that hangs: " + ", ".join(f"{s:.1f} s" for s in sorted(took_s)[-2:]))
        assert pids.keys() == {"expert-0"}
        assert losses(reports) == pytest.approx(curve, rel=1e-5)
        gone_back = [(report.step, report.recovery) for report in reports if report.recovery is not None]
        assert [(step, r.step, r.undone, r.source) for step, r in gone_back] == [
            (3, 2, 0, "memory"),
            (6, 5, 0, "memory"),
        ]
        await_status(client, has_actors(3), what="three actors")


def test_another_service_goes_on_from_the_checkpoint(folder: Path, curve: list[float], tmp_path: Path) -> None:
    checkpoints = {"folder": str(tmp_path)}
    with training(folder, checkpoints=checkpoints) as (_, trainer):
        run(trainer, 5)
        trainer.save()
        trainer.finish_save()
    with training(folder, checkpoints=checkpoints, parallel={"replicas": 2}) as (_, trainer):
        assert trainer.step == 5
        assert losses(run(trainer)) == pytest.approx(curve[5:], rel=1e-5)


def test_killing_all_actors_but_one_in_mid_step_begins_anew(folder: Path, curve: list[float]) -> None:
    with training(folder) as (service, trainer), Client(service.address) as client:
        run(trainer, 2)
        pids = {host.host_id: host.pid for host in client.status().hosts}
        original = trainer.dispatcher.backward_rows

        def dying(*arguments: Any, **more: Any) -> torch.Tensor:
            trainer.dispatcher.backward_rows = original  # type: ignore[method-assign]
            for host_id in ("expert-0", "expert-2"):
                os.kill(pids[host_id], signal.SIGKILL)
            return original(*arguments, **more)

        trainer.dispatcher.backward_rows = dying  # type: ignore[method-assign]
        reports = run(trainer)
        recovery = reports[0].recovery
        assert recovery is not None
        assert recovery.lost == ("expert-0", "expert-2")  # the second kept what the first was
        assert (recovery.step, recovery.source) == (0, "model")
        assert losses(reports) == pytest.approx(curve, rel=1e-5)
