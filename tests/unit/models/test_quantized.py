"""FP8 and MXFP4 checkpoints are dequantised while they are loaded, to the same bits as `from_pretrained` gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from ray_moe.models.experts import experts_modules, make_shard
from ray_moe.models.huggingface import Checkpoint
from ray_moe.models.quantization import RaggedFp8Dequantize, dequantizer
from tests import tiny_models

BLOCK = 8


def to_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of linear layers as FP8 with one scale per 8x8 block, as DeepSeek and Qwen publish them."""
    out: dict[str, torch.Tensor] = {}
    for name, weight in tensors.items():
        if weight.ndim != 2 or any(kept in name for kept in ("embed", "lm_head", "gate.weight")):
            out[name] = weight
            continue
        rows, columns = weight.shape
        blocks = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        out[name] = (blocks / scale).to(torch.float8_e4m3fn).view(rows, columns)
        out[f"{name}_scale_inv"] = scale.view(rows // BLOCK, columns // BLOCK)
    return out


def to_mxfp4(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """gpt-oss's expert matrices as pairs of 4-bit numbers, 32 of which share a power of two."""
    out: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    for name, weight in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            out[name] = weight
            continue
        experts, width_in, width_out = weight.shape
        shape = (experts, width_out, width_in // 32)
        out[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        out[f"{name}_scales"] = torch.randint(120, 126, shape, dtype=torch.uint8, generator=generator)
    return out


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


@pytest.fixture(params=["qwen3_moe", "deepseek_v3", "gpt_oss"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    family: str = request.param
    wide = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    tiny_models.save(family, tmp_path, torch.bfloat16, **wide)
    tensors = load_file(tmp_path / "model.safetensors")
    if family == "gpt_oss":
        rewrite(tmp_path, to_mxfp4(tensors), {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    else:
        # from_pretrained asks for a package that dequantising does not use.
        monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
        settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
        rewrite(tmp_path, to_fp8(tensors), settings)
    return tmp_path


def whole_model(folder: Path) -> Any:
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    settings = Mxfp4Config(dequantize=True) if method == "mxfp4" else FineGrainedFP8Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)


def test_backbone_and_experts_are_those_of_transformers(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    backbone = checkpoint.load_backbone().state_dict()
    whole = whole_model(folder)

    assert {str(tensor.dtype) for tensor in whole.state_dict().values()} <= {"torch.bfloat16", "torch.float32"}
    routed = tuple(checkpoint.layers)
    others = {name: value for name, value in whole.state_dict().items() if not name.startswith(routed)}
    assert backbone.keys() == others.keys()
    for name, value in others.items():
        assert backbone[name].dtype == value.dtype
        assert torch.equal(backbone[name], value), name

    for path, experts in experts_modules(whole).items():
        ids = [0, 3, checkpoint.layers[path].num_experts - 1]
        loaded = checkpoint.load_experts({path: ids})[path]
        expected = make_shard(experts, ids)
        assert loaded.state_dict().keys() == expected.state_dict().keys()
        for name, value in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), (path, name)


def test_sizes_are_those_after_dequantising(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.dtype == torch.bfloat16
    progress: list[int] = []
    plan = {path: [1, 2] for path in checkpoint.layers}
    loaded = checkpoint.load_experts(plan, on_progress=progress.append)
    assert {spec.dtype for spec in checkpoint.layers.values()} == {"bfloat16"}
    weights = sum(p.nbytes for experts in loaded.values() for p in experts.parameters())
    assert weights == checkpoint.experts_bytes(plan) == sum(progress)


@pytest.mark.parametrize("shape", [(20, 32), (32, 12), (12, 12), (16, 32)])
def test_blocks_at_the_edge_may_be_cut_off(shape: tuple[int, int]) -> None:
    rows, columns = shape
    grid = (-(-rows // BLOCK), -(-columns // BLOCK))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = torch.rand(grid, generator=torch.Generator().manual_seed(1)) + 0.5
    config = tiny_models.config("qwen3_moe")
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    operation = RaggedFp8Dequantize(dequantizer(config))

    out = operation.convert({"weight": [weight], "weight_scale_inv": [scales]})["weight"]

    for row in range(rows):
        for column in range(columns):
            expected = weight[row, column].float() * scales[row // BLOCK, column // BLOCK]
            assert out[row, column] == expected


def test_a_checkpoint_with_cut_off_blocks_loads(tmp_path: Path) -> None:
    # 20 rows of kv_a_proj_with_mqa are two and a half blocks.
    tiny_models.save("deepseek_v3", tmp_path, torch.bfloat16, kv_lora_rank=12)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert tensors[name].shape == (20, 32)
    weight, scales = tensors[name].to(torch.float8_e4m3fn), torch.full((3, 4), 0.5)
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    rewrite(tmp_path, {**tensors, name: weight, f"{name}_scale_inv": scales}, settings)

    loaded = Checkpoint.open(str(tmp_path)).load_backbone().get_parameter(name)
    assert torch.equal(loaded, (weight.float() * 0.5).bfloat16())
