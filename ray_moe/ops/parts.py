"""Experts cut into parts: an expert of width F is the sum of t experts of width F / t.

The gate's and the up-projection are cut by the channels that come out of them, the down-projection by those that go
in. What comes out of the parts is added up as the outputs of several experts are, so a part is an expert of its own to
all that holds, computes, trains or moves experts. Which number it has is `policy/parts.py`.

Shape legend: D model width, F expert width, t parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ray_moe.errors import InvalidCheckpoint, InvalidConfig, UnsupportedModel
from ray_moe.ops.experts import computes_rows
from ray_moe.types import LayerPath

Tensors = Mapping[str, torch.Tensor]


class Axis(NamedTuple):
    """Where a matrix of an expert, or a stack of such, is cut."""

    dim: int
    """-1 or -2."""
    blocks: int
    """Of equal size along it, each of which is cut: 2 where the gate is above the up-projection."""


Axes = Mapping[str, Axis]
"""By the name of the stack."""


def cut(tensor: torch.Tensor, axis: Axis, num_parts: int, part: int) -> torch.Tensor:
    """One part of a matrix or stack: a copy, or a view where it is all in one piece."""
    dim, blocks = axis
    apart: torch.Tensor = tensor.unflatten(dim, (blocks, num_parts, -1))
    return apart.select(dim - 1, part).flatten(dim - 1, dim)


def join(parts: Sequence[torch.Tensor], axis: Axis) -> torch.Tensor:
    """The whole of all parts, in their order. A copy."""
    dim, blocks = axis
    apart = [part.unflatten(dim, (blocks, -1)) for part in parts]
    return torch.stack(apart, dim - 1).flatten(dim - 2, dim)


def axes_of(experts: nn.Module, path: LayerPath, num_parts: int) -> Axes:
    """How the experts of a module of `transformers`' experts interface (which may be on the meta device) are cut.

    Raises:
        UnsupportedModel: they are no sum of parts.
        InvalidConfig: their width is no multiple of `num_parts`.
    """
    module: Any = experts
    if computes_rows(module):
        raise _no_parts(path, "they are modules of another kind than a feed-forward network")
    if module.has_bias or module.has_post_expert_norm:
        what = "biases" if module.has_bias else "a norm on what they put out"
        raise _no_parts(path, f"they have {what}, which a part of an expert has no part of")
    into, out = (-2, -1) if module.is_transposed else (-1, -2)
    up = Axis(out, 2 if module.has_gate else 1)
    axes = {"gate_up_proj" if module.has_gate else "up_proj": up, "down_proj": Axis(into, 1)}
    if others := sorted(_per_expert(module) - axes.keys()):
        raise _no_parts(path, f"each has a {others[0]} beside its matrices")
    width = module.down_proj.shape[into]
    if width % num_parts:
        raise InvalidConfig(
            f"experts.tensor is {num_parts}, and the experts of {path} are {width} wide, which is no multiple of it; "
            f"take one of {', '.join(str(n) for n in range(1, min(width, 16) + 1) if width % n == 0)}"
        )
    if not _acts_by_channel(module, up, width, num_parts):
        raise _no_parts(path, "their activation mixes channels, or has the gate's and the others interleaved")
    return axes


def _no_parts(path: LayerPath, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the experts of {path} cannot be cut into parts: {reason}. Leave them whole (experts.tensor: 1)."
    )


def _per_expert(module: Any) -> set[str]:
    number = len(module.down_proj)
    return {name for name, p in module._parameters.items() if p is not None and p.ndim > 0 and len(p) == number}


@torch.no_grad()
def _acts_by_channel(module: Any, axis: Axis, width: int, num_parts: int) -> bool:
    """Whether each part's channels alone decide what the activation makes of them, whichever family's it is."""
    act = module._apply_gate if module.has_gate else module.act_fn
    rows = torch.linspace(-3, 3, axis.blocks * width).sin().unsqueeze(0)
    try:
        whole = act(rows)
        parts = [act(cut(rows, Axis(-1, axis.blocks), num_parts, part)) for part in range(num_parts)]
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # it looks at more than these rows
        return False
    return whole.shape[-1] == width and torch.allclose(torch.cat(parts, -1), whole, rtol=1e-5, atol=1e-6)


@dataclass(frozen=True, slots=True)
class ExpertParts:
    """How the experts of a model are cut; as they are when nothing is said."""

    number: int = 1
    """t."""
    axes: Mapping[LayerPath, Axes] = field(default_factory=dict)

    def cut(self, layer: LayerPath, tensors: Tensors, part: int) -> dict[str, torch.Tensor]:
        """A part of an expert: of its weights, and of whatever else there is of them (``exp_avg.gate_up_proj``).

        Raises: `InvalidCheckpoint` for what cannot be cut.
        """
        return {
            name: tensor if (axis := self._axis(layer, name, tensor)) is None else _cut(tensor, axis, self.number, part)
            for name, tensor in tensors.items()
        }

    def join(self, layer: LayerPath, parts: Sequence[Tensors]) -> dict[str, torch.Tensor]:
        """The whole expert of all its parts. Raises: as `cut`."""
        whole = {}
        for name, first in parts[0].items():
            axis = self._axis(layer, name, first)
            whole[name] = first if axis is None else join([part[name] for part in parts], axis)
        return whole

    def _axis(self, layer: LayerPath, name: str, tensor: torch.Tensor) -> Axis | None:
        """Where a tensor is cut; None for a number that all parts have in common (the optimizer's ``step``)."""
        if self.number == 1 or tensor.ndim == 0:
            return None
        axis = self.axes[layer].get(name.rpartition(".")[2])
        if axis is None or tensor.ndim != 2 or tensor.dtype == torch.uint8:
            raise InvalidCheckpoint(
                f"{name} of the experts of {layer} cannot be cut or joined: adapters of experts and an optimizer's "
                "state in 8 bits go on with the same number of parts (experts.tensor) only."
            )
        return axis


def _cut(tensor: torch.Tensor, axis: Axis, num_parts: int, part: int) -> torch.Tensor:
    """In memory of its own, which the whole does not stay for."""
    return cut(tensor, axis, num_parts, part).clone(memory_format=torch.contiguous_format)
