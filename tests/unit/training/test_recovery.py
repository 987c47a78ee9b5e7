"""Hosts and coordinators that die at every point of a step: the curve is the same, no step is lost or made twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ray_moe.errors import HostLost, InsufficientResources, StepInterrupted
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.training.reports import StepReport
from ray_moe.training.settings import ExchangeSettings, StepSettings
from ray_moe.transport.local import Fault, FaultPlan
from tests.tiny_models import build
from tests.training_cluster import Cluster

NUM_STEPS = 8


def batches(step: int, rank: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(3, 96, (2, 7), generator=generator)
    return [{"input_ids": ids, "labels": ids}]


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral")


def cluster(model: Any, **changes: Any) -> Cluster:
    made = Cluster(
        model,
        changes.pop("num_hosts", 3),
        changes.pop("num_workers", 1),
        optimizer=OptimizerSettings(lr=3e-3, weight_decay=0.01),
        settings=changes.pop("settings", StepSettings()),
        **changes,
    )
    made.start()
    return made


@pytest.fixture(scope="module")
def curve(model: Any) -> list[float]:
    """The losses of the undisturbed run."""
    return losses(cluster(model).train(NUM_STEPS, batches))


def losses(reports: list[StepReport]) -> list[float]:
    """Of the steps that count: those of a step that was made again are the newest."""
    made = {report.step: report.loss for report in reports if report.outcome == "made"}
    assert sorted(made) == list(range(1, NUM_STEPS + 1))
    return [made[step] for step in sorted(made)]


def orders_die(made: Cluster, method: str, nth: int, then: Callable[[], None]) -> None:
    """`then` happens just before the `nth` order `method` is given."""
    original, seen = made.control.order, [0]

    def order(host_id: str, name: str, *arguments: Any) -> Any:
        if name == method:
            seen[0] += 1
            if seen[0] == nth:
                then()
        return original(host_id, name, *arguments)

    made.control.order = order  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("nth", range(17, 25))
def test_a_host_that_dies_in_forward_or_backward_changes_nothing(
    model: Any, curve: list[float], nth: int, recompute: bool
) -> None:
    """A step is four calls to each host: two layers forward and two backward."""
    made = cluster(
        model,
        faults=FaultPlan((Fault("kill", "expert-1", nth),)),
        exchange=ExchangeSettings(recompute=recompute),
    )
    reports = made.train(NUM_STEPS, batches)
    assert losses(reports) == pytest.approx(curve, rel=1e-6)
    (interrupted,) = [report for report in reports if report.outcome == "interrupted"]
    assert interrupted.recovery is not None
    assert (interrupted.recovery.lost, interrupted.recovery.source) == (("expert-1",), "memory")
    assert interrupted.recovery.step == interrupted.step - 1  # it was snapshot


@pytest.mark.parametrize("method", ["begin", "gradients", "sums", "apply", "weights", "snapshot", "keep", "keep_blob"])
@pytest.mark.parametrize("nth", [7, 8, 9])
def test_a_host_that_dies_around_the_commit_changes_nothing(
    model: Any, curve: list[float], method: str, nth: int
) -> None:
    made = cluster(model, settings=StepSettings(num_replicas=2))
    orders_die(made, method, nth, lambda: made.kill("expert-2"))
    assert losses(made.train(NUM_STEPS, batches)) == pytest.approx(curve, rel=1e-5)
    assert len(made.control.hosts()) == 2


def test_with_rare_snapshots_the_steps_since_are_made_again(model: Any, curve: list[float]) -> None:
    made = cluster(model, settings=StepSettings(snapshot_every=3))
    orders_die(made, "apply", 3 * 5 + 1, lambda: made.kill("expert-0"))
    reports = made.train(NUM_STEPS, batches)
    assert losses(reports) == pytest.approx(curve, rel=1e-6)
    (interrupted,) = [report for report in reports if report.outcome == "interrupted"]
    assert interrupted.step == 6
    assert interrupted.recovery is not None
    assert (interrupted.recovery.step, interrupted.recovery.undone) == (3, 2)


def test_when_nothing_is_left_in_memory_training_begins_anew(model: Any, curve: list[float]) -> None:
    made = cluster(model, num_hosts=1, settings=StepSettings(snapshot_every=0))

    def die() -> None:
        made.kill("expert-0")
        made.revive("expert-0")

    orders_die(made, "sums", 4, die)
    reports = made.train(NUM_STEPS, batches)
    assert losses(reports) == pytest.approx(curve, rel=1e-6)
    (interrupted,) = [report for report in reports if report.outcome == "interrupted"]
    assert interrupted.recovery is not None
    assert (interrupted.recovery.step, interrupted.recovery.source) == (0, "model")


def test_when_a_host_and_its_keeper_are_lost_training_begins_anew(model: Any, curve: list[float]) -> None:
    made = cluster(model)
    made.train(4, batches)
    made.kill("expert-0")
    made.kill("expert-2")
    reports = made.train(NUM_STEPS, batches)
    assert losses(reports) == pytest.approx(curve, rel=1e-6)
    recovery = reports[0].recovery
    assert recovery is not None
    assert (recovery.step, recovery.undone, recovery.source) == (0, 4, "model")


def test_two_workers_go_back_together(model: Any) -> None:
    calm = losses(cluster(model, num_workers=2).train(NUM_STEPS, batches))
    made = cluster(
        model, num_workers=2, faults=FaultPlan((Fault("kill", "expert-0", 14), Fault("kill", "expert-2", 31)))
    )
    assert losses(made.train(NUM_STEPS, batches)) == pytest.approx(calm, rel=1e-5)
    assert list(made.control.hosts()) == ["expert-1"]


def test_a_host_that_comes_back_shares_the_work_again(model: Any, curve: list[float]) -> None:
    made = cluster(model)
    made.kill("expert-1")
    made.train(3, batches)
    made.revive("expert-1")
    made.train(4, batches)
    assert made.trainees["expert-1"].report().owned
    reports = made.train(NUM_STEPS, batches)
    assert [report.loss for report in reports if report.outcome == "made"] == pytest.approx(curve[4:], rel=1e-6)


def test_answers_that_are_lost_or_doubled_count_once(model: Any, curve: list[float]) -> None:
    faults = [Fault("duplicate", "expert-0", nth) for nth in range(1, 9)]
    faults += [Fault("reorder", "expert-1", 3), Fault("drop", "expert-2", 6)]
    made = cluster(model, faults=FaultPlan(tuple(faults)), exchange=ExchangeSettings(call_timeout_s=0.3))
    assert losses(made.train(NUM_STEPS, batches)) == pytest.approx(curve, rel=1e-6)


def test_a_new_coordinator_goes_on_where_one_died(model: Any, curve: list[float]) -> None:
    made = cluster(model)
    made.train(5, batches)
    successor = made.coordinator()
    made.trainers[0].coordinator = successor
    recovery = made.trainers[0].start()
    assert (recovery.step, recovery.source) == (5, "memory")
    reports = made.train(NUM_STEPS, batches)
    assert [report.loss for report in reports] == pytest.approx(curve[5:], rel=1e-6)


def test_a_worker_that_is_new_takes_its_state_from_the_hosts(model: Any, curve: list[float]) -> None:
    made = cluster(model)
    made.train(5, batches)
    again = Cluster(model, 3, optimizer=OptimizerSettings(lr=3e-3, weight_decay=0.01), settings=StepSettings())
    again.control, again.transport, again.trainees = made.control, made.transport, made.trainees
    again.trainers[0].coordinator = made.coordinator()
    again.trainers[0].dispatcher._transport = made.transport
    again.start()
    assert again.trainers[0].step == 5
    assert [report.loss for report in again.train(NUM_STEPS, batches)] == pytest.approx(curve[5:], rel=1e-6)


def test_without_any_host_training_ends_with_an_error(model: Any) -> None:
    made = cluster(model, num_hosts=1)
    made.kill("expert-0")
    with pytest.raises(InsufficientResources, match="no expert actor"):
        made.train(1, batches)


def test_a_step_that_never_goes_through_is_given_up(model: Any) -> None:
    made = cluster(model, settings=StepSettings(max_attempts=3))
    made.trainers[0].coordinator.commit = _raise  # type: ignore[method-assign, union-attr]
    with pytest.raises(StepInterrupted, match="begun 3 times"):
        made.train(1, batches)


def _raise(*_: Any) -> Any:
    raise HostLost("always")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused_and_named(model: Any, curve: list[float], value: float) -> None:
    made = cluster(model)
    made.train(2, batches)
    trainees = made.trainees["expert-1"]
    layer, (expert, *_) = next(iter(trainees.report().owned.items()))
    before = trainees.state()
    original = trainees.run

    def poisoned(call: Any) -> Any:
        reply = original(call)
        if call.keep and call.layer == layer and expert in call.experts:
            for parameter in trainees._experts.layers[layer].experts[expert].values():
                parameter.register_hook(lambda grad: grad * value)
        return reply

    trainees.run = poisoned  # type: ignore[method-assign]
    (report,) = made.train(3, batches)
    assert report.outcome == "refused"
    assert f"expert {expert} of {layer}" in report.error
    after = trainees.state()
    for name, (_, array) in before[layer][expert].items():
        assert (after[layer][expert][name][1] == array).all()
    assert made.trainers[0].step == 2


def test_a_loss_that_is_not_finite_is_refused(model: Any) -> None:
    made = cluster(model, loss=lambda model, batch: model(**batch).loss * float("nan"))
    (report,) = made.train(1, batches)
    assert (report.outcome, made.trainers[0].step) == ("refused", 0)
    assert "loss of step 1 is nan" in report.error
