"""Computing rows through a group of experts: a grouped matrix product over the experts that are touched.

Works on any experts module of `transformers`' experts interface (a stack of weights `[E, out, in]` with the flags
`has_gate`, `has_bias`, `is_transposed`, `has_post_expert_norm`), whatever the family, because only the flags and the
family's own `_apply_gate` are used. Called by `runtime/expert_host.py`; knows nothing of hosts or routing.

Shape legend: n rows, D model width, F expert width, E experts held.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ray_moe.errors import WireError

ExpertArrays = dict[str, tuple[str, npt.NDArray[Any]]]
"""Tensors of some experts by name, ready to travel without torch: (name of the torch dtype, array). What numpy has no
dtype for (bfloat16, float8) is an array of its bits."""


class ExpertGroup(Protocol):
    """Some experts of one layer, able to compute rows that are already grouped by expert."""

    flops_per_row: int
    """Multiply-adds of one row, times two."""

    def run(self, rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """[n, D] -> [n, D]: the first ``counts[0]`` rows through local expert ``experts[0]``, and so on.

        The result is unweighted, in the dtype and on the device of `rows`.
        """
        ...

    def parameters(self) -> list[torch.Tensor]:
        """The parameters a gradient is accumulated in."""
        ...


@runtime_checkable
class SeparableGroup(ExpertGroup, Protocol):
    """A group whose experts can be taken out of it one by one."""

    def select(self, experts: Sequence[int]) -> SeparableGroup:
        """A group of its own memory with only these local experts, in this order, and their gradients so far."""
        ...

    def tensors(self, experts: Sequence[int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What these local experts are, by name: a row for each of them, and what all experts share."""
        ...


class StackedExperts:
    """A `SeparableGroup` over a module of `transformers`' experts interface."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.flops_per_row = 2 * sum(p.numel() // p.shape[0] for p in module.parameters() if p.ndim == 3)

    def run(self, rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        module = self.module
        up_name = "gate_up_proj" if module.has_gate else "up_proj"
        up: torch.Tensor = getattr(module, up_name)
        hidden = _grouped_linear(rows.to(up.device, up.dtype), module, up_name, experts, counts)
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        out = _grouped_linear(hidden, module, "down_proj", experts, counts)
        if module.has_post_expert_norm:
            out = module.post_expert_norm(out)
        return out.to(rows.device, rows.dtype)

    def parameters(self) -> list[torch.Tensor]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def select(self, experts: Sequence[int]) -> StackedExperts:
        part: Any = copy.copy(self.module)
        rows = torch.tensor(experts, device=self.module.down_proj.device)
        part._parameters = {name: self._taken(name, rows) for name in self.module._parameters}
        part._modules = {name: copy.deepcopy(child) for name, child in self.module._modules.items()}
        if hasattr(part, "num_experts"):
            part.num_experts = len(experts)
        return StackedExperts(part)

    def tensors(self, experts: Sequence[int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        rows = torch.tensor(experts, device=self.module.down_proj.device)
        own, shared = {}, {}
        for name, tensor in self.module.state_dict().items():
            if self._is_stack(name):
                own[name] = tensor.detach().index_select(0, rows)
            else:
                shared[name] = tensor.detach().clone()
        return own, shared

    def _is_stack(self, name: str) -> bool:
        """Whether the parameter has one row for each expert."""
        parameter = self.module._parameters.get(name)
        return parameter is not None and parameter.ndim > 0 and len(parameter) == len(self.module.down_proj)

    def _taken(self, name: str, rows: torch.Tensor) -> nn.Parameter | None:
        parameter = self.module._parameters[name]
        if parameter is None:
            return None
        where = rows if self._is_stack(name) else ...
        taken = nn.Parameter(parameter.detach()[where].clone(), requires_grad=parameter.requires_grad)
        if parameter.grad is not None:
            taken.grad = parameter.grad[where].clone()
        return taken


_BITS = {1: np.uint8, 2: np.uint16}
"""What stands in for the dtypes that numpy does not have, by their width in bytes."""


def pack(tensors: Mapping[str, torch.Tensor]) -> ExpertArrays:
    """Tensors as plain arrays; those that are on the CPU already share their memory."""
    packed: ExpertArrays = {}
    for name, tensor in tensors.items():
        here, dtype = tensor.detach().cpu().contiguous(), str(tensor.dtype).removeprefix("torch.")
        if hasattr(np, dtype):
            packed[name] = (dtype, here.numpy())
        else:
            packed[name] = (dtype, here.view(getattr(torch, np.dtype(_BITS[here.itemsize]).name)).numpy())
    return packed


def unpack(arrays: ExpertArrays) -> dict[str, torch.Tensor]:
    """The tensors that `pack` made arrays of, in memory of their own (an array that travelled may be read-only).

    Raises: `WireError` for what it never makes.
    """
    tensors = {}
    for name, (dtype_name, array) in arrays.items():
        dtype = getattr(torch, dtype_name, None)
        if not isinstance(dtype, torch.dtype) or dtype.itemsize != array.itemsize:
            raise WireError(
                f"{name} is said to be {dtype_name!r} and has {array.itemsize} bytes a number; expected the name of a "
                "torch dtype of that width"
            )
        tensors[name] = torch.from_numpy(np.array(array)).view(dtype)
    return tensors


def _grouped_linear(
    rows: torch.Tensor, module: Any, name: str, experts: Sequence[int], counts: Sequence[int]
) -> torch.Tensor:
    """[n, in] -> [n, out] through the weights `module.<name>` of each row's expert.

    The bias is added after the product has been rounded, as `transformers` does: fusing them would change bf16 bits.
    """
    weight: torch.Tensor = getattr(module, name)
    if not module.is_transposed:
        weight = weight.transpose(-2, -1)  # [E, in, out]
    if weight.device.type == "cuda" and weight.dtype is torch.bfloat16:  # the dtype the kernel is made for
        sizes = torch.zeros(weight.shape[0], dtype=torch.int32)
        sizes[torch.tensor(experts)] = torch.tensor(counts, dtype=torch.int32)
        offsets = torch.cumsum(sizes, 0, dtype=torch.int32).to(weight.device)
        out = torch.nn.functional.grouped_mm(rows, weight, offs=offsets)
    else:
        parts = rows.split(list(counts))
        if torch.is_grad_enabled():
            out = torch.cat([part @ weight[expert] for part, expert in zip(parts, experts, strict=True)])
        else:
            # torch's own grouped product on the CPU is this loop, over all experts instead of those touched.
            out = rows.new_empty(len(rows), weight.shape[-1])
            for part, expert, into in zip(parts, experts, out.split(list(counts)), strict=True):
                torch.mm(part, weight[expert], out=into)
    if module.has_bias:
        bias: torch.Tensor = getattr(module, f"{name}_bias")
        expert_of_row = torch.tensor(experts, device=bias.device).repeat_interleave(
            torch.tensor(counts, device=bias.device)
        )
        out = out + bias[expert_of_row]
    return out
