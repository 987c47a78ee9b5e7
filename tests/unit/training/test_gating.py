"""Gates and methods from a training configuration: what one process learns, what may be written, what is loaded."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_moe import load_trained
from ray_moe.actors.training import gate_choice, make_backbone, method_settings, optimizer_settings, step_settings
from ray_moe.config_train import TrainConfig
from ray_moe.errors import InvalidConfig
from ray_moe.models.experts import experts_modules
from ray_moe.models.gates import replace_gates, routings, tell_ids
from ray_moe.models.huggingface import Checkpoint
from ray_moe.models.lora import whole_state
from ray_moe.training.archive import DiskArchive
from ray_moe.training.auxiliary import LossWithAuxiliary
from ray_moe.training.dispatcher import TrainingDispatcher
from ray_moe.training.export import export_running, export_trained, find
from ray_moe.training.gating import check_writable, make_methods
from ray_moe.training.manifest import fingerprint
from ray_moe.training.reports import StepReport
from ray_moe.training.trainer import Trainer, causal_lm_loss
from tests.tiny_models import save
from tests.training_cluster import Cluster

STEPS, LR = 4, 1e-2
IDS = torch.arange(3, 27).view(2, 12)


def batches(step: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 96, (2, 2, 9), generator=torch.Generator().manual_seed(step))
    return [{"input_ids": each, "labels": each} for each in ids]


class Run:
    """A worker as `actors/training.py` makes one of a configuration, and two hosts in this process."""

    def __init__(self, family: str, folder: Path, train: dict[str, Any]) -> None:
        self.train = TrainConfig.model_validate({"optimizer": {"lr": LR}, "clip_norm": None, **train})
        self.folder = folder
        if not (folder / "model").exists():
            save(family, folder / "model")
        self.checkpoint = Checkpoint.open(str(folder / "model"))
        self.archive = DiskArchive(
            folder / "saved",
            "run",
            self.checkpoint.name,
            fingerprint(self.checkpoint.files.config),
            {path: layer.num_experts for path, layer in self.checkpoint.layers.items()},
            gate=gate_choice(self.train),
        )
        settings = step_settings(self.train)
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        cluster = Cluster(model, 2, optimizer=optimizer_settings(self.train), settings=settings)
        dispatcher = TrainingDispatcher(cluster.transport)
        backbone = make_backbone(self.checkpoint, self.train, dispatcher, "cpu")
        methods = make_methods(backbone, method_settings(self.train))
        coefficients = self.train.auxiliary.coefficients
        self.trainer = Trainer(
            backbone,
            dispatcher,
            optimizer_settings(self.train),
            coordinator=cluster.coordinator(self.archive),
            settings=settings,
            loss=LossWithAuxiliary(backbone, coefficients) if coefficients else causal_lm_loss,
            prepare=methods.apply if methods is not None else lambda step: None,
        )
        self.trainer.start()

    @property
    def model(self) -> Any:
        return self.trainer.model

    def steps(self, number: int = STEPS) -> list[StepReport]:
        return [self.trainer.make_step(batches) for _ in range(number)]

    def save(self) -> None:
        self.trainer.save()
        assert self.trainer.finish_save() is not None

    def logits(self) -> torch.Tensor:
        """With the experts on the hosts, in evaluation mode."""
        self.trainer.begin()
        out: torch.Tensor = self.trainer.evaluate(lambda model: logits(model))
        return out

    def publish(self, name: str) -> Path:
        coordinator = self.trainer.coordinator
        assert coordinator is not None
        state = whole_state(self.trainer.model)
        return export_running(self.checkpoint, self.folder / name, 1, state, coordinator.weights, ())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS).logits
    return out


def in_one_process(run: Run, losses: Sequence[str] = ()) -> list[float]:
    """The losses of the same steps with `replace_gates`, autograd and AdamW alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(run.folder / "model").train()
    for module in experts_modules(model).values():
        module.requires_grad_(True)
    choice = gate_choice(run.train)
    assert choice is not None
    replace_gates(model, choice)
    tell_ids(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    told = []
    for step in range(1, STEPS + 1):
        values = []
        for batch in batches(step):
            loss = model(**batch).loss
            for routing in routings(model).values():
                loss = loss + sum(0.1 * routing.losses[name] for name in losses)
            values.append(loss)
        mean = torch.stack(values).mean()
        optimizer.zero_grad()
        mean.backward()
        for parameter in model.parameters():  # as experts without rows are stepped
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        told.append(mean.item())
    return told


@pytest.mark.parametrize(
    ("family", "gate", "losses"),
    [
        ("mixtral", {"name": "sigmoid", "scale": 1.5}, []),
        ("mixtral", {"name": "dynamic_k", "threshold": 0.6}, ["entropy"]),
        ("qwen3_moe", "expert_choice", []),
        ("olmoe", "hash", []),
        ("deepseek_v3", {"name": "hierarchical", "top_groups": 2, "top_k": 2}, []),
    ],
)
def test_a_gate_of_the_configuration_learns_as_in_one_process(
    family: str, gate: Any, losses: list[str], tmp_path: Path
) -> None:
    run = Run(family, tmp_path, {"gate": gate, "auxiliary": dict.fromkeys(losses, 0.1)})
    assert [report.loss for report in run.steps()] == pytest.approx(in_one_process(run, losses), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "gate"),
    [
        ("mixtral", "noisy_topk"),
        ("qwen3_moe", "topk"),
        ("deepseek_v3", {"name": "sigmoid", "num_groups": 4, "top_groups": 2, "scale": 2.5}),
    ],
)
def test_what_the_familys_routers_compute_is_written_as_an_ordinary_checkpoint(
    family: str, gate: Any, tmp_path: Path
) -> None:
    run = Run(family, tmp_path, {"gate": gate, "auxiliary": {"load": 0.1} if gate == "noisy_topk" else {}})
    before = copy.deepcopy(dict(run.model.named_parameters()))
    run.steps()
    run.save()
    assert all(not torch.equal(p, before[name]) for name, p in run.model.named_parameters() if ".gate." in name)
    expected = run.logits()
    for written in (
        export_trained(find(tmp_path / "saved"), run.checkpoint, tmp_path / "trained"),
        run.publish("published"),
    ):
        trained = AutoModelForCausalLM.from_pretrained(written)
        torch.testing.assert_close(logits(trained), expected, rtol=1e-4, atol=1e-4)
        run.checkpoint.check_same_architecture(Checkpoint.open(str(written)))
    torch.testing.assert_close(logits(load_trained(tmp_path / "saved")), expected, rtol=1e-4, atol=1e-4)


