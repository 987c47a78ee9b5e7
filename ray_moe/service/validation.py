"""What a request may be, checked before the backend sees it; shared by every front door.

Pure functions over a `Backend`'s facts. They raise `InvalidRequest`, `NotFound` or `UnsupportedModel`, and the message
says what was wrong, what was expected and what to do. Letters in shapes: T tokens, D width of the layer, E experts of
the layer, K experts per token.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_moe.errors import InvalidRequest, NotFound, UnsupportedModel
from ray_moe.service.backend import Backend
from ray_moe.types import CanaryRequest, ChaosRequest, GenerateRequest, LayerPath, LayerSpec, MicroBatch, StepOptions

MAX_NEW_TOKENS = 2**20
"""For a model that has no bound of its own."""

MIN_TEMPERATURE = 1e-4
"""Logits divided by less leave float32."""

MAX_PENALTY = 100.0
MIN_REPETITION_PENALTY = 0.01
"""Logits divided by much less leave float32 as well."""

MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6
"""Of a loss in the mean over a step: sums of gradients must not leave float32."""
MAX_LR = 1e6
MAX_STEP = 2**53

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
MAX_STOP_TOKENS = 1000

_F64 = sys.float_info.max
_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}

_MAX_NAME = 200  # of a name that comes from outside and goes into a message


# --- One layer -----------------------------------------------------------------------------------------------
def find_layer(backend: Backend, layer: LayerPath | int | None) -> LayerSpec:
    """The layer by path, or by number in the order of the model."""
    paths = list(backend.layers)
    some = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
    if layer is None:
        raise InvalidRequest(f"no layer is named; expected layer_path (one of {some}) or layer_index")
    if isinstance(layer, int):
        if not 0 <= layer < len(paths):
            raise NotFound(f"no MoE layer has index {layer}; the model has {len(paths)}: expected 0..{len(paths) - 1}")
        return backend.layers[paths[layer]]
    if layer not in backend.layers:
        asked = layer[:_MAX_NAME]
        nearest = "".join(f"did you mean {path}? " for path in difflib.get_close_matches(asked, paths, n=1))
        raise NotFound(f"the model has no MoE layer {asked!r}: {nearest}It has {len(paths)}: {some}")
    return backend.layers[layer]


def check_hidden(spec: LayerSpec, hidden: NDArray[Any], max_tokens: int) -> None:
    """Raise unless `hidden` is [T, D] with T <= `max_tokens`, of floats, all finite, also in the layer's dtype."""
    if hidden.dtype.kind != "f":
        raise InvalidRequest(f"hidden has dtype {hidden.dtype}; expected a float dtype (F64, F32, F16 or BF16)")
    if hidden.ndim != 2 or hidden.shape[1] != spec.hidden_size:
        raise InvalidRequest(
            f"hidden has shape {list(hidden.shape)}; layer {spec.path} expects [T, {spec.hidden_size}], a row per token"
        )
    if len(hidden) > max_tokens:
        raise InvalidRequest(f"hidden has {len(hidden):,} tokens; at most {max_tokens:,} go in one call: split it")
    _check_numbers("hidden", hidden, _LARGEST.get(spec.dtype, _F64), spec.dtype)


def check_routing(spec: LayerSpec, num_tokens: int, index: NDArray[Any], weight: NDArray[Any]) -> None:
    """Raise unless `index` and `weight` are both [T, K], in range and finite."""
    if index.dtype.kind != "i":
        raise InvalidRequest(f"index has dtype {index.dtype}; expected integers (I64 or I32): convert it")
    if weight.dtype.kind != "f":
        raise InvalidRequest(f"weight has dtype {weight.dtype}; expected a float dtype (F64, F32, F16 or BF16)")
    for name, array in (("index", index), ("weight", weight)):
        if array.ndim != 2 or array.shape[0] != num_tokens:
            raise InvalidRequest(
                f"{name} has shape {list(array.shape)}; expected [{num_tokens}, K]: one row for each row of hidden"
            )
    if index.shape != weight.shape:
        raise InvalidRequest(
            f"index has shape {list(index.shape)} and weight {list(weight.shape)}; expected the same [T, K] for both"
        )
    if not 1 <= index.shape[1] <= spec.num_experts:
        raise InvalidRequest(
            f"index has {index.shape[1]} experts per token; layer {spec.path} expects 1..{spec.num_experts}"
        )
    row, column, num_wrong = _first((index < 0) | (index > spec.num_experts))
    if num_wrong:
        raise InvalidRequest(
            f"index[{row}, {column}] is {index[row, column]}; layer {spec.path} has experts 0..{spec.num_experts - 1}, "
            f"and {spec.num_experts} means no expert ({num_wrong:,} such entries)"
        )
    _check_numbers("weight", weight)


