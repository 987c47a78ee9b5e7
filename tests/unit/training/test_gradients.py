"""Gradients in few bits a number: how few bytes travel, what is learned from them, and steps that are made again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ray_moe.errors import HostLost, InvalidConfig, StepInterrupted, StepRefused, WireError
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.training.gradients import BACKBONE_BITS, EXPERT_BITS, GradientCompressor, expand, join, split
from ray_moe.training.reports import StepReport
from ray_moe.training.settings import GradientCompression, StepSettings
from tests.tiny_models import build
from tests.training_cluster import Cluster
from tests.training_traffic import Gradients

ONE_BIT = StepSettings(num_replicas=2, gradient_compression="1bit")


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral")


def batches(step: int, rank: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that count up: there is something to learn."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(3, 60, (8, 1), generator=generator) + torch.arange(12)
    return [{"input_ids": ids, "labels": ids}]


def cluster(model: Any, settings: StepSettings, num_workers: int = 2, **others: Any) -> Cluster:
    made = Cluster(model, 2, num_workers, optimizer=OptimizerSettings(lr=3e-3), settings=settings, **others)
    made.start()
    return made


def losses(reports: Sequence[StepReport]) -> list[float]:
    made = {report.step: report.loss for report in reports if report.outcome == "made"}
    return [made[step] for step in sorted(made)]


def noisy_batches(step: int, rank: int) -> list[dict[str, torch.Tensor]]:
    """Twelve tokens in a circle, half of them replaced by any: the loss has a floor that a short run gets to."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = 3 + (torch.randint(0, 12, (8, 1), generator=generator) + torch.arange(12)) % 12
    is_noise = torch.rand(ids.shape, generator=generator) < 0.5
    ids = torch.where(is_noise, torch.randint(3, 15, ids.shape, generator=generator), ids)
    return [{"input_ids": ids, "labels": ids}]


def test_the_loss_ends_within_a_percent_and_few_bytes_travel(model: Any) -> None:
    num_steps, last, traffic = 100, {}, {}
    for compression in ("none", "1bit"):
        settings = StepSettings(num_replicas=2, gradient_compression=compression, snapshot_every=0)
        made = cluster(model, settings, schedule=lambda step: 0.005 * (1 + math.cos(math.pi * (step - 1) / num_steps)))
        traffic[compression] = Gradients(made)
        curve = losses(made.train(num_steps, noisy_batches))
        last[compression] = sum(curve[-10:]) / 10
    assert traffic["none"].replicas / traffic["1bit"].replicas > 16 / EXPERT_BITS
    assert traffic["none"].workers / traffic["1bit"].workers > 24 / BACKBONE_BITS
    assert last["none"] < 0.6 * curve[0]
    assert last["1bit"] == pytest.approx(last["none"], rel=0.01)


def test_all_workers_and_replicas_have_the_same_weights(model: Any) -> None:
    made = cluster(model, ONE_BIT)
    made.train(3, batches)
    one, other = (trainer.state() for trainer in made.trainers)
    assert all(torch.equal(one[name], other[name]) for name in one)
    held = next(iter(made.trainees.values())).report().held
    here, there = (trainees.weights(held) for trainees in made.trainees.values())
    for layer, experts in held.items():
        for expert in experts:
            for name, (_, array) in here[layer][expert].items():
                assert (array == there[layer][expert][name][1]).all()


def test_gradients_of_the_first_steps_travel_whole(model: Any) -> None:
    curve, first, after = {}, {}, {}
    ways: list[tuple[GradientCompression, int]] = [("none", 0), ("1bit", 3), ("1bit", 0)]
    for compression, warmup in ways:
        settings = StepSettings(num_replicas=2, gradient_compression=compression, compression_warmup_steps=warmup)
        made = cluster(model, settings, 2)
        traffic = Gradients(made)
        curve[warmup or compression] = losses(made.train(3, batches))
        first[warmup or compression] = traffic.replicas + traffic.workers
        curve[warmup or compression] += losses(made.train(6, batches))
        after[warmup or compression] = traffic.replicas + traffic.workers - first[warmup or compression]
    assert first[3] == first["none"]
    assert after[3] < after["none"] / 8
    # Step 4 begins with weights that were made of whole gradients.
    assert curve[3][:4] == pytest.approx(curve["none"][:4], rel=1e-5)
    assert curve["1bit"][1:4] != pytest.approx(curve["none"][1:4], rel=1e-5)
    with pytest.raises(InvalidConfig, match="compression_warmup_steps"):
        StepSettings(compression_warmup_steps=-1)


