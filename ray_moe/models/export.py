"""Writing a model with other weights as a checkpoint that is to `transformers` as the one it came from.

Same names of tensors on disk, same dtypes, same configuration, tokenizer and other files. Layers of experts come one
after the other and are written at once, so no more than one of them is in memory.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ray_moe.errors import InvalidCheckpoint, InvalidConfig
from ray_moe.models.checkpoint import CONFIG, INDEX, SINGLE, TensorHeader
from ray_moe.models.huggingface import Checkpoint
from ray_moe.models.lazy import TORCH_DTYPES
from ray_moe.models.naming import DiskNames
from ray_moe.models.writing import NewFolder, TensorFile, TensorSpec, check_room, refusal, write_file
from ray_moe.types import LayerPath

LayerSource = Callable[[LayerPath], Mapping[str, torch.Tensor]]
"""Gives the state of a layer's experts module: stacks with a row for every expert, and what all experts share."""

OnWritten = Callable[[int, int], None]
"""Told the bytes of weights that are written, and how many there will be."""

MAX_FILE_BYTES = 5_000_000_000

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack"}
_TEMPLATES = "additional_chat_templates"


def export(
    checkpoint: Checkpoint,
    folder: str | Path,
    backbone: Mapping[str, torch.Tensor],
    experts: LayerSource,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    overwrite: bool = False,
    on_progress: OnWritten | None = None,
) -> Path:
    """Write the model of `checkpoint` with new weights to `folder`, which is there whole or not at all.

    What is on disk but no part of the model is copied. A quantised checkpoint becomes one of plain weights; what it has
    besides the model is left out.

    Args:
        checkpoint: what the model is.
        folder: where to write, resolved. With `overwrite`, a checkpoint of that name is replaced once all is written.
        backbone: the state of `Checkpoint.load_backbone()`.
        experts: called once for each layer, in model order, with nothing else of `experts` in memory.
        dtype: of the weights; None keeps the dtype that each tensor has in the checkpoint. Tensors that the model keeps
            in another precision than the others stay in it.
        max_file_bytes: of one file of weights, if no single tensor is larger.
        overwrite: whether there may be a checkpoint in `folder`.
        on_progress: told after each tensor.

    Returns: the folder.

    Raises:
        InvalidConfig: `folder` is taken, or cannot be written.
        InsufficientResources: the disk is full.
        InvalidRequest: a tensor is missing, or has the wrong shape.
        InvalidCheckpoint: the files of `checkpoint` have changed.
        UnsupportedModel: weights of this family cannot be written.
    """
    target = check_target(checkpoint, folder, overwrite)
    plan = _Plan(checkpoint, dtype, max_file_bytes)
    with NewFolder(target) as partial:
        check_room(partial, plan.num_bytes)
        _copy_other_files(checkpoint.files.folder, partial)
        _write_config(checkpoint, partial, dtype)
        with closing(_Weights(plan, partial, on_progress)) as weights:
            for group in plan.names.groups:
                if group in checkpoint.layers:
                    state = {f"{group}.{name}": tensor for name, tensor in experts(group).items()}
                    weights.put(plan.names.on_disk(group, state))
                    del state
                else:
                    weights.put(plan.names.on_disk(group, backbone))
            with checkpoint.files.reader() as reader:
                for name in plan.copied:
                    weights.put({name: reader.slice(name)[...]})
        _write_index(plan, partial)
    return target


def check_target(checkpoint: Checkpoint, folder: str | Path, overwrite: bool) -> Path:
    """Where `export` would write.

    Raises:
        InvalidConfig: there is something that it would not replace.
    """
    target = Path(folder).expanduser().resolve()
    if target == checkpoint.files.folder or target in checkpoint.files.folder.parents:
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


class _Plan:
    """Which tensor is written to which file."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | None, max_file_bytes: int) -> None:
        self.names = DiskNames(checkpoint, dtype)
        headers = checkpoint.files.tensors
        self.copied = [] if _is_quantised(checkpoint.files.config) else self.names.unplaced
        specs = self.names.specs | {name: _spec_of(headers[name]) for name in self.copied}
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


class _Weights:
    """The files of weights that are being written; each is closed with its last tensor."""

    def __init__(self, plan: _Plan, folder: Path, on_progress: OnWritten | None) -> None:
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


def _spec_of(header: TensorHeader) -> TensorSpec:
    if header.dtype not in TORCH_DTYPES:
        raise InvalidCheckpoint(f"{header.file} has a tensor of dtype {header.dtype}, unknown here.")
    return TensorSpec(TORCH_DTYPES[header.dtype], header.shape)


def _is_quantised(config: Mapping[str, Any]) -> bool:
    return any("quantization_config" in part for part in _parts(config))


def _parts(config: Any) -> list[dict[str, Any]]:
    """A configuration and those inside it."""
    inside = [value for value in config.values() if isinstance(value, dict)]
    return [config, *(part for value in inside for part in _parts(value))]


def _write_config(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None) -> None:
    """The configuration as it was, but for what is no longer so."""
    config = copy.deepcopy(checkpoint.files.config)
    for part in _parts(config):
        part.pop("quantization_config", None)
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and key in part:
                part[key] = str(dtype).removeprefix("torch.")
    if config == checkpoint.files.config:
        _copy(checkpoint.files.folder / CONFIG, folder / CONFIG)
    else:
        write_file(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _copy_other_files(source: Path, folder: Path) -> None:
    """Tokenizer, generation configuration, licence ...: all files that are no weights."""
    for path in sorted(source.iterdir()):
        is_weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and not path.name.startswith(".") and path.name != CONFIG:
            _copy(path, folder / path.name)
    if (source / _TEMPLATES).is_dir():
        with refusal(folder / _TEMPLATES):
            shutil.copytree(source / _TEMPLATES, folder / _TEMPLATES)


def _copy(source: Path, target: Path) -> None:
    with refusal(target):
        shutil.copyfile(source, target)  # of a link, what it points to


def _write_index(plan: _Plan, folder: Path) -> None:
    if len(plan.files) > 1:
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": dict(sorted(plan.file_of.items()))}
        write_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
