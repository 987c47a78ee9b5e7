"""Shared and fine-grained experts, against the blocks of `transformers` and plain arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from ray_moe import MoELayer
from ray_moe.errors import InvalidConfig
from ray_moe.ops.architectures.feed_forward import FeedForward
from ray_moe.ops.architectures.fine_grained import ExpertSizes
from ray_moe.ops.architectures.shared import SharedExpertLayer, shared_expert_layer
from ray_moe.ops.gates.sigmoid import SigmoidSettings
from ray_moe.ops.gates.topk import TopKSettings
from tests import tiny_models
from tests.unit.ops.architectures.elsewhere import Network, loss_of, regression, same_elsewhere

QWEN = {
    "gate.": "moe.gate.",
    "experts.": "moe.experts.",
    "shared_expert.": "shared.",
    "shared_expert_gate.": "shared_gate.",
}
DEEPSEEK = {
    "gate.weight": "moe.gate.weight",
    "gate.e_score_correction_bias": "moe.gate.bias",
    "experts.": "moe.experts.",
    "shared_experts.": "shared.",
}


def renamed(name: str, names: dict[str, str]) -> str:
    old = next(old for old in names if name.startswith(old))
    return names[old] + name.removeprefix(old)


def compare(layer: SharedExpertLayer, block: nn.Module, names: dict[str, str]) -> None:
    """The same weights give the same outputs and the same gradients."""
    layer.load_state_dict({renamed(name, names): tensor for name, tensor in block.state_dict().items()})
    hidden = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    mine, other = layer(ours), block(theirs)
    torch.testing.assert_close(mine, other)
    mine.square().sum().backward()
    other.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(layer.get_parameter(renamed(name, names)).grad, parameter.grad)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_gated_shared_expert_is_that_of_qwen2_moe(normalize) -> None:
    model = tiny_models.build("qwen2_moe", norm_topk_prob=normalize)
    block = model.model.layers[0].mlp.train()
    assert isinstance(block, Qwen2MoeSparseMoeBlock)
    moe = MoELayer(32, 24, 8, gate=TopKSettings(3, normalize=normalize))
    compare(SharedExpertLayer(moe, FeedForward(32, 40), gated=True), block, QWEN)


@pytest.mark.parametrize("num_shared", [1, 2])
def test_shared_experts_are_those_of_deepseek_v3(num_shared) -> None:
    model = tiny_models.build("deepseek_v3", n_shared_experts=num_shared)
    block = model.model.layers[1].mlp.train()
    assert isinstance(block, DeepseekV3MoE)
    gate = SigmoidSettings(3, num_groups=4, top_groups=2, scale=2.5)
    compare(shared_expert_layer(32, 24, 8, gate=gate, num_shared=num_shared), block, DEEPSEEK)


@pytest.mark.parametrize(("gated", "bias", "activation"), [(True, True, "gelu"), (False, False, "relu")])
def test_a_shared_network_of_n_widths_is_the_sum_of_n_experts(gated, bias, activation) -> None:
    torch.manual_seed(1)
    layer: Any = shared_expert_layer(
        6, 4, 3, 1, num_shared=2, gated=gated, bias=bias, activation=activation, shared_gate=True
    ).double()
    hidden = torch.randn(5, 6, dtype=torch.float64)
    shared, act = layer.shared, layer.moe.experts.act_fn
    expected = []
    for token, routed in zip(hidden, layer.moe(hidden), strict=True):
        total = torch.zeros(6, dtype=torch.float64)
        for expert in range(2):
            channels = slice(4 * expert, 4 * expert + 4)
            up = shared.up_proj.weight[channels] @ token + (shared.up_proj.bias[channels] if bias else 0)
            if gated:
                gate = shared.gate_proj.weight[channels] @ token + (shared.gate_proj.bias[channels] if bias else 0)
                inner = act(gate) * up
            else:
                inner = act(up)
            total = total + shared.down_proj.weight[:, channels] @ inner
        total = total + (shared.down_proj.bias if bias else 0)
        share = 1 / (1 + torch.exp(-(layer.shared_gate.weight[0] @ token)))
        expected.append(routed + share * total)
    torch.testing.assert_close(layer(hidden), torch.stack(expected))


def test_it_learns_the_same_with_its_experts_elsewhere() -> None:
    layer = shared_expert_layer(8, 6, 5, 2, num_shared=2, shared_gate=True, seed=0)
    same_elsewhere(Network(8, layer), loss_of, lambda seed: regression(seed, 4, 3))


def test_no_shared_experts_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="num_shared is 0"):
        shared_expert_layer(8, 6, 5, num_shared=0)


# --- Fine-grained --------------------------------------------------------------------------------------------
def counted(sizes: ExpertSizes, gated: bool) -> tuple[int, int]:
    """Parameters of the experts of a layer, and multiply-adds times two of one token, from what is really there."""
    layer = MoELayer(16, sizes.expert_size, sizes.num_experts, sizes.top_k, gated=gated)
    shared = [FeedForward(16, sizes.num_shared * sizes.expert_size, gated=gated)] if sizes.num_shared else []
    parameters = [*layer.experts.parameters(), *(p for each in shared for p in each.parameters())]
    layer(torch.randn(1, 16))
    touched = set(layer.routing.index.flatten().tolist())  # type: ignore[union-attr]
    used = sum(p[sorted(touched)].numel() for p in layer.experts.parameters())
    used += sum(p.numel() for each in shared for p in each.parameters())
    return sum(p.numel() for p in parameters), 2 * used


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("num_shared", [0, 1])
def test_cutting_experts_keeps_parameters_and_flops_and_multiplies_the_choices(gated, m, num_shared) -> None:
    coarse = ExpertSizes(expert_size=8, num_experts=6, top_k=2)
    fine = coarse.cut(m).isolate(num_shared)
    assert (fine.num_experts, fine.top_k, fine.expert_size) == (6 * m - num_shared, 2 * m - num_shared, 8 // m)
    for sizes in (coarse, fine):
        assert counted(sizes, gated) == (
            sizes.num_parameters(16, gated=gated),
            sizes.flops_per_token(16, gated=gated),
        )
    assert counted(coarse, gated) == counted(fine, gated)
    if num_shared == 0:
        assert fine.num_combinations >= coarse.num_combinations


def test_the_number_of_combinations_is_that_of_the_paper() -> None:
    coarse = ExpertSizes(expert_size=64, num_experts=16, top_k=2)
    assert (coarse.num_combinations, coarse.cut(4).num_combinations) == (120, 4_426_165_368)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ExpertSizes(8, 4, 5), "top_k is in 1..num_experts"),
        (lambda: ExpertSizes(8, 4, 2).cut(3), "8 wide cannot be cut in 3; m is one of 1, 2, 4, 8"),
        (lambda: ExpertSizes(8, 4, 2).isolate(2), "num_shared is 2; with 2 experts per token, 0 to 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, said) -> None:
    with pytest.raises(InvalidConfig, match=said):
        make()
