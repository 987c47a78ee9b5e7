"""The experts modules of a `transformers` model: finding them, taking some of their rows, answering for them.

Works on every module of `transformers`' experts interface (`use_experts_implementation`), whatever the family, and on
the experts of a `MoELayer`. Loads nothing and knows no Ray: `models/huggingface.py` loads through it, `runtime/`
installs its dispatcher with it.

Shape legend: T tokens, D model width, K experts per token.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer

from ray_moe.ops.experts import StackedExperts
from ray_moe.ops.parts import Axes, cut
from ray_moe.ops.routed_experts import Handler, run_slots
from ray_moe.policy.parts import whole_of
from ray_moe.types import LayerPath

IMPLEMENTATION = "ray_moe"
"""Name under which `transformers` finds our experts function."""

LOCAL_IMPLEMENTATION = "grouped_mm"
"""What a shard computes with: `transformers`' own default, so that results can be compared bit by bit."""

_HANDLER = "_ray_moe_handler"
_PATH = "_ray_moe_path"


def experts_modules(model: nn.Module) -> dict[LayerPath, nn.Module]:
    """The modules of `model` that hold routed experts, by module path, in model order."""
    return {path: module for path, module in model.named_modules() if _is_experts(module)}


def install(model: nn.Module, handler: Handler) -> None:
    """Let `handler` answer for every experts module of `model`, and of no other model.

    The modules' own weights are not used any more and may be absent. Gradients flow through whatever `handler` does.
    """
    for registry in (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS):
        registry.register(IMPLEMENTATION, _ask_handler)
    modules: dict[LayerPath, Any] = dict(experts_modules(model))
    # A config may be shared with other models, so these modules get their own copy of it (one for all of them).
    # (Those of a `MoELayer` have none, and ask their handler by themselves.)
    originals = {id(module.config): module.config for module in modules.values() if hasattr(module, "config")}
    copies = {number: copy.deepcopy(original) for number, original in originals.items()}
    for config in copies.values():
        config._experts_implementation_internal = IMPLEMENTATION
    for path, module in modules.items():
        # Not setattr: a handler that is a module itself must not become a submodule.
        module.__dict__[_HANDLER] = handler
        module.__dict__[_PATH] = path
        if hasattr(module, "config"):
            module.config = copies[id(module.config)]


