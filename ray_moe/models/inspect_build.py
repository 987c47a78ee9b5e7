"""From a configuration to a network to look at: whole on the meta device, small with random weights, or from its files.

Runs no code that comes with a checkpoint. Called by `models/inspect.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.models.auto import modeling_auto as auto

from ray_moe.errors import UnsupportedModel
from ray_moe.models.inspect_forward import MAX_TOKENS
from ray_moe.models.inspect_module import Found
from ray_moe.models.quiet import no_progress_bars

MAX_SMALL_PARAMS = 100_000_000
"""A shrunken model is no larger than this."""
_VOCABULARY = 512
_MIN_WIDTH = 64
_GRAIN = 16
"""What widths are multiples of: grouped matrix products want it."""
_MAX_WIDTH = 32
"""Of a feed-forward network in a shrunken model: wide enough that some neurons of each expert are active."""
_WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "intermediate_size_mlp",
    "ffn_hidden_size",
    "expert_ffn_hidden_size",
    "d_ff",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "n_inner",
)
_DEPTHS = (
    "num_hidden_layers",
    "num_layers",
    "n_layers",
    "n_layer",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)


def read_config(folder_or_file: Path) -> Any:
    """The configuration as `transformers` understands it. Raises: what `transformers` raises for one that is wrong."""
    return AutoConfig.from_pretrained(folder_or_file, trust_remote_code=False)


def class_of(config: Any) -> Any:
    """The class that the configuration names, else the one that this kind of model is mostly used by."""
    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    mappings = [auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_MASKED_LM_MAPPING]
    if config.is_encoder_decoder:
        mappings = [auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, *mappings]
    elif getattr(config, "is_decoder", None) is False:  # BERT and its like, unless they are told to generate
        mappings.reverse()
    if "text_config" in config.sub_configs:
        mappings.insert(0, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    for mapping in (*mappings, auto.MODEL_MAPPING):
        if type(config) in mapping:
            named = mapping[type(config)]
            return named[0] if isinstance(named, tuple) else named
    raise UnsupportedModel(f"transformers has no model for the configuration of {config.model_type!r}.")


def on_meta(config: Any, model_class: Any | None = None) -> Any:
    """The whole model on the meta device, its tied weights tied; of the class of `class_of` unless told otherwise."""
    config = _plain(config)
    with torch.device("meta"):
        model = (model_class or class_of(config))._from_config(config)
    model.tie_weights()
    return model.eval()


def _plain(config: Any) -> Any:
    """A copy without quantisation: parameters are counted as they are once loaded."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load(folder: Path, config: Any) -> Any:
    """The model of a checkpoint, in float32, on the CPU."""
    with no_progress_bars():
        return class_of(config).from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()


def small(config: Any) -> Any:
    """A model of the same configuration, with fewer layers and narrower ones, and random weights.

    Experts and how many of them are chosen stay as they are. Heads keep their width, so that positions stay valid.

    Raises: what the model's class raises for sizes that do not go together; `UnsupportedModel` if it stays large.
    """
    failures: list[Exception] = []
    for narrow, layers in ((True, 8), (True, 2), (False, 8), (False, 2)):  # some families tie the width to other sizes
        shrunk = _plain(config)
        for part in [shrunk, *(getattr(shrunk, name, None) for name in shrunk.sub_configs)]:
            if part is not None:
                _shrink(part, narrow, layers)
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in class_of(shrunk)._from_config(shrunk).parameters())
            if size <= MAX_SMALL_PARAMS:
                return randomized(class_of(shrunk)._from_config(shrunk, dtype=torch.float32))
            failures.append(UnsupportedModel(f"even with small layers it has {size / 1e6:.0f} million parameters"))
        except Exception as error:  # the classes check their sizes in many ways
            failures.append(error)
    raise failures[0]


