"""The learning rate as a pure function of the step: a factor of the peak, for linear warm-up and what comes after it.

The shapes are those of `transformers.get_scheduler`, so that a run can be compared with one made there. Nothing is
kept between steps: a step that is replayed gets the same rate. Called by whoever commits a training step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ray_moe.errors import InvalidConfig

ScheduleKind = Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"]


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    """How the learning rate goes. Raises `InvalidConfig` where the numbers contradict each other."""

    kind: ScheduleKind = "constant"
    """After the warm-up: `constant`; `linear` and `cosine`, down to `final_ratio` at `total_steps`; `wsd`, constant and
    linearly down in the last `decay_steps` (warm-up, stable, decay); `inverse_sqrt`, as 1 / sqrt(step)."""
    warmup_steps: int = 0
    """Steps in which the factor rises linearly from 0 to 1; step 0 has factor 0 if there are any."""
    total_steps: int | None = None
    """Steps of the whole run, warm-up and decay included: for `linear`, `cosine` and `wsd`."""
    decay_steps: int | None = None
    """For `wsd` alone."""
    final_ratio: float = 0.0
    """Factor from `total_steps` on, for `linear`, `cosine` and `wsd`."""

    def __post_init__(self) -> None:
        ends = self.kind in ("linear", "cosine", "wsd")
        decay = self.decay_steps or 0
        for holds, said in (
            (self.kind in get_args(ScheduleKind), f"kind is one of {', '.join(get_args(ScheduleKind))}"),
            (self.warmup_steps >= 0, "warmup_steps is 0 or more"),
            (not ends or self.total_steps is not None, f"{self.kind} needs total_steps"),
            ((self.kind == "wsd") == (self.decay_steps is not None), "decay_steps is needed for wsd, and for it alone"),
            (decay >= 0, "decay_steps is 0 or more"),
            (
                self.total_steps is None or self.total_steps >= self.warmup_steps + decay,
                "total_steps has room for warmup_steps and decay_steps",
            ),
            (0 <= self.final_ratio <= 1, "final_ratio is between 0 and 1"),
            (ends or self.final_ratio == 0, "final_ratio is for linear, cosine and wsd"),
        ):
            if not holds:
                raise InvalidConfig(f"learning rate schedule: {said}; got {self}")


def factor(settings: ScheduleSettings, step: int) -> float:
    """What the peak learning rate is multiplied by in `step`, which counts from 0."""
    warmup = settings.warmup_steps
    if step < warmup:
        return step / warmup
    if settings.kind == "inverse_sqrt":
        timescale = warmup or 10_000  # without warm-up the rate would start at infinity
        return 1 / math.sqrt((step - warmup + timescale) / timescale)
    if settings.kind == "constant" or settings.total_steps is None:
        return 1.0
    begin = warmup if settings.decay_steps is None else settings.total_steps - settings.decay_steps
    if step < begin:
        return 1.0
    done = min(1.0, (step - begin) / max(1, settings.total_steps - begin)) if step < settings.total_steps else 1.0
    left = (1 + math.cos(math.pi * done)) / 2 if settings.kind == "cosine" else 1 - done
    return settings.final_ratio + (1 - settings.final_ratio) * left
