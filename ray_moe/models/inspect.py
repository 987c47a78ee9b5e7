"""Is a model dense, a Mixture of Experts, a dynamic one or a hybrid? With the evidence, and what speaks against it.

Four witnesses, from the one that is believed most: a run in which is measured what each token uses
(`inspect_forward.py`), the shapes of the weights (`inspect_weights.py`, `gguf.py`), the modules of the network that the
configuration describes (`inspect_module.py`), and the words of the configuration. Loads weights only where they are
small, runs no code that comes with a checkpoint. `ray_moe.inspect` and `ray-moe inspect` call it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ray_moe.errors import InvalidCheckpoint, InvalidRequest, NotFound, RayMoEError, UnsupportedModel
from ray_moe.models import inspect_build, inspect_forward, inspect_module
from ray_moe.models.families import UNSUPPORTED
from ray_moe.models.huggingface import Checkpoint
from ray_moe.models.inspect_config import read_words
from ray_moe.models.inspect_files import Files, open_files
from ray_moe.models.inspect_headers import Weights, read_weights
from ray_moe.models.inspect_module import Found
from ray_moe.models.inspect_verdict import Case, Inspection, hear_words, judge_modules, judge_weights, verdict
from ray_moe.policy.anatomy import Anatomy, ExpertGroup, Stack

MAX_LOADED_BYTES = 2 * 2**30
"""Weights up to this size are loaded, and what is measured is measured on them."""

MAX_SMALL_GROUPS = 2
"""Of a small model with random weights no more are measured: they are all alike."""


def inspect(model: str | Path | nn.Module, inputs: Any = None, *, measure: bool = True) -> Inspection:
    """Say what `model` is.

    Args:
        model: a checkpoint's folder or name on the hub, a file (config.json, safetensors, GGUF), or a network.
        inputs: for a network: what it is run with, a mapping of keyword arguments, a tuple or a single argument.
            None: guessed from its first layer.
        measure: whether to run it, or a small model of its configuration.

    Raises:
        NotFound: there is no such file, folder or model.
        InvalidCheckpoint: a file is damaged, or none of them says anything of a model.
        InvalidRequest: `model` is of a type that is no model.
    """
    if isinstance(model, nn.Module):
        return _of_network(model, inputs, measure)
    if not isinstance(model, str | Path):
        raise InvalidRequest(f"a {type(model).__name__} is no model: give a folder, a file, a name or a torch Module")
    if not str(model).strip():
        raise NotFound("no model is named. Name a folder, a file, or a model of the hub.")
    return _of_files(open_files(model), measure)


# --- A network in memory ---------------------------------------------------------------------------------------------
def _of_network(model: nn.Module, inputs: Any, measure: bool) -> Inspection:
    case = Case()
    config: Any = model.config if inspect_build.is_transformers(model) else None
    words = read_words({} if config is None else config.to_dict())
    found = inspect_module.find(model)
    if config is not None:
        found = [one for one in found if one.standing != "bare"]
    if not measure:
        case.notes.append("not measured, as was asked for")
    elif any(p.is_meta for p in model.parameters()):
        if config is not None:
            _measure_small(case, config)
        else:
            case.notes.append("not measured: its weights are on the meta device")
    else:
        _measure_network(case, model, found, inputs, config)
    if config is not None:
        hear_words(case, words)
    groups, stacks = judge_modules(case, model, found, words, f"the modules of this {type(model).__name__}")
    parameters = list(model.parameters())
    anatomy = Anatomy(
        total_params=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.nbytes for p in parameters),
        groups=groups,
        stacks=stacks,
        lookup_params=inspect_module.lookup_params(model, found),
    )
    if config is not None:
        anatomy = _with_costs(anatomy, inspect_build.on_meta(config, type(model)), config, anatomy.bytes_per_param)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in parameters}
    kind, basis = verdict(case, groups, stacks)
    return Inspection(
        name=type(model).__name__,
        family=type(model).__name__ if config is None else config.model_type,
        kind=kind,
        basis=basis,
        anatomy=anatomy,
        evidence=tuple(case.evidence),
        contradictions=tuple(case.contradictions),
        notes=tuple(case.notes),
        dtype=", ".join(sorted(dtypes)),
        mixers={} if config is None else inspect_build.mixers(config),
        k_per_token=case.k_per_token(),
    )


def _measure_network(case: Case, model: nn.Module, found: list[Found], inputs: Any, config: Any) -> None:
    if not found:
        return
    failure: BaseException | None = None
    for tried in [inputs] if inputs is not None else _guesses(model, found, config):
        try:
            case.usages = inspect_forward.measure(model, found, tried)
            return
        except Exception as error:  # whatever a network raises that is given what it does not take
            failure = error
    why = (
        f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:200] if failure else "no input could be guessed"
    )
    case.notes.append(f"not measured ({why}); give inputs that it takes")


def _guesses(model: nn.Module, found: list[Found], config: Any) -> Iterator[Any]:
    if config is None:
        yield from inspect_forward.guesses(model, found)
        return
    try:
        yield inspect_build.inputs_of(model)
    except UnsupportedModel:
        return


def _measure_small(case: Case, config: Any) -> None:
    """On a small model with random weights. Only how many experts a token uses is of the real one."""
    try:
        model = inspect_build.small(config)
        found = [one for one in inspect_module.find(model) if one.standing != "bare"]
        large = sum(p.numel() for p in model.parameters()) > inspect_forward.LARGE_PARAMS
        inputs = inspect_build.inputs_of(model, inspect_forward.FEW_TOKENS if large else inspect_forward.MAX_TOKENS)
        case.usages = inspect_forward.measure(model, found[: 1 if large else MAX_SMALL_GROUPS], inputs)
        if found:
            case.notes.append("measured on a small model of this configuration with random weights")
    except Exception as error:  # sizes that do not go together differ from family to family
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        case.notes.append(f"not measured: no small model of this configuration runs ({why})")


# --- Files -----------------------------------------------------------------------------------------------------------
def _of_files(files: Files, measure: bool) -> Inspection:
    case = Case()
    words = read_words(files.config or files.gguf_words)
    weights = read_weights(files)
    config = model = None
    if files.config is not None:
        config, model = _built(case, files)
        hear_words(case, words)
    elif files.gguf is not None:
        hear_words(case, words)
    if model is None and weights is None and not words.says_anything:
        raise InvalidCheckpoint(
            f"{files.name} says nothing of a model: it names no model_type, no number of experts, and has no weights. "
            "Name a folder that save_pretrained() wrote, its config.json, or a safetensors or GGUF file."
        )
    groups: tuple[ExpertGroup, ...] = ()
    stacks: tuple[Stack, ...] = ()
    anatomy = Anatomy(total_params=0, weight_bytes=0)
    if model is not None:
        found = [one for one in inspect_module.find(model) if one.standing != "bare"]
        if not measure:
            case.notes.append("not measured, as was asked for")
        elif found:
            _measure_files(case, files, config, weights, found)
        groups, stacks = judge_modules(case, model, found, words, f"the modules of {type(model).__name__}")
        anatomy = _anatomy_of(model, found, config, weights)
    if weights is not None:
        groups, stacks, anatomy = judge_weights(case, weights, words, groups, stacks, anatomy, model is not None)
    elif model is None:
        groups = words.as_groups()
        case.notes.append("from the configuration's words alone: parameters and memory are not known")
    anatomy = replace(anatomy, groups=groups, stacks=stacks)
    kind, basis = verdict(case, groups, stacks)
    servable, why_not = _servable(files, weights, config)
    return Inspection(
        name=files.name,
        family=words.family or (type(model).__name__ if model is not None else "unknown"),
        kind=kind,
        basis=basis,
        anatomy=anatomy,
        evidence=tuple(case.evidence),
        contradictions=tuple(case.contradictions),
        notes=tuple(case.notes),
        dtype=weights.dtype if weights is not None else str(_dtype(config)).removeprefix("torch."),
        mixers={} if config is None else inspect_build.mixers(config),
        k_per_token=case.k_per_token(),
        servable=servable,
        not_servable=why_not,
    )


def _built(case: Case, files: Files) -> tuple[Any, Any]:
    """The configuration of `transformers` and its model on the meta device; (None, None) where there is none."""
    if files.config is None or not isinstance(files.config.get("model_type"), str):
        case.notes.append("config.json names no model_type, so no modules could be built")
        return None, None
    try:
        config = inspect_build.read_config(files.config_path)
        return config, inspect_build.on_meta(config)
    except Exception as error:  # what transformers raises for values out of place has no common class
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        case.notes.append(f"transformers cannot build a model from config.json ({why})")
        return None, None


def _measure_files(case: Case, files: Files, config: Any, weights: Weights | None, found: list[Found]) -> None:
    small_enough = weights is not None and files.has_safetensors and weights.num_bytes <= MAX_LOADED_BYTES
    if files.folder is not None and small_enough:
        try:
            model = inspect_build.load(files.folder, config)
            case.usages = inspect_forward.measure(model, found, inspect_build.inputs_of(model))
            case.notes.append("measured on the checkpoint's own weights")
            return
        except Exception as error:  # files that contradict the configuration fail in many ways
            case.notes.append(f"its own weights did not run ({type(error).__name__})")
    _measure_small(case, config)


def _anatomy_of(model: Any, found: list[Found], config: Any, weights: Weights | None) -> Anatomy:
    total = sum(p.numel() for p in model.parameters())
    if weights is None:
        weight_bytes = total * _dtype(config).itemsize
    elif weights.is_packed:
        weight_bytes = weights.num_bytes
    else:  # files may have what the model does not use, such as buffers
        weight_bytes = round(total * weights.bytes_per_param)
    anatomy = Anatomy(
        total_params=total,
        weight_bytes=weight_bytes,
        lookup_params=inspect_module.lookup_params(model, found),
    )
    return _with_costs(anatomy, model, config, _dtype(config).itemsize)


def _with_costs(anatomy: Anatomy, on_meta: Any, config: Any, item_bytes: float) -> Anatomy:
    found = [one for one in inspect_module.find(on_meta) if one.standing == "declared"]
    kept = inspect_build.kv_numbers(on_meta, found)
    if kept is None:
        return anatomy
    numbers, layers = kept
    width = inspect_build.attention_width(config, layers)
    return replace(anatomy, kv_bytes_per_token=round(numbers * item_bytes), attention_width=width)


def _dtype(config: Any) -> Any:
    import torch

    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _servable(files: Files, weights: Weights | None, config: Any) -> tuple[bool | None, str]:
    """Whether `ray-moe serve` takes it, and why not; None where only its weights could tell."""
    if files.gguf is not None:
        return False, "GGUF files are not served; name the safetensors checkpoint that it was made of."
    if files.config is None:
        return False, "it has no config.json."
    model_type = str(files.config.get("model_type"))
    if model_type in UNSUPPORTED:
        return False, f"{model_type} models cannot be served: {UNSUPPORTED[model_type]}"
    if files.folder is None or weights is None:
        return None, ""
    try:
        Checkpoint.open(files.folder, encoder_decoder=True)
    except RayMoEError as error:
        return False, error.message
    return True, ""
