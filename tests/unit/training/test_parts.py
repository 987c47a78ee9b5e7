"""Training with experts in parts: checkpoints that go on with any number of them, and whole experts for everybody."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ray_moe import MoELayer
from ray_moe.errors import InvalidConfig, UnsupportedModel
from ray_moe.models.export import export
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.lora import ExpertAdapters
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.training.archive import DiskArchive
from ray_moe.training.export import export_running, export_trained, find
from ray_moe.training.loop import balancedness
from ray_moe.training.manifest import fingerprint
from ray_moe.training.network import make_trainer, whole_state_dict
from ray_moe.training.settings import ExchangeSettings, StepSettings
from ray_moe.training.trainer import Batch
from tests.tiny_models import save
from tests.training_cluster import Cluster
from tests.unit.training.test_network import Hosts, Network
from tests.unit.training.test_recovery import batches

SAVED, LAST = 3, 6


def run(folder: Path, root: Path | None, num_parts: int, num_hosts: int = 2, **how: Any) -> Cluster:
    """A run on the model in `folder`, from wherever its checkpoints in `root` are."""
    checkpoint = Checkpoint.open(folder)
    layers = {path: spec.num_experts for path, spec in checkpoint.layers.items()}
    archive = None
    if root is not None:
        shape = fingerprint(checkpoint.files.config)
        parts = checkpoint.cut(num_parts).parts
        archive = DiskArchive(root, "run", str(folder), shape, layers, torch.float64, parts=parts)
    cluster = Cluster(
        AutoModelForCausalLM.from_pretrained(folder),
        num_hosts,
        optimizer=OptimizerSettings(lr=3e-3, weight_decay=0.01),
        exchange=ExchangeSettings(num_parts=num_parts),
        archive=archive,
        **how,
    )
    cluster.start()
    return cluster


@pytest.fixture(scope="module", params=["mixtral", "deepseek_v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp(request.param)
    save(request.param, made, torch.float64)  # AdamW makes much of gradients that are zero but for rounding
    return made


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (2, 2)])
def test_a_checkpoint_goes_on_with_another_number_of_parts(
    folder: Path, tmp_path: Path, before: int, after: int
) -> None:
    curve = [report.loss for report in run(folder, None, 1).train(LAST, batches)]
    first = run(folder, tmp_path, before, num_hosts=3)
    losses = [report.loss for report in first.train(SAVED, batches)]
    first.together(lambda trainer: trainer.save())
    first.together(lambda trainer: trainer.finish_save())
    second = run(folder, tmp_path, after)
    assert second.trainers[0].step == SAVED
    for name, stack in second.experts().items():
        assert torch.equal(stack, first.experts()[name])
    losses += [report.loss for report in second.train(LAST, batches)]
    assert losses == pytest.approx(curve, rel=1e-5)


def test_what_is_exported_and_published_has_whole_experts(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    cluster = run(folder, tmp_path / "saved", 2)
    cluster.train(SAVED, batches)
    cluster.together(lambda trainer: trainer.save())
    cluster.together(lambda trainer: trainer.finish_save())
    coordinator, backbone = cluster.trainers[0].coordinator, cluster.trainers[0].model.state_dict()
    assert coordinator is not None
    export_trained(find(tmp_path / "saved"), checkpoint, tmp_path / "trained")
    published = export_running(checkpoint, tmp_path / "published", SAVED, backbone, coordinator.weights, ())
    export(checkpoint, tmp_path / "stacked", backbone, coordinator.layer)
    expected = cluster.experts()
    for written in (tmp_path / "trained", published, tmp_path / "stacked"):
        there = Checkpoint.open(written)
        assert there.layers == checkpoint.layers
        for path, spec in there.layers.items():
            module = there.load_experts({path: range(spec.num_experts)})[path]
            for name, parameter in module.named_parameters():
                assert torch.equal(parameter, expected[f"{path}.{name}"])


def test_a_lost_host_costs_no_step_and_reports_are_of_whole_experts(folder: Path) -> None:
    whole = run(folder, None, 1)
    expected = whole.train(LAST, batches)
    cut = run(folder, None, 2, num_hosts=3, settings=StepSettings(num_replicas=2))
    reports = cut.train(SAVED, batches)
    cut.kill("expert-1")
    reports += [report for report in cut.train(LAST, batches) if report.outcome == "made"]
    assert [report.loss for report in reports] == pytest.approx([report.loss for report in expected], rel=1e-5)
    assert [report.grad_norm for report in reports] == pytest.approx([r.grad_norm for r in expected], rel=1e-4)
    assert reports[0].tokens_per_expert == expected[0].tokens_per_expert
    assert 0 < balancedness(reports[-1].tokens_per_expert, cut.trainers[0].dispatcher.table.placement) <= 1


def test_hosts_that_have_the_run_in_another_number_of_parts_are_told_apart(folder: Path) -> None:
    cluster = run(folder, None, 2)
    cluster.train(1, batches)
    cluster.parts = cluster.parts.__class__()
    with pytest.raises(InvalidConfig, match="each expert in 2 parts, and now it is to be in 1; go on as it was begun"):
        cluster.coordinator().start()


def test_adapters_of_experts_in_parts_are_refused(folder: Path) -> None:
    with pytest.raises(InvalidConfig, match="each part would learn one of its own"):
        run(folder, None, 2, adapters=ExpertAdapters(2, 4.0))


def test_a_network_is_trained_in_parts_and_brought_home_whole() -> None:
    model = nn.Sequential(nn.Linear(3, 8), MoELayer(8, 6, 5, 2, seed=1), MoELayer(8, 12, 4, 2, gated=False, seed=2))
    model = model.double()

    def loss_of(network: nn.Module, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = network(batch["x"]).square().mean()
        return loss

    x = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    trained = []
    for num_parts in (1, 3):
        hosts = Hosts(2)
        trainer = make_trainer(
            copy.deepcopy(model),
            loss_of,
            hosts.control,
            hosts.transport,
            run_id="run",
            optimizer=OptimizerSettings(lr=3e-3),
            exchange=ExchangeSettings(num_parts=num_parts),
        )
        trainer.start()
        losses = [trainer.make_step(lambda step: [{"x": x * step}]).loss for _ in range(4)]
        trained.append((losses, whole_state_dict(trainer)))
    (losses, weights), (losses_in_parts, weights_in_parts) = trained
    assert losses_in_parts == pytest.approx(losses, rel=1e-10)
    assert weights_in_parts.keys() == weights.keys() == model.state_dict().keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(weights_in_parts[name], tensor, rtol=1e-8, atol=1e-10)


def test_a_network_whose_experts_are_no_sum_of_parts_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="num_parts is 0"):
        ExchangeSettings(num_parts=0)
    with pytest.raises(UnsupportedModel, match="they have biases"):
        Hosts(2).trainer(Network(), exchange=ExchangeSettings(num_parts=2))
