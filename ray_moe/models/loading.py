"""Filling a model with some of a checkpoint's tensors.

The conversion (renaming, stacking, fusing, dequantising) is `transformers`' own: it is handed only the tensors that
are wanted, lazily, and works on those. Called by `models/huggingface.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from ray_moe.errors import InvalidCheckpoint
from ray_moe.models.experts import make_shard
from ray_moe.models.layout import LayerTensors
from ray_moe.models.lazy import LazyTensor, TensorSource
from ray_moe.models.quiet import no_progress_bars
from ray_moe.models.skeleton import Skeleton
from ray_moe.types import LayerPath


def fill(skeleton: Skeleton, tensors: Mapping[str, LazyTensor], device: str | torch.device) -> set[str]:
    """Convert `tensors` (by name on disk) and set them as parameters of the skeleton's model, on `device`.

    Returns the parameters of the model that they did not fill.

    Raises:
        InvalidCheckpoint: the tensors do not have the shapes that the configuration asks for.
    """
    with no_progress_bars():
        report, _ = convert_and_load_state_dict_in_model(
            skeleton.model, dict(tensors), _settings(skeleton, device), None
        )
    for target, reason in report.conversion_errors.items():
        # transformers reports a traceback, then "Error: Operation on tensors destined for ...".
        lines = [line for line in str(reason).splitlines() if line.strip() and not line.startswith(("Error", " "))]
        raise InvalidCheckpoint(f"the tensors on disk do not make up {target} ({lines[-1]}). {_ADVICE}")
    for target, found, expected in report.mismatched_keys:
        raise InvalidCheckpoint(
            f"{target} has shape {tuple(found)} on disk, but the configuration asks for {tuple(expected)}. {_ADVICE}"
        )
    missing: set[str] = report.missing_keys
    return missing


def fill_experts(
    skeleton: Skeleton,
    path: LayerPath,
    layer: LayerTensors,
    ids: Sequence[int],
    source: TensorSource,
    device: str | torch.device,
) -> nn.Module:
    """Load the experts `ids` (ascending) of the layer at `path` into a module of their own.

    Not thread-safe: for a moment the module takes the place of the skeleton's, where the conversion looks for it.

    Raises:
        InvalidCheckpoint: tensors are missing, or have the wrong shape.
    """
    shard = make_shard(skeleton.experts[path], ids)
    skeleton.model.set_submodule(path, shard)
    try:
        missing = fill(skeleton, layer.select(ids, source), device)
    finally:
        skeleton.model.set_submodule(path, skeleton.experts[path])
    refuse_missing(missing & {f"{path}.{name}" for name in shard.state_dict()})
    return shard.requires_grad_(False)


def refuse_missing(names: set[str]) -> None:
    """Raise `InvalidCheckpoint` if there are any `names`."""
    if names:
        few = ", ".join(sorted(names)[:3])
        raise InvalidCheckpoint(
            f"the checkpoint lacks {len(names)} tensors that the model needs: {few}{' ...' if len(names) > 3 else ''}. "
            f"{_ADVICE}"
        )


def finish(skeleton: Skeleton, missing: set[str], device: str | torch.device) -> Any:
    """The model of a filled skeleton, ready to run: weights tied, buffers computed, in evaluation mode."""
    model = skeleton.model
    report = LoadStateDictInfo(
        missing_keys=missing,
        unexpected_keys=set(),
        mismatched_keys=set(),
        conversion_errors={},
        error_msgs=[],
        skipped_pp_keys=set(),
    )
    type(model)._finalize_model_loading(model, _settings(skeleton, device), report)
    if skeleton.quantizer is not None:
        skeleton.quantizer.postprocess_model(model)
    return model.eval()


def return_free_memory() -> None:
    """Give the memory that a conversion has freed back to the system, where the C library can (glibc).

    Fusing leaves holes of some megabytes between the weights of successive layers: a third of the result, uncalled for.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _settings(skeleton: Skeleton, device: str | torch.device) -> LoadStateDictConfig:
    return LoadStateDictConfig(
        device_map={"": torch.device(device)},
        dtype=skeleton.dtype,
        dtype_plan=skeleton.model._get_dtype_plan(skeleton.dtype),
        hf_quantizer=skeleton.quantizer,
        weight_mapping=skeleton.conversions,
    )


_ADVICE = "Fetch configuration and weights of one version."
