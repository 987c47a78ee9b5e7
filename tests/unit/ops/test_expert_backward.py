"""Experts with a backward of their own: a plain loop that autograd goes through alone is what they are held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ray_moe.ops import experts as module_under_test
from ray_moe.ops.experts import SeparateExperts, StackedExperts
from ray_moe.ops.routed_experts import Experts

COUNTS = {1: 3, 2: 1, 4: 2}
"""Rows of the experts that are touched: neither the first nor the one before the last."""


def made(gated: bool, bias: bool, transposed: bool, dtype: torch.dtype = torch.float64) -> Experts:
    torch.manual_seed(0)
    experts = Experts(3, 4, 5, gated=gated, bias=bias).to(dtype)
    experts.is_transposed = transposed
    for name, stack in list(experts._parameters.items()):
        if transposed and stack is not None and not name.endswith("_bias"):
            experts._parameters[name] = torch.nn.Parameter(stack.detach().transpose(1, 2).contiguous())
    return experts


def reference(experts: Any, rows: torch.Tensor) -> torch.Tensor:
    """What the formula says, row by row."""
    out, begin = [], 0
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    for expert, count in COUNTS.items():
        weights = {name: parameter[expert] for name, parameter in experts.named_parameters()}
        for row in rows[begin : begin + count]:
            inner = (weights[up].t() if experts.is_transposed else weights[up]) @ row
            inner = inner + weights.get(f"{up}_bias", 0)
            hidden = torch.nn.functional.silu(inner[:4]) * (inner[4:] if experts.has_gate else 1)
            last = (weights["down_proj"].t() if experts.is_transposed else weights["down_proj"]) @ hidden
            out.append(last + weights.get("down_proj_bias", 0))
        begin += count
    return torch.stack(out)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


KINDS = [(gated, bias, transposed) for gated in (True, False) for bias in (True, False) for transposed in (True, False)]


@pytest.mark.parametrize(("gated", "bias", "transposed"), KINDS)
def test_rows_and_gradients_are_those_of_the_formula(
    rows: torch.Tensor, gated: bool, bias: bool, transposed: bool
) -> None:
    experts = made(gated, bias, transposed)
    learning = [rows, *experts.parameters()]
    out = StackedExperts(experts).run(rows, list(COUNTS), list(COUNTS.values()))
    expected = reference(experts, rows)
    torch.testing.assert_close(out, expected)
    given = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    for found, wanted in zip(
        torch.autograd.grad(out, learning, given), torch.autograd.grad(expected, learning, given), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("gated", "bias", "transposed"), KINDS)
def test_gradients_are_finite_differences(rows: torch.Tensor, gated: bool, bias: bool, transposed: bool) -> None:
    experts = made(gated, bias, transposed)

    def run(rows: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return StackedExperts(experts).run(rows, list(COUNTS), list(COUNTS.values()))

    assert torch.autograd.gradcheck(run, (rows, *experts.parameters()))


def test_experts_with_tensors_of_their_own(rows: torch.Tensor) -> None:
    experts = made(gated=True, bias=True, transposed=False)
    names = [name for name, _ in experts.named_parameters()]
    each = [{name: getattr(experts, name)[e].detach().requires_grad_() for name in names} for e in COUNTS]
    out = SeparateExperts(experts, each).run(rows, list(COUNTS.values()))
    expected = reference(experts, rows)
    torch.testing.assert_close(out, expected)
    expected.square().sum().backward()
    out.square().sum().backward()
    for expert, tensors in zip(COUNTS, each, strict=True):
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor.grad, getattr(experts, name).grad[expert])


def test_what_is_frozen_gets_no_gradient(rows: torch.Tensor) -> None:
    experts = made(gated=True, bias=True, transposed=False)
    experts.gate_up_proj.requires_grad_(False)
    StackedExperts(experts).run(rows.detach(), list(COUNTS), list(COUNTS.values())).sum().backward()
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None] == ["gate_up_proj"]
    assert grads["down_proj"] is not None
    assert [bool(grad.any()) for grad in grads["down_proj"]] == [False, True, True, False, True]


def test_bits_in_bfloat16_are_those_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = made(gated=True, bias=True, transposed=False, dtype=torch.bfloat16)
    rows = torch.randn(6, 3, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))

    def run() -> torch.Tensor:
        return StackedExperts(experts).run(rows, list(COUNTS), list(COUNTS.values()))

    mine = run()
    monkeypatch.setattr(module_under_test, "_learns_alone", lambda *_: False)
    assert torch.equal(mine, run())


def test_an_activation_that_learns_is_left_to_autograd(rows: torch.Tensor) -> None:
    class Steep(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, inner: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(inner) * self.slope

    experts = made(gated=True, bias=False, transposed=False)
    experts.act_fn = Steep()
    StackedExperts(experts).run(rows, list(COUNTS), list(COUNTS.values())).sum().backward()
    assert experts.act_fn.slope.grad is not None


def test_only_what_the_first_product_puts_out_is_kept(rows: torch.Tensor) -> None:
    experts = made(gated=True, bias=False, transposed=False)
    kept: list[Sequence[int]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        StackedExperts(experts).run(rows, list(COUNTS), list(COUNTS.values()))
    assert kept == [(6, 3), (6, 8), (5, 8, 3), (5, 3, 4)]  # rows, what the first product puts out, and the weights
