"""A dense checkpoint, opened to have its feed-forward networks read in parts.

Reads configuration and headers only; a tensor, or some of its rows, when it is asked for. Refuses what it does not
know to the last tensor, so that nothing of a model is lost on the way. Called by `models/upcycle.py` and
`models/merge.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import dot_natural_key

from ray_moe.errors import InvalidCheckpoint, UnsupportedModel
from ray_moe.models.checkpoint import CheckpointFiles, Reader
from ray_moe.models.ffn import FFN
from ray_moe.models.lazy import TORCH_DTYPES
from ray_moe.models.moe_targets import check_family
from ray_moe.models.skeleton import read_config
from ray_moe.models.writing import TensorSpec

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_COMPUTED = "rotary_emb.inv_freq"
"""In files of early versions of `transformers`, which computes it."""


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A dense decoder-only model on disk. Made by `open`."""

    name: str
    """As it was given to `open`."""
    config: Any
    files: CheckpointFiles
    backbone: tuple[str, ...]
    """Names on disk of all tensors but those of the feed-forward networks, in natural order."""

    @classmethod
    def open(cls, model: str | Path) -> Dense:
        """Find and check the dense checkpoint `model`, a directory or a name on the Hugging Face hub.

        Raises:
            NotFound: there is no such checkpoint.
            InvalidCheckpoint: a file is missing or damaged, or tensors are missing.
            UnsupportedModel: no MoE family has its block, it is quantised, or it has tensors that are not known here.
        """
        files = CheckpointFiles.open(model)
        config = read_config(files)
        check_family(config.model_type)
        if getattr(config, "quantization_config", None):
            raise UnsupportedModel(
                f"{model} is quantised; only plain weights are made into experts. Use its unquantised version, or "
                "write one: AutoModelForCausalLM.from_pretrained(FOLDER).dequantize().save_pretrained(NEW_FOLDER)"
            )
        return cls(str(model), config, files, _checked_names(config, files))

    @property
    def num_layers(self) -> int:
        layers: int = self.config.num_hidden_layers
        return layers

    @property
    def hidden_size(self) -> int:
        width: int = self.config.hidden_size
        return width

    @property
    def width(self) -> int:
        """F, of its feed-forward networks."""
        width: int = self.config.intermediate_size
        return width

    @property
    def dtype(self) -> torch.dtype:
        """Of its feed-forward networks on disk."""
        return self.spec(ffn_names(0)[0]).dtype

    @property
    def num_parameters(self) -> int:
        """As they are in memory: of tied weights, one."""
        names = [*self.backbone, *(name for layer in range(self.num_layers) for name in ffn_names(layer))]
        tied = self.config.tie_word_embeddings and "lm_head.weight" in names
        return sum(
            math.prod(self.files.tensors[name].shape) for name in names if not (tied and name == "lm_head.weight")
        )

    def spec(self, name: str) -> TensorSpec:
        """What a tensor is on disk."""
        header = self.files.tensors[name]
        return TensorSpec(TORCH_DTYPES[header.dtype], header.shape)

    def ffn(self, reader: Reader, layer: int, part: int = 0, num_parts: int = 1) -> FFN:
        """The network of a layer; of `num_parts` equal ones along F, the part `part`, of which alone it reads."""
        gate, up, down = (reader.slice(name) for name in ffn_names(layer))
        width = self.width // num_parts
        rows = slice(part * width, (part + 1) * width)
        return FFN(gate[rows], up[rows], down[:, rows])


def ffn_names(layer: int) -> tuple[str, str, str]:
    """Names on disk of the gate's, the up and the down projection of a layer."""
    gate, up, down = (f"model.layers.{layer}.mlp.{name}.weight" for name in _PROJECTIONS)
    return gate, up, down


def _checked_names(config: Any, files: CheckpointFiles) -> tuple[str, ...]:
    """The backbone's tensors, after checking that what is on disk is the whole model and nothing else."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UnsupportedModel(f"transformers cannot build this {config.model_type} model: {error}") from error
    places = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: header.shape for name, header in files.tensors.items() if not name.endswith(_COMPUTED)}
    networks = {name for layer in range(config.num_hidden_layers) for name in ffn_names(layer)}
    unknown = sorted(found.keys() - places.keys(), key=dot_natural_key)
    if unknown:
        raise UnsupportedModel(
            f"{files.folder} has {len(unknown)} tensors that are no part of a {config.model_type} model for "
            f"transformers: {_few(unknown)}. Write it anew with save_pretrained()."
        )
    missing = sorted(places.keys() - found.keys() - _tied(model), key=dot_natural_key)
    if missing:
        raise InvalidCheckpoint(f"{files.folder} lacks {len(missing)} tensors of the model: {_few(missing)}.")
    wrong = [name for name, shape in found.items() if shape != places[name]]
    if wrong:
        raise InvalidCheckpoint(
            f"{wrong[0]} in {files.folder} has shape {found[wrong[0]]}; its configuration says {places[wrong[0]]}."
        )
    return tuple(sorted(found.keys() - networks, key=dot_natural_key))


def _tied(model: Any) -> set[str]:
    """Weights that may be missing, because they are others under another name."""
    tied: dict[str, str] = model.all_tied_weights_keys
    return set(tied)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
