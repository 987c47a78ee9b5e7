"""A checkpoint: what it says of itself, and loading its backbone, some experts, its tokenizer."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from ray_moe.errors import InvalidCheckpoint, NotFound
from ray_moe.models.checkpoint import Reader
from ray_moe.models.experts import experts_modules, install, make_shard
from ray_moe.models.huggingface import Checkpoint
from ray_moe.types import LayerSpec
from tests import tiny_models

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_models.save("mixtral", tmp_path, torch.bfloat16)
    return tmp_path


def test_what_a_checkpoint_says_of_itself(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.name == str(folder)
    assert checkpoint.model_type == "mixtral"
    assert checkpoint.config.num_local_experts == checkpoint.num_experts == 6
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.max_positions == 256
    assert checkpoint.vocab_size == 96
    # gate, up and down projections of 32 x 48, two bytes each
    assert list(checkpoint.layers.values()) == [
        LayerSpec(path, 6, 32, 32, "bfloat16", 3 * 32 * 48 * 2) for path in (FIRST, SECOND)
    ]
    whole = AutoModelForCausalLM.from_pretrained(folder)
    total = sum(tensor.nbytes for tensor in whole.state_dict().values())
    rotary = sum(buffer.nbytes for buffer in whole.buffers())
    assert checkpoint.expert_bytes == 2 * 6 * 3 * 32 * 48 * 2
    assert checkpoint.backbone_bytes == total - checkpoint.expert_bytes + rotary


@pytest.mark.parametrize("family", ["gpt_oss", "dbrx", "llama4_text"])
def test_other_layouts_say_the_same(family: str, tmp_path: Path) -> None:
    tiny_models.save(family, tmp_path)
    for spec in Checkpoint.open(str(tmp_path)).layers.values():
        assert (spec.num_experts, spec.hidden_size, spec.output_size, spec.dtype) == (6, 32, 32, "float32")


def test_opening_reads_no_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "slice", lambda self, name: pytest.fail(f"{name} was read"))
    Checkpoint.open(str(folder))


# --- The backbone ----------------------------------------------------------------------------------------------------
def test_the_backbone_is_the_model_without_routed_experts(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "max_new_tokens": 7}))
    checkpoint = Checkpoint.open(str(folder))
    backbone: Any = checkpoint.load_backbone()
    whole = AutoModelForCausalLM.from_pretrained(folder)

    assert not backbone.training
    assert isinstance(backbone.generation_config, GenerationConfig)
    assert backbone.generation_config.eos_token_id == [2, 5]
    assert backbone.config.to_dict() == {**whole.config.to_dict(), "_name_or_path": backbone.config._name_or_path}
    expected = {name: value for name, value in whole.state_dict().items() if ".experts." not in name}
    state = backbone.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert not [name for name, value in (*backbone.named_parameters(), *backbone.named_buffers()) if value.is_meta]


def test_tied_embeddings_are_one_tensor_and_counted_once(tmp_path: Path) -> None:
    tiny_models.save("mixtral", tmp_path, tie_word_embeddings=True)
    checkpoint = Checkpoint.open(str(tmp_path))
    backbone: Any = checkpoint.load_backbone()
    assert backbone.lm_head.weight is backbone.model.embed_tokens.weight
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*backbone.parameters(), *backbone.buffers())}
    assert checkpoint.backbone_bytes == sum(held.values())


def test_two_backbones_share_nothing(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    first, second = checkpoint.load_backbone(), checkpoint.load_backbone()
    install(first, lambda path, hidden, index, weight: hidden)
    with pytest.raises(AttributeError):
        second(torch.tensor([[3, 4]]))


def test_weights_do_not_change_with_the_files(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    backbone, shard = checkpoint.load_backbone(), checkpoint.load_experts({FIRST: [2]})[FIRST]
    before = [value.clone() for value in (*backbone.parameters(), *shard.parameters())]
    path = folder / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    after = [*backbone.parameters(), *shard.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- Experts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx"])
def test_experts_are_loaded_one_by_one_or_together(family: str, tmp_path: Path) -> None:
    tiny_models.save(family, tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    everything = {path: range(spec.num_experts) for path, spec in checkpoint.layers.items()}
    whole = checkpoint.load_experts(everything)
    assert list(whole) == list(checkpoint.layers)
    for path in checkpoint.layers:
        assert type(whole[path]) is type(checkpoint.load_experts({path: [1]})[path])
        for ids in ([4], [0, 5], [2, 1, 0], [3, 3]):
            part, expected = checkpoint.load_experts({path: ids})[path], make_shard(whole[path], ids)
            assert part.num_experts == len(set(ids))
            assert not any(parameter.requires_grad for parameter in part.parameters())
            state = part.state_dict()
            assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())


def test_only_the_planned_experts_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    read = Reader.slice

    def note(self: Reader, name: str) -> Any:
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(Reader, "slice", note)
    Checkpoint.open(str(folder)).load_experts({SECOND: [4]})
    assert sorted(names) == [f"model.layers.1.block_sparse_moe.experts.4.w{number}.weight" for number in (1, 2, 3)]


def test_layers_without_ids_are_left_out(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    assert list(checkpoint.load_experts({SECOND: [0], FIRST: []})) == [SECOND]
    assert checkpoint.load_experts({}) == {}
    assert checkpoint.experts_bytes({}) == 0


def test_layers_and_experts_that_the_model_does_not_have(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    with pytest.raises(NotFound, match=r"model\.layers\.0\.mlp\.experts"):
        checkpoint.load_experts({"model.layers.7.mlp.experts": [0]})
    for ids in ([6], [-1], [0, 1000]):
        with pytest.raises(NotFound, match="0 to 5"):
            checkpoint.load_experts({FIRST: ids})
        with pytest.raises(NotFound, match="0 to 5"):
            checkpoint.experts_bytes({FIRST: ids})


def test_progress_adds_up_to_the_bytes_announced(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    steps: list[int] = []
    checkpoint.load_backbone(on_progress=steps.append)
    assert len(steps) > 2
    assert sum(steps) == checkpoint.backbone_bytes
    steps.clear()
    plan = {FIRST: [0, 1], SECOND: [5]}
    checkpoint.load_experts(plan, on_progress=steps.append)
    assert len(steps) == 2
    assert sum(steps) == checkpoint.experts_bytes(plan)


def test_threads_may_load_at_the_same_time(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    whole = checkpoint.load_experts({FIRST: range(6), SECOND: range(6)})
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda expert: checkpoint.load_experts({FIRST: [expert], SECOND: [expert]}), range(6)))
    for path in (FIRST, SECOND):
        for expert, part in enumerate(parts):
            expected = make_shard(whole[path], [expert]).state_dict()
            assert all(torch.equal(part[path].state_dict()[name], value) for name, value in expected.items())


def test_a_file_that_vanishes_is_named(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors"):
        checkpoint.load_experts({FIRST: [0]})
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors"):
        checkpoint.load_backbone()


def test_no_progress_bar_of_transformers_shows_and_its_setting_stays(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert logging.is_progress_bar_enabled()
    checkpoint = Checkpoint.open(str(folder))
    checkpoint.load_backbone()
    checkpoint.load_experts({FIRST: [0]})
    assert logging.is_progress_bar_enabled()
    assert capfd.readouterr().err == ""


def test_loading_in_the_dtype_of_the_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.layers[FIRST].expert_bytes == 3 * 32 * 48 * 4
    assert checkpoint.load_experts({FIRST: [0]})[FIRST].get_parameter("down_proj").dtype == torch.float32
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(str(folder)).dtype == torch.bfloat16


# --- The tokenizer ---------------------------------------------------------------------------------------------------
def test_the_tokenizer_if_there_is_one(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.load_tokenizer() is None
    tiny_models.save_tokenizer(folder)
    tokenizer = checkpoint.load_tokenizer()
    assert tokenizer is not None
    text = "def f(x):\n    return 'grün' + x  # \N{ROCKET}\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 259


def test_a_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidCheckpoint, match="tokenizer"):
        Checkpoint.open(str(folder)).load_tokenizer()


def test_a_damaged_generation_configuration(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InvalidCheckpoint, match="generation_config"):
        Checkpoint.open(str(folder)).load_backbone()


def test_modules_of_the_skeleton_stay_on_meta(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    checkpoint.load_experts({FIRST: [0]})
    modules = experts_modules(checkpoint._skeleton.model)
    assert list(modules) == [FIRST, SECOND]
    assert all(parameter.is_meta and len(parameter) == 6 for m in modules.values() for parameter in m.parameters())
