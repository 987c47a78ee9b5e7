"""Statistics of gradients: their norm, and by how much to clip it.

The norm of a model is made of one number for each tensor, wherever that tensor is, by an exact sum: so it is the same
to the last bit however experts are placed on hosts of one kind. Called by hosts (`squares`) and by whoever commits a
step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ray_moe.errors import InvalidConfig, InvalidRequest

CHUNK = 2**20
"""Elements that are in float64 at a time."""


def squares(tensors: Iterable[torch.Tensor]) -> list[float]:
    """The sum of squares of each tensor, in float64: what cannot overflow for tensors of float32 or less.

    In float32, as `torch.nn.utils.clip_grad_norm_` has it, that of 16 million normal numbers was off by 0.1 % on a CPU.
    """
    sums = []
    for tensor in tensors:
        total = torch.zeros((), dtype=torch.float64, device=tensor.device)
        for chunk in tensor.detach().reshape(-1).split(CHUNK):
            exact = chunk.double()
            total += torch.dot(exact, exact)
        sums.append(total)
    return [float(total) for total in sums]  # only now waits for a GPU


def norm(squares_of_all: Iterable[float]) -> float:
    """The norm of all tensors together, of their `squares` in any order; inf or nan if any of these is."""
    try:
        return math.sqrt(math.fsum(squares_of_all))
    except OverflowError:
        return math.inf


def clip_coefficient(total_norm: float, max_norm: float | None) -> float:
    """What gradients are multiplied by, as `torch.nn.utils.clip_grad_norm_` has it in float64: at most 1.

    Args:
        total_norm: of all gradients.
        max_norm: None does not clip.

    Raises:
        InvalidRequest: `total_norm` is not finite, so that no multiple of the gradients is.
        InvalidConfig: `max_norm` is negative or not a number.
    """
    if not math.isfinite(total_norm):
        raise InvalidRequest(
            f"the gradients' norm is {total_norm}: leave out this step's batch, or lower the learning rate"
        )
    if max_norm is None:
        return 1.0
    if not max_norm >= 0:
        raise InvalidConfig(f"max_norm is {max_norm}; expected 0 or more, or none")
    return min(1.0, max_norm / (total_norm + 1e-6))
