"""`ray_moe.MoELayer` against `transformers`: blocks of two families with the same weights, and the auxiliary loss."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ray_moe import MoELayer
from ray_moe.ops.gates.base import Routing
from ray_moe.ops.gates.topk import TopKGate
from ray_moe.ops.losses import load_balancing_loss
from tests import tiny_models


@pytest.mark.parametrize(
    ("family", "inner", "num_experts", "top_k", "normalize"), [("mixtral", 48, 6, 2, True), ("olmoe", 48, 8, 3, False)]
)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_block_of_transformers_with_the_same_weights_computes_and_learns_the_same(
    family, inner, num_experts, top_k, normalize, implementation
) -> None:
    model = tiny_models.build(family)
    model.set_experts_implementation(implementation)
    block = model.model.layers[0].mlp.train()
    gate = TopKGate(32, num_experts, top_k, normalize=normalize)
    layer = MoELayer(32, inner, num_experts, top_k, gate=gate)
    layer.load_state_dict(block.state_dict())
    hidden = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    mine, other = layer(ours), block(theirs)
    torch.testing.assert_close(mine, other)
    mine.square().sum().backward()
    other.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_the_balancing_loss_of_a_layer_is_that_of_transformers(top_k, padded) -> None:
    generator = torch.Generator().manual_seed(top_k)
    logits = torch.randn(3 * 11, 8, generator=generator)
    mask = torch.randint(0, 2, (3, 11), generator=generator) if padded else None
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weight, index = ours.softmax(-1).topk(top_k, dim=-1)
    loss = load_balancing_loss(Routing(index, weight, ours), mask)
    expected = load_balancing_loss_func((theirs,), 8, top_k, mask)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
