"""A run of training from its first step to its last, on one of its workers.

Every worker calls `run`; what happens is the same on all of them, and what is told is told by each. The data of a step
is dealt to the workers there are, so a run may go on with more or fewer of them and learn the same. Runs without Ray.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ray_moe.errors import RayMoEError, StepRefused
from ray_moe.policy.parts import whole_of
from ray_moe.training.data import Batch, BatchRequest, Data, Split
from ray_moe.training.reports import StepReport
from ray_moe.training.trainer import Trainer
from ray_moe.types import LayerPath, Placement

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """How long a run is and what is done on the way."""

    steps: int
    batch_size: int
    """Windows of a micro-batch."""
    micro_batches: int
    """Of a step, over all workers."""
    window: int
    """Tokens of a window."""
    seed: int = 0
    save_every: int = 0
    """Steps from one checkpoint to the next, and one at the end; 0 saves none."""
    publish_every: int = 0
    """Steps from one published version to the next, and one at the end; 0 publishes none."""
    report_every: int = 1
    validation_every: int = 0
    validation_batches: int = 8
    """Micro-batches over all workers."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. Of the steps since it was last told: means, and sums."""

    step: int
    steps: int
    loss: float = math.nan
    grad_norm: float = math.nan
    lr: float = math.nan
    tokens_per_s: float = math.nan
    balancedness: float = math.nan
    """Mean load of the actors over the highest, by rows, mean over the layers; 1 is perfect."""
    expert_utilisation: float = math.nan
    """Share of the experts that got any row, mean over the layers."""
    dropped_tokens: int = 0
    """Choices of the gates that went to no expert."""
    validation_loss: float = math.nan
    """Of the last look."""
    num_interruptions: int = 0
    """Since the worker began."""
    event: str = ""
    """What happened, in words, where something did: a loss, a checkpoint, a published version."""
    failure: RayMoEError | None = None
    """What ended the run, where beginning anew would not help."""

    def repeats(self, before: Progress) -> bool:
        """Whether it tells of nothing but the step that `before` told of: who told it may have been lost since, and
        who came after could not know."""
        return not self.event and (self.step, self.loss) == (before.step, before.loss)

    def metrics(self) -> dict[str, float]:
        """The numbers that are known, by name."""
        values = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("steps", "event", "failure")
        }
        return {name: float(value) for name, value in values.items() if math.isfinite(value)}


@dataclass(frozen=True, slots=True)
class Untold:
    """The note of a step (`Trainer.commit`): the reports of those before it of which nothing had been told."""

    reports: tuple[StepReport, ...]


@dataclass(slots=True)
class _Since:
    """What was done since it was last told."""

    made: list[StepReport] = field(default_factory=list)

    def undo(self, step: int) -> None:
        """Forget what was made after `step`: it will be made again."""
        self.made = [report for report in self.made if report.step <= step]

    def progress(
        self, trainer: Trainer, settings: LoopSettings, validation_loss: float, interruptions: int
    ) -> Progress:
        made, self.made = self.made, []
        counts = [report.tokens_per_expert for report in made]
        placement = trainer.dispatcher.table.placement
        return Progress(
            step=trainer.step,
            steps=settings.steps,
            loss=sum(report.loss for report in made) / len(made),
            grad_norm=sum(report.grad_norm for report in made) / len(made),
            lr=made[-1].lr,
            tokens_per_s=sum(report.num_tokens for report in made) / sum(report.seconds for report in made),
            balancedness=_mean([balancedness(each, placement) for each in counts]),
            expert_utilisation=_mean([_mean([_share_used(n) for n in each.values()]) for each in counts]),
            dropped_tokens=sum(report.num_dropped for report in made),
            validation_loss=validation_loss,
            num_interruptions=interruptions,
        )


