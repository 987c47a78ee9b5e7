"""Merging: each dense model's networks become an expert of one MoE model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ray_moe
from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.models.huggingface import Checkpoint
from ray_moe.models.merge import MergeSettings, merge
from tests import tiny_dense, tiny_models
from tests.tiny_dense import logits


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for seed, folder in enumerate(folders):
        tiny_dense.save("qwen3", folder, seed=seed, vocab_size=260)
        tiny_models.save_tokenizer(folder)
    return folders


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_experts_are_the_models_networks_and_the_rest_is_their_average(models: list[Path], tmp_path: Path) -> None:
    result = merge(models, tmp_path / "moe")
    held, sources = weights(tmp_path / "moe"), [weights(folder) for folder in models]
    for layer in range(3):
        for number, source in enumerate(sources):
            for name in ("gate_proj", "up_proj", "down_proj"):
                expert = held[f"model.layers.{layer}.mlp.experts.{number}.{name}.weight"]
                assert torch.equal(expert, source[f"model.layers.{layer}.mlp.{name}.weight"])
    backbone = [name for name in sources[0] if ".mlp." not in name]
    assert {name for name in held if ".mlp." not in name} == {*backbone}
    for name in backbone:
        torch.testing.assert_close(held[name], torch.stack([source[name] for source in sources]).mean(0))
    assert not result.same_function
    assert Checkpoint.open(tmp_path / "moe").num_experts == 3


def test_the_first_models_backbone_and_layers_that_stay_dense(models: list[Path], tmp_path: Path) -> None:
    merge(models, tmp_path / "moe", MergeSettings(backbone="first", layers="1"))
    held, first = weights(tmp_path / "moe"), weights(models[0])
    same = [name for name in first if not name.startswith("model.layers.1.mlp.")]
    assert all(torch.equal(held[name], first[name]) for name in same)
    assert {name for name in held if ".experts." in name} == {
        f"model.layers.1.mlp.experts.{e}.{name}.weight"
        for e in range(3)
        for name in ("gate_proj", "up_proj", "down_proj")
    }


def test_one_model_merged_with_itself_computes_as_before(models: list[Path], tmp_path: Path) -> None:
    merge([models[0]] * 3, tmp_path / "moe")
    moe, dense = (tiny_dense.load(folder) for folder in (tmp_path / "moe", models[0]))
    torch.testing.assert_close(logits(moe), logits(dense), rtol=0, atol=5e-6)


def test_tokens_go_through_the_networks_that_the_gate_chooses(models: list[Path], tmp_path: Path) -> None:
    """Against the formula, in a loop over tokens: the layer's input, the dense models' own modules, a softmax."""
    merge(models, tmp_path / "moe", MergeSettings(backbone="first", gate_std=1.0, layers="last:1"))
    moe, dense = tiny_dense.load(tmp_path / "moe"), [tiny_dense.load(folder) for folder in models]
    seen: dict[str, torch.Tensor] = {}
    block = moe.model.layers[2].mlp
    block.register_forward_hook(lambda _, given, out: seen.update(given=given[0], out=out))
    logits(moe)
    gate = weights(tmp_path / "moe")["model.layers.2.mlp.gate.weight"]
    chosen = set()
    for hidden, out in zip(seen["given"].flatten(0, 1), seen["out"].flatten(0, 1), strict=True):
        scores = torch.softmax(gate @ hidden, 0)
        best = scores.argsort(descending=True)[:2].tolist()
        chosen.update(best)
        total = sum(scores[e] for e in best)
        with torch.no_grad():
            expected = sum(scores[e] / total * dense[e].model.layers[2].mlp(hidden) for e in best)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert chosen == {0, 1, 2}


def test_gates_from_prompts_point_where_the_prompts_are(models: list[Path], tmp_path: Path) -> None:
    prompts = (("def f(x):", "return x + 1"), ("Whereas the party of the first part",), ("zzzzzzzz", "zzz"))
    merge(models, tmp_path / "moe", MergeSettings(prompts=prompts, backbone="first", top_k=1))
    held = weights(tmp_path / "moe")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models[0]), AutoTokenizer.from_pretrained(models[0])
    for number, texts in enumerate(prompts):
        inputs = []
        for text in texts:
            given: list[Any] = []
            hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, x, given=given: given.append(x[0]))
            with torch.no_grad():
                model(**tokenizer(text, return_tensors="pt"))
            hook.remove()
            inputs.append(given[0][0])
        mean = torch.cat(inputs).mean(0)
        row = held["model.layers.0.mlp.gate.weight"][number]
        torch.testing.assert_close(row, mean / mean.norm())
    # The first layer's gate sees what it was made of, so such a prompt goes mostly to its own expert.
    moe = tiny_dense.load(tmp_path / "moe")
    chosen: list[torch.Tensor] = []
    moe.model.layers[0].mlp.gate.register_forward_hook(lambda _, x, out: chosen.append(out[2]))
    for number, texts in enumerate(prompts):
        chosen.clear()
        moe(**tokenizer(texts[0], return_tensors="pt"))
        assert (chosen[0] == number).float().mean() > 0.5


def test_the_same_seed_gives_the_same_bytes(models: list[Path], tmp_path: Path) -> None:
    files = []
    for number, seed in enumerate((1, 1, 2)):
        merge(models, tmp_path / str(number), MergeSettings(seed=seed, dtype=torch.bfloat16))
        files.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
    assert tiny_dense.load(tmp_path / "0").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("qwen3", {"num_hidden_layers": 2}, "its num_hidden_layers is 2, not 3"),
        ("qwen3", {"intermediate_size": 128}, "its intermediate_size is 128, not 64"),
        ("qwen3", {"vocab_size": 96}, "its vocab_size is 96, not 260"),
        ("qwen3", {"rms_norm_eps": 1e-2}, "its rms_norm_eps is 0.01, not 1e-06"),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "its rope_parameters is"),
        ("mistral", {}, "mistral, not qwen3"),
    ],
)
def test_another_architecture_is_refused(family, changes, said, models: list[Path], tmp_path: Path) -> None:
    tiny_dense.save(family, tmp_path / "other", **{"vocab_size": 260, **changes})
    with pytest.raises(InvalidRequest, match=f"other is of another architecture than .*a, .*{said}"):
        merge([models[0], tmp_path / "other"], tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_what_does_not_change_the_function_may_differ(models: list[Path], tmp_path: Path) -> None:
    tiny_dense.save("qwen3", tmp_path / "other", torch.bfloat16, vocab_size=260, eos_token_id=7, attention_dropout=0.1)
    merge([models[0], tmp_path / "other"], tmp_path / "moe")
    assert tiny_dense.load(tmp_path / "moe").config.eos_token_id == 2
    assert tiny_dense.load(tmp_path / "moe").dtype == torch.float32


@pytest.mark.parametrize(
    ("number", "settings", "said"),
    [
        (1, {}, "1 models were named; expected 2 or more"),
        (2, {"top_k": 3}, "top_k is 3; expected 1 to 2"),
        (2, {"backbone": "last"}, "backbone is 'last'; expected average or first"),
        (2, {"prompts": (("a",),)}, "prompts for 1 models; expected them for all 2"),
        (2, {"prompts": (("a",), ())}, "a model has no prompts"),
        (2, {"prompts": (("a",), ("",))}, "a prompt of model 1 has no tokens that"),
        (2, {"gate_std": -1.0}, "gate_std is -1.0"),
        (2, {"layers": "last:4"}, "layers is 'last:4'"),
    ],
)
def test_settings_that_do_not_fit(number: int, settings: dict[str, Any], said: str, models, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=said):
        merge(models[:number], tmp_path / "moe", MergeSettings(**settings))
    assert not (tmp_path / "moe").exists()


def test_experts_that_grouped_products_do_not_take(tmp_path: Path) -> None:
    tiny_dense.save("mistral", tmp_path / "odd", intermediate_size=42)
    with pytest.raises(InvalidConfig, match=r"experts of width 42 have rows of 168 bytes; .* multiple of 16"):
        merge([tmp_path / "odd"] * 2, tmp_path / "moe")


def test_a_model_without_a_tokenizer_has_no_prompts(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        tiny_dense.save("mistral", tmp_path / name, seed=seed)
    with pytest.raises(InvalidConfig, match="a has no tokenizer that can be read"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "moe", MergeSettings(prompts=(("x",), ("y",))))


def test_none_of_the_models_is_overwritten(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="holds the checkpoint that the model comes from"):
        merge(models, models[1], overwrite=True)


def test_it_is_at_the_root() -> None:
    assert ray_moe.merge is merge
    assert ray_moe.MergeSettings is MergeSettings
