"""What the workers of a step tell each other and whoever made them: shares, a decision, and the report of it.

Values, and sums of them. Made by `training/trainer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ray_moe.errors import RayMoEError, StepRefused
from ray_moe.training.coordinator import Recovery
from ray_moe.types import HostId, LayerPath


@dataclass(frozen=True, slots=True)
class StepReport:
    """How a step ended, the same on every worker."""

    step: int
    """The step that was begun."""
    outcome: str
    """``made``, ``refused`` or ``interrupted``."""
    loss: float = math.nan
    """Mean over all micro-batches of all workers."""
    grad_norm: float = math.nan
    """Global norm over backbone and experts, before clipping."""
    lr: float = 0.0
    seconds: float = 0.0
    num_tokens: int = 0
    tokens_per_expert: dict[LayerPath, list[int]] = field(default_factory=dict)
    num_dropped: int = 0
    """Choices of the gates that went to no expert."""
    num_micro_batches: int = 0
    error: str = ""
    """Why it was refused or interrupted."""
    recovery: Recovery | None = None
    """Of a step that was interrupted: where it goes on."""


@dataclass(frozen=True, slots=True)
class MicroReport:
    """What came of one micro-batch."""

    loss: float
    num_tokens: int
    tokens_per_expert: dict[LayerPath, list[int]]


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker has done of a step."""

    losses: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    """Of the losses."""
    num_tokens: int = 0
    num_calls: dict[HostId, int] = field(default_factory=dict)
    tokens_per_expert: dict[LayerPath, list[int]] = field(default_factory=dict)
    learned: frozenset[str] = frozenset()
    """Parameters of the backbone that got a gradient."""
    num_dropped: int = 0
    error: RayMoEError | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What the first worker has made of it."""

    error: RayMoEError | None = None
    scale: float = 1.0
    norm: float = math.nan


def total_weight(shares: Sequence[Share]) -> float:
    """Raises: `StepRefused` for nothing at all."""
    weight = sum(weight for share in shares for weight in share.weights)
    if not weight:
        raise StepRefused("there is no micro-batch in the step; nothing changed")
    return weight


def add_counts(shares: Sequence[Share]) -> dict[LayerPath, list[int]]:
    total: dict[LayerPath, list[int]] = {}
    for share in shares:
        for layer, counts in share.tokens_per_expert.items():
            before = total.get(layer)
            total[layer] = counts if before is None else [a + b for a, b in zip(before, counts, strict=True)]
    return total
