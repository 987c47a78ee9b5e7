"""Which gates a checkpoint's routers are in evaluation: asked of `transformers`' own, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ray_moe.errors import InvalidConfig, UnsupportedModel
from ray_moe.models.gate_trial import try_gate
from ray_moe.models.gates import replace_gates, router_state
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.gates.registry import GATES, GateChoice
from tests.tiny_models import build, save

OWN: dict[str, list[GateChoice]] = {
    "mixtral": [GateChoice("topk"), GateChoice("noisy_topk")],
    "qwen3_moe": [GateChoice("topk", {"top_k": 3}), GateChoice("noisy_topk")],
    "olmoe": [GateChoice("topk", {"normalize": False})],
    "deepseek_v3": [GateChoice("sigmoid", {"num_groups": 4, "top_groups": 2, "scale": 2.5})],
    "glm4_moe": [GateChoice("sigmoid", {"num_groups": 2})],
}
TOLD = ["multi_task", "modality"]


def outline(family: str, folder: Path) -> Any:
    save(family, folder)
    return Checkpoint.open(folder).outline()


@pytest.mark.parametrize("family", OWN)
def test_a_familys_own_gate_is_recognised_without_its_weights(family: str, tmp_path: Path) -> None:
    for number, choice in enumerate(OWN[family]):
        trial = try_gate(outline(family, tmp_path / str(number)), choice)
        assert trial.difference == ""
        assert trial.losses == ({"load"} if choice.name == "noisy_topk" else set())
        assert {f"{path}.weight" for path in trial.paths} <= set(trial.parameters)


@pytest.mark.parametrize("gate", [name for name in GATES if name not in ("topk", "noisy_topk", *TOLD)])
def test_other_gates_are_others(gate: str, tmp_path: Path) -> None:
    trial = try_gate(outline("mixtral", tmp_path), GateChoice(gate))
    assert "differs by up to" in trial.difference
    assert trial.takes_ids is (gate == "hash")


def test_another_k_or_another_sum_is_another_gate(tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [{"top_k": 1}, {"top_k": 3}, {"normalize": False}]
    for number, options in enumerate(others):
        assert try_gate(outline("mixtral", tmp_path / str(number)), GateChoice("topk", options)).difference


def test_what_a_router_adds_of_its_own_is_no_gates(tmp_path: Path) -> None:
    """gpt-oss's logits have a bias, which no gate has; with the bias at 0 they would be the same."""
    assert try_gate(outline("gpt_oss", tmp_path), GateChoice("topk")).difference


@pytest.mark.parametrize("gate", TOLD)
def test_gates_that_have_to_be_told_of_the_tokens_are_refused(gate: str, tmp_path: Path) -> None:
    options = {"num_tasks": 2} if gate == "multi_task" else {}
    with pytest.raises(InvalidConfig, match="where tokens have ids and nothing else: this gate has to know the"):
        try_gate(outline("mixtral", tmp_path), GateChoice(gate, options))


def test_a_model_without_such_routers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="answers hidden states with"):
        try_gate(outline("dbrx", tmp_path), GateChoice("topk"))


def test_the_state_has_the_routers_names_again() -> None:
    model: Any = build("deepseek_v3")
    names = model.state_dict().keys()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    replace_gates(model, OWN["deepseek_v3"][0])
    assert model.state_dict().keys() != names
    after = router_state(model.state_dict(), names)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in names)
