"""Experts that are no feed-forward network: any `torch.nn.Module` that takes and gives rows of the same shape.

`MoELayer(..., experts=[module, ...])` comes here. There are two forms, and `module_experts` chooses:

- modules **of one kind** (same classes, options and shapes, no buffers) become one stack of each of their parameters,
  as the experts of `transformers` are. So whatever hosts, moves, trains or exports experts does so with these;
- modules **of different kinds** are kept as they are, and are computed where the layer is. Elsewhere they are a part of
  the backbone: trained there, and not sent to hosts.

What an expert gets are rows [n, D]; with an `item_shape` it gets items [n, *item_shape], whole sequences or images,
each of which travels as one row (`items.py` routes them). An expert must treat each row or item by itself, and give the
same for it when it is asked again: hosts compute some rows twice. So no dropout inside, and no statistics of a batch.

Shape legend: n rows of some experts, D width of a row, E experts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import nn

from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.ops.experts import Weights
from ray_moe.ops.routed_experts import Handler, RoutedExperts
from ray_moe.types import LayerPath

DOT = ":"
"""In names of stacks, for the dots of the modules' own names: a parameter's name has none."""

ItemShape = tuple[int, ...]
"""Of what an expert gets, without the first dimension; one number may be -1, for whatever is there."""


class ModuleExperts(RoutedExperts):
    """What both forms have in common."""

    def __init__(self, num_experts: int, item_shape: ItemShape | None) -> None:
        super().__init__()
        self.num_experts, self.item_shape = num_experts, item_shape

    def _call(self, ask: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """[n, D] -> [n, D] through one expert, which sees items if it is to."""
        items = rows if self.item_shape is None else rows.view(len(rows), *_known(self.item_shape, rows.shape[-1]))
        out = ask(items)
        if not isinstance(out, torch.Tensor) or out.shape != items.shape:
            got = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise InvalidRequest(f"an expert was given {list(items.shape)} and answered {got}; it must keep the shape")
        return out.reshape(rows.shape).to(rows.dtype)


class StackedModules(ModuleExperts):
    """E modules of one kind, on the experts interface.

    Their parameters are copied into stacks [E, ...], named as theirs with ``:`` for ``.``.
    """

    has_gate, has_bias = False, False

    def __init__(self, modules: Sequence[nn.Module], item_shape: ItemShape | None) -> None:
        """Use `module_experts`, which checks."""
        super().__init__(len(modules), item_shape)
        self._names = [name for name, _ in modules[0].named_parameters()]
        for name in self._names:
            parameters = [module.get_parameter(name) for module in modules]
            stack = torch.stack([parameter.detach() for parameter in parameters])
            self.register_parameter(
                name.replace(".", DOT), nn.Parameter(stack, requires_grad=parameters[0].requires_grad)
            )
        self.each = _without_weights(modules[0])

    def compute_rows(self, rows: torch.Tensor, counts: Sequence[int], weights: Weights) -> torch.Tensor:
        """See `ops.experts.ComputesRows`."""
        stacks = [weights(name.replace(".", DOT)) for name in self._names]
        outs = [rows[:0]]
        for position, part in enumerate(rows.split(list(counts))):
            expert = {name: stack[position] for name, stack in zip(self._names, stacks, strict=True)}
            first = expert[self._names[0]]
            outs.append(self._call(_with_weights(self.each, expert), part.to(first.device, first.dtype)).to(rows))
        return torch.cat(outs)

    def extra_repr(self) -> str:
        where = "" if self._ray_moe_handler is None else f", elsewhere as {self._ray_moe_path!r}"
        return f"{self.num_experts} of one kind{where}"


class SeparateModules(ModuleExperts):
    """E modules of different kinds, computed where the layer is."""

    def __init__(self, modules: Sequence[nn.Module], item_shape: ItemShape | None) -> None:
        super().__init__(len(modules), item_shape)
        self.each = nn.ModuleList(modules)

    def answer_with(self, handler: Handler, path: LayerPath) -> None:
        raise InvalidConfig(
            f"the experts of {path!r} are modules of different kinds ({_kinds(self.each)}), and hosts hold experts of "
            "one kind: keep them here, or give modules of one class with the same options and shapes, and no buffers"
        )

    def _run(self, rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        parts = zip(experts, rows.split(list(counts)), strict=True)
        return torch.cat([self._call(self.each[expert], part) for expert, part in parts])


def module_experts(
    modules: Sequence[nn.Module] | nn.ModuleList | Callable[[int], nn.Module],
    num_experts: int | None = None,
    *,
    item_shape: ItemShape | None = None,
) -> ModuleExperts:
    """Experts of a `MoELayer`, of modules that somebody has.

    Args:
        modules: E of them, rows [n, D] -> [n, D]; or a function that makes the expert with a number.
        num_experts: E, for a function.
        item_shape: what an expert gets in place of [n, D]: items [n, *item_shape].

    Raises: `InvalidConfig` for what are no modules, or for one module twice (its gradients would be those of two).
    """
    if isinstance(modules, nn.ModuleList):
        modules = list(modules)
    elif not isinstance(modules, Sequence):
        if num_experts is None or num_experts < 1:
            raise InvalidConfig(f"num_experts is {num_experts}; a function that makes experts needs to know how many")
        modules = [modules(number) for number in range(num_experts)]
    if not modules or not all(isinstance(module, nn.Module) for module in modules):
        raise InvalidConfig(f"experts are modules, one at least; got {[type(module).__name__ for module in modules]}")
    if num_experts is not None and num_experts != len(modules):
        raise InvalidConfig(f"num_experts is {num_experts}, and there are {len(modules)} modules")
    if len({id(module) for module in modules}) < len(modules):
        raise InvalidConfig("an expert is there twice; give a module of its own for each")
    if item_shape is not None and (item_shape.count(-1) > 1 or any(n < 1 and n != -1 for n in item_shape)):
        raise InvalidConfig(f"item_shape is {item_shape}; its numbers are 1 or more, and -1 once at most")
    one_kind = all(_same_kind(modules[0], module) for module in modules)
    made: ModuleExperts = (StackedModules if one_kind else SeparateModules)(modules, item_shape)
    return made


def _same_kind(first: nn.Module, second: nn.Module) -> bool:
    """Whether the weights of one in the other would make it the other; where that cannot be known, not."""
    mine, theirs = dict(first.named_modules()), dict(second.named_modules())
    if list(mine) != list(theirs) or not list(first.parameters()) or list(first.buffers()) or list(second.buffers()):
        return False
    return all(_same(mine[name], theirs[name]) for name in mine) and _weights(first) == _weights(second)


def _weights(module: nn.Module) -> list[Any]:
    """By name, what else than its numbers a parameter is; those that are there twice count twice, and never stack."""
    every = module.named_parameters(remove_duplicate=False)
    shapes = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in every]
    return shapes if len(shapes) == len(list(module.parameters())) else [object()]


def _same(mine: nn.Module, theirs: nn.Module) -> bool:
    """Of one submodule: class and options."""
    options, others = _options(mine), _options(theirs)
    return (
        type(mine) is type(theirs)
        and options.keys() == others.keys()
        and all(value is others[name] or (_plain(value) and value == others[name]) for name, value in options.items())
    )


def _plain(value: Any) -> bool:
    """Whether a value means the same as any that it is equal to."""
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    return isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device, NoneType))


def _options(module: nn.Module) -> dict[str, Any]:
    inside = {"_parameters", "_buffers", "_modules"}
    return {
        name: value
        for name, value in vars(module).items()
        if name not in inside and not (isinstance(value, (dict, set)) and not value)
    }


def _kinds(modules: nn.ModuleList) -> str:
    return ", ".join(sorted({type(module).__name__ for module in modules}))


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy that only knows how to compute."""
    bare = copy.deepcopy(module)
    for each in bare.modules():
        each._parameters = dict.fromkeys(each._parameters)
    return bare


def _with_weights(bare: nn.Module, weights: Mapping[str, torch.Tensor], prefix: str = "") -> nn.Module:
    """One that has `weights`, by their names. `bare` is not touched: others may use it at the same time."""
    made: Any = copy.copy(bare)
    made._parameters = {name: weights.get(prefix + name) for name in bare._parameters}
    made._modules = {
        name: None if child is None else _with_weights(child, weights, f"{prefix}{name}.")
        for name, child in bare._modules.items()
    }
    module: nn.Module = made
    return module


def _known(shape: ItemShape, width: int) -> ItemShape:
    """`shape` with its -1 worked out. Raises: `InvalidRequest` for rows that are no such items."""
    known = math.prod(number for number in shape if number != -1)
    if width % known or (-1 not in shape and width != known):
        raise InvalidRequest(f"a row of {width} numbers is no item of the shape {list(shape)}")
    return tuple(width // known if number == -1 else number for number in shape)
