"""What is told of a run: each step once, and nothing of steps that are made again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from ray_moe.training.coordinator import Recovery
from ray_moe.training.loop import LoopSettings, Progress, run
from ray_moe.training.reports import StepReport
from ray_moe.types import Placement


class Lost(Exception):
    """A worker is, in the middle of what it does."""


class Scripted:
    """In the place of a trainer: its steps end as they are told to. A step is made with a new loss each time."""

    def __init__(self, ends: Sequence[int | Lost | None], step: int = 0) -> None:
        """Args: ends: of each attempt; None is made, a number interrupted, and the step that it goes back to."""
        self.step = step
        self._last: tuple[Any, StepReport] | None = None
        self.dispatcher = SimpleNamespace(table=SimpleNamespace(placement=Placement({})))
        self._ends = list(enumerate(ends))

    def last(self) -> tuple[Any, StepReport] | None:
        return self._last

    def make_step(self, batches: Any, *, note: Any) -> StepReport:
        number, back = self._ends.pop(0)
        step = self.step + 1
        if isinstance(back, Lost):
            raise back
        if back is None:
            self.step = step
            self._last = note, StepReport(step, "made", loss=float(number), seconds=1.0, num_tokens=10)
            return self._last[1]
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


@pytest.mark.parametrize(
    ("report_every", "lost_in", "expected"),
    [
        (1, "telling", [(1, 0.0), (2, 1.0), (3, 2.0), (4, 3.0)]),
        (1, "making", [(1, 0.0), (2, 1.0), (2, 1.0), (3, 3.0), (4, 4.0)]),  # it cannot know that it was told
        (2, "telling", [(2, 0.5), (4, 2.5)]),
        (2, "making", [(2, 0.5), (2, 0.5), (4, 3.5)]),
        (3, "making", [(3, 4 / 3), (4, 4.0)]),
        (4, "making", [(4, 2.0)]),
    ],
)
def test_who_takes_a_workers_place_tells_what_that_one_had_not(
    report_every: int, lost_in: str, expected: list[tuple[int, float]]
) -> None:
    """The first is lost when it has made two steps: telling of them, or making the third."""
    trainer: Any = Scripted([None, None, *([Lost()] if lost_in == "making" else []), None, None])
    heard: list[Progress] = []

    def tell(progress: Progress) -> None:
        if lost_in == "telling" and progress.step == 2 and not lost.called:
            lost()
            raise Lost
        heard.append(progress)

    lost, data = Mock(), None
    settings = LoopSettings(steps=4, batch_size=1, micro_batches=1, window=2, report_every=report_every)
    with pytest.raises(Lost):
        run(trainer, data, settings, tell)  # type: ignore[arg-type]
    run(trainer, data, settings, tell)  # type: ignore[arg-type]
    assert [progress.step for progress in heard] == [step for step, _ in expected]
    assert [progress.loss for progress in heard] == pytest.approx([loss for _, loss in expected])
    assert [b.repeats(a) for a, b in pairwise(heard)] == [a.step == b.step for a, b in pairwise(heard)]


def test_a_run_whose_last_step_was_made_before_tells_that_it_is_at_its_end() -> None:
    ((step, loss),) = told([], 4, 1, first=4)
    assert step == 4
    assert math.isnan(loss)
