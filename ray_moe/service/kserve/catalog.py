"""The models that the protocol shows: the whole model, which generates, and each of its MoE layers.

What they are called, and which tensors they take and give. Pure; facts come from the `Backend`, which must be ready.
Letters in shapes: T tokens, D width of the layer, K experts per token, n anything.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from itertools import islice

from ray_moe.errors import NotFound
from ray_moe.service.backend import Backend
from ray_moe.types import LayerSpec

VERSION = "1"
"""Of every model: what is served has no versions side by side."""

PLATFORM = "ray_moe"

_MAX_NAME = 200  # of a name that comes from outside and goes into a message

_ANY = -1
_INTEGERS = ("INT32", "INT64", "UINT32", "UINT64")
_FLOATS = ("FP32", "FP64")
_HALVES = ("FP16", "BF16")
_DATATYPES = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "float64": "FP64"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output of a model."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """-1 is any size."""
    optional: bool = True
    """Of an input: may be left out. Of an output: whether it is given only when it is asked for."""
    also: tuple[str, ...] = ()
    """Datatypes that are taken beside `datatype`."""

    @property
    def datatypes(self) -> tuple[str, ...]:
        return (self.datatype, *(datatype for datatype in self.also if datatype != self.datatype))


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    layer: LayerSpec | None = None
    """None for the model that generates."""


def _one(name: str, datatype: str, *also: str) -> TensorInfo:
    return TensorInfo(name, datatype, (1,), also=also)


_TEXT = _one("text_input", "BYTES")
_TOKENS = TensorInfo("token_ids", "INT64", (_ANY,), also=_INTEGERS)
_STOP = TensorInfo("stop", "BYTES", (_ANY,))
_SETTINGS = (
    _one("max_tokens", "INT32", *_INTEGERS),
    _one("temperature", "FP32", *_FLOATS),
    _one("top_p", "FP32", *_FLOATS),
    _one("top_k", "INT32", *_INTEGERS),
    _one("min_p", "FP32", *_FLOATS),
    _one("repetition_penalty", "FP32", *_FLOATS),
    _one("presence_penalty", "FP32", *_FLOATS),
    _one("frequency_penalty", "FP32", *_FLOATS),
    _one("seed", "UINT64", *_INTEGERS),
    _one("ignore_eos", "BOOL"),
    _one("stream", "BOOL"),
    TensorInfo("stop_token_ids", "INT64", (_ANY,), also=_INTEGERS),
)
_GENERATED = (
    TensorInfo("token_ids", "INT64", (_ANY,), optional=False),
    TensorInfo("finish_reason", "BYTES", (1,), optional=False),
    TensorInfo("logprobs", "FP32", (_ANY,)),
    TensorInfo("num_prompt_tokens", "INT64", (1,)),
    TensorInfo("num_cached_tokens", "INT64", (1,)),
)


def generation_model(backend: Backend) -> Model:
    """The whole model. Without a tokenizer it knows no texts."""
    if not backend.has_tokenizer:
        return Model(backend.model_name, (_TOKENS, *_SETTINGS), _GENERATED)
    text_output = TensorInfo("text_output", "BYTES", (1,), optional=False)
    return Model(backend.model_name, (_TEXT, _TOKENS, *_SETTINGS, _STOP), (text_output, *_GENERATED))


def layer_model(backend: Backend, spec: LayerSpec) -> Model:
    """One layer; routing may be left out where its gate can be called."""
    own = _DATATYPES.get(spec.dtype, "FP32")
    with_gate = spec.path in backend.layers_with_gate
    also = (*_FLOATS, *_HALVES)
    return Model(
        f"{backend.model_name}/{spec.path}",
        (
            TensorInfo("hidden", own, (_ANY, spec.hidden_size), optional=False, also=also),
            TensorInfo("index", "INT64", (_ANY, _ANY), optional=with_gate, also=("INT32",)),
            TensorInfo("weight", own, (_ANY, _ANY), optional=with_gate, also=also),
        ),
        (TensorInfo("hidden", own, (_ANY, spec.output_size), optional=False),),
        spec,
    )


def can_generate(backend: Backend) -> bool:
    return backend.vocab_size > 0


def list_models(backend: Backend) -> list[Model]:
    """All models, the whole one first, the layers in their order."""
    whole = [generation_model(backend)] if can_generate(backend) else []
    return whole + [layer_model(backend, spec) for spec in backend.layers.values()]


def find_model(backend: Backend, name: str, version: str) -> Model:
    """The model of that name, whose version may be left out.

    Raises: `NotFound`.
    """
    model = _find(backend, name)
    if model is None:
        names = [*([backend.model_name] if can_generate(backend) else ()), *_layer_names(backend)]
        asked = name[:_MAX_NAME]
        nearest = "".join(f"did you mean {match}? " for match in difflib.get_close_matches(asked, names, n=1))
        some = ", ".join(islice(names, 3)) + (", ..." if len(names) > 3 else "")
        raise NotFound(f"there is no model {asked!r}: {nearest}There are {len(names)}: {some}")
    check_version(version)
    return model


def has_model(backend: Backend, name: str, version: str) -> bool:
    return version in ("", VERSION) and _find(backend, name) is not None


def check_version(version: str) -> None:
    """Raises: `NotFound`."""
    if version not in ("", VERSION):
        raise NotFound(f"there is no version {version[:_MAX_NAME]!r}; expected {VERSION!r} or none")


def _layer_names(backend: Backend) -> list[str]:
    return [f"{backend.model_name}/{path}" for path in backend.layers]


def _find(backend: Backend, name: str) -> Model | None:
    if name == backend.model_name:
        return generation_model(backend) if can_generate(backend) else None
    prefix = f"{backend.model_name}/"
    spec = backend.layers.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
    return None if spec is None else layer_model(backend, spec)
