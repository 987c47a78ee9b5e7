"""Residual MoE and pyramids."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ray_moe import MoELayer
from ray_moe.errors import InvalidConfig
from ray_moe.ops.architectures.feed_forward import FeedForward
from ray_moe.ops.architectures.residual import ResidualMoE, pyramid
from tests.unit.ops.architectures.elsewhere import Network, loss_of, regression, same_elsewhere


def residual(mix: str = "learned") -> ResidualMoE:
    torch.manual_seed(2)
    moe = MoELayer(6, 4, 5, gate="switch", gated=False, activation="relu", seed=3)
    return ResidualMoE(FeedForward(6, 4, gated=False, activation="relu"), moe, mix=mix)  # type: ignore[arg-type]


@pytest.mark.parametrize("mix", ["learned", "sum"])
def test_it_is_the_papers_formula_token_by_token_gradients_included(mix) -> None:
    layer: Any = residual(mix).double()
    hidden = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    expected = []
    for token in hidden.reshape(-1, 6):
        logits = [(row @ token).item() for row in layer.moe.gate.weight]
        expert = max(range(5), key=logits.__getitem__)
        probability = torch.softmax(layer.moe.gate.weight @ token, 0)[expert]
        experts = layer.moe.experts
        chosen = probability * (experts.down_proj[expert] @ (experts.up_proj[expert] @ token).clamp(min=0))
        dense = layer.dense.down_proj.weight @ (layer.dense.up_proj.weight @ token).clamp(min=0)
        first = second = torch.ones((), dtype=torch.float64)
        if layer.mix is not None:
            a, b = layer.mix.weight @ token + layer.mix.bias
            first = a.exp() / (a.exp() + b.exp())
            second = 1 - first
        expected.append(first * chosen + second * dense)
    out, wanted = layer(hidden), torch.stack(expected).view(2, 4, 6)
    torch.testing.assert_close(out, wanted)
    inputs = [hidden, *layer.parameters()]
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    ours = torch.autograd.grad((out * weight).sum(), inputs)
    theirs = torch.autograd.grad((wanted * weight).sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_it_learns_the_same_with_its_experts_elsewhere() -> None:
    same_elsewhere(Network(6, residual()), loss_of, lambda seed: regression(seed, 4, 3))


def test_a_pyramid_is_that_of_the_paper() -> None:
    # PR-MoE 32/64 of 12 MoE layers: 32 experts in ten, 64 in the last two.
    assert pyramid(12, 32) == (32,) * 10 + (64,) * 2
    assert pyramid(3, 4, last=1, factor=3) == (4, 4, 12)
    assert pyramid(2, 4, last=0) == (4, 4)
    assert sum(pyramid(12, 32)) == math.fsum([320, 128])


@pytest.mark.parametrize("arguments", [{"last": 5}, {"last": -1}, {"factor": 0}, {"num_experts": 0}])
def test_what_cannot_be_is_refused(arguments) -> None:
    with pytest.raises(InvalidConfig, match="a pyramid of"):
        pyramid(**{"num_layers": 4, "num_experts": 2, **arguments})
    with pytest.raises(InvalidConfig, match="mix is 'mean'"):
        residual("mean")
