"""Experts that are trained in 8 bits on hosts: the steps of one process, whatever is lost, and what is written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ray_moe import MoELayer
from ray_moe.config import Config
from ray_moe.errors import InvalidConfig
from ray_moe.models.experts import drop_parameters, experts_modules, install
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.experts import unpack
from ray_moe.ops.lora import ExpertAdapters
from ray_moe.ops.optimizers import OptimizerSettings, is_blank
from ray_moe.ops.quantized_training import Int8Training, Rounded, bring_home, train_in_8_bits
from ray_moe.training.archive import DiskArchive
from ray_moe.training.export import export_trained, find
from ray_moe.training.manifest import fingerprint
from ray_moe.training.network import whole_state_dict
from ray_moe.training.rounding import CODES, LOST
from ray_moe.training.settings import ExchangeSettings, StepSettings
from tests.tiny_models import build, save
from tests.training_cluster import Cluster
from tests.unit.ops.architectures.elsewhere import Network, loss_of, regression, trainer_of

ADAM = OptimizerSettings(lr=3e-3, weight_decay=0.1)
UNCLIPPED = StepSettings(clip_norm=None)
AGAIN = ExchangeSettings(recompute=True)
STEPS = 4


def batches(step: int, rank: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(10 * step + rank))
    return [{"input_ids": ids, "labels": ids}]


def cluster(model: nn.Module, compensation: Any = "int8", **options: Any) -> Cluster:
    options = {"optimizer": ADAM, "settings": UNCLIPPED, "exchange": AGAIN, **options}
    made = Cluster(model, rounding=compensation, **options)
    made.start()
    return made


def matrices(made: Cluster) -> dict[str, Rounded]:
    """As their owners have them, by layer, expert and name."""
    return {
        f"{layer}/{expert}/{name}": rounded
        for host in made.trainees.values()
        for layer, here in host._experts.layers.items()
        for expert in here.owned
        for name, rounded in here.rounded[expert].items()
    }


def same(one: Cluster, other: Cluster) -> bool:
    mine, theirs = matrices(one), matrices(other)
    return mine.keys() == theirs.keys() and all(
        torch.equal(a, b)
        for name in mine
        for a, b in (
            (mine[name].small.codes, theirs[name].small.codes),
            (mine[name].small.scale, theirs[name].small.scale),
            (torch.as_tensor(mine[name].lost), torch.as_tensor(theirs[name].lost)),
        )
    )


@pytest.mark.parametrize("compensation", ["none", "int8", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_hosts_make_the_steps_of_one_process(family: str, compensation: Any) -> None:
    """gpt-oss has its matrices transposed, and biases, which stay in float."""
    model: Any = build(family).train()
    made = cluster(model, compensation)
    theirs: Any = build(family).train()
    training = Int8Training(experts_modules(theirs), ADAM, compensation)
    drop_parameters(theirs)
    install(theirs, training)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-3, weight_decay=0.1)
    for report in made.train(STEPS, batches):
        (batch,) = batches(report.step, 0)
        loss = theirs(**batch).loss
        assert report.loss == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        training.step()
    ours, num, moved = matrices(made), 0, 0
    for path, layer in training.layers.items():
        for name, stack in layer.stacks.items():
            for expert in range(layer.num_experts):
                codes = ours[f"{path}/{expert}/{name}"].small.codes
                moved += int((codes.int() - stack.small.codes[expert].int()).abs().clamp(max=2).sum())
                num += codes.numel()
        values = made.trainers[0].coordinator.layer(path)  # type: ignore[union-attr]
        for name, whole in training.weights(path).items():
            torch.testing.assert_close(values[name], whole, rtol=1e-2, atol=1e-3)
    assert moved <= num / 2000  # sums in another order move a code that is all but half way


def test_a_float_run_would_differ_and_take_more_memory() -> None:
    model = build("mixtral").train()
    runs = [cluster(model, compensation) for compensation in ("int8", None)]
    losses = [[report.loss for report in run.train(2, batches)] for run in runs]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    (in_8_bits, in_float) = (sum(rounded_bytes(host) for host in run.trainees.values()) for run in runs)
    assert in_8_bits < 0.55 * in_float  # two bytes a weight, and the scales of these small matrices


def rounded_bytes(host: Any) -> int:
    """Of weights alone, by the host's own account: without the moments and their snapshots."""
    moments = [t for name in host._experts.optimizer.names for t in host._experts.optimizer.in_memory(name)]
    owned = {t.data_ptr(): t.nbytes for t in moments if not is_blank(t) and t.dtype is torch.float32}
    weights = [p for here in host._experts.layers.values() for each in here.experts.values() for p in each.values()]
    masters = {p.data_ptr() for p in weights if not is_blank(p)}
    return host._experts.num_bytes - sum(size for pointer, size in owned.items() if pointer not in masters)


def test_replicas_compute_with_the_owners_codes() -> None:
    model = build("mixtral").train()
    alone = cluster(model).train(STEPS, lambda step, rank: [*batches(step, 0), *batches(step, 1)])
    made = cluster(model, num_workers=2, settings=StepSettings(clip_norm=None, num_replicas=2))
    reports = made.train(STEPS, batches)
    assert [report.loss for report in reports] == pytest.approx([report.loss for report in alone], rel=1e-3)
    first, second = made.trainees.values()
    for layer, here in first._experts.layers.items():
        for expert, small in here.rounded.items():
            for name, rounded in small.items():
                other = second._experts.layers[layer].rounded[expert][name]
                assert torch.equal(rounded.small.codes, other.small.codes)
                assert torch.equal(rounded.small.scale, other.small.scale)
                assert (rounded.lost is None) != (other.lost is None)  # one is the owner


