"""Numbers in 8 bits: a tensor as codes with one scale for each channel, and experts that are kept so.

`int8`: symmetric absmax, code 127 is the largest magnitude of its channel, so zero stays zero and an error is at most
half a step, absmax / 254. `fp8`: float8 e4m3 (arXiv:2209.05433), whose largest, 448, is the largest magnitude of the
channel: three bits of mantissa whatever the magnitude, so an error is at most a 16th of the number itself; better than
int8 where a channel has few large numbers among many small ones. `QuantizedExperts` holds a fourth of the memory of
float32, and computes in the dtype of what it was made of, or (`int8_compute`) multiplies in integers.
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

Quantization = Literal["none", "int8", "int8_compute", "fp8"]
"""What experts that serve are held as."""

Codes = Literal["int8", "fp8"]

DTYPES: dict[Codes, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST: dict[Codes, int] = {"int8": 127, "fp8": 448}


@dataclass(frozen=True, slots=True)
class ScaledTensor:
    """A tensor in 8 bits."""

    codes: torch.Tensor
    """int8 or float8_e4m3fn, shaped like the tensor."""
    scale: torch.Tensor
    """float32, the same shape but 1 in the dimension that has one scale."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if self.codes.dtype is torch.int8:
            return (self.codes * self.scale).to(dtype)
        return (_to_float(self.codes) * self.scale).to(dtype)

    def __getitem__(self, index: int) -> ScaledTensor:
        """One of a stack."""
        return ScaledTensor(self.codes[index], self.scale[index])

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


@torch.no_grad()
def quantize(tensor: torch.Tensor, dim: int = -1, to: Codes = "int8") -> ScaledTensor:
    """Quantise with one scale for all that differs in `dim` alone.

    Raises:
        InvalidRequest: a number is not finite.
    """
    exact = tensor.float()
    if not exact.numel():
        return ScaledTensor(exact.to(DTYPES[to]), exact.sum(dim, keepdim=True))
    largest = LARGEST[to]
    scale = exact.abs().amax(dim, keepdim=True) / largest
    if not torch.isfinite(scale).all():
        raise InvalidRequest(f"a tensor {list(tensor.shape)} that has inf or nan in it cannot be quantised")
    steps = exact / torch.where(scale == 0, 1, scale)
    if to == "int8":
        steps.round_()
    return ScaledTensor(steps.clamp_(-largest, largest).to(DTYPES[to]), scale)


