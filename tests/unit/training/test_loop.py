"""What is told of a run: each step once, and nothing of steps that are made again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from ray_moe.training.coordinator import Recovery
from ray_moe.training.loop import LoopSettings, Progress, run
from ray_moe.training.reports import StepReport
from ray_moe.types import Placement


class Scripted:
    """In the place of a trainer: its steps end as they are told to. A step is made with a new loss each time."""

    def __init__(self, ends: Sequence[int | None], step: int = 0) -> None:
        """Args: ends: of each attempt; None is made, a number interrupted, and the step that it goes back to."""
        self.step = step
        self.dispatcher = SimpleNamespace(table=SimpleNamespace(placement=Placement({})))
        self._ends = list(enumerate(ends))

    def make_step(self, batches: Any) -> StepReport:
        number, back = self._ends.pop(0)
        step = self.step + 1
        if back is None:
            self.step = step
            return StepReport(step, "made", loss=float(number), seconds=1.0, num_tokens=10)
        undone, self.step = self.step - back, back
        return StepReport(step, "interrupted", recovery=Recovery(back, undone, ("expert-0",), "memory"))


def told(ends: Sequence[int | None], steps: int, report_every: int, first: int = 0) -> list[tuple[int, float]]:
    """Step and loss of all that is told, of a run that goes on after step `first`."""
    heard: list[Progress] = []
    trainer: Any = Scripted(ends, first)
    data: Any = None
    settings = LoopSettings(steps=steps, batch_size=1, micro_batches=1, window=2, report_every=report_every)
    last = run(trainer, data, settings, heard.append)
    assert last == heard[-1]
    return [(progress.step, progress.loss) for progress in heard]


@pytest.mark.parametrize(
    ("report_every", "expected"),
    [
        (1, [(1, 0.0), (2, 1.0), (1, math.nan), (2, 3.0), (3, 4.0), (4, 5.0)]),
        (2, [(2, 0.5), (1, math.nan), (2, 3.0), (4, 4.5)]),
        (3, [(1, 0.0), (3, 3.5), (4, 5.0)]),
    ],
)
def test_what_is_undone_is_told_anew_and_no_loss_twice(report_every: int, expected: list[tuple[int, float]]) -> None:
    heard = told([None, None, 1, None, None, None], 4, report_every)
    assert [step for step, _ in heard] == [step for step, _ in expected]
    assert [loss for _, loss in heard] == pytest.approx([loss for _, loss in expected], nan_ok=True)


def test_a_run_whose_last_step_was_made_before_tells_that_it_is_at_its_end() -> None:
    ((step, loss),) = told([], 4, 1, first=4)
    assert step == 4
    assert math.isnan(loss)
