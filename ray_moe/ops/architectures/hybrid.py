"""Stacks in which some layers are dense and some are MoE layers.

Shape legend: D model width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.ops.gates.base import TokenInfo, takes_info

Pattern = str | Callable[[int], bool]
"""Which layers of a stack are MoE layers; see `moe_pattern`."""

_EVERY = re.compile(r"every (\d+)(?:st|nd|rd|th)?")
_LAST = re.compile(r"last (\d+)")


def moe_pattern(pattern: Pattern, num_layers: int) -> tuple[bool, ...]:
    """Whether each layer is a MoE layer.

    Args:
        pattern: "all"; "every 2nd", the 2nd, 4th ... (GShard, Switch); "last 2" (V-MoE); letters such as "D M" or
            "D D D M", dense and MoE, repeated as often as they fit; or a function of a layer's number, from 0
            (``lambda n: n >= 3``).
        num_layers: of the stack.

    Raises: `InvalidConfig` for a pattern that is none, or that does not fit the number of layers.
    """
    layers = range(num_layers)
    if callable(pattern):
        return tuple(bool(pattern(number)) for number in layers)
    if pattern == "all":
        return (True,) * num_layers
    if (match := _EVERY.fullmatch(pattern)) and 1 <= (step := int(match[1])) <= num_layers:
        return tuple((number + 1) % step == 0 for number in layers)
    if (match := _LAST.fullmatch(pattern)) and (last := int(match[1])) <= num_layers:
        return tuple(number >= num_layers - last for number in layers)
    letters = pattern.split()
    if letters and set(letters) <= {"D", "M"} and num_layers % len(letters) == 0:
        return tuple(letter == "M" for letter in letters) * (num_layers // len(letters))
    raise InvalidConfig(
        f'{pattern!r} is no pattern for {num_layers} layers; give "all", "every N", "last N" with N up to that, '
        'letters "D M ...", a number of them that divides it, or a function of the number of a layer'
    )


class Stack(nn.Module):
    """Layers one after the other. Those that have an argument `info` get what is known about the tokens."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._take_info = [takes_info(layer) for layer in self.layers]

    def forward(self, hidden: torch.Tensor, info: TokenInfo | None = None) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        for layer, asks in zip(self.layers, self._take_info, strict=True):
            hidden = layer(hidden, info) if asks else layer(hidden)
        return hidden


class PreNorm(nn.Module):
    """``x + inner(norm(x))``: what a layer of a transformer is around its attention, and around its experts."""

    def __init__(self, hidden_size: int, inner: nn.Module) -> None:
        """
        Args:
            hidden_size: D.
            inner: [..., D] -> [..., D]; a `MoELayer`, a dense network, an attention ...
        """
        super().__init__()
        self.norm, self.inner = nn.RMSNorm(hidden_size), inner
        self._takes_info = takes_info(inner)

    def forward(self, hidden: torch.Tensor, info: TokenInfo | None = None) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        normed = self.norm(hidden)
        out: torch.Tensor = hidden + (self.inner(normed, info) if self._takes_info else self.inner(normed))
        return out


def hybrid_stack(
    num_layers: int,
    pattern: Pattern,
    *,
    dense: Callable[[int], nn.Module],
    moe: Callable[[int], nn.Module],
) -> Stack:
    """A stack of what `dense` and `moe` make.

    Args:
        num_layers: of both kinds.
        pattern: see `moe_pattern`.
        dense, moe: make the layer with a number, from 0 among all (so that a pyramid can have more experts later).

    Raises: `InvalidConfig` as `moe_pattern`.
    """
    return Stack((moe if is_moe else dense)(number) for number, is_moe in enumerate(moe_pattern(pattern, num_layers)))
