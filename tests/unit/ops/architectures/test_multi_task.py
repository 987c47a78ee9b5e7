"""The multi-gate mixture of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.ops.architectures.multi_task import MMoE
from ray_moe.ops.capacity import CapacitySettings
from tests.unit.ops.architectures.elsewhere import regression, same_elsewhere

TASKS, EXPERTS, WIDTH = 3, 4, 5


def mmoe(top_k: int | None = None, **options: Any) -> MMoE:
    torch.manual_seed(0)
    towers = [nn.Linear(WIDTH, outputs) for outputs in (1, 2, 1)]
    return MMoE(WIDTH, 6, EXPERTS, towers, top_k=top_k, gated=False, activation="relu", seed=1, **options)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_it_is_the_papers_formula_gradients_included(top_k) -> None:
    model: Any = mmoe(top_k).double()
    x = torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    experts = model.moe.experts
    gates = model.moe.gate.weight.view(TASKS, EXPERTS, WIDTH)
    wanted: list[list[torch.Tensor]] = [[] for _ in range(TASKS)]
    for example in x:
        outs = [experts.down_proj[e] @ (experts.up_proj[e] @ example).clamp(min=0) for e in range(EXPERTS)]
        for task in range(TASKS):
            share = (gates[task] @ example).softmax(0)
            if top_k is not None:
                kept = share.topk(top_k).indices.tolist()
                share = torch.stack([share[e] if e in kept else share[e] * 0 for e in range(EXPERTS)])
                share = share / share.sum()
            wanted[task].append(model.towers[task](sum(share[e] * outs[e] for e in range(EXPERTS))))
    ours, theirs = model(x), [torch.stack(each) for each in wanted]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    inputs = [x, *model.parameters()]
    mine_of = torch.autograd.grad([each.square().sum() for each in ours], inputs)
    theirs_of = torch.autograd.grad([each.square().sum() for each in theirs], inputs)
    for mine, other in zip(mine_of, theirs_of, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("top_k", [None, 1])
def test_an_expert_computes_an_example_once_however_many_tasks_want_it(top_k) -> None:
    model, asked = mmoe(top_k), []
    model.moe.experts.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[1].flatten().tolist()))
    model(torch.randn(6, WIDTH))
    routing = model.moe.routing
    assert routing is not None
    wanted = {(slot // TASKS, expert) for slot, row in enumerate(routing.index.tolist()) for expert in row}
    assert len(asked[0]) == len(wanted) <= 6 * EXPERTS
    assert sorted(asked[0]) == sorted(expert for _, expert in wanted)


def test_it_learns_the_same_with_its_experts_elsewhere() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mmoe = nn.Linear(3, WIDTH), mmoe(2)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            outs: list[torch.Tensor] = self.mmoe(self.first(x))
            return outs

    def loss_of(model: Any, batch: Any) -> torch.Tensor:
        return torch.stack([((out - batch["y"]) ** 2).mean() for out in model(batch["x"])]).sum()

    torch.manual_seed(2)
    same_elsewhere(Network(), loss_of, lambda seed: regression(seed, 4, 3))


def test_no_examples_and_no_capacity() -> None:
    assert [out.shape for out in mmoe()(torch.zeros(0, WIDTH))] == [(0, 1), (0, 2), (0, 1)]
    with pytest.raises(InvalidConfig, match="an MMoE has no capacity"):
        mmoe(capacity=CapacitySettings())
