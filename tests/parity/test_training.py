"""Training with the experts on hosts, against one process of PyTorch: losses, every gradient, and the curve."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.training.settings import ExchangeSettings, StepSettings
from ray_moe.training.trainer import causal_lm_loss
from tests.tiny_models import build
from tests.training_cluster import Cluster

FAMILIES = ("mixtral", "olmoe", "qwen3_moe", "deepseek_v3")
WAYS = list(itertools.product((1, 2), (1, 3), (1, 2), (False, True)))
"""Workers, hosts, replicas, recompute."""

RATE = 4096.0
"""So large that the gradient is seen in the weights after one step: they are what rounding would be lost in."""


def batches(step: int, rank: int, num_micro: int = 2) -> list[dict[str, torch.Tensor]]:
    made = []
    for micro in range(num_micro):
        generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
        ids = torch.randint(3, 96, (2, 9), generator=generator)
        labels = ids.clone()
        labels[0, :3] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def loss_of(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    device = next(model.parameters()).device
    return causal_lm_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})


def reference_step(model: nn.Module, step: int, num_workers: int) -> float:
    """Gradients of the mean loss over all micro-batches of all workers, in one process."""
    every = [batch for rank in range(num_workers) for batch in batches(step, rank)]
    losses = []
    for batch in every:
        loss = loss_of(model, batch)
        (loss / len(every)).backward()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def compare_step(model: Any, within: float, way: tuple[int, int, int, bool], num_parts: int = 1) -> None:
    """One step of workers and hosts beside one of a single process: the loss, and the gradient of every parameter."""
    num_workers, num_hosts, num_replicas, recompute = way
    theirs = copy.deepcopy(model)
    theirs.set_experts_implementation("eager")  # the default knows no float64
    loss = reference_step(theirs, 1, num_workers)
    cluster = Cluster(
        model,
        num_hosts,
        num_workers,
        optimizer=OptimizerSettings(kind="sgd", lr=RATE),
        settings=StepSettings(num_replicas=num_replicas, clip_norm=None),
        exchange=ExchangeSettings(recompute=recompute, num_parts=num_parts),
        loss=loss_of,
    )
    cluster.start()
    (report,) = cluster.train(1, batches)
    assert report.loss == pytest.approx(loss, rel=within)
    after = dict(cluster.trainers[-1].model.named_parameters()) | cluster.experts()
    for path, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        gradient = (parameter.detach() - after[path].detach()) / RATE
        assert relative(gradient, parameter.grad) < within, (way, num_parts, path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_every_gradient_equal_one_process(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    for way in WAYS:
        compare_step(model, 1e-10 if dtype is torch.float64 else 1e-5, way)


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_in_parts_have_the_loss_and_every_gradient_of_one_process(name: str) -> None:
    model = build(name, torch.float64)
    for way in ((1, 1, 1, False), (2, 2, 1, False), (2, 3, 2, True)):
        for num_parts in (2, 4):
            compare_step(model, 1e-10, way, num_parts)


@pytest.mark.parametrize("name", FAMILIES)
def test_twenty_steps_stay_on_the_curve_of_one_process(name: str) -> None:
    model = build(name, torch.float32)
    settings = OptimizerSettings(lr=3e-3, weight_decay=0.01)
    cluster = Cluster(model, 3, 2, optimizer=settings, settings=StepSettings(num_replicas=2, clip_norm=0.5))
    cluster.start()
    reports = cluster.train(20, batches)
    theirs = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-3, weight_decay=0.01)
    for step, report in zip(range(1, 21), reports, strict=True):
        optimizer.zero_grad()
        loss = reference_step(theirs, step, 2)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        assert report.loss == pytest.approx(loss, rel=1e-5)
        assert report.grad_norm == pytest.approx(float(norm), rel=1e-4)
    ours = dict(cluster.trainers[1].model.named_parameters()) | cluster.experts()
    for path, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours[path].detach(), parameter.detach(), rtol=1e-3, atol=1e-4)
