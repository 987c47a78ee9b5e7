"""Numbers in 8 bits: a tensor as int8 codes with one scale for each channel, and experts that are kept so.

Symmetric absmax: code 127 is the largest magnitude of its channel, so zero stays zero and an error is at most half a
step, absmax / 254. `Int8Experts` holds a fourth of the memory of float32, and computes in the dtype of what it was
made of.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from ray_moe.errors import InvalidRequest, WireError
from ray_moe.ops.experts import Change, StackedExperts, mapped_module

Quantization = Literal["none", "int8"]
"""What experts that serve are held as."""

LARGEST = 127


@dataclass(frozen=True, slots=True)
class Int8Tensor:
    """A tensor in 8 bits."""

    codes: torch.Tensor
    """int8, shaped like the tensor."""
    scale: torch.Tensor
    """float32, the same shape but 1 in the dimension that has one scale."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (self.codes * self.scale).to(dtype)

    def __getitem__(self, index: int) -> Int8Tensor:
        """One of a stack."""
        return Int8Tensor(self.codes[index], self.scale[index])

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


@torch.no_grad()
def quantize(tensor: torch.Tensor, dim: int = -1) -> Int8Tensor:
    """Quantise with one scale for all that differs in `dim` alone.

    Raises:
        InvalidRequest: a number is not finite.
    """
    exact = tensor.float()
    if not exact.numel():
        return Int8Tensor(exact.to(torch.int8), exact.sum(dim, keepdim=True))
    scale = exact.abs().amax(dim, keepdim=True) / LARGEST
    if not torch.isfinite(scale).all():
        raise InvalidRequest(f"a tensor {list(tensor.shape)} that has inf or nan in it cannot be quantised")
    codes = (exact / torch.where(scale == 0, 1, scale)).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return Int8Tensor(codes, scale)


SCALE = ".scale"
"""After the name of a stack: its scales, among the tensors of experts in 8 bits."""


