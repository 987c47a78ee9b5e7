"""Tokens to rows that are grouped by expert and back, for training on the CPU: a block of tokens at a time.

As products of all slots, what lies between an expert's output and a layer's is written and read again six times, each
time in new memory of the system. A block of tokens stays in the cache. Sums are made in the order and the dtypes of
`ops/dispatch.py: combine`. Called by `ops/routed_experts.py`; cannot be differentiated twice.

Shape legend: T tokens, D model width, K experts per token, N = T*K slots (slot s is choice s % K of token s // K).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ray_moe.ops.dispatch import combine

_BLOCK = 256
"""Tokens of a block: with two experts of width 512 a megabyte of rows, which a core's own cache holds."""


def group(hidden: torch.Tensor, order: torch.Tensor, place: torch.Tensor, top_k: int) -> torch.Tensor:
    """[T, D] -> [N, D]: row r is the token of slot ``order[r]``.

    Args:
        hidden: [T, D].
        order: [N], each slot once.
        place: [N], where each slot is in `order`.
        top_k: K.
    """
    rows: torch.Tensor = _Group.apply(hidden, order, place, top_k)  # type: ignore[no-untyped-call]
    return rows


def combine_grouped(rows: torch.Tensor, place: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[N, D] -> [T, D]: the weighted sum of each token's rows.

    Args:
        rows: [N, D], unweighted.
        place: [N], where each slot's row is.
        weight: [T, K].
    """
    out: torch.Tensor = _Combine.apply(rows, place, weight)  # type: ignore[no-untyped-call]
    return out


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, order: torch.Tensor, place: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.top_k = top_k
        return hidden.index_select(0, order // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        to_hidden = grad.new_empty(len(grad) // ctx.top_k, grad.shape[-1])
        for tokens, slots in _blocks(len(to_hidden), ctx.top_k):
            mine = grad.index_select(0, place[slots])
            torch.sum(mine.view(-1, ctx.top_k, grad.shape[-1]), 1, out=to_hidden[tokens])
        return to_hidden, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, place: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, place, weight)
        out = rows.new_empty(len(weight), rows.shape[-1])
        for tokens, slots in _blocks(*weight.shape):
            out[tokens] = combine(rows.index_select(0, place[slots]), weight[tokens])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, place, weight = ctx.saved_tensors
        to_rows, to_weight = torch.empty_like(rows), torch.empty_like(weight)
        for tokens, slots in _blocks(*weight.shape):
            given = grad[tokens].unsqueeze(1)
            mine = rows.index_select(0, place[slots]).view(-1, weight.shape[1], rows.shape[-1])
            to_weight[tokens] = (mine * given).sum(-1)
            each = given * weight[tokens].unsqueeze(-1)
            to_rows.index_copy_(0, place[slots], each.to(rows.dtype).view(-1, rows.shape[-1]))
        return to_rows, None, to_weight


def _blocks(num_tokens: int, top_k: int) -> Iterator[tuple[slice, slice]]:
    """The tokens of each block, and their slots."""
    for begin in range(0, num_tokens, _BLOCK):
        end = min(begin + _BLOCK, num_tokens)
        yield slice(begin, end), slice(begin * top_k, end * top_k)
