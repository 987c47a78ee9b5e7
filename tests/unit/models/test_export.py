"""A model written as a checkpoint: the same on disk as the one it came from, and whole or not there."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from ray_moe.errors import InsufficientResources, InvalidConfig, InvalidRequest
from ray_moe.models.export import LayerSource, export
from ray_moe.models.huggingface import Checkpoint
from tests import tiny_models
from tests.unit.models.test_families import llama4, qwen3_vl, step3p7
from tests.unit.models.test_quantized import BLOCK, rewrite, to_fp8, to_mxfp4, whole_model

TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(5))


def backbone_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return checkpoint.load_backbone().state_dict()


def experts_of(checkpoint: Checkpoint) -> LayerSource:
    def load(path: str) -> Mapping[str, torch.Tensor]:
        return checkpoint.load_experts({path: range(checkpoint.layers[path].num_experts)})[path].state_dict()

    return load


def export_as_it_is(source: Path, folder: Path, **options: Any) -> Checkpoint:
    checkpoint = Checkpoint.open(source)
    export(checkpoint, folder, backbone_of(checkpoint), experts_of(checkpoint), **options)
    return Checkpoint.open(folder)


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (header.dtype, header.shape) for name, header in Checkpoint.open(folder).files.tensors.items()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_models.save("mixtral", tmp_path / "source", torch.bfloat16)
    return tmp_path / "source"


# --- What is written -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", tiny_models.TINY)
@torch.no_grad()
def test_a_model_comes_back_as_it_was(family: str, tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "exported"
    tiny_models.save(family, source, torch.bfloat16)
    export_as_it_is(source, folder)
    assert headers(folder) == headers(source)
    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, folder))
    state = after.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.state_dict().items())
    assert torch.equal(after(TOKENS).logits, before(TOKENS).logits)


@pytest.mark.parametrize("family", tiny_models.TINY)
def test_changed_weights_are_what_is_loaded(family: str, tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "exported"
    tiny_models.save(family, source)
    checkpoint = Checkpoint.open(source)
    load = experts_of(checkpoint)
    backbone = {name: -tensor for name, tensor in backbone_of(checkpoint).items()}
    export(checkpoint, folder, backbone, lambda path: {name: -tensor for name, tensor in load(path).items()})
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (source, folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], -tensor) for name, tensor in before.items())


@pytest.mark.parametrize("make", [llama4, qwen3_vl, step3p7])
def test_models_of_text_and_images_keep_what_is_not_served(make: Callable[[], Any], tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "exported"
    model = make()
    tiny_models.randomize(model)
    model.save_pretrained(source)
    export_as_it_is(source, folder)
    assert headers(folder) == headers(source)
    before, after = (AutoModelForImageTextToText.from_pretrained(path).state_dict() for path in (source, folder))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("on_disk_twice", [False, True])
def test_tied_embeddings_are_written_as_the_checkpoint_has_them(on_disk_twice: bool, tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "exported"
    tiny_models.save("mixtral", source, tie_word_embeddings=True)
    if on_disk_twice:
        tensors = load_file(source / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(source)
    trained: Any = checkpoint.load_backbone()
    with torch.no_grad():
        trained.lm_head.weight.mul_(2)
    export(checkpoint, folder, trained.state_dict(), experts_of(checkpoint))
    assert headers(folder) == headers(source)
    after = AutoModelForCausalLM.from_pretrained(folder)
    assert after.lm_head.weight is after.model.embed_tokens.weight
    assert torch.equal(after.lm_head.weight, trained.lm_head.weight)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_quantised_checkpoint_becomes_a_plain_one(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = tmp_path / "source", tmp_path / "exported"
    tiny_models.save(family, source, torch.bfloat16, hidden_size=64, intermediate_size=64, moe_intermediate_size=32)
    plain = headers(source)
    tensors = load_file(source / "model.safetensors")
    if family == "gpt_oss":
        rewrite(source, to_mxfp4(tensors), {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    else:
        monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
        rewrite(source, to_fp8(tensors), {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})
    export_as_it_is(source, folder)
    assert headers(folder) == plain
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    before, after = whole_model(source).state_dict(), AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_another_dtype(source: Path, tmp_path: Path) -> None:
    exported = export_as_it_is(source, tmp_path / "exported", dtype=torch.float32)
    assert exported.dtype == torch.float32
    assert {dtype for dtype, _ in headers(tmp_path / "exported").values()} == {"F32"}
    back = export_as_it_is(tmp_path / "exported", tmp_path / "back", dtype=torch.bfloat16)
    assert back.dtype == torch.bfloat16
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_the_model_keeps_precise_stays_so_in_another_dtype(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "exported"
    tiny_models.save("deepseek_v3", source, torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    precise = [name for name in tensors if name.endswith("e_score_correction_bias")]
    save_file(tensors | {name: tensors[name].float() for name in precise}, source / "model.safetensors")
    export_as_it_is(source, folder, dtype=torch.float16)
    assert precise
    for name, (dtype, _) in headers(folder).items():
        assert dtype == ("F32" if name in precise else "F16")


def test_weights_are_cut_into_files_of_a_size(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    told: list[tuple[int, int]] = []
    export_as_it_is(source, folder, max_file_bytes=20_000, on_progress=lambda *progress: told.append(progress))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    assert all((folder / file).stat().st_size < 25_000 for file in files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    total = sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == headers(source).keys()
    assert told[-1] == (total, total)
    assert told == sorted(told)
    after = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    before = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_one_layer_of_experts_is_asked_for_at_a_time(source: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(source)
    load, alive = experts_of(checkpoint), 0
    most, asked = 0, []

    class Tensors(dict[str, torch.Tensor]):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def counted(path: str) -> Mapping[str, torch.Tensor]:
        nonlocal alive, most
        alive, most = alive + 1, max(most, alive + 1)
        asked.append(path)
        return Tensors(load(path))

    export(checkpoint, tmp_path / "exported", backbone_of(checkpoint), counted)
    assert asked == list(checkpoint.layers)
    assert most == 1


def test_the_other_files_come_along(source: Path, tmp_path: Path) -> None:
    tiny_models.save_tokenizer(source, "{{ messages[0].content }}")
    (source / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (source / "LICENSE").write_text("free")
    (source / "pytorch_model.bin").write_text("the same weights in another format")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("...")
    exported = export_as_it_is(source, tmp_path / "exported")
    before, after = content_of_all(source), content_of_all(tmp_path / "exported")
    del before["pytorch_model.bin"], before["model.safetensors"], after["model.safetensors"]
    assert after == before
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "exported")("ab").input_ids
        == AutoTokenizer.from_pretrained(source)("ab").input_ids
    )
    backbone: Any = exported.load_backbone()
    assert backbone.generation_config.max_new_tokens == 7


def content_of_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- What is not -----------------------------------------------------------------------------------------------------
@pytest.fixture
def old(source: Path, tmp_path: Path) -> Path:
    """A checkpoint that is there before."""
    export_as_it_is(source, tmp_path / "old")
    return tmp_path / "old"


def write_doubled(source: Path, folder: Path, experts: LayerSource | None = None) -> None:
    checkpoint = Checkpoint.open(source)
    backbone = {name: 2 * tensor for name, tensor in backbone_of(checkpoint).items()}
    export(checkpoint, folder, backbone, experts or experts_of(checkpoint), overwrite=True)


def test_a_checkpoint_is_replaced_only_if_asked_and_then_whole(source: Path, old: Path) -> None:
    before = content(old)
    with pytest.raises(InvalidConfig, match=r"there is a checkpoint in .*old already"):
        export_as_it_is(source, old)
    assert content(old) == before
    write_doubled(source, old)
    assert content(old).keys() == before.keys()
    assert content(old)["model.safetensors"] != before["model.safetensors"]
    assert sorted(path.name for path in old.parent.iterdir()) == ["old", "source"]


def test_what_is_no_checkpoint_or_the_source_itself_is_never_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("...")
    before = content(source)
    for folder, said in ((tmp_path / "mine", "no checkpoint"), (tmp_path / "file", "no checkpoint"), (source, "from")):
        with pytest.raises(InvalidConfig, match=said):
            write_doubled(source, folder)
    with pytest.raises(InvalidConfig, match="comes from"):
        write_doubled(source, tmp_path)
    assert content(source) == before
    (tmp_path / "empty").mkdir()
    assert export_as_it_is(source, tmp_path / "empty").num_experts == 6


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, ConnectionError, Interrupted])
def test_experts_that_cannot_be_had_leave_the_old_checkpoint(
    error: type[BaseException], source: Path, old: Path
) -> None:
    before, load = content(old), experts_of(Checkpoint.open(source))

    def cut_off(path: str) -> Mapping[str, torch.Tensor]:
        if "layers.1" in path:
            raise error("the host is gone")
        return load(path)

    with pytest.raises(error, match="the host is gone"):
        write_doubled(source, old, cut_off)
    assert content(old) == before
    assert sorted(path.name for path in old.parent.iterdir()) == ["old", "source"]


@contextmanager
def room(num_bytes: int) -> Iterator[None]:
    """No file may become larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("num_bytes", [0, 1000, 50_000, 100_000])
