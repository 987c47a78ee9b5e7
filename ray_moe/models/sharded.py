"""A new checkpoint's folder: its files of weights, filled tensor by tensor, and all that is copied beside them.

What the tensors are is decided before the first one is written, so that every file has its header, and no more than one
tensor is in memory. Called by `models/export.py` (the same model with other weights) and `models/moe_writing.py` (a new
one).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ray_moe.errors import InvalidConfig
from ray_moe.models.checkpoint import CONFIG, INDEX, SINGLE
from ray_moe.models.writing import TensorFile, TensorSpec, refusal, write_file

OnWritten = Callable[[int, int], None]
"""Told the bytes of weights that are written, and how many there will be."""

MAX_FILE_BYTES = 5_000_000_000

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack"}
_TEMPLATES = "additional_chat_templates"


def free_target(source: Path, folder: str | Path, overwrite: bool) -> Path:
    """Where a checkpoint made of the one in `source` is written to.

    Raises:
        InvalidConfig: there is something that would not be replaced.
    """
    target = Path(folder).expanduser().resolve()
    if target == source or target in source.parents:
        raise InvalidConfig(f"{target} holds the checkpoint that the model comes from; name another folder to write to")
    if target.is_dir() and not any(target.iterdir()):
        return target
    if target.exists() and not (target / CONFIG).is_file():
        raise InvalidConfig(f"{target} is there and is no checkpoint, so it is not replaced; name another folder")
    if target.exists() and not overwrite:
        raise InvalidConfig(
            f"there is a checkpoint in {target} already; name another folder, or have it replaced (--force)"
        )
    return target


class ShardPlan:
    """Which tensor is written to which file."""

    def __init__(self, specs: Mapping[str, TensorSpec], max_file_bytes: int = MAX_FILE_BYTES) -> None:
        """`specs` in the order in which the tensors will come; a file is as large as `max_file_bytes` allows."""
        self.num_bytes = sum(spec.nbytes for spec in specs.values())
        parts: list[dict[str, TensorSpec]] = [{}]
        part_bytes = 0
        for name, spec in specs.items():
            if parts[-1] and part_bytes + spec.nbytes > max_file_bytes:
                parts.append({})
                part_bytes = 0
            parts[-1][name] = spec
            part_bytes += spec.nbytes
        total = len(parts)
        names = [SINGLE] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
        self.files = dict(zip(names, parts, strict=True))
        self.file_of = {name: file for file, part in self.files.items() for name in part}

    def write_index(self, folder: Path) -> None:
        """The index that `transformers` reads, when there is more than one file."""
        if len(self.files) > 1:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(self.file_of.items()))}
            write_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


class ShardWriter:
    """The files of weights that are being written; each is closed with its last tensor."""

    def __init__(self, plan: ShardPlan, folder: Path, on_progress: OnWritten | None = None) -> None:
        self._plan = plan
        self._folder = folder
        self._on_progress = on_progress
        self._open: dict[str, TensorFile] = {}
        self._written_bytes = 0

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            file = self._plan.file_of[name]
            if file not in self._open:
                self._open[file] = TensorFile(self._folder / file, self._plan.files[file], {"format": "pt"})
            self._written_bytes += self._open[file].put(name, tensor)
            if self._open[file].is_complete:
                self._open.pop(file).close()
            if self._on_progress is not None:
                self._on_progress(self._written_bytes, self._plan.num_bytes)

    def close(self) -> None:
        """Close those that an error has left unfinished."""
        for file in self._open.values():
            file.abandon()


def copy_other_files(source: Path, folder: Path) -> None:
    """Tokenizer, generation configuration, licence ...: all files that are neither weights nor the configuration."""
    for path in sorted(source.iterdir()):
        is_weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and not path.name.startswith(".") and path.name != CONFIG:
            copy_file(path, folder / path.name)
    if (source / _TEMPLATES).is_dir():
        with refusal(folder / _TEMPLATES):
            shutil.copytree(source / _TEMPLATES, folder / _TEMPLATES)


def copy_file(source: Path, target: Path) -> None:
    with refusal(target):
        shutil.copyfile(source, target)  # of a link, what it points to
