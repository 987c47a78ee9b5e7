"""Adapters on the backbone while the experts train on hosts: against one process with `peft`, and merged at the end."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM

from ray_moe.actors.training import make_backbone
from ray_moe.config_train import TrainConfig
from ray_moe.errors import InvalidCheckpoint, InvalidConfig
from ray_moe.models.experts import experts_modules
from ray_moe.models.export import export
from ray_moe.models.huggingface import Checkpoint
from ray_moe.models.lora import add_adapters, whole_state
from ray_moe.ops.lora import ExpertAdapters, is_adapter
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.training.archive import LORA_SCALE, DiskArchive
from ray_moe.training.dispatcher import TrainingDispatcher
from ray_moe.training.export import export_running, export_trained, find
from ray_moe.training.manifest import fingerprint
from ray_moe.training.session import Session
from ray_moe.training.settings import StepSettings
from ray_moe.transport.local import LocalTransport
from tests.tiny_models import save
from tests.training_cluster import Cluster

RANK, ALPHA = 3, 6.0
SETTINGS = OptimizerSettings(lr=1e-2)
STEPS = 6


def batches(step: int, rank: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(10 * step + rank))
    return [{"input_ids": ids, "labels": ids}]


def adapted(folder: Path, rank: int = RANK) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    add_adapters(model, rank, ALPHA, 0.0, ["*self_attn*"])
    return model


def archive_of(checkpoint: Checkpoint, folder: Path) -> DiskArchive:
    return DiskArchive(
        folder,
        "run",
        checkpoint.name,
        fingerprint(checkpoint.files.config),
        {path: layer.num_experts for path, layer in checkpoint.layers.items()},
        constants={LORA_SCALE: torch.tensor(ALPHA / RANK)},
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(torch.arange(3, 20)[None]).logits
    return out


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_adapters_and_experts_learn_as_in_one_process_and_are_exported_merged(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "model")
    model = adapted(tmp_path / "model")
    theirs = copy.deepcopy(model)
    for module in experts_modules(theirs).values():
        module.requires_grad_(True)
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    archive = archive_of(checkpoint, tmp_path / "saved")
    cluster = Cluster(
        model, 2, 2, optimizer=SETTINGS, settings=StepSettings(num_replicas=2, clip_norm=0.5), archive=archive
    )
    cluster.start()
    reports = cluster.train(STEPS, batches)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for report in reports:
        optimizer.zero_grad()
        losses = [theirs(**batch).loss for rank in range(2) for batch in batches(report.step, rank)]
        torch.stack(losses).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        assert report.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
        assert report.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    before = dict(model.named_parameters())
    for path, parameter in cluster.trainers[1].model.named_parameters():
        if ".lora_" in path:
            torch.testing.assert_close(parameter, theirs.get_parameter(path), rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(parameter, before[path])
    cluster.together(lambda trainer: trainer.save())
    cluster.together(lambda trainer: trainer.finish_save())
    export_trained(find(tmp_path / "saved"), checkpoint, tmp_path / "trained")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    torch.testing.assert_close(logits(trained), logits(theirs), rtol=1e-3, atol=1e-4)
    # What is published from a running training is the same.
    state = whole_state(cluster.trainers[0].model)
    coordinator = cluster.trainers[0].coordinator
    assert coordinator is not None
    export(checkpoint, tmp_path / "published", state, coordinator.layer)
    published = AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    assert torch.equal(logits(published), logits(trained))


def peft_experts(folder: Path, cluster: Cluster) -> Any:
    """The model with `peft`'s adapters on attention and experts, which are those of `cluster` before its first step."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=r".*self_attn\.\w+_proj",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    inject_adapter_in_model(config, model)
    backbone = dict(cluster.trainers[0].model.named_parameters())
    owners = {
        (layer, expert): trainees
        for trainees in cluster.trainees.values()
        for layer, experts in trainees.report().owned.items()
        for expert in experts
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
            if "self_attn" in name and ".lora_" in name:
                parameter.copy_(backbone[name])
        for name, module in model.named_modules():
            if type(module).__name__ == "ParamWrapper":
                layer = f"{name.split('.experts')[0]}.experts"
                count = len([None for path, _ in owners if path == layer])
                for expert in range(count):
                    tensors = owners[layer, expert].expert_tensors(layer, expert)
                    down, up = (tensors[f"{module.parameter_name}_lora_{each}"] for each in "AB")
                    module.lora_A["default"].weight.view(count, RANK, -1)[expert] = down
                    module.lora_B["default"].weight.view(-1, RANK, count)[:, :, expert] = up
    return model


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_adapters_of_experts_learn_as_those_of_peft_and_are_exported_merged(name: str, tmp_path: Path) -> None:
    """One of the families has matrices [out, in], the other [in, out] and biases."""
    save(name, tmp_path / "model")
    model = adapted(tmp_path / "model")
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    archive = archive_of(checkpoint, tmp_path / "saved")
    how: dict[str, Any] = {
        "optimizer": SETTINGS,
        "settings": StepSettings(num_replicas=2, clip_norm=0.5),
        "archive": archive,
    }
    cluster = Cluster(model, 2, 2, adapters=ExpertAdapters(RANK, ALPHA), **how)
    cluster.start()
    theirs = peft_experts(tmp_path / "model", cluster)
    frozen = {name: tensor.clone() for name, tensor in cluster.experts().items() if not is_adapter(name)}
    reports = cluster.train(STEPS, batches)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for report in reports:
        optimizer.zero_grad()
        losses = [theirs(**batch).loss for rank in range(2) for batch in batches(report.step, rank)]
        torch.stack(losses).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        assert report.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
        assert report.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    after = cluster.experts()
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    cluster.together(lambda trainer: trainer.save())
    cluster.together(lambda trainer: trainer.finish_save())
    export_trained(find(tmp_path / "saved"), checkpoint, tmp_path / "trained")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    torch.testing.assert_close(logits(trained), logits(theirs), rtol=1e-3, atol=1e-4)
    coordinator = cluster.trainers[0].coordinator
    assert coordinator is not None
    for path in checkpoint.layers:
        for tensor_name, stack in coordinator.layer(path).items():
            torch.testing.assert_close(stack, trained.get_parameter(f"{path}.{tensor_name}"), rtol=1e-5, atol=1e-6)
    # A run that is lost goes on from there with its adapters, on other hosts, and with no others.
    how["archive"] = archive_of(checkpoint, tmp_path / "saved")
    again = Cluster(model, 3, 2, adapters=ExpertAdapters(RANK, ALPHA), **how)
    again.start()
    assert again.trainers[0].step == STEPS
    for tensor_name, stack in again.experts().items():
        torch.testing.assert_close(stack, after[tensor_name])
    for adapters, message in ((None, "train it whole"), (ExpertAdapters(RANK + 1, ALPHA), "rank 3, and 4")):
        with pytest.raises(InvalidConfig, match=message):
            Cluster(model, 3, 1, adapters=adapters, **how).start()


def test_a_host_that_dies_costs_adapters_of_experts_no_step(tmp_path: Path) -> None:
    save("mixtral", tmp_path)
    curves = []
    for dies in (False, True):
        cluster = Cluster(adapted(tmp_path), 3, optimizer=SETTINGS, adapters=ExpertAdapters(RANK, ALPHA))
        cluster.start()
        reports = cluster.train(3, batches)
        if dies:
            cluster.kill("expert-1")
        reports += cluster.train(STEPS, batches)
        curves.append([report.loss for report in reports if report.outcome == "made"])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    assert curves[0][-1] != curves[0][0]


def test_what_a_session_gives_to_be_served_has_the_adapters_in_it(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "model")
    cluster = Cluster(adapted(tmp_path / "model"), 2, optimizer=SETTINGS, adapters=ExpertAdapters(RANK, ALPHA))
    session = Session(cluster.trainers[0])
    session.start()
    cluster.train(2, batches)
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    _, folder = session.weights(
        lambda step, backbone, weights: export_running(checkpoint, tmp_path, step, backbone, weights, ())
    )
    with torch.no_grad():
        trainer = cluster.trainers[0]
        trainer.begin()
        wanted = trainer.evaluate(lambda model: model(torch.arange(3, 20)[None]).logits)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), wanted, rtol=1e-4, atol=1e-5)


