"""Experts found by names and shapes on disk alone, in the layout of every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_moe.models.inspect import inspect
from ray_moe.models.inspect_weights import find, stacks
from tests import tiny_models

FAMILIES = [
    ("mixtral", "MM"),
    ("olmoe", "MM"),
    ("qwen2_moe", "MDM"),
    ("deepseek_v3", "DM"),
    ("gpt_oss", "MM"),
    ("granitemoe", "MM"),
    ("phimoe", "MM"),
    ("jamba", "DMDM"),
    ("llama4_text", "DMDM"),
    ("dbrx", "MM"),
    ("ernie4_5_moe", "DM"),
    ("jetmoe", "MM"),
]


@pytest.mark.parametrize(("family", "pattern"), FAMILIES)
def test_a_checkpoint_without_its_configuration(family: str, pattern: str, tmp_path: Path) -> None:
    model = tiny_models.save(family, tmp_path)
    (tmp_path / "config.json").unlink()
    expected = inspect(model, measure=False).anatomy
    found = inspect(tmp_path)
    anatomy = found.anatomy
    assert found.basis == "weights"
    assert found.kind == ("hybrid" if "D" in pattern else "moe")
    assert [stack.pattern for stack in anatomy.stacks] == [pattern]
    assert [(g.num_experts, g.expert_params) for g in anatomy.groups] == [
        (g.num_experts, g.expert_params) for g in _in_order(expected.groups)
    ]
    buffers = sum(
        b.numel() for name, b in model.named_buffers() if name in model.state_dict()
    )  # not told apart on disk
    assert (anatomy.total_params, anatomy.expert_params) == (expected.total_params + buffers, expected.expert_params)
    assert anatomy.top_k is anatomy.active_params is None  # it is in no tensor


def _in_order(groups):
    return sorted(groups, key=lambda group: (group.path.split(".")[2], group.path.split(".")[3]))


def test_a_single_file_and_one_with_another_name(tmp_path: Path) -> None:
    tiny_models.save("mixtral", tmp_path / "a")
    whole = inspect(tmp_path / "a" / "model.safetensors")
    (tmp_path / "b").mkdir()
    save_file(load_file(tmp_path / "a" / "model.safetensors"), tmp_path / "b" / "weights.safetensors")
    other = inspect(tmp_path / "b")
    assert whole.anatomy == other.anatomy
    assert whole.kind == "moe"


def test_an_index_alone_has_names(tmp_path: Path) -> None:
    tiny_models.save("mixtral", tmp_path / "a")
    names = load_file(tmp_path / "a" / "model.safetensors")
    index = {"metadata": {"total_size": 12345}, "weight_map": dict.fromkeys(names, "x.safetensors")}
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    found = inspect(file)
    assert (found.kind, found.anatomy.num_experts, found.anatomy.weight_bytes) == ("moe", 6, 12345)
    assert "shapes are in files that are not here" in found.evidence[-1].text


def test_packed_weights_keep_their_gate() -> None:
    """As gpt-oss and FP8 checkpoints have them: blocks and scales, of which none has the width of the gate."""
    shapes = {
        "model.layers.0.mlp.router.weight": (32, 2880),
        "model.layers.0.mlp.experts.gate_up_proj_blocks": (32, 5760, 90, 16),
        "model.layers.0.mlp.experts.gate_up_proj_scales": (32, 5760, 90),
    }
    (group,) = find(shapes)
    assert (group.num_experts, group.hidden_size) == (32, 2880)


def test_convolutions_and_layers_are_no_experts() -> None:
    shapes = {f"blocks.{n}.{name}": shape for n in range(4) for name, shape in {
        "conv.weight": (8, 8, 3), "fc1.weight": (16, 8), "mixer.conv1d.weight": (8, 1, 4), "dt_proj.weight": (8, 4),
    }.items()}  # fmt: skip
    shapes["head.weight"] = (4, 8)
    assert find(shapes) == []
    assert stacks(shapes, []) == [("blocks", "DDDD")]


def test_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_models.save("mixtral", tmp_path)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(torch, "frombuffer", refused)
    assert inspect(tmp_path, measure=False).kind == "moe"
