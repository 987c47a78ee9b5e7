"""Shared experts: always on, for what all tokens have in common, beside experts that are chosen.

DeepSeekMoE (arXiv:2401.06066) adds what they put out to that of the chosen ones; Qwen2-MoE (arXiv:2407.10671) weighs it
by a sigmoid for each token. N shared experts of width F are one feed-forward network of width N * F, and that is what
to give here.

Shape legend: D model width, F expert width, N shared experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.ops.architectures.feed_forward import FeedForward
from ray_moe.ops.gates.base import TokenInfo
from ray_moe.ops.layer import MoELayer


class SharedExpertLayer(nn.Module):
    """A MoE layer and a network that all tokens go through. Takes and gives [..., D].

    Where the MoE layer's experts are on hosts, the shared ones are still here: they have work for every token.
    """

    def __init__(self, moe: MoELayer, shared: nn.Module, *, gated: bool = False) -> None:
        """
        Args:
            moe: chooses.
            shared: [..., D] -> [..., D], such as a `FeedForward`.
            gated: whether what it puts out is multiplied by a sigmoid that is linear in the token.
        """
        super().__init__()
        self.moe, self.shared = moe, shared
        self.shared_gate = nn.Linear(moe.hidden_size, 1, bias=False) if gated else None

    def forward(self, hidden: torch.Tensor, info: TokenInfo | None = None) -> torch.Tensor:
        """[..., D] -> [..., D]; `info` is for the MoE layer."""
        shared = self.shared(hidden)
        if self.shared_gate is not None:
            shared = self.shared_gate(hidden).sigmoid() * shared
        out: torch.Tensor = self.moe(hidden, info) + shared
        return out


def shared_expert_layer(
    hidden_size: int,
    expert_size: int,
    num_experts: int,
    top_k: int | None = None,
    *,
    num_shared: int = 1,
    shared_gate: bool = False,
    **options: Any,
) -> SharedExpertLayer:
    """`num_experts` experts to choose from and `num_shared` shared ones of the same width and kind.

    Args:
        hidden_size, expert_size, num_experts, top_k, options: of the `MoELayer`.
        num_shared: N.
        shared_gate: see `SharedExpertLayer`.

    Raises: `InvalidConfig` for sizes that cannot be.
    """
    if num_shared < 1:
        raise InvalidConfig(f"num_shared is {num_shared}; it must be 1 or more (without shared experts, take MoELayer)")
    kind = {name: options[name] for name in ("activation", "gated", "bias") if name in options}
    moe = MoELayer(hidden_size, expert_size, num_experts, top_k, **options)
    return SharedExpertLayer(moe, FeedForward(hidden_size, num_shared * expert_size, **kind), gated=shared_gate)
