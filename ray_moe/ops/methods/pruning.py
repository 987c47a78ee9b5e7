"""Making an MoE layer smaller: only some of its experts stay, and the gate and the optimizer hear of it.

Parameters become new ones with fewer rows, which take the place of the old ones in the optimizer, with the state of
these rows. (The old ones cannot be cut: whatever is left of an old graph would want gradients of their old shape.)
Called by `sparsify.py` and `search.py`; `fit_to` lets a new network load what has become smaller.

Shape legend: E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.ops.gates.base import takes_info
from ray_moe.ops.gates.hard_concrete import HardConcreteGate
from ray_moe.ops.layer import MoELayer, moe_layers


@torch.no_grad()
def keep_experts(
    layer: MoELayer, experts: Sequence[int], optimizer: torch.optim.Optimizer | None = None, top_k: int | None = None
) -> None:
    """Leave only some experts in a layer, in place; they are numbered anew, in ascending order of their old numbers.

    Args:
        layer: with its experts in it.
        experts: numbers of those that stay.
        optimizer: that of the layer's parameters, whose state is cut as they are; None if there is none.
        top_k: K from now on; None leaves it, or is all that stay where these are fewer.

    Raises: `InvalidConfig`, and changes nothing, for numbers that are none, for experts that are elsewhere, and for a
        gate whose experts cannot be taken one by one.
    """
    number, stay = layer.experts.num_experts, sorted(set(experts))
    if not stay or stay[0] < 0 or stay[-1] >= number:
        raise InvalidConfig(f"cannot keep experts {list(experts)}; name some of 0 to {number - 1}")
    settings = check_prunable(layer, len(stay), top_k)
    for module in layer.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.ndim and len(buffer) == number:
                module._buffers[name] = _rows(buffer, stay)
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.ndim and len(parameter) == number:
                smaller = nn.Parameter(_rows(parameter, stay), requires_grad=parameter.requires_grad)
                module._parameters[name] = smaller
                _replace(optimizer, parameter, smaller, stay)
    layer.experts.num_experts = len(stay)
    if hasattr(layer.gate, "num_experts"):
        layer.gate.num_experts = len(stay)
    if settings is not None:
        layer.gate.settings = settings
    layer.routing = layer.overflow = None


def check_prunable(layer: MoELayer, num_experts: int, top_k: int | None = None) -> Any:
    """What the settings of the layer's gate are with `num_experts`; None for a gate without settings.

    Raises: `InvalidConfig` where it cannot have so many.
    """
    gate, kind = layer.gate, type(layer.gate).__name__
    if not list(layer.experts.parameters()):
        raise InvalidConfig("these experts are elsewhere, so none can be taken out here; bring them home first")
    settings: Any = getattr(gate, "settings", None)
    in_groups = hasattr(settings, "own") or getattr(settings, "num_groups", 1) != 1 or takes_info(gate)
    rows = [p for p in gate.parameters() if p.ndim and len(p) == layer.experts.num_experts]
    if in_groups or not rows:
        raise InvalidConfig(f"a {kind} has no row of its own for each expert: none can be taken out")
    if not hasattr(settings, "build"):
        return None
    has_top_k = hasattr(settings, "top_k")
    if top_k is not None and not has_top_k:
        raise InvalidConfig(f"top_k is {top_k}, and a {kind} has none")
    if has_top_k:
        wanted = min(settings.top_k, num_experts) if top_k is None else top_k
        settings = replace(settings, top_k=wanted)
    with torch.device("meta"):
        settings.build(8, num_experts)
    return settings


def fit_to(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Make the MoE layers of a new network as small as those that `weights` is the `state_dict` of, to load it.

    Raises: `InvalidConfig` where they cannot be.
    """
    for path, layer in moe_layers(model).items():
        prefix = f"{path}." if path else ""
        saved = weights.get(f"{prefix}experts.down_proj")
        if saved is None or len(saved) == layer.experts.num_experts:
            continue
        if len(saved) > layer.experts.num_experts:
            raise InvalidConfig(
                f"{path or 'the layer'} has {layer.experts.num_experts} experts, {len(saved)} were saved"
            )
        if isinstance(layer.gate, HardConcreteGate):
            layer.gate.close()
        keep_experts(layer, range(len(saved)))


def _rows(tensor: torch.Tensor, stay: Sequence[int]) -> torch.Tensor:
    return tensor.detach().index_select(0, torch.tensor(stay, device=tensor.device))


def _replace(
    optimizer: torch.optim.Optimizer | None, old: nn.Parameter, new: nn.Parameter, stay: Sequence[int]
) -> None:
    """Let the optimizer have `new`, which is some rows of `old`, in place of it."""
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old in optimizer.state:
        smaller = {key: _rows(value, stay) for key, value in _states(optimizer, old)}
        optimizer.state[new] = {**optimizer.state.pop(old), **smaller}


def _states(optimizer: torch.optim.Optimizer | None, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What of an optimizer's state has the shape of the parameter, by name."""
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            yield key, value


def spread_state(optimizer: torch.optim.Optimizer | None, parameter: torch.Tensor, row: int) -> None:
    """Give all rows of a parameter the state of one of them, as copies of what this one is need it."""
    for _, state in _states(optimizer, parameter):
        state.copy_(state[row].clone().expand_as(state))