def test_what_they_do_not_compute_is_kept_for_training_and_python_alone(tmp_path: Path) -> None:
    run = Run("mixtral", tmp_path, {"gate": {"name": "gumbel", "anneal_steps": 3}})
    run.steps()
    run.save()
    expected = run.logits()
    with pytest.raises(InvalidConfig, match=r"gumbel\(anneal_steps=3\) is not what the routers of a mixtral model"):
        export_trained(find(tmp_path / "saved"), run.checkpoint, tmp_path / "trained")
    assert not (tmp_path / "trained").exists()
    with pytest.raises(InvalidConfig, match="cannot be published or exported"):
        check_writable(run.checkpoint, gate_choice(run.train))
    again = load_trained(tmp_path / "saved")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), expected, atol=1e-3)
    gates: list[Any] = [module for module in again.modules() if hasattr(module, "anneal")]
    gate = gates[0]
    assert gate.settings.temperature_at(STEPS - 1) == gate.settings.final_temperature


def test_a_run_that_is_taken_up_again_has_its_gate(tmp_path: Path) -> None:
    train = {"gate": {"name": "dynamic_k", "threshold": 0.6}}
    whole = [report.loss for report in Run("mixtral", tmp_path / "whole", train).steps()]
    first = Run("mixtral", tmp_path, train)
    told = [report.loss for report in first.steps(2)]
    first.save()
    again = Run("mixtral", tmp_path, train)
    assert again.trainer.step == 2
    assert told + [report.loss for report in again.steps(2)] == pytest.approx(whole, rel=1e-6)


