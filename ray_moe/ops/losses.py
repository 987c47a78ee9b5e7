"""Auxiliary losses of a gate. Add them, times a small coefficient, to what a network is trained for.

Shape legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch

from ray_moe.ops.gates.base import Routing


def load_balancing_loss(routing: Routing, mask: torch.Tensor | None = None) -> torch.Tensor:
    """How unevenly a gate spreads the tokens: the loss of GShard and the Switch Transformer (arXiv:2101.03961, 4-6).

    E times the sum over the experts of (slots sent there / tokens) times (mean probability); K when all are alike, more
    when few experts are preferred. The counts have no gradient, the probabilities do. For one layer it equals
    `transformers`' `load_balancing_loss_func`, which counts those of all layers as if they were one: what one layer has
    too much of then makes up for what another has too little of. Call this for each layer and take the mean.

    Args:
        routing: of one layer; choices of "no expert" are not counted.
        mask: [T], true where a token counts (no padding); None for all.

    Returns: scalar, float32 or wider.
    """
    num_experts = routing.logits.shape[-1]
    probabilities = _wide(routing.logits).softmax(-1)
    counts = probabilities.new_ones(routing.index.shape) if mask is None else mask.reshape(-1, 1).to(probabilities)
    counts = counts.expand(routing.index.shape).reshape(-1)
    load = probabilities.new_zeros(num_experts + 1).scatter_add_(0, routing.index.reshape(-1).long(), counts)
    return num_experts * torch.dot(load[:num_experts] / _num_tokens(routing.logits, mask), _mean(probabilities, mask))


def router_z_loss(logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """How large the logits are, which makes low precision unstable: the mean of log(sum(exp))².

    From ST-MoE (arXiv:2202.08906, 5).

    Args:
        logits: [T, E].
        mask: [T], true where a token counts (no padding); None for all.

    Returns: scalar, float32 or wider.
    """
    return _mean(_wide(logits).logsumexp(-1).square(), mask)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _num_tokens(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | int:
    """At least one, so that a batch that is all padding (or none) has no NaN."""
    return max(len(values), 1) if mask is None else mask.count_nonzero().clamp(min=1)


def _mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[T, ...] -> [...]: the mean over the tokens that count."""
    if mask is not None:
        mask = mask.reshape(-1, *(1,) * (values.ndim - 1)).bool()
        values = values.masked_fill(~mask, 0)
    return values.sum(0) / _num_tokens(values, mask)
