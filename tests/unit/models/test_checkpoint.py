"""Where the files of a checkpoint come from, and how they are read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_moe.errors import InvalidCheckpoint
from ray_moe.models.checkpoint import CheckpointFiles, TensorHeader
from ray_moe.models.lazy import BlankTensors, ExpertRows, OwnTensor
from tests import tiny_models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_models.build("mixtral").save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


def test_every_tensor_of_every_file_is_known(folder: Path) -> None:
    files = CheckpointFiles.open(folder)
    on_disk = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    assert files.config["model_type"] == "mixtral"
    assert {name: header.shape for name, header in files.tensors.items()} == {n: v.shape for n, v in on_disk.items()}
    assert files.tensors["lm_head.weight"].dtype == "F32"


def test_a_reader_gives_tensors_and_rows(folder: Path) -> None:
    files = CheckpointFiles.open(str(folder))
    expected = load_file(folder / files.tensors["lm_head.weight"].file)["lm_head.weight"]
    with files.reader() as reader:
        lazy = reader.slice("lm_head.weight")
        own = OwnTensor(lazy)[...]
        rows = ExpertRows(lazy, [0, 2, 5], rows_per_expert=4)
        assert rows.get_shape() == [12, expected.shape[1]]
        assert rows.get_dtype() == "F32"
        some = rows[...]
    # Copies outlive the file.
    shutil.rmtree(folder)
    assert torch.equal(own, expected)
    assert torch.equal(some, expected.view(-1, 4, expected.shape[1])[[0, 2, 5]].flatten(0, 1))


def test_a_file_that_vanishes_after_opening(folder: Path) -> None:
    files = CheckpointFiles.open(folder)
    header = files.tensors["lm_head.weight"]
    (folder / header.file).unlink()
    with pytest.raises(InvalidCheckpoint, match=header.file), files.reader() as reader:
        reader.slice("lm_head.weight")


def test_one_file_needs_no_index_and_wins_over_one(folder: Path) -> None:
    save_file({"only": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert list(CheckpointFiles.open(folder).tensors) == ["only"]


def test_a_hub_name_fetches_the_configuration_first_and_weights_of_the_same_commit_later(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / "0123abcd"
    asked: list[tuple[str, str | None]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, revision))
        snapshot.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for path in folder.glob(pattern):
                shutil.copy(path, snapshot)
        assert not any(pattern.endswith((".bin", ".py")) for pattern in allow_patterns)
        return str(snapshot)

    monkeypatch.setattr("ray_moe.models.checkpoint.snapshot_download", download)
    files = CheckpointFiles.open("someone/mixtral")
    assert files.config["model_type"] == "mixtral"
    assert not list(snapshot.glob("*.safetensors"))
    assert "lm_head.weight" in files.tensors
    assert asked == [("someone/mixtral", None), ("someone/mixtral", "0123abcd")]


def test_blank_tensors_have_shape_and_dtype_but_no_data() -> None:
    blank: Any = BlankTensors({"a": TensorHeader("f", "BF16", (4, 2)), "b": TensorHeader("f", "F6_E2M3", (4,))})
    assert blank.slice("a")[...].is_meta
    assert blank.slice("a")[1:3].shape == (2, 2)
    assert blank.slice("a")[...].dtype == torch.bfloat16
    with pytest.raises(InvalidCheckpoint, match="F6_E2M3"):
        blank.slice("b")[...]