def test_a_full_disk_leaves_the_old_checkpoint(num_bytes: int, source: Path, old: Path) -> None:
    before = content(old)
    with room(num_bytes), pytest.raises(InsufficientResources, match=r"there is no room for .*Make room"):
        write_doubled(source, old)
    assert content(old) == before
    assert sorted(path.name for path in old.parent.iterdir()) == ["old", "source"]


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(
    source: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(old)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1234}))
    with pytest.raises(InsufficientResources, match=r"\d+ bytes are to be written to .*, where 1234 are free"):
        write_doubled(source, old, lambda path: pytest.fail("experts were asked for"))
    assert content(old) == before


def test_a_process_that_is_killed_leaves_the_old_checkpoint_and_the_next_one_clears_up(source: Path, old: Path) -> None:
    before = content(old)
    script = f"""
        import os, signal
        from ray_moe.models.export import export
        from ray_moe.models.huggingface import Checkpoint
        checkpoint = Checkpoint.open({str(source)!r})
        backbone = checkpoint.load_backbone().state_dict()
        export(checkpoint, {str(old)!r}, backbone, lambda path: os.kill(os.getpid(), signal.SIGKILL), overwrite=True)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert ended.returncode == -9
    assert content(old) == before
    assert len(list(old.parent.glob(".old.partial-*"))) == 1
    write_doubled(source, old)
    assert sorted(path.name for path in old.parent.iterdir()) == ["old", "source"]


def test_one_that_writes_is_not_cleared_up_by_another(source: Path, old: Path) -> None:
    load = experts_of(Checkpoint.open(source))
    inner = 0

    def write_another(path: str) -> Mapping[str, torch.Tensor]:
        nonlocal inner
        if inner < 1:
            inner += 1
            write_doubled(source, old, load)
        return load(path)

    write_doubled(source, old, write_another)
    assert inner == 1
    assert Checkpoint.open(old).num_experts == 6
    assert sorted(path.name for path in old.parent.iterdir()) == ["old", "source"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (lambda state: state.update({"lm_head.weight": torch.zeros(3, 32)}), r"lm_head\.weight has shape \(3, 32\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, torch.Tensor]], object], said: str, source: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(source)
    backbone = dict(backbone_of(checkpoint))
    change(backbone)
    with pytest.raises(InvalidRequest, match=said):
        export(checkpoint, tmp_path / "exported", backbone, experts_of(checkpoint))
    with pytest.raises(InvalidRequest, match=r"layers\.0\.mlp\.experts\.gate_up_proj has shape \(2, .*\(6, 96, 32\)"):
        export(
            checkpoint,
            tmp_path / "exported",
            backbone_of(checkpoint),
            lambda path: checkpoint.load_experts({path: [0, 1]})[path].state_dict(),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_that_cannot_be_written_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("...")
    with pytest.raises(InvalidConfig, match=r"cannot write .*Name a folder that this process may write"):
        export_as_it_is(source, tmp_path / "file" / "below")