def run(
    trainer: Trainer,
    data: Data,
    settings: LoopSettings,
    tell: Callable[[Progress], None],
    publish: Callable[[int], str] | None = None,
) -> Progress:
    """Train up to `settings.steps`; the last progress.

    Args:
        trainer: started.
        tell: hears of every `report_every`-th step, and of whatever happens; of a step that was the last before a
            worker was lost perhaps twice (`Progress.repeats`).
        publish: publishes the weights after a step, on the first worker, and answers where they are served.

    Raises: `StepRefused` when a loss or gradient is not finite: the weights are those of the step before.
    """
    since, validation_loss, interruptions = _Since(), math.nan, 0
    told = Progress(trainer.step, settings.steps)

    def say(event: str = "") -> None:
        nonlocal told
        told = since.progress(trainer, settings, validation_loss, interruptions) if since.made else told
        told = replace(told, step=trainer.step, num_interruptions=interruptions, event=event)
        tell(told)

    note, last = trainer.last() or (None, None)
    if isinstance(note, Untold) and last is not None:
        since.made = [*note.reports, last]
    if trainer.step >= settings.steps or (since.made and trainer.step % settings.report_every == 0):
        say()  # it was made before, and who should have told of it may be lost
    while trainer.step < settings.steps:
        report = trainer.make_step(lambda step: batches(trainer, data, settings, step), note=Untold(tuple(since.made)))
        if report.outcome == "refused":
            raise StepRefused(report.error)
        if report.outcome == "interrupted":
            interruptions += 1
            since.undo(trainer.step)
            told = Progress(trainer.step, settings.steps)  # what was told last may be of a step that is made again
            say(_recovered(report))
            continue
        since.made.append(report)
        step, is_last = report.step, report.step == settings.steps
        if settings.validation_every and (step % settings.validation_every == 0 or is_last):
            validation_loss = trainer.validate(validation_batches(trainer, data, settings))
        if step % settings.report_every == 0 or is_last:
            say()
        if settings.save_every and (step % settings.save_every == 0 or is_last):
            trainer.save()
        if publish is not None and settings.publish_every and (step % settings.publish_every == 0 or is_last):
            say(trainer.publish(publish))
    if settings.save_every:
        folder: Path | None = trainer.finish_save()
        if folder is not None:
            say(f"saved {folder}")
            trainer.forget()
    return told


def batches(trainer: Trainer, data: Data, settings: LoopSettings, step: int) -> list[Batch]:
    """This worker's micro-batches of a step (from 1): its part of those of all."""
    return _mine(trainer, data, settings, step - 1, settings.micro_batches, "train")


def validation_batches(trainer: Trainer, data: Data, settings: LoopSettings) -> list[Batch]:
    """This worker's part of what is looked at, the same each time."""
    return _mine(trainer, data, settings, 0, settings.validation_batches, "validation")


def _mine(trainer: Trainer, data: Data, settings: LoopSettings, step: int, number: int, split: Split) -> list[Batch]:
    rank, size = trainer.rank, trainer.num_workers
    return [
        data.batch(
            BatchRequest(
                step=step,
                batch_size=settings.batch_size,
                window=settings.window,
                micro_batch=micro_batch,
                num_micro_batches=number,
                seed=settings.seed,
                split=split,
            )
        )
        for micro_batch in range(rank * number // size, (rank + 1) * number // size)
    ]


def balancedness(tokens_per_expert: Mapping[LayerPath, Sequence[int]], placement: Placement) -> float:
    """Mean rows of the hosts over the most that one had, mean over the layers; an expert's replicas share evenly, and
    each of its parts has all of its rows."""
    values = []
    for layer, counts in tokens_per_expert.items():
        load: dict[str, float] = {}
        for part, hosts in enumerate(placement.hosts_of.get(layer, ())):
            for host in hosts:
                load[host] = load.get(host, 0.0) + counts[whole_of(part, len(counts))[0]] / len(hosts)
        if load and max(load.values()) > 0:
            values.append(sum(load.values()) / len(load) / max(load.values()))
    return _mean(values)


def _share_used(counts: Sequence[int]) -> float:
    return sum(count > 0 for count in counts) / len(counts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _recovered(report: StepReport) -> str:
    recovery = report.recovery
    if recovery is None:
        return f"step {report.step} was interrupted: {report.error}"
    lost = ", ".join(recovery.lost) or "nobody"
    return (
        f"step {report.step} was interrupted (lost: {lost}); training goes on after step {recovery.step}, from "
        f"{recovery.source}, and makes {recovery.undone} steps again"
    )
