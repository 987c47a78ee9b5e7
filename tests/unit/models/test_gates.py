"""Other gates in models of `transformers`: the same logits where nothing differs, and learning where much does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ray_moe.errors import InvalidConfig, InvalidRequest, UnsupportedModel
from ray_moe.models.gates import replace_gates, routings, tell_ids, told
from ray_moe.ops.gates.base import GateSettings, TokenInfo
from ray_moe.ops.gates.multi_task import MultiTaskSettings
from ray_moe.ops.gates.sigmoid import SigmoidSettings
from ray_moe.ops.gates.topk import TopKSettings
from tests.tiny_models import build

IDS = torch.arange(3, 27).view(2, 12)

SAME: dict[str, GateSettings] = {
    "mixtral": TopKSettings(2),
    "qwen3_moe": TopKSettings(3),
    "qwen2_moe": TopKSettings(3, normalize=False),
    "olmoe": TopKSettings(3, normalize=False),
    "deepseek_v3": SigmoidSettings(3, num_groups=4, top_groups=2, scale=2.5),
    "glm4_moe": SigmoidSettings(3, num_groups=2, top_groups=1),
}
"""The gate that each family has."""


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", SAME)
def test_the_familys_own_gate_changes_no_logit_and_no_name(family: str, implementation: str) -> None:
    model = build(family).eval()
    model.set_experts_implementation(implementation)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer)))
    expected, names = model(IDS).logits, model.state_dict().keys()
    paths = replace_gates(model, SAME[family])
    assert paths and all(path.endswith("mlp.gate") for path in paths)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert {name.replace("gate.bias", "gate.e_score_correction_bias") for name in model.state_dict()} == names
    num_experts = 6 if family == "mixtral" else 8
    shapes = {path: tuple(routing.logits.shape) for path, routing in routings(model).items()}
    assert shapes == dict.fromkeys(paths, (24, num_experts))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize(
    "gate", ["switch", "noisy_topk", "topk_random", "expert_choice", "dynamic_k", "gumbel", "sigmoid", "hierarchical"]
)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_others_learn_in_its_place(family: str, gate: str, implementation: str) -> None:
    model = build(family).train()
    model.set_experts_implementation(implementation)
    paths = replace_gates(model, gate)
    before = copy.deepcopy({name: p for name, p in model.named_parameters() if ".gate." in name})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        own = [each for routing in routings(model).values() for each in routing.losses.values()]
        (loss + 0.01 * sum(own)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    after = dict(model.named_parameters())
    assert before and all(
        bool(after[name].ne(p).any()) and bool(after[name].isfinite().all()) for name, p in before.items()
    )
    assert len(routings(model)) == len(paths)


def test_no_expert_is_none_in_every_implementation() -> None:
    model = build("mixtral").eval()
    replace_gates(model, "dynamic_k")
    outs = []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        outs.append(model(IDS).logits)
    assert any(bool((routing.index == 6).any()) for routing in routings(model).values())
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-4, atol=1e-5)


def test_a_name_takes_the_models_own_k_and_a_seed_its_weights() -> None:
    model = build("qwen3_moe")
    (first, *_) = replace_gates(model, "topk")
    assert model.get_submodule(first).settings.top_k == 3
    one, same, other = build("mixtral"), build("mixtral"), build("mixtral")
    for each, seed in ((one, 1), (same, 1), (other, 2)):
        path = replace_gates(each, MultiTaskSettings(2, top_k=2), seed=seed)[0] + ".weight"
    assert torch.equal(one.get_parameter(path), same.get_parameter(path))
    assert not torch.equal(one.get_parameter(path), other.get_parameter(path))


def test_a_model_that_was_used_can_be_copied() -> None:
    model = build("mixtral").eval()
    replace_gates(model, "dynamic_k")
    expected = model(IDS).logits
    twin = copy.deepcopy(model)
    assert not routings(twin)
    torch.testing.assert_close(twin(IDS).logits, expected)
    assert routings(twin).keys() == routings(model).keys()


def test_gates_have_the_routers_dtype() -> None:
    model = build("mixtral").bfloat16()
    (path, *_) = replace_gates(model, "switch")
    assert model.get_parameter(f"{path}.weight").dtype is torch.bfloat16
    assert model(IDS).logits.dtype is torch.bfloat16


def test_gates_hear_of_the_tokens_what_the_model_is_not_told() -> None:
    model = build("mixtral").eval()
    replace_gates(model, MultiTaskSettings(2, top_k=2))
    with pytest.raises(InvalidRequest, match="know the task"):
        model(IDS)
    outs = []
    for task in (0, 1):
        with told(model, TokenInfo(task=torch.full_like(IDS, task))):
            outs.append(model(IDS).logits)
    assert not torch.allclose(*outs)
    with told(model, TokenInfo(task=torch.zeros(3, dtype=torch.long))), pytest.raises(InvalidRequest, match="3 tokens"):
        model(IDS)
    with pytest.raises(InvalidRequest, match="know the task"):
        model(IDS)
    hashed = build("mixtral").eval()
    (path, *_) = replace_gates(hashed, "hash")
    with told(hashed, TokenInfo(ids=IDS)):
        hashed(IDS)
    index = routings(hashed)[path].index
    with told(hashed, TokenInfo(ids=IDS.flip(1))):
        hashed(IDS.flip(1))
    assert torch.equal(routings(hashed)[path].index.view(2, 12, -1).flip(1), index.view(2, 12, -1))


def test_gates_hear_the_ids_that_a_model_is_called_with() -> None:
    model: Any = build("mixtral").eval()
    (path, *_) = replace_gates(model, "hash")
    tell_ids(model)
    twin: Any = copy.deepcopy(model)
    model(IDS)
    first = routings(model)[path].index.view(2, 12, -1)
    model(input_ids=IDS.flip(1))
    assert torch.equal(routings(model)[path].index.view(2, 12, -1).flip(1), first)
    assert len(first.unique()) > 3
    twin(IDS)
    assert torch.equal(routings(twin)[path].index.view(2, 12, -1), first)
    with told(model, TokenInfo(ids=torch.zeros_like(IDS))):
        model(IDS)
    assert len(routings(model)[path].index.unique()) == 2  # K of one token


def test_a_model_that_has_another_form_is_left_as_it_was() -> None:
    with pytest.raises(UnsupportedModel, match="no experts"):
        replace_gates(nn.Linear(2, 2), "topk")
    model: Any = build("mixtral")
    model.model.layers[1].mlp.gate.forward = lambda hidden: hidden
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.experts answers.* tried gate \(MixtralTop"):
        replace_gates(model, "switch")
    del model.model.layers[1].mlp.gate
    with pytest.raises(UnsupportedModel, match=r"of 6 experts, .* tried nothing"):
        replace_gates(model, "switch")
    with pytest.raises(InvalidConfig, match="num_groups divides 6"):
        replace_gates(build("mixtral"), SigmoidSettings(2, num_groups=4))
    assert type(model.model.layers[0].mlp.gate).__name__ == "MixtralTopKRouter"