def compute_touched(model: nn.Module) -> None:
    """Let the experts modules of `model` compute with those experts that a batch touches, and with their own weights.

    `transformers`' grouped product on the CPU calls a product for every expert, also for those without rows.
    """
    modules: dict[LayerPath, Any] = dict(experts_modules(model))

    def handler(path: LayerPath, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        experts = modules[path]
        return run_slots(StackedExperts(experts).run, hidden, index, weight, experts.num_experts)

    install(model, handler)


def make_shard(experts: nn.Module, ids: Sequence[int]) -> nn.Module:
    """A module of the same class that holds only the experts `ids`, row r being the r-th smallest id.

    Parameters with one row per expert are row-selected (copied), the others are copied whole. Works on meta tensors.

    Raises:
        ValueError: `ids` is empty or names an expert that the module does not have.
    """
    source: Any = experts
    rows = sorted(set(ids))
    if not rows or rows[0] < 0 or rows[-1] >= source.num_experts:
        raise ValueError(f"a shard needs experts of 0..{source.num_experts - 1}, got {list(ids)}")
    shard = copy.copy(source)
    for attached in (_HANDLER, _PATH):
        shard.__dict__.pop(attached, None)
    shard._parameters = {name: _rows(source, name, rows) for name in source._parameters}
    shard._buffers = dict(source._buffers)
    shard._modules = {name: copy.deepcopy(child) for name, child in source._modules.items()}
    shard.num_experts = len(rows)
    if hasattr(source, "config"):
        # The shard computes by itself, whatever its origin's model does.
        shard.config = copy.deepcopy(source.config)
        shard.config._experts_implementation_internal = LOCAL_IMPLEMENTATION
    module: nn.Module = shard
    return module.requires_grad_(False)


def make_parts(
    load: Callable[[int], nn.Module], num_experts: int, ids: Sequence[int], axes: Axes, num_parts: int
) -> nn.Module:
    """A module that holds only the parts `ids` of experts, row r being the r-th smallest (`policy/parts.py`).

    Experts are loaded one after the other, so that there is never more than one of them beside their parts.

    Args:
        load: gives a module of one expert alone, by its number.
        num_experts: of the layer.
        axes: where its matrices are cut.
    """
    rows: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, number in enumerate(sorted(set(ids))):
        expert, part = whole_of(number, num_experts)
        rows[expert].append((row, part))
    made: Any = None
    for expert, wanted in rows.items():
        whole: Any = load(expert)
        if made is None:
            made = copy.copy(whole)
            made._parameters = dict(whole._parameters)
            made.num_experts = len(set(ids))
            for name, axis in axes.items():
                shape = cut(whole._parameters[name], axis, num_parts, 0).shape[1:]
                stack = whole._parameters[name].new_empty(made.num_experts, *shape)
                made._parameters[name] = nn.Parameter(stack, requires_grad=False)
        for name, axis in axes.items():
            for row, part in wanted:
                made._parameters[name].data[row] = cut(whole._parameters[name].data[0], axis, num_parts, part)
    module: nn.Module = made
    return module


def expert_rows(experts: nn.Module, row: int) -> dict[str, torch.Tensor]:
    """A copy of what one expert of a module is, by parameter."""
    return {
        name: parameter.detach()[row].clone()
        for name, parameter in experts._parameters.items()
        if parameter is not None and is_per_expert(experts, name)
    }


def without_experts(experts: nn.Module) -> nn.Module:
    """How a module's experts compute, and none of them: a copy that can be pickled, with what all experts share."""
    bare: Any = copy.copy(experts)
    for attached in (_HANDLER, _PATH):
        bare.__dict__.pop(attached, None)
    bare._parameters = {
        name: nn.Parameter(parameter.detach().clone())
        for name, parameter in experts._parameters.items()
        if parameter is not None and not is_per_expert(experts, name)
    }
    bare._modules = {name: copy.deepcopy(child) for name, child in experts._modules.items()}
    module: nn.Module = bare
    return module.requires_grad_(False)


def is_per_expert(experts: nn.Module, name: str) -> bool:
    """Whether the parameter `name` of an experts module has one row per expert."""
    parameter = experts._parameters.get(name)
    num_experts: Any = experts.num_experts
    return parameter is not None and parameter.ndim > 0 and len(parameter) == int(num_experts)


def drop_parameters(model: nn.Module) -> None:
    """Take the routed experts' weights out of `model`: what is left is the backbone."""
    for experts in experts_modules(model).values():
        for module in experts.modules():
            module._parameters.clear()
            # Otherwise transformers would initialise the weights that are no longer there.
            marked: Any = module
            marked._is_hf_initialized = True


def moe_block(model: nn.Module, path: LayerPath) -> nn.Module | None:
    """The block around the experts at `path` that holds their gate and can be called with hidden [1, T, D] alone.

    It answers [1, T, D] or [T, D], in some families as the first of a tuple, and includes the shared experts.
    None when there is no such block, because the gate belongs to a whole decoder layer (Gemma 4 ...).
    """
    block = model.get_submodule(path.rpartition(".")[0])
    if isinstance(block, GradientCheckpointingLayer):
        return None
    required = [
        p
        for p in inspect.signature(block.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    return block if len(required) == 1 else None


def _is_experts(module: nn.Module) -> bool:
    """Whether `use_experts_implementation` has decorated the module's class, or it is that of a `MoELayer`."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate")


def _rows(experts: Any, name: str, rows: list[int]) -> nn.Parameter | None:
    parameter = experts._parameters[name]
    if parameter is None:
        return None
    index = torch.tensor(rows, device=parameter.device) if is_per_expert(experts, name) else ...
    return nn.Parameter(parameter.detach()[index].clone(), requires_grad=False)


def _ask_handler(
    experts: nn.Module, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    handler: Handler = experts.__dict__[_HANDLER]
    return handler(experts.__dict__[_PATH], hidden_TD, index_TK, weight_TK)
