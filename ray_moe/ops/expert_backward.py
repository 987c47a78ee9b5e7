"""Feed-forward experts with a backward of their own, for training on the CPU: one expert after the other.

Left to autograd, a group of experts keeps every step between its two products for all rows, and joins gradients that
were made apart: the halves of a gated projection, the experts of a stack. Here only what the first product puts out is
kept. The activation is computed again in backward, an expert at a time, so that what lies between two products stays in
the cache, and each gradient is written where it belongs.

Called by `ops/experts.py`; rounds as its other ways do. Cannot be differentiated twice.

Shape legend: n rows, D model width, F expert width, E experts held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Weights = Sequence[torch.Tensor]
"""A stack alone, or what each expert that is touched has of its own; empty where there is no such weight."""


@dataclass(frozen=True, slots=True)
class Touched:
    """Which experts compute, and how."""

    counts: list[int]
    """Rows of each."""
    experts: list[int] | None
    """Their places in the stacks; None where each has tensors of its own."""
    is_transposed: bool
    """Whether matrices are [in, out], and not [out, in]."""
    activation: Callable[[torch.Tensor], torch.Tensor]
    """From what the first product puts out, [n, F] or [n, 2F], to what goes into the second, [n, F]; no parameters."""

    def each(self, weights: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
        """The weight of each expert."""
        if not weights:
            return [None] * len(self.counts)
        return weights if self.experts is None else [weights[0][expert] for expert in self.experts]

    def cut(self, rows: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
        """The rows of each expert."""
        return [None] * len(self.counts) if rows is None else rows.split(self.counts)

    def product(self, rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(rows, matrix if self.is_transposed else matrix.t(), out=out)

    def to_rows(self, grad: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor) -> None:
        """The gradient of a product's rows, from that of what it put out."""
        torch.mm(grad, matrix.t() if self.is_transposed else matrix, out=out)

    def to_matrix(self, grad: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
        """The gradient of its matrix."""
        one, other = (rows, grad) if self.is_transposed else (grad, rows)
        torch.mm(one.t(), other, out=out)

    def room(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """For the gradients of these weights, zero where an expert of a stack is not touched."""
        made = [torch.empty_like(weight) for weight in weights]
        if self.experts is not None and made:
            for expert in set(range(len(made[0]))).difference(self.experts):
                made[0][expert].zero_()
        return made


def through_experts(
    rows: torch.Tensor, touched: Touched, up: Weights, up_bias: Weights, down: Weights, down_bias: Weights
) -> torch.Tensor:
    """[n, D] -> [n, D]: the first rows through the first expert, and so on; differentiable in rows and weights.

    Args:
        rows: in the dtype of the weights.
        touched: the experts, at least one.
        up: the first matrices, D to F or 2F.
        down: the second ones, F to D.
        up_bias, down_bias: of either, or empty.
    """
    kinds = (up, up_bias, down, down_bias)
    out: torch.Tensor = _ThroughExperts.apply(  # type: ignore[no-untyped-call]
        rows, touched, [len(weights) for weights in kinds], *(weight for weights in kinds for weight in weights)
    )
    return out


class _ThroughExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, touched: Touched, lengths: list[int], *weights: torch.Tensor
    ) -> torch.Tensor:
        kinds = _parted(weights, lengths)
        inner = rows.new_empty(len(rows), kinds[0][0].shape[-1 if touched.is_transposed else -2])
        out = torch.empty_like(rows)
        each = zip(*map(touched.cut, (rows, inner, out)), *map(touched.each, kinds), strict=True)
        for mine, mine_inner, mine_out, up, up_bias, down, down_bias in each:
            touched.product(mine, up, mine_inner)
            if up_bias is not None:
                mine_inner.add_(up_bias)  # after the product was rounded, as `transformers` does
            touched.product(touched.activation(mine_inner), down, mine_out)
            if down_bias is not None:
                mine_out.add_(down_bias)
        ctx.save_for_backward(rows, inner, *weights)
        ctx.touched, ctx.lengths = touched, lengths
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        touched: Touched = ctx.touched
        rows, inner, *weights = ctx.saved_tensors
        kinds = _parted(weights, ctx.lengths)
        wanted = [any(asked) for asked in _parted(ctx.needs_input_grad[3:], ctx.lengths)]
        made = [touched.room(kind) if asked else [] for kind, asked in zip(kinds, wanted, strict=True)]
        to_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        each = zip(
            *map(touched.cut, (rows, inner, grad, to_rows)),
            touched.each(kinds[0]),
            touched.each(kinds[2]),
            *map(touched.each, made),
            strict=True,
        )
        for mine, mine_inner, mine_grad, to_mine, up, down, to_up, to_up_bias, to_down, to_down_bias in each:
            leaf = mine_inner.detach().requires_grad_()
            with torch.enable_grad():
                hidden = touched.activation(leaf)
            to_hidden = torch.empty_like(hidden)
            touched.to_rows(mine_grad, down, to_hidden)
            (to_inner,) = torch.autograd.grad(hidden, leaf, to_hidden)
            if to_down is not None:
                touched.to_matrix(mine_grad, hidden.detach(), to_down)
            if to_down_bias is not None:
                torch.sum(mine_grad, 0, out=to_down_bias)
            if to_up is not None:
                touched.to_matrix(to_inner, mine, to_up)
            if to_up_bias is not None:
                torch.sum(to_inner, 0, out=to_up_bias)
            if to_mine is not None:
                touched.to_rows(to_inner, up, to_mine)
        flat: list[torch.Tensor | None] = []
        for kind, length in zip(made, ctx.lengths, strict=True):
            flat += kind or [None] * length
        return to_rows, None, None, *flat


def _parted(flat: Sequence[Any], lengths: Sequence[int]) -> list[Sequence[Any]]:
    """The pieces of these lengths."""
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    return [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]
