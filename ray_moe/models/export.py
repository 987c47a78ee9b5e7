"""Writing a model with other weights as a checkpoint that is to `transformers` as the one it came from.

Same names of tensors on disk, same dtypes, same configuration, tokenizer and other files. Layers of experts come one
after the other and are written at once, so no more than one of them is in memory.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ray_moe.errors import InvalidCheckpoint
from ray_moe.models.checkpoint import CONFIG, TensorHeader
from ray_moe.models.huggingface import Checkpoint
from ray_moe.models.lazy import TORCH_DTYPES
from ray_moe.models.naming import DiskNames
from ray_moe.models.sharded import (
    MAX_FILE_BYTES,
    OnWritten,
    ShardPlan,
    ShardWriter,
    copy_file,
    copy_other_files,
    free_target,
)
from ray_moe.models.writing import NewFolder, TensorSpec, check_room, write_file
from ray_moe.types import LayerPath

LayerSource = Callable[[LayerPath], Mapping[str, torch.Tensor]]
"""Gives the state of a layer's experts module: stacks with a row for every expert, and what all experts share."""


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
    names = DiskNames(checkpoint, dtype)
    headers = checkpoint.files.tensors
    copied = [] if _is_quantised(checkpoint.files.config) else names.unplaced
    plan = ShardPlan(names.specs | {name: _spec_of(headers[name]) for name in copied}, max_file_bytes)
    with NewFolder(target) as partial:
        check_room(partial, plan.num_bytes)
        copy_other_files(checkpoint.files.folder, partial)
        _write_config(checkpoint, partial, dtype)
        with closing(ShardWriter(plan, partial, on_progress)) as weights:
            for group in names.groups:
                if group in checkpoint.layers:
                    state = {f"{group}.{name}": tensor for name, tensor in experts(group).items()}
                    weights.put(names.on_disk(group, state))
                    del state
                else:
                    weights.put(names.on_disk(group, backbone))
            with checkpoint.files.reader() as reader:
                for name in copied:
                    weights.put({name: reader.slice(name)[...]})
        plan.write_index(partial)
    return target


def check_target(checkpoint: Checkpoint, folder: str | Path, overwrite: bool) -> Path:
    """Where `export` would write.

    Raises:
        InvalidConfig: there is something that it would not replace.
    """
    return free_target(checkpoint.files.folder, folder, overwrite)


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
        copy_file(checkpoint.files.folder / CONFIG, folder / CONFIG)
    else:
        write_file(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
