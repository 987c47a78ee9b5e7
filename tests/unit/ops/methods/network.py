"""A small network, its data and its loop: what the tests of methods of training train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ray_moe import MoELayer

WIDTH, EXPERTS = 6, 5


class Network(nn.Module):
    """Two MoE layers between linear ones."""

    def __init__(self, num_experts: int = EXPERTS, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 1)
        self.layers = nn.ModuleList(MoELayer(WIDTH, 4, num_experts, seed=n, **options) for n in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        out: torch.Tensor = self.last(hidden)
        return out


def rows(step: int, number: int = 16) -> torch.Tensor:
    return torch.randn(number, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x = rows(step)
    return nn.functional.mse_loss(model(x), x.sum(-1, keepdim=True).sin())


def network(num_experts: int = EXPERTS, **options: Any) -> Any:
    return Network(num_experts, **options).double()


def adam(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, methods: Any, steps: range) -> list[float]:
    """The losses of some steps."""
    losses = []
    for step in steps:
        methods.apply(step)
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