def _to_float(codes: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn -> float32, of finite numbers.

    torch converts them one by one on the CPU. As float16, seven bits further left, they are what they are times 2^-8,
    also where they are subnormal, and float16 is converted many at a time (benchmarks/quantization.py).
    """
    if codes.device.type != "cpu":
        return codes.float()
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    bits.bitwise_and_(-0x4001)  # what the sign has been extended into
    return bits.view(torch.float16).float().mul_(256)


SCALE = ".scale"
"""After the name of a stack: its scales, among the tensors of experts in 8 bits."""


class QuantizedExperts:
    """A `MovableGroup` whose weights are int8 or fp8, one scale for each output channel.

    All parameters are frozen: gradients go through to the rows that come in. Weights are dequantised for one expert at
    a time; while a graph is recorded, it keeps those of the experts that were touched. With `int8_compute` nothing is
    dequantised: rows are rounded to int8 with a scale of their own, and the products are those of integers, so they are
    exact and the same in every batch. Where that cannot be (gradients, few rows on a GPU), it computes as `int8`.
    """

    def __init__(self, group: StackedExperts, quantization: Quantization = "int8") -> None:
        """Quantises the stacks of the group, which is not changed (and whose memory is the caller's to free)."""
        module = group.module
        inputs, to = -2 if module.is_transposed else -1, codes_of(quantization)
        stacks = {name: quantize(module._parameters[name], inputs, to) for name in _stacks_of(module)}
        self._set(module, stacks, quantization)

    @classmethod
    def from_tensors(
        cls, module: nn.Module, tensors: Mapping[str, torch.Tensor], quantization: Quantization = "int8"
    ) -> QuantizedExperts:
        """What `tensors` of another group said, of all its experts: the same numbers, nothing is quantised anew.

        Args:
            module: how they compute, with as many experts; its own weights are not used, and may be on the meta device.
            tensors: of the experts, one after the other, and what they share.
            quantization: what the other group was made with.

        Raises: `WireError` when these are not such experts.
        """
        given = dict(tensors)
        frame: Any = copy.copy(module)
        frame._parameters = dict(module._parameters)
        frame._modules = {name: copy.deepcopy(child) for name, child in module._modules.items()}
        stacks = {}
        try:
            for name in _stacks_of(module):
                stack = ScaledTensor(given.pop(name), given.pop(name + SCALE))
                inputs = -2 if frame.is_transposed else -1
                _check(name, stack, frame._parameters[name].shape, inputs, DTYPES[codes_of(quantization)])
                stacks[name] = stack
            whole = {name: frame._parameters[name] for name in stacks} | given
            frame.load_state_dict(whole, strict=True, assign=True)
        except (KeyError, RuntimeError) as error:
            raise WireError(f"these are not experts in 8 bits of a {type(module).__name__}: {error}") from error
        made = cls.__new__(cls)
        made._set(frame.requires_grad_(False), stacks, quantization)
        return made

    def _set(self, module: Any, stacks: Mapping[str, ScaledTensor], quantization: Quantization) -> None:
        """Args: module: whose parameters named in `stacks` give the dtype to compute in, and are not kept."""
        group = StackedExperts(module)
        self.quantization = quantization
        self.flops_per_row = group.flops_per_row
        self._stacks = {name: (stack, module._parameters[name].dtype) for name, stack in stacks.items()}
        self._others: Any = copy.copy(module)
        self._others._parameters = {
            name: None if parameter is None or name in stacks else parameter.detach()
            for name, parameter in module._parameters.items()
        }
        self._rows = {name for name in _per_expert(module) if name not in stacks}  # biases: a row for each expert

    def select(self, experts: Sequence[int]) -> QuantizedExperts:
        part = copy.copy(self)
        rows = torch.tensor(experts, device=self.device)
        part._stacks = {
            name: (ScaledTensor(stack.codes[rows], stack.scale[rows]), dtype)
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
        """As every `SeparableGroup`; a stack as its codes, and its scales with `SCALE` after the name."""
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

    def mapped(self, change: Change) -> QuantizedExperts:
        part = copy.copy(self)
        part._stacks = {
            name: (ScaledTensor(change(stack.codes), change(stack.scale)), dtype)
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
        outs = [self._run_one(part, expert) for expert, part in parts]
        return torch.cat(outs) if outs else rows.clone()

    def _run_one(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        """[n, D] -> [n, D] through one expert."""
        if self.quantization != "int8_compute" or not self._fits_integers(rows):
            return self._dequantized(expert).run(rows, [0], [len(rows)])
        module = self._others
        hidden = self._linear(rows.to(self.device), "gate_up_proj" if module.has_gate else "up_proj", expert)
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        out = self._linear(hidden, "down_proj", expert)
        if module.has_post_expert_norm:
            out = module.post_expert_norm(out)
        return out.to(rows.device, rows.dtype)

    def _linear(self, rows: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        """[n, in] -> [n, out]: a product of integers, in the dtype that the weights had."""
        stack, dtype = self._stacks[name]
        codes, scale = stack.codes[expert], stack.scale[expert]
        if not self._others.is_transposed:
            codes, scale = codes.t(), scale.t()
        exact = rows.float()
        of_row = exact.abs().amax(-1, keepdim=True) / LARGEST["int8"]
        steps = (exact / torch.where(of_row == 0, 1, of_row)).round_().to(torch.int8)
        out = (torch._int_mm(steps, codes) * of_row * scale).to(dtype)
        if self._others.has_bias:
            out = out + self._others._parameters[f"{name}_bias"][expert]
        return out

    def _fits_integers(self, rows: torch.Tensor) -> bool:
        """Whether integers can be multiplied: no gradient goes through them, and GPUs want many rows of even widths."""
        if (torch.is_grad_enabled() and rows.requires_grad) or not len(rows):
            return False
        if self.device.type == "cpu":
            return True
        widths = [width for stack, _ in self._stacks.values() for width in stack.codes.shape[-2:]]
        return len(rows) > 16 and not any(width % 8 for width in widths)

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


def codes_of(quantization: Quantization) -> Codes:
    """What weights are stored as. `none` has no codes."""
    return "fp8" if quantization == "fp8" else "int8"


def make_group(module: nn.Module, quantization: Quantization) -> StackedExperts | QuantizedExperts:
    """The experts of a module as they are to be held."""
    group = StackedExperts(module)
    return group if quantization == "none" else QuantizedExperts(group, quantization)


def quantized_bytes(module: nn.Module) -> int:
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


def _check(name: str, stack: ScaledTensor, shape: Sequence[int], inputs: int, dtype: torch.dtype) -> None:
    scales = list(shape)
    scales[inputs] = 1
    if (stack.codes.dtype, stack.scale.dtype) != (dtype, torch.float32):
        raise WireError(f"{name} in 8 bits is {dtype} and float32, not {stack.codes.dtype} and {stack.scale.dtype}")
    if (list(stack.codes.shape), list(stack.scale.shape)) != (list(shape), scales):
        raise WireError(f"{name} is {list(stack.codes.shape)} with scales {list(stack.scale.shape)}; expected {shape}")