def test_adapters_leave_the_gate_to_learn(tmp_path: Path) -> None:
    run = Run("mixtral", tmp_path, {"gate": "sigmoid", "lora": {"rank": 2}})
    before = copy.deepcopy(dict(run.model.named_parameters()))
    run.steps(2)
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in changed if ".lora_" not in name} == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)
    }


def test_a_loss_that_the_gate_does_not_tell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="entropy is not a loss of the gate 'noisy_topk', which has load"):
        Run("mixtral", tmp_path, {"gate": "noisy_topk", "auxiliary": {"entropy": 0.1}})
    with pytest.raises(InvalidConfig, match="which has none of its own"):
        Run("mixtral", tmp_path, {"gate": "topk", "auxiliary": {"load": 0.1}})


# --- Methods -------------------------------------------------------------------------------------------------
def slots(report: StepReport) -> list[int]:
    """Choices that went to some expert, by layer."""
    return [sum(counts) for counts in report.tokens_per_expert.values()]


TOKENS = 2 * 2 * 9
"""Of a step."""


def test_a_curriculum_ends_at_the_models_own_number(tmp_path: Path) -> None:
    run = Run("mixtral", tmp_path, {"methods": {"active_experts": {"first": 4, "steps": 2}}})
    assert [slots(report) for report in run.steps()] == [[TOKENS * k] * 2 for k in (4, 3, 2, 2)]
    assert run.model.model.layers[0].mlp.gate.top_k == 2
    with pytest.raises(InvalidConfig, match="one number of experts for each token"):
        Run("mixtral", tmp_path, {"gate": "dynamic_k", "methods": {"active_experts": {"first": 1}}})


@pytest.mark.parametrize("in_flight", [1, 2])
def test_gates_learn_between_the_steps_that_are_told(in_flight: int, tmp_path: Path) -> None:
    freeze = {"before": 1, "after": 3}
    run = Run("mixtral", tmp_path, {"methods": {"freeze_gate": freeze}, "in_flight": in_flight})
    gate, states = run.model.model.layers[1].mlp.gate.weight, []
    for _ in range(STEPS):
        states.append(gate.detach().clone())
        (report,) = run.steps(1)
        assert report.outcome == "made"
    states.append(gate.detach().clone())
    assert [torch.equal(a, b) for a, b in itertools.pairwise(states)] == [True, False, False, True]


def test_random_routing_and_dropout_are_of_training_alone(tmp_path: Path) -> None:
    plain = Run("mixtral", tmp_path, {})
    methods = {"random_routing": 1, "expert_dropout": 0.5}
    run = Run("mixtral", tmp_path, {"methods": methods})
    torch.testing.assert_close(run.logits(), plain.logits(), rtol=0, atol=0)
    first, second = run.steps(2)
    assert first.loss != plain.steps(1)[0].loss
    for report in (first, second):
        used = [sum(count > 0 for count in counts) for counts in report.tokens_per_expert.values()]
        assert report.num_dropped == 2 * 2 * TOKENS - sum(slots(report)) > 0
        assert min(used) < 6
    again = Run("mixtral", tmp_path / "again", {"methods": methods})
    assert again.steps(2)[1].loss == second.loss


def test_a_capacity_drops_and_counts(tmp_path: Path) -> None:
    run = Run("mixtral", tmp_path, {"methods": {"capacity": {"factor": 1.0}}})
    (report,) = run.steps(1)
    room = 2 * (TOKENS // 2 * 2 // 6)  # of two micro-batches
    assert max(count for counts in report.tokens_per_expert.values() for count in counts) <= room
    assert report.num_dropped == 2 * 2 * TOKENS - sum(slots(report)) > 0
    moved = Run("mixtral", tmp_path, {"methods": {"capacity": {"factor": 1.0, "policy": "next"}}})
    assert moved.steps(1)[0].num_dropped == 0


def test_dropped_choices_keep_a_gates_own_losses(tmp_path: Path) -> None:
    train = {"gate": "noisy_topk", "auxiliary": {"load": 0.1}, "methods": {"capacity": {"factor": 0.5}}}
    (report,) = Run("mixtral", tmp_path, train).steps(1)
    assert report.outcome == "made" and report.num_dropped > 0
