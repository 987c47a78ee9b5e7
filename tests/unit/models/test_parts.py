"""Experts that are cut while they are loaded, of every family whose experts can be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ray_moe.errors import NotFound, UnsupportedModel
from ray_moe.models.experts import expert_rows
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.experts import StackedExperts, pack
from ray_moe.ops.quantization import make_group
from ray_moe.policy.parts import parts_of
from tests import tiny_models

NUM_PARTS = 2
WITH_BIASES = {"gpt_oss"}


@pytest.mark.parametrize("family", sorted(tiny_models.TINY.keys() - WITH_BIASES))
def test_the_parts_that_are_loaded_make_up_the_experts_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    tiny_models.save(family, tmp_path)
    whole = Checkpoint.open(str(tmp_path))
    cut = whole.cut(NUM_PARTS)
    assert whole.cut(1) is whole
    assert cut.expert_bytes == whole.expert_bytes
    for path, spec in whole.layers.items():
        assert (cut.layers[path].num_experts, cut.layers[path].expert_bytes) == (
            NUM_PARTS * spec.num_experts,
            spec.expert_bytes // NUM_PARTS,
        )
        experts = [0, spec.num_experts - 1]
        loaded = whole.load_experts({path: experts})[path]
        numbers = sorted(part for e in experts for part in parts_of(e, spec.num_experts, NUM_PARTS))
        parts = cut.load_experts({path: numbers})[path]
        assert sum(p.nbytes for p in parts._parameters.values() if p is not None) == cut.experts_bytes({path: numbers})
        rows = {number: expert_rows(parts, row) for row, number in enumerate(numbers)}
        for row, expert in enumerate(experts):
            of_expert = [rows[part] for part in parts_of(expert, spec.num_experts, NUM_PARTS)]
            joined = cut.parts.join(path, of_expert)
            for name, tensor in expert_rows(loaded, row).items():
                assert torch.equal(joined[name], tensor)


def test_parts_are_copied_from_host_to_host_and_held_in_8_bits_as_experts_are(tmp_path: Path) -> None:
    tiny_models.save("qwen3_moe", tmp_path)
    cut = Checkpoint.open(str(tmp_path)).cut(3)
    path, spec = next(iter(cut.layers.items()))
    ids = [2, spec.num_experts - 1]
    group = StackedExperts(cut.load_experts({path: ids})[path])
    own, shared = group.tensors([0, 1])
    copied = cut.experts_from(path, ids, pack(own | shared))
    rows = torch.randn(4, spec.hidden_size)
    assert torch.equal(StackedExperts(copied).run(rows, [0, 1], [1, 3]), group.run(rows, [0, 1], [1, 3]))
    held = make_group(copied, "int8")
    assert {layer.path: layer.expert_bytes for layer in cut.layers_as("int8")}[path] * 2 == held.nbytes  # type: ignore[union-attr]
    with pytest.raises(NotFound, match=f"experts 0 to {spec.num_experts - 1}"):
        cut.load_experts({path: [spec.num_experts]})


def test_no_more_than_one_whole_expert_is_there_for_a_moment(tmp_path: Path) -> None:
    tiny_models.save("mixtral", tmp_path)
    whole = Checkpoint.open(str(tmp_path))
    cut = whole.cut(4)
    path, spec = next(iter(whole.layers.items()))
    assert cut.peak_bytes({path: [0, 1]}) == cut.experts_bytes({path: [0, 1]}) + spec.expert_bytes
    assert whole.peak_bytes({path: [0, 1]}) == whole.experts_bytes({path: [0, 1]})


def test_experts_with_biases_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    tiny_models.save("gpt_oss", tmp_path)
    with pytest.raises(UnsupportedModel, match=r"cannot be cut into parts: they have biases.*experts\.tensor"):
        Checkpoint.open(str(tmp_path)).cut(NUM_PARTS)
