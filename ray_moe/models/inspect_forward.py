"""Which experts a token uses, measured: run the network, and see which of their weights its output depends on.

A weight counts as used by a token when the gradient of that token's output with respect to it is not zero. So experts
that compute for every token and are multiplied by 0 are not used, whatever the code does. The smallest module around a
group of experts that is called runs again alone, without attention, where no token sees another one.

Leaves the network as it was. Called by `models/inspect.py`.

Shape legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ray_moe.models.inspect_module import Found

MAX_TOKENS = 16
"""Tokens that are looked at one by one."""
FEW_TOKENS = 6
LARGE_PARAMS = 20_000_000
"""With more weights only a few tokens are looked at: some families go through their experts one by one, and back for
each token."""
_IMAGE_SIZES = (32, 28, 64, 224)


@dataclass(frozen=True, slots=True, eq=False)
class Usage:
    """Of one group."""

    touched: torch.Tensor
    """[T, E], whether the token uses the expert."""

    @property
    def per_token(self) -> list[int]:
        """Experts that each token uses."""
        counts: list[int] = self.touched.sum(1).tolist()
        return counts

    @property
    def varies(self) -> bool:
        """Whether some tokens use more experts than others."""
        return len(set(self.per_token)) > 1

    @property
    def depends_on_token(self) -> bool:
        """Whether some tokens use other experts than others."""
        return bool((self.touched != self.touched[:1]).any())

    @property
    def uses_all(self) -> bool:
        """Whether every token uses every expert."""
        return bool(self.touched.all())


@dataclass(slots=True)
class _Call:
    """The first call of a module, and how often it was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    number: int = 1


def measure(model: nn.Module, groups: Sequence[Found], inputs: Any) -> dict[str, Usage]:
    """By path of each group that took part in the run.

    Args:
        inputs: of the model: a mapping of keyword arguments, a tuple of positional ones, or a single one.

    Raises: whatever the model raises.
    """
    paths = {group.path: _ancestors(group.path) for group in groups}
    calls: dict[str, _Call] = {}
    with _evaluating(model):
        handles = [
            model.get_submodule(path).register_forward_pre_hook(_recorder(calls, path), with_kwargs=True)
            for path in dict.fromkeys(path for ancestors in paths.values() for path in ancestors)
        ]
        try:
            with torch.no_grad():
                call(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        usages = {}
        for group in groups:
            around = [(model.get_submodule(path), calls[path]) for path in paths[group.path] if path in calls]
            # What is called more often than what is around it computes one expert at a time (DBRX).
            while len(around) > 1 and around[0][1].number > around[1][1].number:
                around.pop(0)
            if around:
                usages[group.path] = _usage(model, group, around)
    return usages


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def guesses(model: nn.Module, groups: Sequence[Found]) -> Iterator[Any]:
    """Inputs that a network of unknown kind may take, the likeliest first."""
    generator = torch.Generator().manual_seed(0)
    first = next(
        (m for m in model.modules() if isinstance(m, nn.Embedding | nn.Linear | nn.modules.conv._ConvNd)), None
    )
    if isinstance(first, nn.Embedding):
        yield torch.randint(0, first.num_embeddings, (1, MAX_TOKENS), generator=generator)
    if isinstance(first, nn.Conv2d):
        for size in _IMAGE_SIZES:
            yield torch.randn(2, first.in_channels, size, size, generator=generator)
    widths = [first.in_features] if isinstance(first, nn.Linear) else []
    for width in dict.fromkeys([*widths, *(group.hidden_size for group in groups)]):
        yield torch.randn(1, MAX_TOKENS, width, generator=generator)
        yield torch.randn(MAX_TOKENS, width, generator=generator)


def _usage(model: nn.Module, group: Found, around: Sequence[tuple[nn.Module, _Call]]) -> Usage:
    """Run the innermost of the modules `around` again, and look back from each row of what it gives.

    Unless the next one gives fewer: then it was asked once for each expert, and its rows are no tokens (Llama 4).
    """
    names = list(dict.fromkeys(name for expert in group.experts for name, _, _ in expert))
    parameters = [model.get_parameter(name) for name in names]
    with _needing_gradients(parameters), torch.enable_grad():
        rows_TD = _rows(*around[0])
        if len(around) > 1 and len(rows_TD) > MAX_TOKENS:
            outer_TD = _rows(*around[1])
            rows_TD = outer_TD if len(outer_TD) < len(rows_TD) else rows_TD
        # Not their sum: that of normalised rows is constant.
        direction_D = torch.randn(rows_TD.shape[-1], generator=torch.Generator().manual_seed(1)).to(rows_TD)
        looked_at = FEW_TOKENS if sum(p.numel() for p in parameters) > LARGE_PARAMS else MAX_TOKENS
        touched = [
            _touched(group, names, _gradients((row_D * direction_D).sum(), parameters))
            for row_D in rows_TD[:looked_at].unbind(0)
        ]
    return Usage(torch.tensor(touched, dtype=torch.bool).reshape(-1, group.num_experts))


def _rows(block: nn.Module, recorded: _Call) -> torch.Tensor:
    args, kwargs = tree_map(_detached, (recorded.args, recorded.kwargs))
    out = _first_tensor(block(*args, **kwargs))
    return out.reshape(-1, out.shape[-1])


def _gradients(value: torch.Tensor, parameters: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
    if not value.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)


def _touched(group: Found, names: Sequence[str], gradients: Sequence[torch.Tensor | None]) -> list[bool]:
    rows = {
        name: None if gradient is None else (gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None]).any(1)
        for name, gradient in zip(names, gradients, strict=True)
    }

    def is_touched(name: str, first: int, number: int) -> bool:
        row = rows[name]
        return row is not None and bool((row if number < 0 else row[first : first + number]).any())

    return [any(is_touched(*part) for part in expert) for expert in group.experts]


def _first_tensor(out: Any) -> torch.Tensor:
    """The first tensor of numbers in what a module gives: hidden states, or logits."""
    if isinstance(out, torch.Tensor):
        return out
    values = out.values() if isinstance(out, Mapping) else out
    return next(_first_tensor(v) for v in values if isinstance(v, torch.Tensor | Mapping | tuple | list))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _ancestors(path: str) -> list[str]:
    """``a.b`` -> ``a.b``, ``a``, and the root."""
    parts = path.split(".") if path else []
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _recorder(calls: dict[str, _Call], path: str) -> Any:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if path in calls:
            calls[path].number += 1
        else:
            calls[path] = _Call(args, kwargs)

    return record


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _needing_gradients(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, needed in zip(parameters, before, strict=True):
            parameter.requires_grad_(needed)
