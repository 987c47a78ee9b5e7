"""What most gates have in common: one row of weights for each expert, and checks of their options.

No gate by itself. The gates of this folder are made of it.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ray_moe.errors import InvalidConfig


class LinearGate(nn.Module):
    """Logits [T, E] that are linear in the hidden states. Its subclasses choose."""

    weight: nn.Parameter

    def __init__(self, hidden_size: int, num_experts: int, settings: Any, **rows: int) -> None:
        """
        Args:
            hidden_size: D.
            num_experts: E.
            settings: what it is made by; `upcast` is read here.
            rows: of further weights [rows, D] by name, or of `weight` where it has others than E.
        """
        super().__init__()
        self.settings, self.num_experts, self.hidden_size = settings, num_experts, hidden_size
        for name, number in ({"weight": num_experts} | rows).items():
            self.register_parameter(name, nn.Parameter(torch.empty(number, hidden_size)))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights: uniform within ±1/√D, as `torch.nn.Linear` has them."""
        for parameter in self.parameters():
            bound = parameter.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, E]."""
        return project(hidden, self.weight, self.settings.upcast)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.num_experts}, {self.settings}"


def project(hidden: torch.Tensor, weight: torch.Tensor, upcast: bool) -> torch.Tensor:
    """[T, D] and [E, D] -> [T, E], in float32 at least with `upcast`, whatever autocast says.

    Rounding to bfloat16 makes ties, and an order of experts that is not that of their logits.
    """
    if not upcast:
        return nn.functional.linear(hidden, weight)
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    device = hidden.device.type
    exact = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with exact:
        return nn.functional.linear(hidden.to(dtype), weight.to(dtype))


def normalized(weight: torch.Tensor) -> torch.Tensor:
    """[T, K] divided by its sum over K; zeros stay zeros."""
    total = weight.sum(dim=-1, keepdim=True)
    return weight / total.masked_fill(total == 0, 1)


def mean(values: torch.Tensor) -> torch.Tensor:
    """[T] -> the mean, 0 where there are none."""
    return values.sum() / max(len(values), 1)


def compact(chosen: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices as a mask, to an index with as many columns as the token with the most choices needs (one at least).

    Experts are computed for whole columns, so what no token needs is better left out. The device is waited for.

    Args:
        chosen: [T, E] booleans.
        weight: [T, E].

    Returns: index [T, K], experts ascending and then E, and weight [T, K], zero there.
    """
    num_experts = chosen.shape[-1]
    most = int(chosen.sum(-1).max()) if len(chosen) else 0
    order = chosen.byte().argsort(dim=-1, descending=True, stable=True)[:, : max(most, 1)]
    kept = chosen.gather(-1, order)
    return order.masked_fill(~kept, num_experts), weight.gather(-1, order) * kept


def check(settings: object, *rules: tuple[bool, str]) -> None:
    """Raises: `InvalidConfig` with the first rule that does not hold."""
    for holds, said in rules:
        if not holds:
            raise InvalidConfig(f"{said}; got {settings}")


def check_top_k(top_k: int, most: int, of: str = "experts") -> None:
    """Raises: `InvalidConfig` when K is not in 1..most."""
    if not 1 <= top_k <= most:
        raise InvalidConfig(f"top_k is {top_k}; with {most} {of} it can be 1 to {most}")