class Int8Experts:
    """A `MovableGroup` whose weights are int8, one scale for each output channel.

    All parameters are frozen: gradients go through to the rows that come in. Weights are dequantised for one expert at
    a time; while a graph is recorded, it keeps those of the experts that were touched.
    """

    def __init__(self, group: StackedExperts) -> None:
        """Quantises the stacks of the group, which is not changed (and whose memory is the caller's to free)."""
        module = group.module
        inputs = -2 if module.is_transposed else -1
        self._set(module, {name: quantize(module._parameters[name], inputs) for name in _stacks_of(module)})

    @classmethod
    def from_tensors(cls, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Int8Experts:
        """What `tensors` of another group said, of all its experts: the same numbers, nothing is quantised anew.

        Args:
            module: how they compute, with as many experts; its own weights are not used, and may be on the meta device.
            tensors: of the experts, one after the other, and what they share.

        Raises: `WireError` when these are not such experts.
        """
        given = dict(tensors)
        frame: Any = copy.copy(module)
        frame._parameters = dict(module._parameters)
        frame._modules = {name: copy.deepcopy(child) for name, child in module._modules.items()}
        stacks = {}
        try:
            for name in _stacks_of(module):
                stack = Int8Tensor(given.pop(name), given.pop(name + SCALE))
                _check(name, stack, frame._parameters[name].shape, -2 if frame.is_transposed else -1)
                stacks[name] = stack
            whole = {name: frame._parameters[name] for name in stacks} | given
            frame.load_state_dict(whole, strict=True, assign=True)
        except (KeyError, RuntimeError) as error:
            raise WireError(f"these are not experts in 8 bits of a {type(module).__name__}: {error}") from error
        made = cls.__new__(cls)
        made._set(frame.requires_grad_(False), stacks)
        return made

    def _set(self, module: Any, stacks: Mapping[str, Int8Tensor]) -> None:
        """Args: module: whose parameters named in `stacks` give the dtype to compute in, and are not kept."""
        group = StackedExperts(module)
        self.flops_per_row = group.flops_per_row
        self._stacks = {name: (stack, module._parameters[name].dtype) for name, stack in stacks.items()}
        self._others: Any = copy.copy(module)
        self._others._parameters = {
            name: None if parameter is None or name in stacks else parameter.detach()
            for name, parameter in module._parameters.items()
        }
        self._rows = {name for name in _per_expert(module) if name not in stacks}  # biases: a row for each expert

    def select(self, experts: Sequence[int]) -> Int8Experts:
        part = copy.copy(self)
        rows = torch.tensor(experts, device=self.device)
        part._stacks = {
            name: (Int8Tensor(stack.codes[rows], stack.scale[rows]), dtype)
            for name, (stack, dtype) in self._stacks.items()
        }
        part._others = copy.copy(self._others)
        part._others._parameters = {
            name: other[rows] if name in self._rows else other for name, other in self._others._parameters.items()
        }
        if hasattr(part._others, "num_experts"):
            part._others.num_experts = len(experts)
        return part

    def tensors(self, experts: Sequence[int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """As every `SeparableGroup`; a stack as its codes (int8), and its scales with `SCALE` after the name."""
        rows = torch.tensor(experts, device=self.device)
        own, shared = {}, {}
        for name, (stack, _) in self._stacks.items():
            own[name], own[name + SCALE] = stack.codes[rows], stack.scale[rows]
        for name, tensor in self._others.state_dict().items():
            if name in self._rows:
                own[name] = tensor[rows]
            else:
                shared[name] = tensor.clone()
        return own, shared

    def mapped(self, change: Change) -> Int8Experts:
        part = copy.copy(self)
        part._stacks = {
            name: (Int8Tensor(change(stack.codes), change(stack.scale)), dtype)
            for name, (stack, dtype) in self._stacks.items()
        }
        part._others = mapped_module(self._others, change)
        return part

    def warm_up(self) -> None:
        """As every `MovableGroup`."""
        self._dequantized(0).warm_up()

    @property
    def device(self) -> torch.device:
        return self._stacks["down_proj"][0].codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stacks of weights."""
        return sum(stack.nbytes for stack, _ in self._stacks.values())

    def run(self, rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """[n, D] -> [n, D], as every `ExpertGroup`."""
        parts = zip(experts, rows.split(list(counts)), strict=True)
        outs = [self._dequantized(expert).run(part, [0], [len(part)]) for expert, part in parts]
        return torch.cat(outs) if outs else rows.clone()

    def _dequantized(self, expert: int) -> StackedExperts:
        """A group of this expert alone."""
        module = copy.copy(self._others)
        if hasattr(module, "num_experts"):
            module.num_experts = 1
        module._parameters = {
            name: other[expert : expert + 1] if name in self._rows else other
            for name, other in self._others._parameters.items()
        }
        for name, (stack, dtype) in self._stacks.items():
            module._parameters[name] = stack[expert].dequantize(dtype)[None]
        return StackedExperts(module)


def make_group(module: nn.Module, quantization: Quantization) -> StackedExperts | Int8Experts:
    """The experts of a module as they are to be held."""
    group = StackedExperts(module)
    return Int8Experts(group) if quantization == "int8" else group


def int8_bytes(module: nn.Module) -> int:
    """Bytes of one of the module's experts (which may be on the meta device) in 8 bits."""
    inputs = -2 if cast(Any, module).is_transposed else -1
    stacks = {name: module._parameters[name] for name in _stacks_of(module)}
    weights = sum(p[0].numel() + 4 * p[0].numel() // p.shape[inputs] for p in stacks.values() if p is not None)
    others = [module._parameters[name] for name in _per_expert(module) - stacks.keys()]
    return weights + sum(p[0].nbytes for p in others if p is not None)


def _per_expert(module: Any) -> set[str]:
    """Names of the parameters that have a row for each expert."""
    number = len(module._parameters["down_proj"])
    return {n for n, p in module._parameters.items() if p is not None and p.ndim > 0 and len(p) == number}


def _stacks_of(module: Any) -> list[str]:
    """Names of the weights: a matrix for each expert."""
    return [name for name in module._parameters if name in _per_expert(module) and module._parameters[name].ndim == 3]


def _check(name: str, stack: Int8Tensor, shape: Sequence[int], inputs: int) -> None:
    scales = list(shape)
    scales[inputs] = 1
    if (stack.codes.dtype, stack.scale.dtype) != (torch.int8, torch.float32):
        raise WireError(f"{name} in 8 bits is int8 and float32, not {stack.codes.dtype} and {stack.scale.dtype}")
    if (list(stack.codes.shape), list(stack.scale.shape)) != (list(shape), scales):
        raise WireError(f"{name} is {list(stack.codes.shape)} with scales {list(stack.scale.shape)}; expected {shape}")
