"""`ray-moe export`: from a checkpoint of training to a folder that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from ray_moe.cli.commands import commands
from ray_moe.models.huggingface import Checkpoint
from ray_moe.training.checkpoints import BACKBONE, Draft
from ray_moe.training.manifest import Stamp, fingerprint
from ray_moe.training.shards import AsyncWriter
from tests import tiny_models


def run(*arguments: object) -> Result:
    return CliRunner().invoke(commands, ["export", *map(str, arguments)])


def train(model: Path, root: Path, step: int, trained: Mapping[str, torch.Tensor] | None = None) -> Path:
    """A checkpoint in which every expert's weights are -`step` times what they were, and the backbone is `trained`."""
    checkpoint = Checkpoint.open(model)
    layers = {path: spec.num_experts for path, spec in checkpoint.layers.items()}
    draft = Draft(root, Stamp("run", step, str(model)), layers, fingerprint(checkpoint.files.config))
    writer = AsyncWriter("expert-0")
    states = {}
    for path, number in layers.items():
        stacks = checkpoint.load_experts({path: range(number)})[path].state_dict()
        for expert in range(number):
            masters = {f"master.{name}": -step * stack[expert].float() for name, stack in stacks.items()}
            moments = {f"exp_avg.{name}": torch.zeros_like(stack[expert]) for name, stack in stacks.items()}
            states[path, expert] = {**masters, **moments, "step": torch.tensor(float(step))}
    writer.save(draft.folder, draft.stamp, states.items(), {BACKBONE: trained or {}})
    folder = draft.commit(writer.wait())
    writer.close()
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_models.save("mixtral", tmp_path / "model", torch.bfloat16, tie_word_embeddings=True)
    tiny_models.save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return state


def test_the_latest_step_becomes_a_checkpoint_of_the_model(model: Path, tmp_path: Path) -> None:
    train(model, tmp_path / "run", 1)
    embeddings = torch.full((96, 32), 0.25)
    train(model, tmp_path / "run", 2, {"model.embed_tokens.weight": embeddings})
    result = run(tmp_path / "run", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'out'}: step 2 of {model}, ")
    assert "writing: " in result.stderr
    before, after = weights(model), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if ".experts." in name:
            assert torch.equal(after[name], -2 * tensor), name
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(after[name], embeddings.bfloat16()), name
        else:
            assert torch.equal(after[name], tensor), name
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("family", ["gpt_oss", "dbrx", "deepseek_v3"])
def test_other_layouts_and_a_chosen_step(family: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_models.save(family, model)
    step = train(model, tmp_path / "run", 1)
    train(model, tmp_path / "run", 2)
    assert run(step, tmp_path / "out").exit_code == 0
    before, after = weights(model), weights(tmp_path / "out")
    routed = [name for name in before if ".experts." in name and "shared" not in name]
    assert routed
    assert all(torch.equal(after[name], -before[name] if name in routed else before[name]) for name in before)


def test_another_dtype_and_a_model_that_has_moved(model: Path, tmp_path: Path) -> None:
    train(model, tmp_path / "run", 3)
    moved = model.rename(tmp_path / "moved")
    result = run(tmp_path / "run", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"error: the training began with {model}: there is no directory" in result.stderr
    assert "Say where it is with --model" in result.stderr
    result = run(tmp_path / "run", tmp_path / "out", "--model", moved, "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    assert Checkpoint.open(tmp_path / "out").dtype == torch.float32
    before, after = weights(moved), weights(tmp_path / "out")
    assert all(torch.equal(after[name], -3 * before[name].float()) for name in before if ".experts." in name)


def test_a_checkpoint_is_replaced_only_by_force(model: Path, tmp_path: Path) -> None:
    train(model, tmp_path / "run", 1)
    assert run(tmp_path / "run", tmp_path / "out").exit_code == 0
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    train(model, tmp_path / "run", 2)
    result = run(tmp_path / "run", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "there is a checkpoint in" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
    assert run(tmp_path / "run", tmp_path / "out", "--force").exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != first


def test_wrong_input_is_one_line_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    step = train(model, tmp_path / "run", 1)
    tiny_models.save("mixtral", tmp_path / "wider", hidden_size=64)
    wrong: list[tuple[tuple[object, ...], str]] = [
        ((tmp_path / "nowhere",), "there is no folder"),
        ((model,), "is no checkpoint of training: it has no manifest.json"),
        ((step, "--dtype", "int4"), "--dtype is 'int4'; expected one of float32, bfloat16, float16"),
        ((step, "--model", tmp_path / "wider"), "is a model of another shape"),
    ]
    for (checkpoint, *options), said in wrong:
        result = run(checkpoint, tmp_path / "out", *options)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert said in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run", "wider"]


def test_a_damaged_checkpoint_is_named_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    step = train(model, tmp_path / "run", 1)
    shard = step / "experts" / "expert-0-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    result = run(step, tmp_path / "out")
    assert (result.exit_code, f"error: {shard} is damaged: its content" in result.stderr) == (2, True)
    manifest = step / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "step": 5}))
    result = run(step, tmp_path / "out")
    assert (result.exit_code, f"error: {manifest} is damaged" in result.stderr) == (2, True)
    assert not (tmp_path / "out").exists()
