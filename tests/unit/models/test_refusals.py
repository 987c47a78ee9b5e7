"""What is not a checkpoint, or cannot be served, is refused before it is loaded, with the reason and a way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    NllbMoeConfig,
    SwitchTransformersConfig,
    T5Config,
    ViTConfig,
)

from ray_moe.errors import InvalidCheckpoint, NotFound, RayMoEError, UnsupportedModel
from ray_moe.models.huggingface import Checkpoint
from tests import tiny_models

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint of one file."""
    tiny_models.save("mixtral", tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A sound checkpoint of several files and an index."""
    tiny_models.build("mixtral").save_pretrained(tmp_path, max_shard_size="60KB")
    return tmp_path


def refusal(model: str | Path, error: type[RayMoEError]) -> str:
    with pytest.raises(error) as caught:
        Checkpoint.open(str(model))
    assert type(caught.value) is error
    return caught.value.message


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# --- No checkpoint -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_directory_that_does_not_exist(name: str) -> None:
    assert "there is no directory" in refusal(name, NotFound)


def test_a_name_the_hub_cannot_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal("nobody/no-such-model", NotFound)
    assert "neither a directory nor a model" in message
    assert "HF_TOKEN" in message


def test_a_name_that_no_model_can_have() -> None:
    assert "neither a directory nor a model" in refusal("not a name!", NotFound)


def test_a_file_instead_of_its_folder(folder: Path) -> None:
    assert "Name the folder" in refusal(folder / WEIGHTS, InvalidCheckpoint)


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    message = refusal(tmp_path, InvalidCheckpoint)
    assert "is not a checkpoint" in message
    assert "config.json" in message


@pytest.mark.parametrize("text", ["", "{", "nonsense", "[1, 2]", "\x00"])
def test_a_configuration_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "JSON" in refusal(folder, InvalidCheckpoint)


def test_a_configuration_with_a_wrong_value(folder: Path) -> None:
    change_json(folder / "config.json", hidden_size="wide")
    message = refusal(folder, InvalidCheckpoint)
    assert "hidden_size" in message
    assert "wide" in message


# --- Models that cannot be served ----------------------------------------------------------------------------------
def test_no_model_type(folder: Path) -> None:
    change_json(folder / "config.json", model_type=None)
    assert "model_type" in refusal(folder, InvalidCheckpoint)


def test_an_unknown_model_type_names_the_nearest(folder: Path) -> None:
    change_json(folder / "config.json", model_type="mixtrall")
    message = refusal(folder, UnsupportedModel)
    assert "'mixtrall'" in message
    assert "'mixtral'" in message


def test_code_of_the_checkpoint_is_never_run(folder: Path) -> None:
    (folder / "configuration_mine.py").write_text("raise SystemExit('this must not run')")
    change_json(folder / "config.json", model_type="zzz_mine", auto_map={"AutoConfig": "configuration_mine.MineConfig"})
    assert "never run" in refusal(folder, UnsupportedModel)


def test_a_dense_model_may_be_upcycled(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    message = refusal(tmp_path, UnsupportedModel)
    assert "dense" in message
    assert "upcycle" in message


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "encoder-decoder"),
        (SwitchTransformersConfig(), "encoder-decoder"),
        (NllbMoeConfig(), "only the first two experts"),
        (ViTConfig(dtype="float32"), "no model that generates text"),
        (BertConfig(is_decoder=True, dtype="float32"), "dense"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_families_that_do_not_fit(tmp_path: Path, config: Any, reason: str) -> None:
    config.save_pretrained(tmp_path)
    assert reason in refusal(tmp_path, UnsupportedModel)


def test_what_transformers_cannot_build_is_refused_with_its_reason(tmp_path: Path) -> None:
    tiny_models.save("dbrx", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["attn_config"]["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "rope_theta" in refusal(tmp_path, UnsupportedModel)


def test_a_quantisation_that_cannot_be_undone(folder: Path) -> None:
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    message = refusal(folder, UnsupportedModel)
    assert "'gptq'" in message
    assert "unquantised" in message


# --- Weights -------------------------------------------------------------------------------------------------------
def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "has no weights" in refusal(folder, InvalidCheckpoint)


def test_weights_under_a_name_of_their_own(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")
    assert "consolidated.safetensors" in refusal(folder, InvalidCheckpoint)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_to_be_converted(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    message = refusal(folder, InvalidCheckpoint)
    assert name in message
    assert "save_pretrained" in message


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00007.safetensors").unlink(missing_ok=False)
    assert "model-00002-of-00007.safetensors" in refusal(sharded, InvalidCheckpoint)


@pytest.mark.parametrize("lost_bytes", [1, 1000])
def test_a_truncated_file(sharded: Path, lost_bytes: int) -> None:
    path = sharded / "model-00003-of-00007.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost_bytes])
    message = refusal(sharded, InvalidCheckpoint)
    assert "truncated" in message
    assert str(path) in message
    assert f"{len(whole)} bytes" in message
    assert str(len(whole) - lost_bytes) in message


def test_a_file_that_is_too_long(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes() + b"more")
    assert "too long" in refusal(folder, InvalidCheckpoint)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, (5).to_bytes(8, "little") + b"{oops"])
def test_a_file_that_is_not_safetensors(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    assert WEIGHTS in refusal(folder, InvalidCheckpoint)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 8]},
        {"dtype": "X7", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32"},
        7,
    ],
)
def test_a_header_that_makes_no_sense(folder: Path, entry: Any) -> None:
    header = json.dumps({"lm_head.weight": entry}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    assert WEIGHTS in refusal(folder, InvalidCheckpoint)


def test_a_git_lfs_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    assert "git lfs pull" in refusal(folder, InvalidCheckpoint)


def test_an_index_that_names_tensors_its_files_lack(sharded: Path) -> None:
    path = sharded / INDEX
    index = json.loads(path.read_text())
    weight_map = {**index["weight_map"], "model.layers.9.made_up": "model-00001-of-00007.safetensors"}
    change_json(path, weight_map=weight_map)
    message = refusal(sharded, InvalidCheckpoint)
    assert "disagree" in message
    assert "model.layers.9.made_up" in message


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}])
def test_an_index_without_a_map(sharded: Path, weight_map: Any) -> None:
    change_json(sharded / INDEX, weight_map=weight_map)
    assert "weight_map" in refusal(sharded, InvalidCheckpoint)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_a_backbone_tensor_that_no_file_has(folder: Path, name: str) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(name))
    message = refusal(folder, InvalidCheckpoint)
    assert "lacks 1 tensors" in message
    assert name in message


def test_all_of_a_layers_experts_missing(folder: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name and ".w2." in name]:
            del tensors[name]

    change_tensors(folder, drop)
    message = refusal(folder, InvalidCheckpoint)
    assert "model.layers.1." in message
    assert "down_proj" in message


def test_another_number_of_experts_than_configured(folder: Path) -> None:
    change_json(folder / "config.json", num_local_experts=8)
    message = refusal(folder, InvalidCheckpoint)
    assert "8 experts" in message
    assert "6 experts" in message


@pytest.mark.parametrize(
    ("configured", "found"), [(4, "6 rows"), (3, "the configuration asks for (3,"), (12, "6 rows")]
)
def test_another_number_of_stacked_experts_than_configured(tmp_path: Path, configured: int, found: str) -> None:
    tiny_models.save("gpt_oss", tmp_path)
    change_json(tmp_path / "config.json", num_local_experts=configured)
    assert found in refusal(tmp_path, InvalidCheckpoint)


def test_projections_of_one_expert_that_do_not_fit_together(folder: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name and ".w3." in name]:
            tensors[name] = tensors[name][:, :-1].contiguous()

    change_tensors(folder, narrow)
    message = refusal(folder, InvalidCheckpoint)
    assert "do not make up model.layers.1.mlp.experts.gate_up_proj" in message
    assert "Traceback" not in message


def test_one_expert_of_another_shape(folder: Path) -> None:
    name = next(n for n in load_file(folder / WEIGHTS) if ".layers.0." in n and "experts.2.w1" in n)
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    assert "different shapes" in refusal(folder, InvalidCheckpoint)


@pytest.mark.parametrize(("setting", "value"), [("intermediate_size", 64), ("vocab_size", 128), ("hidden_size", 64)])
def test_weights_of_another_size_than_configured(folder: Path, setting: str, value: int) -> None:
    change_json(folder / "config.json", **{setting: value})
    message = refusal(folder, InvalidCheckpoint)
    assert "shape" in message or "do not make up" in message
