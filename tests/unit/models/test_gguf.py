"""GGUF headers: what is read of them, what is made of it, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_moe.errors import InvalidCheckpoint
from ray_moe.models.gguf import read_header
from ray_moe.models.inspect import inspect
from tests.unit.models import gguf_files


def test_a_header_is_read_as_it_was_written(tmp_path: Path) -> None:
    header = read_header(gguf_files.mixtral(tmp_path / "m.gguf"))
    assert header.architecture == "llama"
    assert header.get("expert_count") == 8
    assert header.metadata["tokenizer.ggml.tokens"] == 3  # texts are counted, not kept
    assert header.metadata["tokenizer.ggml.scores"] == [0.0, 1.0, 2.0]
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    assert header.tensors["blk.1.ffn_gate_exps.weight"].shape == (8, 128, 64)
    assert header.tensors["blk.1.ffn_gate_exps.weight"].num_bytes == 8 * 128 * 64 * 34 // 32
    assert header.tensors["blk.0.attn_norm.weight"].num_bytes == 256


def test_a_mixture_is_told(tmp_path: Path) -> None:
    found = inspect(gguf_files.mixtral(tmp_path / "m.gguf"))
    anatomy = found.anatomy
    assert (found.kind, found.basis, found.family) == ("moe", "weights", "llama")
    assert [(group.path, group.num_experts, group.top_k) for group in anatomy.groups] == [
        ("blk.0", 8, 2),
        ("blk.1", 8, 2),
    ]
    expert = 3 * 64 * 128
    total = 2 * (96 * 64) + 2 * (64 * 64 + 64 + 8 * 64 + 8 * expert)
    assert (anatomy.total_params, anatomy.active_params) == (total, total - 2 * 6 * expert)
    assert anatomy.kv_bytes_per_token == 2 * 2 * (2 * 16) * 2  # float16 x layers x both of two heads of 16
    assert [stack.pattern for stack in anatomy.stacks] == ["MM"]
    assert found.contradictions == ()


def test_a_dense_model_is_told(tmp_path: Path) -> None:
    tensors = {"blk.0.ffn_up.weight": ((128, 64), 1), "blk.0.ffn_down.weight": ((64, 128), 1)}
    found = inspect(gguf_files.write(tmp_path / "m.gguf", {"general.architecture": "llama"}, tensors))
    assert (found.kind, found.anatomy.total_params) == ("dense", 2 * 64 * 128)


def test_words_without_weights_are_contradicted(tmp_path: Path) -> None:
    metadata = {"general.architecture": "llama", "llama.expert_count": 8, "llama.expert_used_count": 2}
    tensors = {"blk.0.ffn_up.weight": ((128, 64), 1), "blk.0.ffn_down.weight": ((64, 128), 1)}
    found = inspect(gguf_files.write(tmp_path / "m.gguf", metadata, tensors))
    assert found.kind == "dense"
    assert any("the configuration by itself says" in text for text in found.contradictions)


def test_files_in_parts_are_one_model(tmp_path: Path) -> None:
    gate, up = {"blk.0.ffn_gate_inp.weight": ((4, 64), 0)}, {"blk.0.ffn_up_exps.weight": ((4, 96, 64), 1)}
    metadata = {"general.architecture": "qwen", "qwen.expert_used_count": 1}
    gguf_files.write(tmp_path / "m-00001-of-00002.gguf", metadata, gate)
    gguf_files.write(tmp_path / "m-00002-of-00002.gguf", {}, up)
    found = inspect(tmp_path)
    assert (found.kind, found.anatomy.num_experts, found.anatomy.top_k) == ("moe", 4, 1)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a GGUF file"),
        (b"GGML....", "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1), "version 1"),
        (b"GGUF" + struct.pack(">I", 3), "version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "damaged or truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62), "damaged or truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_files.text("k") + struct.pack("<I", 77), "metadata of type 77"),
    ],
)
def test_what_is_no_header_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(InvalidCheckpoint, match=said):
        read_header(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_header_raises_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("gguf")
    whole = gguf_files.mixtral(folder / "m.gguf").read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[at] ^= data.draw(st.integers(1, 255))
    for content in (whole[:cut], bytes(damaged)):
        (folder / "d.gguf").write_bytes(content)
        try:
            read_header(folder / "d.gguf")
        except InvalidCheckpoint as error:
            assert str(folder / "d.gguf") in error.message
