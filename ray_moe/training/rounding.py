"""Experts that are trained in 8 bits on a host: their matrices as codes, and as tensors that can go elsewhere.

What is trained is what `ops/quantized_training.py` trains in one process. A parameter of such an expert has a shape and
a gradient and no weights (`ops/optimizers.py: blank`); these are in a `Rounded`. Among the tensors that an expert is,
each of its matrices has the names `KEYS`. Called by `trained_experts.py`.

Shape legend: D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from ray_moe.errors import InvalidConfig
from ray_moe.ops.lora import ExpertAdapters
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.ops.quantization import ScaledTensor
from ray_moe.ops.quantized_training import Compensation, Rounded

CODES, SCALE, LOST, LIKE = "codes.", "scale.", "lost.", "like."
KEYS = (CODES, SCALE, LOST, LIKE)
"""Before the name of a matrix: its codes, their scales, what rounding took away, and nothing of the dtype that products
are computed in."""


def check_rounding(optimizer: OptimizerSettings, adapters: ExpertAdapters | None, num_parts: int) -> None:
    """Raises: `InvalidConfig` for what experts in 8 bits cannot have."""
    for holds, said in (
        (optimizer.offload == "none", f"their optimizer's state offloaded (optimizer.offload is {optimizer.offload})"),
        (adapters is None, "adapters (train.lora.experts): their own weights would stay as they are"),
        (num_parts == 1, f"{num_parts} parts (experts.tensor), each of which would have scales of its own"),
    ):
        if not holds:
            raise InvalidConfig(
                f"experts that are trained in 8 bits cannot have {said}; set train.quantization to none"
            )


def round_matrices(
    tensors: Mapping[str, torch.Tensor], inputs: int, compensation: Compensation, device: torch.device | str
) -> dict[str, Rounded]:
    """The matrices of an expert, by name.

    Args:
        tensors: what it is: weights (rounded now, from ``master.NAME`` where there is one), or codes of another host or
            of a checkpoint, which stay as they are.
        inputs: the dimension of the inputs of each, -1 or -2.
    """
    made: dict[str, Rounded] = {}
    for name, tensor in tensors.items():
        if name.startswith(CODES):
            made[name.removeprefix(CODES)] = _copied(tensors, name.removeprefix(CODES), inputs, compensation, device)
        elif "." not in name and tensor.ndim == 2 and CODES + name not in tensors:
            exact = tensors.get(f"master.{name}", tensor).to(device)
            made[name] = Rounded(exact, inputs, compensation)
            made[name].dtype = tensor.dtype
    return made


def _copied(
    tensors: Mapping[str, torch.Tensor], name: str, inputs: int, compensation: Compensation, device: torch.device | str
) -> Rounded:
    codes, scale, like = (tensors[key + name] for key in (CODES, SCALE, LIKE))
    made = Rounded(torch.zeros((0, 0), dtype=like.dtype), inputs, compensation)
    made.small, made.shape = ScaledTensor(codes.to(device), scale.to(device)), codes.shape
    made.lost = tensors[LOST + name].to(device) if LOST + name in tensors else None
    return made


def to_compute(rounded: Mapping[str, Rounded]) -> dict[str, torch.Tensor]:
    """What a replica needs: no compensation."""
    tensors: dict[str, torch.Tensor] = {}
    for name, each in rounded.items():
        tensors |= {CODES + name: each.small.codes, SCALE + name: each.small.scale}
        tensors[LIKE + name] = torch.empty(0, dtype=each.dtype)
    return tensors


def take_over(rounded: Mapping[str, Rounded], tensors: Mapping[str, torch.Tensor], device: torch.device | str) -> None:
    """Have a replica compute with what `to_compute` said of its owner."""
    for name, each in rounded.items():
        each.small = ScaledTensor(tensors[CODES + name].to(device), tensors[SCALE + name].to(device))


def to_train(rounded: Mapping[str, Rounded]) -> dict[str, torch.Tensor]:
    """What whoever goes on with an expert needs, beside the optimizer's state; copies."""
    lost = {LOST + name: each.lost for name, each in rounded.items() if each.lost is not None}
    return {name: tensor.clone() for name, tensor in (to_compute(rounded) | lost).items()}


def values(rounded: Mapping[str, Rounded]) -> dict[str, torch.Tensor]:
    """The matrices as products see them, by name."""
    return {name: each.value() for name, each in rounded.items()}


class _Value(torch.autograd.Function):
    """What products see of a matrix; its gradient is that of the parameter, which has no weights."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, rounded: Rounded) -> torch.Tensor:
        return rounded.value()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0].float(), None


learned = cast("Callable[[torch.Tensor, Rounded], torch.Tensor]", _Value.apply)
"""(parameter, its matrix) -> its value, through which the parameter gets a gradient."""
