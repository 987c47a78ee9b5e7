"""From a model's parameters to the names and shapes that they have in its checkpoint: the way back of `layout.py`.

A tensor that is only named differently on disk gets the very name it was read from. What was stacked, fused or
transposed while loading is taken apart by `transformers`' own conversion, backwards. Called by `models/export.py`.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from ray_moe.errors import InvalidRequest, UnsupportedModel
from ray_moe.models.huggingface import Checkpoint
from ray_moe.models.layout import Renaming
from ray_moe.models.lazy import TORCH_DTYPES
from ray_moe.models.skeleton import build
from ray_moe.models.writing import TensorSpec

_AS_THEY_ARE = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
"""Dtypes of plain weights and of buffers on disk; those of quantised weights are not for writing."""


class DiskNames:
    """The names of one checkpoint. Quantised ones are written as the plain weights that they are loaded as."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
        """With `dtype`, weights that are loaded in the checkpoint's dtype are to be written in this one.

        Raises:
            UnsupportedModel: this family's conversion cannot be done backwards.
        """
        self._dtype = dtype
        self._loaded_dtype = checkpoint.dtype
        self._headers = checkpoint.files.tensors
        skeleton = build(_plain_config(checkpoint), checkpoint.files)
        self._model: Any = skeleton.model
        self._places = checkpoint.places
        renamed = Renaming(skeleton)
        origins: dict[str, list[str]] = defaultdict(list)
        converted: set[str] = set()
        self.unplaced: list[str] = []
        """Tensors on disk that are no part of the model (of a vision tower, of another head ...), in natural order."""
        for name in sorted(self._headers, key=dot_natural_key):
            target, pattern = renamed(name)
            if target not in renamed.places:
                self.unplaced.append(name)
                continue
            origins[target].append(name)
            if pattern is not None:
                converted.add(target)
        # As transformers keeps them for saving: which prefixes to put back depends on those that were there.
        self._model._weight_conversions = [rule for rule in skeleton.conversions if rule.was_used()]
        self._same = {target: names[0] for target, names in origins.items() if target not in converted}
        self._tied = checkpoint.tied
        self._left_out = (set(self._places) - set(origins)) & ({*self._tied} | _not_saved(self._model))
        self.groups = self._grouped(checkpoint)
        """Names of parameters that are converted together; one group is the experts of a layer, or a part of the
        backbone, in model order."""
        self.specs = self._planned([name for names in origins.values() for name in names])
        """All tensors of the model as they are written, by name on disk, in the order of the groups."""

    def on_disk(self, group: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a group, by name on disk, from its parameters in `state` (which may have others too).

        Of tied weights, one is enough.

        Raises:
            InvalidRequest: one is missing, or has the wrong shape.
        """
        chosen: dict[str, torch.Tensor] = {}
        for target in self.groups[group]:
            tensor, place = state.get(target, state.get(self._tied.get(target, ""))), self._places[target]
            if tensor is None or tensor.shape != place.shape:
                found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise InvalidRequest(f"{target} {found}; expected a tensor of shape {tuple(place.shape)}")
            chosen[target] = tensor.detach()
        named = {self._same[target]: tensor for target, tensor in chosen.items() if target in self._same}
        others = {target: tensor for target, tensor in chosen.items() if target not in self._same}
        return named | revert_weight_conversion(self._model, others) if others else named

    def _grouped(self, checkpoint: Checkpoint) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = defaultdict(list)
        for target in self._places:
            if target in self._left_out:
                continue
            path = next((path for path in checkpoint.layers if target.startswith(f"{path}.")), None)
            number = re.search(r"\.\d+\.", target)
            groups[path or (target[: number.end() - 1] if number else "")].append(target)
        return dict(groups)

    def _planned(self, originals: list[str]) -> dict[str, TensorSpec]:
        """Every tensor that will be written, found out by converting without data."""
        specs: dict[str, TensorSpec] = {}
        for group in self.groups:
            for name, blank in self.on_disk(group, self._places).items():
                specs[name] = TensorSpec(self._written_dtype(name, blank.dtype), tuple(blank.shape))
        wrong = [
            name for name in originals if name not in specs or specs[name].shape != tuple(self._headers[name].shape)
        ]
        if wrong:
            raise UnsupportedModel(
                f"the weights of {self._model.config.model_type} models cannot be written back: {len(wrong)} tensors "
                f"would not be as they are in the checkpoint, {wrong[0]} among them"
            )
        return specs

    def _written_dtype(self, name: str, loaded: torch.dtype) -> torch.dtype:
        if self._dtype is not None and loaded == self._loaded_dtype:
            return self._dtype
        header = self._headers.get(name)
        return TORCH_DTYPES[header.dtype] if header is not None and header.dtype in _AS_THEY_ARE else loaded


def _plain_config(checkpoint: Checkpoint) -> Any:
    """The configuration of the same model, not quantised."""
    config = copy.deepcopy(checkpoint.config)
    for part in (config, config.get_text_config(decoder=True)):
        part.dtype = checkpoint.dtype
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config


def _not_saved(model: Any) -> set[str]:
    """What a checkpoint may lack: buffers that are computed, and what `transformers` never writes."""
    return {name for name, _ in model.named_buffers()} | set(model._keys_to_ignore_on_save or ())