def check_gate(backend: Backend, spec: LayerSpec) -> None:
    """Raise unless the layer's own block can be called."""
    if spec.path not in backend.layers_with_gate:
        raise UnsupportedModel(
            f"the gate of layer {spec.path} cannot be called on its own in this model: give routing (index and weight)"
        )


def _check_numbers(name: str, array: NDArray[Any], largest: float = _F64, dtype: str = "") -> None:
    # The extremes tell, without another array of this size: a NaN anywhere makes both NaN.
    if not array.size or all(abs(float(extreme)) <= largest for extreme in (array.min(), array.max())):
        return
    bound = array.dtype.type(min(largest, float(np.finfo(array.dtype).max)))
    row, column, num_wrong = _first(~(np.abs(array) <= bound))
    holds = f", and {dtype}, the layer's dtype, holds up to {largest:.4g}" if dtype else ""
    raise InvalidRequest(
        f"{name}[{row}, {column}] is {array[row, column]}; expected finite numbers{holds} ({num_wrong:,} are not): "
        "mask or drop those tokens"
    )


def _first(wrong: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Row and column of the first True of a matrix, and how many there are."""
    num_wrong = int(np.count_nonzero(wrong))
    row, column = divmod(int(wrong.argmax()), wrong.shape[1]) if num_wrong else (0, 0)
    return row, column, num_wrong


# --- Generation ----------------------------------------------------------------------------------------------
def check_generate(backend: Backend, request: GenerateRequest, max_prompt_bytes: int) -> None:
    """Raise for what can be told without the tokenizer; the backend does the rest (see `Backend.generate`)."""
    if (request.prompt is None) == (request.token_ids is None):
        raise InvalidRequest("expected exactly one of prompt (text) and token_ids")
    if request.prompt is not None and not backend.has_tokenizer:
        raise InvalidRequest("this model has no tokenizer: send token_ids instead of prompt")
    if not (request.prompt or request.token_ids):
        raise InvalidRequest("the prompt is empty; expected at least one token (the model's start token will do)")
    if request.prompt is not None:
        _check_text(request.prompt, max_prompt_bytes)
    _check_length(backend, request)  # before anything that takes a while for many tokens
    if request.token_ids is not None:
        _check_token_ids(backend, request.token_ids)
    if not (request.temperature == 0 or MIN_TEMPERATURE <= request.temperature < math.inf):
        raise InvalidRequest(
            f"temperature is {request.temperature}; expected 0 (greedy) or a number from {MIN_TEMPERATURE} on"
        )
    if not 0 < request.top_p <= 1:
        raise InvalidRequest(f"top_p is {request.top_p}; expected 0 < top_p <= 1 (1 keeps every token)")
    _check_choice(request)
    _check_stops(backend, request)


def _check_choice(request: GenerateRequest) -> None:
    """What the choice of a token is ruled by, but for temperature and top_p."""
    if request.top_k < 0:
        raise InvalidRequest(f"top_k is {request.top_k}; expected at least 0 (0 keeps every token)")
    if not 0 <= request.min_p <= 1:
        raise InvalidRequest(f"min_p is {request.min_p}; expected 0 to 1 (0 keeps every token)")
    penalty = request.repetition_penalty
    if penalty is not None and not MIN_REPETITION_PENALTY <= penalty <= MAX_PENALTY:
        raise InvalidRequest(
            f"repetition_penalty is {penalty}; expected {MIN_REPETITION_PENALTY} to {MAX_PENALTY:g} (1 changes nothing)"
        )
    for name in ("presence_penalty", "frequency_penalty"):
        if not abs(getattr(request, name)) <= MAX_PENALTY:
            raise InvalidRequest(f"{name} is {getattr(request, name)}; expected -{MAX_PENALTY:g} to {MAX_PENALTY:g}")
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
        raise InvalidRequest(f"logprobs is {request.logprobs}; expected 0 to {MAX_LOGPROBS}")


def _check_stops(backend: Backend, request: GenerateRequest) -> None:
    if len(request.stop) > MAX_STOPS:
        raise InvalidRequest(f"{len(request.stop)} stops are given; expected at most {MAX_STOPS}")
    for number, stop in enumerate(request.stop):
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise InvalidRequest(f"stop[{number}] has {len(stop)} characters; expected 1 to {MAX_STOP_LENGTH}")
    if request.stop and not backend.has_tokenizer:
        raise InvalidRequest("this model has no tokenizer: send stop_token_ids instead of stop")
    if len(request.stop_token_ids) > MAX_STOP_TOKENS:
        raise InvalidRequest(f"{len(request.stop_token_ids)} stop tokens; expected at most {MAX_STOP_TOKENS}")
    if request.stop_token_ids:
        _check_token_ids(backend, request.stop_token_ids, "stop_token_ids")


def _check_token_ids(backend: Backend, token_ids: tuple[int, ...], name: str = "token_ids") -> None:
    vocab_size = backend.vocab_size
    ids = np.asarray(token_ids)
    wrong = (ids < 0) | (ids >= vocab_size)
    if wrong.any():
        position = int(wrong.argmax())
        raise InvalidRequest(
            f"{name}[{position}] is {token_ids[position]}; the vocabulary has 0..{vocab_size - 1}: "
            "is the tokenizer another model's?"
        )


def _check_text(prompt: str, max_prompt_bytes: int) -> None:
    num_bytes = len(prompt.encode(errors="surrogatepass"))
    if num_bytes > max_prompt_bytes:
        raise InvalidRequest(
            f"the prompt has {num_bytes:,} bytes of UTF-8; at most {max_prompt_bytes:,} are taken "
            "(server.max_prompt_bytes): shorten it, or send token_ids"
        )


def _check_length(backend: Backend, request: GenerateRequest) -> None:
    wanted = request.max_new_tokens
    if wanted < 1:
        raise InvalidRequest(f"max_new_tokens is {wanted}; expected at least 1")
    bound = backend.max_positions
    if bound is None:
        if wanted > MAX_NEW_TOKENS:
            raise InvalidRequest(f"max_new_tokens is {wanted:,}; expected at most {MAX_NEW_TOKENS:,}")
        return
    num_prompt = 1 if request.token_ids is None else len(request.token_ids)  # text: at least one token
    if num_prompt + wanted > bound:
        at_least = "at least " if request.token_ids is None else ""
        raise InvalidRequest(
            f"the prompt has {at_least}{num_prompt:,} tokens and max_new_tokens is {wanted:,}, together more than the "
            f"model's {bound:,} positions: shorten the prompt or ask for fewer tokens"
        )


# --- Training ------------------------------------------------------------------------------------------------
NOT_COUNTED = -100
"""A label that does not count, as `transformers` has it."""
MAX_MICRO_BATCHES = 1024
"""Of one TrainStep."""
MAX_SAMPLE_TOKENS = 1024
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def client_id(wanted: str) -> str:
    """Raise unless it can be a client's id of something."""
    if not _ID.fullmatch(wanted):
        raise InvalidRequest(f"id is {wanted[:_MAX_NAME]!r}; expected 1 to 64 letters, digits, '.', '_' or '-'")
    return wanted


def check_tokens(backend: Backend, input_ids: NDArray[Any], labels: NDArray[Any], max_tokens: int) -> None:
    """Raise unless these are the tokens and labels of a micro-batch, [B, S] both, within the vocabulary."""
    for name, array in (("input_ids", input_ids), ("labels", labels)):
        if array.dtype.kind != "i":
            raise InvalidRequest(f"{name} has dtype {array.dtype}; expected integers (I64 or I32): convert it")
    if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        raise InvalidRequest(
            f"input_ids has shape {list(input_ids.shape)}; expected [B, S], one or more sequences of two or more tokens"
        )
    if labels.shape != input_ids.shape:
        raise InvalidRequest(
            f"labels has shape {list(labels.shape)} and input_ids {list(input_ids.shape)}; expected the same [B, S]"
        )
    if input_ids.size > max_tokens:
        raise InvalidRequest(
            f"the micro-batch has {input_ids.size:,} tokens; at most {max_tokens:,} go in one: make it several"
        )
    bound = backend.max_positions
    if bound is not None and input_ids.shape[1] > bound:
        raise InvalidRequest(f"the sequences have {input_ids.shape[1]:,} tokens; the model has {bound:,} positions")
    last = backend.vocab_size - 1
    for name, array, besides in (("input_ids", input_ids, ""), ("labels", labels, " and -100, which does not count")):
        row, column, num_wrong = _first(((array < 0) | (array > last)) & ~((array == NOT_COUNTED) & bool(besides)))
        if num_wrong:
            raise InvalidRequest(
                f"{name}[{row}, {column}] is {array[row, column]}; expected 0..{last}{besides} ({num_wrong:,} are not)"
            )
    if (labels[:, 1:] == NOT_COUNTED).all():
        raise InvalidRequest("no label counts: all behind the first of a sequence are -100; leave such batches out")


def check_weight(weight: float) -> None:
    """Raise unless a loss can weigh so much."""
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise InvalidRequest(f"weight is {weight}; expected {MIN_WEIGHT:g} to {MAX_WEIGHT:g} (1 is usual)")


def check_micro_batches(micros: Sequence[MicroBatch]) -> None:
    """Raise unless these can go into one call."""
    if not 1 <= len(micros) <= MAX_MICRO_BATCHES:
        raise InvalidRequest(f"{len(micros)} micro-batches are given; expected 1 to {MAX_MICRO_BATCHES:,}")
    if len({micro.micro_id for micro in micros}) < len(micros):
        raise InvalidRequest("two micro-batches have the same id; give each its own")


def step_number(step: int) -> int:
    """Raise unless it can be a step at all."""
    if not 0 <= step <= MAX_STEP:
        raise InvalidRequest(f"step is {step}; expected 0 to {MAX_STEP:,}")
    return step


def step_options(options: StepOptions) -> StepOptions:
    """Raise unless a step can be made so."""
    if options.step is not None:
        step_number(options.step)
    if options.lr is not None and not 0 <= options.lr <= MAX_LR:
        raise InvalidRequest(f"lr is {options.lr}; expected 0 to {MAX_LR:g}")
    if options.clip_norm is not None and not options.clip_norm > 0:
        raise InvalidRequest(f"clip_norm is {options.clip_norm}; expected a number above 0 (infinity does not clip)")
    return options


def check_sample(request: GenerateRequest) -> None:
    """Raise for what the model that is trained is not asked for; besides `check_generate`."""
    for name, given in (("stop", bool(request.stop)), ("logprobs", request.logprobs is not None)):
        if given:
            raise InvalidRequest(f"{name} is for published weights only: leave it out, or use Generate")
    if request.version is not None:
        raise InvalidRequest("a sample is of the weights that are being trained, not of a version: use Generate")
    if request.max_new_tokens > MAX_SAMPLE_TOKENS:
        raise InvalidRequest(
            f"max_new_tokens is {request.max_new_tokens:,}; a sample has at most {MAX_SAMPLE_TOKENS:,}: publish the "
            "weights and use Generate"
        )


# --- Changing the cluster ------------------------------------------------------------------------------------
MAX_ACTORS = 100_000
CANARY_MODES = ("shadow", "traffic")
CHAOS_KINDS = ("kill", "hang", "slow", "corrupt", "partition")
MAX_CHAOS_S = 3600.0


def num_actors(wanted: int) -> int:
    """Raise unless it is a number of actors at all; whether the cluster can have so many is not known here."""
    if not 0 <= wanted <= MAX_ACTORS:
        raise InvalidRequest(f"num_actors is {wanted}; expected 0 to {MAX_ACTORS:,}")
    return wanted


def canary(request: CanaryRequest) -> CanaryRequest:
    """Raise unless `request` makes sense, whatever experts there are."""
    if not request.model:
        raise InvalidRequest("expected the directory of a checkpoint, or its name on the hub, as the model")
    if request.mode not in CANARY_MODES:
        raise InvalidRequest(f"mode is {request.mode[:_MAX_NAME]!r}; expected one of {', '.join(CANARY_MODES)}")
    if not 0 < request.share <= 1:
        raise InvalidRequest(f"share is {request.share}; expected above 0, at most 1")
    if not 0 < request.max_drift < math.inf:
        raise InvalidRequest(f"max_drift is {request.max_drift}; expected a number above 0")
    return request


def chaos(request: ChaosRequest) -> ChaosRequest:
    """Raise unless `request` names a fault that there is, with times and factors that make sense."""
    if request.kind not in CHAOS_KINDS:
        raise InvalidRequest(f"kind is {request.kind[:_MAX_NAME]!r}; expected one of {', '.join(CHAOS_KINDS)}")
    if not request.target:
        raise InvalidRequest("target is empty; expected an expert actor, node:ID, controller or random")
    for name, value, lowest in (("at_s", request.at_s, 0.0), ("duration_s", request.duration_s, 0.01)):
        if not lowest <= value <= MAX_CHAOS_S:
            raise InvalidRequest(f"{name} is {value}; expected {lowest:g} to {MAX_CHAOS_S:g} seconds")
    if not 1.0 <= request.factor <= 1e6:
        raise InvalidRequest(f"factor is {request.factor}; expected 1 to 1,000,000")
    return request
