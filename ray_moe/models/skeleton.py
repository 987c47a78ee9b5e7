"""From a checkpoint's configuration to its model without weights, or to the reason why it cannot be served.

Decides the class as `AutoModelForCausalLM` (or `AutoModelForSeq2SeqLM`) does, never runs code from the checkpoint, and
reads no tensor. Called by `models/huggingface.py`.
"""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)
from transformers.utils.generic import ContextManagers

from ray_moe.errors import InvalidCheckpoint, UnsupportedModel
from ray_moe.models.checkpoint import CONFIG, CheckpointFiles
from ray_moe.models.experts import experts_modules
from ray_moe.models.families import UNSUPPORTED, adapt, extra_conversions
from ray_moe.models.quantization import dequantizer
from ray_moe.types import LayerPath

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device, and how its weights on disk become its parameters."""

    model: Any
    experts: dict[LayerPath, nn.Module]
    """Its experts modules, by path, in model order."""
    dtype: torch.dtype
    """What its weights are once loaded (a few may have to stay in float32)."""
    conversions: list[Any]
    """`transformers`' weight transforms, in order; they keep a little state, so one skeleton is for one thread."""
    quantizer: Any | None


def read_config(files: CheckpointFiles, encoder_decoder: bool = False) -> Any:
    """The checkpoint's configuration, as `transformers` understands it.

    Args: encoder_decoder: whether a model that has an encoder beside its decoder will do.

    Raises:
        InvalidCheckpoint: a value in it is out of place.
        UnsupportedModel: the family is unknown, or known not to work with its experts apart.
    """
    model_type = files.config.get("model_type")
    if not isinstance(model_type, str):
        raise InvalidCheckpoint(f"{files.folder / CONFIG} names no model_type, so the family of the model is unknown.")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=1)
        hint = f" (the nearest it knows is {near[0]!r})" if near else ""
        own_code = "auto_map" in files.config
        code = " The checkpoint brings code of its own, which is never run here." if own_code else ""
        raise UnsupportedModel(f"transformers knows no model_type {model_type!r}{hint}.{code}")
    if model_type in UNSUPPORTED:
        raise UnsupportedModel(f"{model_type} models cannot be served: {UNSUPPORTED[model_type]}")
    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidCheckpoint(f"transformers refuses {files.folder / CONFIG}: {_one_line(error)}") from error
    if config.is_encoder_decoder and not encoder_decoder:
        raise UnsupportedModel(
            f"{model_type} is an encoder-decoder model: services serve it, but do not train or export it. In a process "
            "of your own it can be trained with its experts apart: Checkpoint.open(model, encoder_decoder=True)."
        )
    return config


def build(config: Any, files: CheckpointFiles) -> Skeleton:
    """The model of `config` on the meta device, its experts on `transformers`' experts interface.

    Raises:
        UnsupportedModel: it does not generate text, it cannot be built, it has no routed experts, or it is quantised
            with a method that cannot be undone.
    """
    config = copy.deepcopy(config)
    quantizer = dequantizer(config)
    model_class, config = _resolve_class(config)
    dtype = _dtype(config, files, quantizer)
    try:
        with ContextManagers(model_class.get_init_context(dtype, quantizer is not None, False, False)):
            model = model_class(config)
    except Exception as error:
        raise UnsupportedModel(
            f"transformers cannot build this {config.model_type} model from its {CONFIG}: {_one_line(error)}"
        ) from error
    adapt(model)
    experts = experts_modules(model)
    if not experts:
        raise UnsupportedModel(
            f"this {config.model_type} model is dense: it has no routed experts to put behind actors. "
            "Serve it as it is, or make a Mixture-of-Experts model of it first: ray-moe upcycle DENSE OUT."
        )
    if quantizer is not None:
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=None)
    conversions = extra_conversions(model) + get_model_conversion_mapping(model, None, quantizer)
    return Skeleton(model, experts, dtype, conversions, quantizer)


def _resolve_class(config: Any) -> tuple[Any, Any]:
    """The model class, and the part of the configuration it takes."""
    decoders = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    for mapping in (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,) if config.is_encoder_decoder else decoders:
        if type(config) not in mapping:
            continue
        model_class = mapping[type(config)]
        model_class = model_class[0] if isinstance(model_class, tuple) else model_class
        if not model_class.can_generate():
            break
        if config.sub_configs.get("text_config") is model_class.config_class:
            text_config = config.get_text_config()
            text_config.dtype = text_config.dtype or config.dtype
            return model_class, text_config
        return model_class, config
    raise UnsupportedModel(f"transformers has no model that generates text for {config.model_type!r}.")


def _dtype(config: Any, files: CheckpointFiles, quantizer: Any | None) -> torch.dtype:
    """The dtype that `config` names, else that of the first plain tensor, as `transformers` chooses it."""
    dtype = config.dtype
    if not isinstance(dtype, torch.dtype):
        on_disk = (_DTYPES.get(files.tensors[name].dtype) for name in sorted(files.tensors))
        dtype = torch.bfloat16 if quantizer is not None else next(filter(None, on_disk), torch.float32)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    return dtype


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
