"""Several micro-batches in flight: the same gradients, and the next one computes while the first one waits."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.training.settings import ExchangeSettings, StepSettings
from ray_moe.training.trainer import Trainer
from ray_moe.transport.local import Fault, FaultPlan
from tests.tiny_models import build
from tests.training_cluster import Cluster

NUM_MICRO = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral")


def batches(step: int, rank: int) -> list[dict[str, torch.Tensor]]:
    """Of different lengths, so that they do not end in the order in which they begin."""
    made = []
    for micro in range(NUM_MICRO):
        generator = torch.Generator().manual_seed(100 * step + 10 * rank + micro)
        ids = torch.randint(3, 96, (2, 30 - 7 * micro), generator=generator)
        made.append({"input_ids": ids, "labels": ids})
    return made


def cluster(model: Any, in_flight: int, **others: Any) -> Cluster:
    made = Cluster(
        model,
        optimizer=OptimizerSettings(kind="sgd", lr=0.1),
        settings=StepSettings(in_flight=in_flight, clip_norm=None),
        **others,
    )
    made.start()
    return made


def gradients(trainer: Trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Of the backbone, of one attempt at a step that is not made."""
    assert trainer.coordinator is not None
    trainer.begin()
    share = trainer._share(trainer._accumulate_all(lambda step: batches(step, 0), 1))
    assert share.error is None
    assert sum(share.num_calls.values()) > 0
    grads = {name: parameter.grad for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    return list(share.losses), grads


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("in_flight", [2, 3, 8])
def test_gradients_of_the_backbone_are_the_same_bits(model: Any, in_flight: int, recompute: bool) -> None:
    exchange = ExchangeSettings(recompute=recompute)
    losses, exact = gradients(cluster(model, 1, exchange=exchange).trainers[0])
    made = cluster(model, in_flight, exchange=exchange)
    overlapped, ours = gradients(made.trainers[0])
    assert overlapped == losses
    assert exact.keys() == ours.keys() == dict(made.trainers[0].model.named_parameters()).keys()
    for name, gradient in exact.items():
        assert torch.equal(gradient, ours[name]), name


def test_with_the_experts_alone_to_train_they_learn_the_same(model: Any) -> None:
    """No token needs a gradient then. Hosts add up what arrives as it arrives, so the last bits are free."""
    frozen = build("mixtral")
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(".experts." in name)
    stacks = []
    for in_flight in (1, 2):
        made = cluster(frozen, in_flight)
        before = made.experts()
        assert [report.outcome for report in made.train(2, batches)] == ["made"] * 2
        stacks.append(made.experts())
        assert any(not torch.equal(before[name], stack) for name, stack in stacks[-1].items())
    for name, stack in stacks[0].items():
        torch.testing.assert_close(stacks[1][name], stack, rtol=1e-5, atol=1e-6)


def test_another_micro_batch_computes_while_one_waits_for_its_rows(model: Any) -> None:
    """The first waits for ever until the second has got to the experts too."""
    made = cluster(model, 2)
    both = threading.Barrier(2)
    original = made.trainers[0].dispatcher.rows
    first_layer = next(iter(made.modules))

    def rows(layer: str, *arguments: Any, **named: Any) -> torch.Tensor:
        if layer == first_layer:
            both.wait(30)
        return original(layer, *arguments, **named)

    made.trainers[0].dispatcher.rows = rows  # type: ignore[method-assign]
    (report,) = made.train(1, batches)
    assert report.outcome == "made"


def test_a_host_that_dies_under_two_micro_batches_changes_nothing(model: Any) -> None:
    calm = [report.loss for report in cluster(model, 2, num_hosts=3).train(4, batches)]
    made = cluster(model, 2, num_hosts=3, faults=FaultPlan((Fault("kill", "expert-1", 40),)))
    reports = made.train(4, batches)
    assert "interrupted" in [report.outcome for report in reports]
    assert [report.loss for report in reports if report.outcome == "made"] == pytest.approx(calm, rel=1e-5)


def test_a_loss_that_is_not_finite_is_refused(model: Any) -> None:
    made = cluster(model, 2, loss=lambda model, batch: model(**batch).loss * float("inf"))
    (report,) = made.train(1, batches)
    assert report.outcome == "refused"
    assert "loss of step 1 is inf" in report.error