@pytest.mark.parametrize("method", ["sums", "apply", "weights"])
@pytest.mark.parametrize(("snapshot_every", "warmup"), [(1, 0), (3, 0), (3, 4), (1, 5)])
def test_steps_that_are_made_again_leave_out_the_same_again(
    model: Any, method: str, snapshot_every: int, warmup: int
) -> None:
    settings = StepSettings(
        num_replicas=2,
        gradient_compression="1bit",
        compression_warmup_steps=warmup,
        snapshot_every=snapshot_every,
    )
    calm = losses(cluster(model, settings, 1).train(8, batches))
    made = cluster(model, settings, 1)
    order, seen = made.control.order, [0]

    def failing(host_id: str, name: str, *arguments: Any) -> Any:
        if name == method:
            seen[0] += 1
            if seen[0] == 12:  # of two hosts: in the sixth step
                return HostLost("for once")
        return order(host_id, name, *arguments)

    made.control.order = failing  # type: ignore[assignment, method-assign]
    reports = made.train(8, batches)
    assert "interrupted" in [report.outcome for report in reports]
    assert losses(reports) == calm


def test_workers_that_go_back_leave_out_the_same_again(model: Any) -> None:
    settings = StepSettings(gradient_compression="1bit", snapshot_every=2)
    calm = cluster(model, settings)
    calm.train(8, batches)
    made = cluster(model, settings)
    commit, seen = made.trainers[0].coordinator.commit, [0]  # type: ignore[union-attr]

    def failing(*arguments: Any) -> Any:
        seen[0] += 1
        if seen[0] == 6:
            raise StepInterrupted("for once")
        return commit(*arguments)

    made.trainers[0].coordinator.commit = failing  # type: ignore[method-assign, union-attr]
    assert "interrupted" in [report.outcome for report in made.train(8, batches)]
    for one, other in zip(calm.trainers, made.trainers, strict=True):
        theirs = other.state()
        # The hosts add up what two workers send in the order in which it comes.
        assert all(torch.allclose(tensor, theirs[name], atol=1e-6) for name, tensor in one.state().items())


def test_a_gradient_that_is_not_finite_is_refused_and_nothing_changes(model: Any) -> None:
    made = cluster(model, StepSettings(gradient_compression="1bit"))
    made.train(2, batches)
    before = made.trainers[0].state()
    parameter = next(iter(made.trainers[1].model.parameters()))
    hook = parameter.register_hook(lambda grad: grad * float("nan"))
    (report,) = made.train(3, batches)
    assert report.outcome == "refused"
    assert "not finite" in report.error
    after = made.trainers[0].state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    hook.remove()
    assert made.train(3, batches)[-1].outcome == "made"


def test_a_host_that_is_lost_takes_only_what_it_had_not_sent(model: Any) -> None:
    calm = losses(cluster(model, ONE_BIT).train(20, batches))
    made = cluster(model, ONE_BIT)
    made.train(10, batches)
    made.kill("expert-1")
    made.revive("expert-1")
    reports = made.train(20, batches)
    assert losses(reports)[-1] == pytest.approx(calm[-1], rel=0.02)


@pytest.mark.parametrize("num_bits", [EXPERT_BITS, BACKBONE_BITS])
def test_many_gradients_travel_as_two_tensors(num_bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = {"a": torch.randn(3, 300, generator=generator), "b": torch.randn(5, generator=generator)}
    small = GradientCompressor(num_bits).compress(grads)
    arrived = expand(split(*join(small), grads, num_bits), grads, num_bits)
    assert {name: tensor.shape for name, tensor in arrived.items()} == {"a": (3, 300), "b": (5,)}
    assert all(torch.equal(tensor, expand(small, grads, num_bits)[name]) for name, tensor in arrived.items())
    with pytest.raises(WireError, match="another size"):
        split(*join(small), {"a": grads["a"]}, num_bits)


@pytest.mark.parametrize(
    "tensors",
    [
        {"codes.w": torch.zeros(1, dtype=torch.uint8)},
        {"codes.v": torch.zeros(1, dtype=torch.uint8), "scale.v": torch.ones(1, dtype=torch.uint8)},
        {"codes.w": torch.zeros(9, dtype=torch.uint8), "scale.w": torch.ones(1, dtype=torch.uint8)},
        {"v": torch.zeros(8)},
    ],
)
def test_what_belongs_to_no_gradient_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(WireError):
        expand(tensors, {"w": torch.zeros(8)}, 1)


def test_what_was_left_out_counts_from_when_the_step_is_made() -> None:
    compressor, grads = GradientCompressor(1), {"w": torch.randn(16, 16, generator=torch.Generator().manual_seed(0))}
    first = compressor.compress(grads, "x/")
    compressor.restore()
    again = compressor.compress(grads, "x/")
    assert all(torch.equal(first[name], again[name]) for name in first)
    compressor.keep(["x/w"])
    assert compressor.residuals.keys() == {"x/w"}
    after = compressor.compress(grads, "x/")
    assert not torch.equal(after["codes.w"], first["codes.w"])
    with pytest.raises(StepRefused, match="not finite"):
        compressor.compress({"w": torch.full((16, 16), float("inf"))}, "x/")
    compressor.keep([])
    assert not compressor.residuals
