"""Routing whole sequences or images: one choice of experts for each, and experts that see all of it.

For experts that mix what they get along more than the last dimension (convolution, attention). The gate sees a summary
of each item, the experts get items. An item travels as one row, so its experts can be on hosts as any others.

Shape legend: T items, D what a gate sees of an item, K experts per item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ray_moe.ops.architectures.module_experts import ItemShape, module_experts
from ray_moe.ops.gates.base import TokenInfo
from ray_moe.ops.layer import MoELayer

Summary = Callable[[torch.Tensor], torch.Tensor]
"""Items [T, *item_shape] -> [T, D]."""


def mean_of_sequence(items: torch.Tensor) -> torch.Tensor:
    """[T, S, D] -> [T, D]."""
    return items.mean(1)


def mean_of_image(items: torch.Tensor) -> torch.Tensor:
    """[T, C, H, W] -> [T, C]."""
    return items.mean((2, 3))


class ItemMoELayer(MoELayer):
    """A `MoELayer` over items: takes and gives [T, *item_shape]."""

    def __init__(
        self,
        hidden_size: int,
        experts: Sequence[nn.Module] | nn.ModuleList | Callable[[int], nn.Module],
        num_experts: int | None = None,
        top_k: int | None = None,
        *,
        item_shape: ItemShape,
        summary: Summary = mean_of_sequence,
        **options: Any,
    ) -> None:
        """
        Args:
            hidden_size: D.
            experts: modules, [n, *item_shape] -> the same shape; or a function that makes the expert with a number.
            num_experts: how many, for a function.
            top_k: K, as of `MoELayer`.
            item_shape: such as ``(-1, 64)``, sequences of any length, or ``(3, 32, 32)``.
            summary: what the gate sees of the items. If it is a module, it is a part of this one.
            options: `gate`, `capacity`, `auxiliary` and `seed` of `MoELayer`.

        Raises: `InvalidConfig` as `MoELayer` and `module_experts`.
        """
        made = module_experts(experts, num_experts, item_shape=item_shape)
        super().__init__(hidden_size, None, made.num_experts, top_k, experts=made, **options)
        self.summary = summary

    def forward(self, hidden: torch.Tensor, info: TokenInfo | None = None) -> torch.Tensor:
        """[T, *item_shape] -> the same. `info` is about items."""
        routing = self.route(self.summary(hidden), info)
        out: torch.Tensor = self.experts(hidden.flatten(1), routing.index, routing.weight)
        return out.view(hidden.shape)