def test_a_run_begun_with_another_rank_or_without_adapters_is_not_gone_on_with(tmp_path: Path) -> None:
    save("mixtral", tmp_path)
    first = Cluster(adapted(tmp_path), optimizer=SETTINGS)
    first.start()
    first.train(1, batches)
    for other, message in ((adapted(tmp_path, rank=5), r"as \[3, .*here it is \[5"), (None, "has not trained")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path) if other is None else other
        again = Cluster(model, optimizer=SETTINGS)
        again.control, again.trainees = first.control, first.trainees
        again.trainers[0].coordinator = first.coordinator()
        with pytest.raises(InvalidCheckpoint, match=message):
            again.start()


def backbone(folder: Path, **train: Any) -> torch.nn.Module:
    dispatcher = TrainingDispatcher(LocalTransport({}))
    return make_backbone(Checkpoint.open(str(folder)), TrainConfig.model_validate(train), dispatcher, "cpu")


def test_with_the_setting_only_adapters_are_trained_and_all_workers_begin_with_the_same(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path)
    one, two = (backbone(tmp_path, lora={"rank": 2, "target_modules": ["*q_proj", "*.v_proj"]}) for _ in range(2))
    trained = {name for name, parameter in one.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == {"q_proj", "v_proj"}
    assert len(trained) == 2 * 2 * 2  # layers, modules, A and B
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_adapted_is_refused(tmp_path: Path) -> None:
    save("mixtral", tmp_path)
    with pytest.raises(InvalidConfig, match=r"names '\*nothing\*'.*there are .*q_proj"):
        backbone(tmp_path, lora={"target_modules": ["*nothing*"]})
    with pytest.raises(ValueError, match="leave it out"):
        TrainConfig.model_validate({"lora": {}, "freeze": ["*norm*"]})


def test_without_peft_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("mixtral", tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InvalidConfig, match=r"ray-moe\[lora\]"):
        backbone(tmp_path, lora={})