def randomized(model: Any) -> Any:
    """The same with weights under which gates choose differently per token."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                fan_in = max(1, math.prod(parameter.shape[1:]) if parameter.ndim == 2 else parameter.shape[-1])
                parameter.normal_(0, fan_in**-0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
    return model.eval()


def _shrink(config: Any, narrow: bool, layers: int) -> None:
    depth = next(filter(None, (_number(config, name) for name in _DEPTHS)), 0)
    for name in _DEPTHS:
        _set(config, name, min(layers, _number(config, name) or layers))
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == depth > layers:
            setattr(config, name, value[:layers])
    if narrow:
        _narrow(config)
    for name in _WIDTHS:
        _set(config, name, min(_MAX_WIDTH, _number(config, name) or _MAX_WIDTH))
    vocabulary = _number(config, "vocab_size")
    if vocabulary is not None and vocabulary > _VOCABULARY:
        config.vocab_size = _VOCABULARY
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            if (_number(config, name) or 0) >= _VOCABULARY:
                setattr(config, name, 0)


def _narrow(config: Any) -> None:
    """Fewer heads of the same width, and a hidden state that is smaller by as much."""
    heads, width = _number(config, "num_attention_heads"), _number(config, "hidden_size")
    if not heads or not width:
        return
    fitting = [f for f in range(1, heads + 1) if heads % f == 0 and width % (f * _GRAIN) == 0]
    factor = max((f for f in fitting if width // f >= _MIN_WIDTH), default=1)
    if "head_dim" in vars(config) or hasattr(type(config), "head_dim"):
        _set(config, "head_dim", _number(config, "head_dim") or width // heads)
    _set(config, "num_key_value_heads", math.gcd(_number(config, "num_key_value_heads") or heads, heads // factor))
    _set(config, "num_attention_heads", heads // factor)
    _set(config, "hidden_size", width // factor)
    inner = _number(config, "mamba_d_head")
    if inner and (expand := _number(config, "mamba_expand")):
        _set(config, "mamba_n_heads", max(1, expand * (width // factor) // inner))


def _set(config: Any, name: str, value: int) -> None:
    if _number(config, name) is not None or name == "head_dim":
        setattr(config, name, value)


def _number(config: Any, name: str) -> int | None:
    """A whole number of the configuration; None where there is none, or one for each layer."""
    try:
        value = getattr(config, name, None)
    except Exception:  # configurations with values for each layer raise an error of their own
        return None
    return value if type(value) is int else None


def inputs_of(model: Any, num_tokens: int = MAX_TOKENS) -> dict[str, Any]:
    """Random tokens, or an image, for a model of `transformers`. Raises: `UnsupportedModel` if it takes neither."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.randn(1, getattr(config, "num_channels", 3), size, size, generator=generator)}
    vocabulary = config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (1, num_tokens), generator=generator)
    if model.main_input_name != "input_ids":
        raise UnsupportedModel(f"it takes {model.main_input_name}, of which nothing is known here")
    more: dict[str, Any] = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    return {"input_ids": ids} | more | ({"use_cache": False} if model.can_generate() else {})


def mixers(config: Any) -> dict[str, int]:
    """How many layers mix tokens in which way, where the configuration says so."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    return {str(kind): list(kinds).count(kind) for kind in dict.fromkeys(kinds)}


# --- What generation keeps -------------------------------------------------------------------------------------------
def kv_numbers(model: Any, groups: list[Found]) -> tuple[int, int] | None:
    """(numbers that the cache keeps of a token, layers that attend), by a run on the meta device; None without either.

    Experts take no part: on the meta device nobody can be chosen.
    """
    if not model.can_generate():
        return (0, 0)
    config = model.config
    for group in groups:
        model.get_submodule(group.path).forward = lambda hidden, *_, **__: hidden
    length = 2
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    try:
        with torch.no_grad(), torch.device("meta"):
            cache = model(**inputs, use_cache=True).past_key_values
        counts = list(_cached(getattr(cache, "self_attention_cache", cache), length))
    except Exception:  # what models do with values that are not there is their affair: there is a formula
        return _kv_formula(config.get_text_config(decoder=True))
    return (sum(counts), len(counts))


def _cached(cache: Any, length: int) -> Iterator[int]:
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.numel():
            yield (keys.numel() + values.numel()) // length


def _kv_formula(config: Any) -> tuple[int, int] | None:
    """Keys and values of every key-value head in every layer that attends; nothing where no layer does."""
    layers = next(filter(None, (_number(config, name) for name in _DEPTHS)), None)
    heads, width = _number(config, "num_attention_heads"), _number(config, "hidden_size")
    if heads is None:
        return (0, 0)
    if layers is None or width is None:
        return None
    kinds = mixers(config)
    layers = sum(n for kind, n in kinds.items() if "attention" in kind and "linear" not in kind) if kinds else layers
    kv_heads = _number(config, "num_key_value_heads") or heads
    head_dim = _number(config, "head_dim") or _number(config, "d_kv") or width // heads
    return (2 * kv_heads * head_dim * layers, layers)


def attention_width(config: Any, num_layers: int) -> int | None:
    """Heads times head width, over the layers that attend."""
    text = config.get_text_config(decoder=True)
    heads, width = _number(text, "num_attention_heads"), _number(text, "hidden_size")
    if heads is None or width is None:
        return 0 if num_layers == 0 else None
    return num_layers * heads * (_number(text, "head_dim") or width // heads)


def is_transformers(model: nn.Module) -> bool:
    """Whether its class, and so its configuration, is of `transformers`."""
    return isinstance(model, transformers.PreTrainedModel) and type(model).__module__.startswith("transformers.")