@pytest.mark.parametrize("compensation", ["none", "int8", "bfloat16"])
def test_a_step_that_is_made_again_is_the_same(compensation: Any) -> None:
    model = build("mixtral").train()
    whole, made = cluster(model, compensation), cluster(model, compensation)
    expected = [report.loss for report in whole.train(STEPS, batches)]
    first = made.train(2, batches)
    made.kill("expert-0")
    reports = made.train(STEPS, batches)
    assert [report.outcome for report in reports] == ["interrupted", "made", "made"]
    assert [r.loss for r in (*first, *reports) if r.outcome == "made"] == pytest.approx(expected, rel=1e-6)
    assert same_but_for_order(made, whole)


def same_but_for_order(one: Cluster, other: Cluster) -> bool:
    mine, theirs = matrices_that_live(one), matrices_that_live(other)
    off = sum(int((mine[name].small.codes != theirs[name].small.codes).sum()) for name in theirs)
    return mine.keys() == theirs.keys() and off <= sum(each.small.codes.numel() for each in theirs.values()) / 2000


def matrices_that_live(made: Cluster) -> dict[str, Rounded]:
    gone = set(made.trainees) - set(made.control.local)
    for host in gone:
        made.trainees.pop(host)
    return matrices(made)


def test_a_state_that_comes_back_is_the_one_that_went(tmp_path: Path) -> None:
    made = cluster(build("mixtral").train())
    made.train(2, batches)
    host = next(iter(made.trainees.values()))
    layer, here = next(iter(host._experts.layers.items()))
    expert = min(here.owned)
    before = host.expert_tensors(layer, expert)
    assert {CODES + "down_proj", LOST + "down_proj", "exp_avg.down_proj"} <= before.keys()
    assert "down_proj" not in before  # codes are all there is
    arrays = host.state({layer: [expert]})[layer][expert]
    host.hold(layer, here.module, {expert: unpack(arrays)}, [expert])
    after = host.expert_tensors(layer, expert)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_checkpoints_go_on_in_8_bits_or_in_float_and_are_exported_as_what_was_trained(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "model")
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    layers = {path: layer.num_experts for path, layer in checkpoint.layers.items()}
    mark = fingerprint(checkpoint.files.config)

    def run(compensation: Any) -> Cluster:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").train()
        archive = DiskArchive(tmp_path / "saved", "run", checkpoint.name, mark, layers)
        return cluster(model, compensation, archive=archive)

    first = run("int8")
    first.train(2, batches)
    first.together(lambda trainer: trainer.save())
    first.together(lambda trainer: trainer.finish_save())
    export_trained(find(tmp_path / "saved"), checkpoint, tmp_path / "trained")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    coordinator = first.trainers[0].coordinator
    assert coordinator is not None
    for path, module in experts_modules(trained).items():
        for name, value in coordinator.layer(path).items():
            assert torch.equal(module.get_parameter(name), value)
    again, in_float = run("int8"), run(None)
    assert again.trainers[0].step == in_float.trainers[0].step == 2
    assert same(again, first)
    expected = [report.loss for report in first.train(STEPS, batches)]
    assert [report.loss for report in again.train(STEPS, batches)] == pytest.approx(expected, rel=1e-6)
    assert [report.loss for report in in_float.train(STEPS, batches)] == pytest.approx(expected, rel=1e-2)


def test_a_run_is_not_rounded_in_the_middle() -> None:
    made = cluster(build("mixtral").train())
    made.train(1, batches)
    made.rounding = None
    with pytest.raises(
        InvalidConfig, match=r"begun with experts in 8 bits \(compensation: int8\), and now .* in float"
    ):
        made.coordinator().start()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": OptimizerSettings(offload="cpu")}, "offload is cpu"),
        ({"adapters": ExpertAdapters(2, 4.0, 0)}, "cannot have adapters"),
        ({"exchange": ExchangeSettings(num_parts=2)}, "cannot have 2 parts"),
    ],
)
def test_what_experts_in_8_bits_cannot_have_is_refused(options: Any, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        cluster(build("mixtral"), **options)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"experts": {"tensor": 2}, "train": {"quantization": "int8"}}, "experts.tensor"),
        ({"train": {"quantization": "int8", "lora": {"experts": True}}}, "train.lora.experts"),
        ({"train": {"quantization": "int8", "optimizer": {"offload": "disk"}}}, "train.optimizer.offload"),
        ({"train": {"quantization": "fp8"}}, "'none' or 'int8'"),
    ],
)
def test_a_configuration_cannot_have_it_either(tree: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate(tree)


def test_somebodys_own_network_is_trained_as_train_in_8_bits_does() -> None:
    here = Network(8, MoELayer(8, 6, 5, 2, bias=True, seed=1))
    trainer = trainer_of(copy.deepcopy(here), loss_of, rounding="int8", optimizer=ADAM)
    trainer.start()
    training = train_in_8_bits(here, ADAM, "int8")
    rest = torch.optim.AdamW(here.parameters(), lr=3e-3, weight_decay=0.1)

    def batch(step: int) -> dict[str, torch.Tensor]:
        return {name: tensor.float() for name, tensor in regression(step, 20, 3).items()}

    given = [trainer.make_step(lambda step: [batch(step)]).loss for _ in range(6)]
    wanted = []
    for step in range(1, 7):
        loss = loss_of(here, batch(step))
        wanted.append(loss.item())
        loss.backward()
        rest.step()
        rest.zero_grad()
        training.step()
    assert given == pytest.approx(wanted, rel=1e-4)
    bring_home(here, training)
    home = whole_state_dict(trainer)
    for name, tensor in here.state_dict().items():
        torch.testing.assert_close(home[name], tensor, rtol=2e-2, atol=2e-3)  # a code in 127 at most
