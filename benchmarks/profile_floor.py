"""The least that a step can take: what must be multiplied and what must be read, at the rates that this machine has.

Routers and hosts take turns in each layer, and hosts work side by side, so the floor of a step is that of the backbone
and that of the busiest host together. Each part takes as long as its products or as its bytes, whichever is more.
Called by `profile_step.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.floor import Rates, measure_rates

BACKWARD = 2.0
"""Products of a backward pass, as a multiple of the forward's."""
ADAM_PASSES = 7
"""Weights, gradients and two moments read, all but the gradients written."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Of one step."""

    main_flops: float
    main_bytes: float
    host_flops: float
    """Of the busiest host, as `host_bytes`."""
    host_bytes: float
    us: float


def one_thread_rates(width: int, inner: int) -> Rates:
    """Through matrices [F, D] of an expert."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure_rates(width, inner, repeats=3)
    finally:
        torch.set_num_threads(before)


def decode_floor(checkpoint: Any, rates: Rates, num_tokens: int, work: Sequence[tuple[float, float]]) -> Floor:
    """Args: work: rows and experts that each host computed in a step, all layers together."""
    weights, expert_bytes = checkpoint.backbone_bytes, _expert_bytes(checkpoint)
    width = _itemsize(checkpoint)
    rows, experts = max(work, key=lambda each: each[1])
    return _floor(
        rates, 2 * weights / width * num_tokens, weights, 2 * rows * expert_bytes / width, experts * expert_bytes
    )


def train_floor(checkpoint: Any, rates: Rates, num_tokens: int, work: Sequence[tuple[float, float]]) -> Floor:
    """As `decode_floor`; `work` counts rows going forward and going backward, so each twice."""
    weights, expert_bytes = checkpoint.backbone_bytes, _expert_bytes(checkpoint)
    width, hosts = _itemsize(checkpoint), len(work)
    rows = max(rows for rows, _ in work) / 2
    held = sum(layer.num_experts * layer.expert_bytes for layer in checkpoint.layers.values()) / hosts
    passes = 1 + BACKWARD
    return _floor(
        rates,
        passes * 2 * weights / width * num_tokens,
        ADAM_PASSES * weights,
        passes * 2 * rows * expert_bytes / width,
        ADAM_PASSES * held,
    )


def _floor(rates: Rates, main_flops: float, main_bytes: float, host_flops: float, host_bytes: float) -> Floor:
    seconds = sum(
        max(flops / rates.flops_per_s, num_bytes / rates.read_bytes_per_s)
        for flops, num_bytes in ((main_flops, main_bytes), (host_flops, host_bytes))
    )
    return Floor(main_flops, main_bytes, host_flops, host_bytes, seconds * 1e6)


def _expert_bytes(checkpoint: Any) -> float:
    """Of one expert, mean over all."""
    layers = checkpoint.layers.values()
    total = sum(layer.num_experts * layer.expert_bytes for layer in layers)
    return float(total / sum(layer.num_experts for layer in layers))


def _itemsize(checkpoint: Any) -> int:
    import torch

    dtype: torch.dtype = getattr(torch, next(iter(checkpoint.layers.values())).dtype)
    return dtype.itemsize
