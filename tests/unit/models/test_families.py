"""Families off the experts interface, and models of text and images, through their own layouts on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Step3p7Config,
    Step3p7ForConditionalGeneration,
)
from transformers.core_model_loading import revert_weight_conversion

from ray_moe.models.experts import experts_modules, install
from ray_moe.models.families import JoinRows, SplitRows, adapt
from ray_moe.models.huggingface import Checkpoint
from tests import tiny_models

TOKENS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama4() -> Any:
    text = tiny_models.config("llama4_text").to_dict()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    }
    return Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision))


def qwen3_vl() -> Any:
    text = {**TEXT, "num_experts": 8, "moe_intermediate_size": 24}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))


def step3p7() -> Any:
    text = {
        **TEXT,
        "num_hidden_layers": 3,
        "num_local_experts": 8,
        "moe_intermediate_size": 24,
        "layer_types": ["full_attention"] * 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "sliding_window": 8,
        "swiglu_limits": [0.0, 0.0, 0.5],
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return Step3p7ForConditionalGeneration(Step3p7Config(text_config=text, vision_config=vision))


@pytest.mark.parametrize(
    ("make", "auto"),
    [
        (llama4, AutoModelForCausalLM),  # its text model alone: the image tower's weights are left on disk
        (qwen3_vl, AutoModelForImageTextToText),
        (step3p7, AutoModelForImageTextToText),
    ],
)
@torch.no_grad()
def test_text_and_image_models_answer_text(make: Any, auto: Any, tmp_path: Path) -> None:
    model = make()
    tiny_models.randomize(model)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    backbone = checkpoint.load_backbone()
    experts = checkpoint.load_experts({path: range(spec.num_experts) for path, spec in checkpoint.layers.items()})
    assert len(checkpoint.layers) == 2
    assert checkpoint.vocab_size == 96
    install(backbone, lambda path, hidden, index, weight: experts[path](hidden, index, weight))
    expected = auto.from_pretrained(tmp_path)(input_ids=TOKENS).logits
    torch.testing.assert_close(backbone(input_ids=TOKENS).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama4_text", "dbrx", "jetmoe"])
@torch.no_grad()
def test_adapting_keeps_the_answers_and_leaves_other_models_alone(family: str) -> None:
    model, other = tiny_models.build(family), tiny_models.build(family)
    before = model(TOKENS).logits
    adapt(model)
    assert experts_modules(model)
    assert not experts_modules(other)
    torch.testing.assert_close(model(TOKENS).logits, before, atol=1e-5, rtol=0)
    assert torch.equal(other(TOKENS).logits, before)


@torch.no_grad()
def test_llama4_asks_only_the_experts_that_were_chosen() -> None:
    model = tiny_models.build("llama4_text")
    adapt(model)
    rows: list[int] = []

    def handler(path: str, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        assert torch.equal(weight, torch.ones_like(weight))
        return hidden

    install(model, handler)
    model(TOKENS)
    assert rows == [TOKENS.numel() * 2] * 2


def test_dbrx_weights_turn_back_into_its_own_layout(tmp_path: Path) -> None:
    tiny_models.save("dbrx", tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    path = next(iter(checkpoint.layers))
    experts = checkpoint.load_experts({path: range(6)})[path]
    state = {f"{path}.{name}": value for name, value in experts.state_dict().items()}
    back = revert_weight_conversion(checkpoint._skeleton.model, state)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert sorted(back) == [f"{path}.mlp.{name}" for name in ("v1", "w1", "w2")]
        assert all(torch.equal(value, file.get_tensor(name)) for name, value in back.items())


def test_rows_split_and_join() -> None:
    flat = torch.arange(24.0).view(12, 2)
    split = SplitRows(4).convert({"w": [flat]})
    assert split["w"].shape == (3, 4, 2)
    assert torch.equal(SplitRows(4).reverse_op.convert(split)["w"], flat)
    assert isinstance(JoinRows(4).reverse_op, SplitRows)
