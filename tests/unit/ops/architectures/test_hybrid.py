"""Stacks of dense and MoE layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ray_moe import MoELayer
from ray_moe.errors import InvalidConfig
from ray_moe.ops.architectures.feed_forward import FeedForward
from ray_moe.ops.architectures.hybrid import PreNorm, Stack, hybrid_stack, moe_pattern
from ray_moe.ops.architectures.residual import pyramid
from ray_moe.ops.gates.base import TokenInfo
from ray_moe.ops.layer import moe_layers
from tests.unit.ops.architectures.elsewhere import Network, loss_of, regression, same_elsewhere


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("all", "MMMM"),
        ("every 1", "MMMM"),
        ("every 2nd", "DMDM"),
        ("every 3rd", "DDMD"),
        ("every 4", "DDDM"),
        ("last 2", "DDMM"),
        ("last 0", "DDDD"),
        ("D M D M", "DMDM"),
        ("M D", "MDMD"),
        ("D", "DDDD"),
        (lambda number: number in (0, 3), "MDDM"),
    ],
)
def test_a_pattern_says_which_layers_are_moe_layers(pattern, expected) -> None:
    assert moe_pattern(pattern, 4) == tuple(letter == "M" for letter in expected)


@pytest.mark.parametrize("pattern", ["", "every", "every 0", "every 5", "last 5", "D M D", "D m", "MDMD", "2"])
def test_what_is_no_pattern_is_refused_with_those_that_are(pattern) -> None:
    with pytest.raises(InvalidConfig, match='is no pattern for 4 layers; give "all", "every N"'):
        moe_pattern(pattern, 4)


def stack(info_gate: bool = False) -> Stack:
    torch.manual_seed(1)
    sizes = dict(zip((1, 3), pyramid(2, 4, last=1), strict=True))
    gate: Any = "hash" if info_gate else "topk"
    return hybrid_stack(
        4,
        "every 2nd",
        dense=lambda number: PreNorm(8, FeedForward(8, 5)),
        moe=lambda number: PreNorm(8, MoELayer(8, 3, sizes[number], 2, gate=gate, seed=number)),
    )


def test_a_stack_is_its_layers_one_after_the_other() -> None:
    model = stack()
    assert [layer.experts.num_experts for layer in moe_layers(model).values()] == [4, 8]
    assert list(moe_layers(model)) == ["layers.1.inner", "layers.3.inner"]
    hidden = torch.randn(2, 3, 8)
    expected = hidden
    every: Any = model.layers
    for layer in every:
        scale = (expected.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
        expected = expected + layer.inner(expected * scale * layer.norm.weight)
    torch.testing.assert_close(model(hidden), expected)


def test_what_is_known_about_tokens_reaches_the_gates_and_no_dense_layer() -> None:
    model, hidden = stack(info_gate=True), torch.randn(2, 3, 8)
    ids = torch.tensor([[5, 5, 7], [7, 5, 9]])
    model(hidden, TokenInfo(ids=ids))
    for layer in moe_layers(model).values():
        index = layer.routing.index.view(2, 3, 2)  # type: ignore[union-attr]
        assert torch.equal(index[0, 0], index[1, 1]) and torch.equal(index[0, 2], index[1, 0])
    assert isinstance(Stack([nn.Identity()])(hidden, TokenInfo()), torch.Tensor)


def test_it_learns_the_same_with_its_experts_elsewhere() -> None:
    same_elsewhere(Network(8, stack()), loss_of, lambda seed: regression(seed, 4, 3))
