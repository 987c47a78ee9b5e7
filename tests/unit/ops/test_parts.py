"""An expert is the sum of its parts, and its parts make up the expert again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ray_moe.errors import InvalidCheckpoint, InvalidConfig, UnsupportedModel
from ray_moe.models.experts import expert_rows, experts_modules
from ray_moe.models.families import adapt
from ray_moe.ops.experts import SeparateExperts
from ray_moe.ops.parts import Axis, ExpertParts, axes_of, cut, join
from ray_moe.ops.routed_experts import Experts
from tests import tiny_models

PATH = "layer"
FAMILIES = ("mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "llama4_text", "dbrx")


@given(
    dim=st.sampled_from([-1, -2]),
    blocks=st.integers(1, 2),
    num_parts=st.integers(1, 5),
    width=st.integers(1, 4),
    other=st.integers(1, 3),
    stacked=st.booleans(),
)
def test_what_is_cut_is_joined_again(
    dim: int, blocks: int, num_parts: int, width: int, other: int, stacked: bool
) -> None:
    cut_side = blocks * num_parts * width
    shape = [cut_side, other] if dim == -2 else [other, cut_side]
    tensor = torch.arange(cut_side * other).view(shape)
    tensor = torch.stack([tensor, -tensor]) if stacked else tensor
    axis = Axis(dim, blocks)
    parts = [cut(tensor, axis, num_parts, part) for part in range(num_parts)]
    assert all(part.shape[dim] == blocks * width for part in parts)
    assert torch.equal(join(parts, axis), tensor)


def adapted(family: str) -> Any:
    model = tiny_models.build(family, torch.float64)
    adapt(model)  # where its experts are not on the experts interface
    return model


def modules() -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {family: next(iter(experts_modules(adapted(family)).values())) for family in FAMILIES}
    made["gated"] = Experts(6, 12, 2).double()
    made["not gated"] = Experts(6, 12, 2, gated=False, activation="gelu").double()
    return made


@pytest.mark.parametrize("num_parts", [2, 3, 4])
@torch.no_grad()
def test_the_outputs_of_its_parts_add_up_to_those_of_an_expert(num_parts: int) -> None:
    for name, module in modules().items():
        parts = ExpertParts(num_parts, {PATH: axes_of(module, PATH, num_parts)})
        whole = expert_rows(module, 1)
        down: Any = module.down_proj
        rows = torch.randn(5, down.shape[-1 if module.is_transposed else -2], dtype=down.dtype)
        expected = SeparateExperts(module, [whole]).run(rows, [5])
        cuts = [parts.cut(PATH, whole, part) for part in range(num_parts)]
        found = torch.stack([SeparateExperts(module, [part]).run(rows, [5]) for part in cuts]).sum(0)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=name)
        assert all(torch.equal(parts.join(PATH, cuts)[key], tensor) for key, tensor in whole.items())


def normed(module: Any) -> None:
    module.has_post_expert_norm = True


def interleaved(module: Any) -> None:
    module._apply_gate = lambda both: torch.nn.functional.silu(both[..., ::2]) * both[..., 1::2]


def mixing(module: Any) -> None:
    module._apply_gate = lambda both: both.chunk(2, -1)[0].softmax(-1)


def scaled(module: Any) -> None:
    module.register_parameter("scale", nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (normed, "a norm on what they put out"),
        (interleaved, "activation mixes channels, or has the gate's and the others interleaved"),
        (mixing, "activation mixes channels"),
        (scaled, "each has a scale beside its matrices"),
    ],
)
def test_experts_that_are_no_sum_of_parts_are_refused_with_the_reason(change: Any, reason: str) -> None:
    module = Experts(6, 12, 2)
    change(module)
    with pytest.raises(UnsupportedModel, match=reason):
        axes_of(module, PATH, 2)


def test_biases_and_widths_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="they have biases"):
        axes_of(Experts(6, 12, 2, bias=True), PATH, 2)
    with pytest.raises(InvalidConfig, match=r"experts\.tensor is 5, .* 12 wide.*take one of 1, 2, 3, 4, 6, 12"):
        axes_of(Experts(6, 12, 2), PATH, 5)


def test_the_optimizers_state_is_cut_as_the_weights_are_unless_it_is_in_8_bits() -> None:
    parts = ExpertParts(2, {PATH: axes_of(Experts(6, 12, 2), PATH, 2)})
    weight = torch.randn(24, 6)
    state = {"gate_up_proj": weight, "exp_avg.gate_up_proj": weight.square(), "step.gate_up_proj": torch.tensor(3.0)}
    cuts = [parts.cut(PATH, state, part) for part in range(2)]
    assert torch.equal(cuts[1]["exp_avg.gate_up_proj"], cuts[1]["gate_up_proj"].square())
    assert cuts[0]["step.gate_up_proj"] == 3
    assert torch.equal(parts.join(PATH, cuts)["exp_avg.gate_up_proj"], state["exp_avg.gate_up_proj"])
    for name, tensor in (
        ("exp_avg.gate_up_proj", torch.zeros(24, 6, dtype=torch.uint8)),
        ("exp_avg_scale.gate_up_proj", torch.zeros(3)),
        ("gate_up_proj_lora_A", torch.zeros(2, 6)),
    ):
        with pytest.raises(InvalidCheckpoint, match="go on with the same number of parts"):
            parts.cut(PATH, {name: tensor}, 0)
