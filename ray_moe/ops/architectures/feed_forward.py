"""The dense feed-forward network: what a MoE layer stands in for, and what shared and residual experts are.

Shape legend: D model width, F inner width.
"""

from __future__ import annotations

import torch
from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.ops.routed_experts import Activation, activation_of


class FeedForward(nn.Module):
    """``down(act(gate(x)) * up(x))`` if `gated`, else ``down(act(up(x)))``. Takes and gives [..., D].

    Weights are named as those of `transformers`: `gate_proj`, `up_proj` and `down_proj`.
    """

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        *,
        activation: str | Activation = "silu",
        gated: bool = True,
        bias: bool = False,
    ) -> None:
        """
        Args:
            hidden_size: D.
            inner_size: F.
            activation, gated, bias: as of `MoELayer`.

        Raises: `InvalidConfig` for a size below 1 or an unknown activation.
        """
        super().__init__()
        if hidden_size < 1 or inner_size < 1:
            raise InvalidConfig(f"hidden_size is {hidden_size} and inner_size {inner_size}; both must be 1 or more")
        self.act_fn = activation_of(activation)
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=bias) if gated else None
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=bias)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        up = self.up_proj(hidden)
        inner = self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(hidden)) * up
        out: torch.Tensor = self.down_proj(inner)
        return out
