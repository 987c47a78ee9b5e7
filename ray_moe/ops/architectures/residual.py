"""Residual MoE and pyramids (PR-MoE, arXiv:2201.05596).

A residual layer has a dense network that every token goes through, and one expert that corrects it: nearly as good as
two experts, at the communication of one. A pyramid has more experts in its last layers, which gain most from them.

Shape legend: D model width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.ops.gates.base import TokenInfo
from ray_moe.ops.layer import MoELayer


class ResidualMoE(nn.Module):
    """A dense network and a MoE layer, mixed. Takes and gives [..., D]."""

    def __init__(self, dense: nn.Module, moe: MoELayer, *, mix: Literal["learned", "sum"] = "learned") -> None:
        """
        Args:
            dense: [..., D] -> [..., D].
            moe: with one expert per token in the paper, and any number here.
            mix: "learned", weights that are a softmax of two, linear in the token (with a bias), as DeepSpeed has it;
                or "sum", as the paper writes it.

        Raises: `InvalidConfig` for another mix.
        """
        super().__init__()
        if mix not in ("learned", "sum"):
            raise InvalidConfig(f'mix is {mix!r}; give "learned" or "sum"')
        self.dense, self.moe = dense, moe
        self.mix = nn.Linear(moe.hidden_size, 2) if mix == "learned" else None

    def forward(self, hidden: torch.Tensor, info: TokenInfo | None = None) -> torch.Tensor:
        """[..., D] -> [..., D]; `info` is for the MoE layer."""
        corrected, dense = self.moe(hidden, info), self.dense(hidden)
        out: torch.Tensor
        if self.mix is None:
            out = corrected + dense
        else:
            share = self.mix(hidden).softmax(-1)
            out = corrected * share[..., :1] + dense * share[..., 1:]
        return out


def pyramid(num_layers: int, num_experts: int, *, last: int = 2, factor: int = 2) -> tuple[int, ...]:
    """Experts of each MoE layer: `num_experts`, and `factor` times as many in the `last` ones (in the paper 2 and 2).

    Raises: `InvalidConfig` for numbers that cannot be.
    """
    if not 0 <= last <= num_layers or min(num_layers, num_experts, factor) < 1:
        raise InvalidConfig(
            f"a pyramid of num_layers={num_layers}, num_experts={num_experts}, last={last}, factor={factor}: last is "
            "in 0..num_layers, and all others are 1 or more"
        )
    return (num_experts,) * (num_layers - last) + (num_experts * factor,) * last
