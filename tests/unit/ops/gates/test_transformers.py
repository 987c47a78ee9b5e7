"""Gates against the routers of `transformers` with the same weights: choices, weights, logits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig, SwitchTransformersConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from ray_moe.errors import InvalidRequest
from ray_moe.ops.gates.registry import make_gate
from ray_moe.ops.gates.sigmoid import SigmoidSettings
from ray_moe.ops.gates.switch import SwitchSettings
from ray_moe.ops.gates.topk import TopKSettings
from tests.unit.ops.gates.gates import EXPERTS, WIDTH, spread, tokens

SOFTMAX = {
    "mixtral": (MixtralTopKRouter, MixtralConfig, {"num_local_experts": EXPERTS}, True),
    "qwen3_moe": (Qwen3MoeTopKRouter, Qwen3MoeConfig, {"num_experts": EXPERTS, "norm_topk_prob": True}, True),
    "olmoe": (OlmoeTopKRouter, OlmoeConfig, {"num_experts": EXPERTS, "norm_topk_prob": False}, False),
}


def same_weights(router: nn.Module, gate: Any, dtype: torch.dtype) -> None:
    nn.init.normal_(router.weight)  # type: ignore[arg-type]
    gate.load_state_dict({"weight": router.weight}, strict=False)
    gate.to(dtype), router.to(dtype)


@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
@pytest.mark.parametrize("family", SOFTMAX)
def test_topk_is_the_router_of_softmax_families(family: str, top_k: int) -> None:
    kind, config, options, normalize = SOFTMAX[family]
    router = kind(config(hidden_size=WIDTH, num_experts_per_tok=top_k, **options))
    gate = make_gate(TopKSettings(top_k, normalize), WIDTH, EXPERTS)
    same_weights(router, gate, torch.float32)
    ours, theirs = tokens(torch.float32).requires_grad_(), tokens(torch.float32).requires_grad_()
    routing, (logits, weight, index) = gate(ours), router(theirs)
    assert torch.equal(routing.index, index)
    torch.testing.assert_close((routing.weight, routing.logits), (weight, logits))
    scale = torch.randn(weight.shape)
    (routing.weight * scale).sum().backward(), (weight * scale).sum().backward()
    torch.testing.assert_close((ours.grad, gate.weight.grad), (theirs.grad, router.weight.grad))


def test_without_upcast_bfloat16_is_routed_bit_for_bit_as_in_mixtral() -> None:
    router = MixtralTopKRouter(MixtralConfig(hidden_size=64, num_local_experts=8, num_experts_per_tok=2))
    gate = make_gate(TopKSettings(upcast=False), 64, 8)
    same_weights(router, gate, torch.bfloat16)
    hidden = torch.randn(500, 64).bfloat16()
    routing, (logits, weight, index) = gate(hidden), router(hidden)
    assert all(torch.equal(*pair) for pair in ((routing.index, index), (routing.weight, weight)))
    assert torch.equal(routing.logits, logits)


@pytest.mark.parametrize("training", [True, False])
def test_switch_is_the_router_of_switch_transformers(training: bool) -> None:
    config = SwitchTransformersConfig(
        d_model=WIDTH, num_experts=EXPERTS, expert_capacity=1000, router_jitter_noise=0.2, router_dtype="float32"
    )
    router = SwitchTransformersTop1Router(config).train(training)
    gate = make_gate(SwitchSettings(jitter=0.2), WIDTH, EXPERTS).train(training)
    nn.init.normal_(router.classifier.weight)
    gate.load_state_dict(router.classifier.state_dict())
    hidden = tokens(torch.float32)
    torch.manual_seed(5)
    mask, weight, logits = router(hidden.clone()[None])
    torch.manual_seed(5)
    routing = gate(hidden)
    assert torch.equal(routing.index[:, 0], mask[0].argmax(-1))
    torch.testing.assert_close((routing.weight, routing.logits), (weight[0], logits[0]))


@pytest.mark.parametrize(
    "settings",
    [
        SigmoidSettings(2),
        SigmoidSettings(3, num_groups=3, top_groups=2, scale=2.5),
        SigmoidSettings(2, num_groups=2, top_groups=1, normalize=False),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_sigmoid_is_the_router_of_deepseek_v3(settings: SigmoidSettings, biased: bool) -> None:
    config = DeepseekV3Config(
        hidden_size=WIDTH,
        num_local_experts=EXPERTS,
        num_experts_per_tok=settings.top_k,
        n_group=settings.num_groups,
        topk_group=settings.top_groups,
        norm_topk_prob=settings.normalize,
        routed_scaling_factor=settings.scale,
    )
    router, gate = DeepseekV3TopkRouter(config), make_gate(settings, WIDTH, EXPERTS)
    same_weights(router, gate, torch.float32)
    if biased:
        router.e_score_correction_bias.copy_(torch.randn(EXPERTS))
        gate.bias.copy_(router.e_score_correction_bias)
    ours, theirs = tokens(torch.float32).requires_grad_(), tokens(torch.float32).requires_grad_()
    routing, (logits, weight, index) = gate(ours), router(theirs)
    expected = torch.zeros(len(ours), EXPERTS).scatter(1, index, weight)
    torch.testing.assert_close((spread(routing), routing.logits), (expected, logits))
    scale = torch.randn(expected.shape)
    (spread(routing) * scale).sum().backward(), (expected * scale).sum().backward()
    torch.testing.assert_close((ours.grad, gate.weight.grad), (theirs.grad, router.weight.grad))


def test_the_bias_moves_against_the_load_until_it_is_even_and_leaves_the_weights_alone() -> None:
    torch.manual_seed(2)
    gate = make_gate(SigmoidSettings(1, bias_rate=0.01, normalize=False), WIDTH, EXPERTS)
    nn.init.normal_(gate.weight)
    hidden = torch.randn(2000, WIDTH) + 0.7
    before = gate(hidden)
    loads = []
    for _ in range(150):
        routing = gate(hidden)
        loads.append(routing.index.flatten().bincount(minlength=EXPERTS))
        gate.update_bias(loads[-1])
    assert loads[0].max() > 2.5 * 2000 / EXPERTS
    assert loads[-1].max() < 1.15 * 2000 / EXPERTS
    stays = routing.index == before.index
    assert torch.equal(routing.weight[stays], before.weight[stays])
    assert gate.bias.grad_fn is None and not gate.bias.requires_grad


def test_one_step_of_the_bias_is_that_of_the_paper() -> None:
    gate = make_gate(SigmoidSettings(bias_rate=0.5), WIDTH, EXPERTS)
    gate.update_bias(torch.tensor([0, 2, 4, 2, 2, 2]))
    assert gate.bias.tolist() == [0.5, 0, -0.5, 0, 0, 0]
    with pytest.raises(InvalidRequest, match=r"shape \[5\]; there are 6 experts"):
        gate.update_bias(torch.zeros(5))


def test_the_bias_stays_in_float32() -> None:
    gate = make_gate(SigmoidSettings(), WIDTH, EXPERTS).bfloat16()
    assert (gate.weight.dtype, gate.bias.dtype) == (torch.bfloat16, torch.float32)
    gate.bias.fill_(1.0)
    gate.update_bias(torch.arange(6))
    assert gate.half().bias.tolist() == pytest.approx([1.001] * 3 + [0.999] * 3, abs=1e-6)
    assert gate.double().bias.dtype is torch.float64
