"""Training as a service: the micro-batches of many clients, one after the other, into the step that is open.

Whoever calls notices nothing of hosts that are lost: what is in the open step is kept here, and done again. It is also
kept on the hosts, beside the state after the last step, so that another session, after the death of this one's process,
goes on with the same step. What has been done under an id of a client's is not done again. Around one `Trainer` that is
alone; runs without Ray. Called by `actors/trainer.py`, by one thread at a time.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch

from ray_moe.errors import InvalidRequest, Overloaded, RayMoEError, StepInterrupted, StepRefused
from ray_moe.models.lora import whole_state
from ray_moe.training.continuing import continue_prompt
from ray_moe.training.coordinator import Coordinator
from ray_moe.training.reports import StepReport
from ray_moe.training.trainer import INTERRUPTIONS, LAST, Batch, Trainer
from ray_moe.types import (
    GenerateChunk,
    GenerateRequest,
    LayerPath,
    MicroBatch,
    MicroBatchReport,
    SavedState,
    StepOptions,
    StepResult,
    TrainingState,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_ATTEMPTS = 10
"""How often one call is begun before it is given up, and may be repeated by its client."""
MAX_OPEN_BYTES = 2**30
"""Of the tokens of all micro-batches in the open step."""
NUM_REMEMBERED = 10_000
"""Ids of micro-batches in steps that were made, and results of steps: a call that comes again gets the same answer."""
NUM_HISTORY = 100
MICRO = "micro/"
"""What the names begin with under which micro-batches are kept on the hosts; then comes their order."""


@dataclass(slots=True)
class _Open:
    """A micro-batch in the open step."""

    name: str
    micro: MicroBatch
    report: MicroBatchReport | None = None


@dataclass(frozen=True, slots=True)
class _Made:
    """A step that was made, in case it has to be made again."""

    micros: tuple[MicroBatch, ...]
    lr: float
    clip_norm: float | None
    note: _Note


@dataclass(frozen=True, slots=True)
class _Note:
    """Kept on the hosts with the state after a step."""

    op_id: str
    reports: tuple[MicroBatchReport, ...]
    """Of its micro-batches, without their rows of experts."""


class Session:
    """Of one run. Not thread-safe, but for `state`."""

    def __init__(self, trainer: Trainer, max_attempts: int = MAX_ATTEMPTS) -> None:
        """Args:
        trainer: a worker that is alone; started and closed with this.
        max_attempts: see `MAX_ATTEMPTS`.
        """
        self._trainer = trainer
        self._max_attempts = max_attempts
        self._step = 0
        self._open: dict[str, _Open] = {}
        self._numbers = count()
        self._accumulated: set[str] | None = None
        """What the trainer has accumulated of the open micro-batches; None: nothing that counts."""
        self._lost: RayMoEError | None = None
        """What has interrupted a call, until all have gone back to the last snapshot."""
        self._made: dict[int, _Made] = {}
        """Steps that the newest snapshot may not have."""
        self._past: OrderedDict[str, MicroBatchReport] = OrderedDict()
        """Micro-batches of steps that were made."""
        self._results: OrderedDict[str, StepResult] = OrderedDict()
        self._history: deque[StepResult] = deque(maxlen=NUM_HISTORY)

    @property
    def _coordinator(self) -> Coordinator:
        coordinator = self._trainer.coordinator
        if coordinator is None:
            raise RuntimeError("the trainer of a session is the first worker")
        return coordinator

    # --- the beginning and the end -------------------------------------------------------------------------
    def start(self) -> None:
        """Join the run, with the open step of the session before, if its hosts keep one. Raises: as `Trainer.start`."""
        self._recovering(self._join, catch_up=False)

    def _join(self) -> None:
        self._trainer.start()
        self._step = self._trainer.step
        lasts, micros = self._coordinator.kept(LAST), self._coordinator.kept(MICRO)
        for note, report in lasts.values():
            if isinstance(note, _Note):  # not one of a run of `ray-moe train`
                self._remember(note, report)
        self._open = {micro.micro_id: _Open(name, micro) for name, micro in micros.items()}
        last = max((int(opened.name.split("/")[1]) for opened in self._open.values()), default=-1)
        self._numbers = count(last + 1)
        logger.info("step %d is open, with %d micro-batches of before", self._step + 1, len(self._open))

    def close(self) -> None:
        self._trainer.close()

    # --- asked by clients ----------------------------------------------------------------------------------
    def state(self) -> TrainingState:
        """How far it is; from any thread."""
        return TrainingState(
            run_id=self._coordinator.run_id,
            step=self._step,
            micro_batches=tuple(self._open),
            history=tuple(self._history),
            saved_steps=tuple(self._coordinator.saved_steps),
        )

    def forward_backward(self, micro: MicroBatch) -> MicroBatchReport:
        """Put a micro-batch into the open step.

        Raises: `InvalidRequest` when another one has come under its id; `StepRefused` when its loss is not finite;
            `Overloaded`; `StepInterrupted`, `InsufficientResources` (no host). It is not in the step then, and all
            others are.
        """
        if micro.micro_id in self._past:
            return self._past[micro.micro_id]
        is_new = self._admit(micro)
        try:
            self._recovering(self._accumulate)
        except BaseException:
            if is_new:
                self._leave_out([micro.micro_id])
            raise
        report = self._open[micro.micro_id].report
        if report is None:
            raise RuntimeError("a micro-batch was accumulated without a report")
        return report

    def optim_step(self, options: StepOptions) -> StepResult:
        """Make the open step, once.

        Raises: `StepRefused` for another step than the next one, one without micro-batches (nothing changes), and for
            gradients that are not finite (its micro-batches are dropped); `StepInterrupted`, `InsufficientResources`.
        """
        return self._results.get(options.op_id) or self._make(options)

    def train_step(self, micros: Sequence[MicroBatch], options: StepOptions) -> StepResult:
        """Put micro-batches into the open step and make it; they are left out again when that fails.

        Raises: as both.
        """
        done = self._results.get(options.op_id)
        if done is not None:
            return done
        self._check_next(options)
        added: list[str] = []
        try:
            for micro in micros:
                is_new = micro.micro_id not in self._open
                self.forward_backward(micro)
                if is_new:
                    added.append(micro.micro_id)
            return self._make(options)
        except BaseException:
            self._leave_out(added)
            raise

    def discard(self, micro_ids: Collection[str]) -> tuple[str, ...]:
        """Leave these (or all, when none is named) out of the open step; those that were in it."""
        wanted = [each for each in self._open if not micro_ids or each in micro_ids]
        self._leave_out(wanted)
        return tuple(wanted)

    def sample(self, request: GenerateRequest) -> GenerateChunk:
        """Continue a prompt of tokens with the weights after the last step. Raises: as `forward_backward`."""

        def run() -> GenerateChunk:
            self._accumulate()
            return self._trainer.evaluate(lambda model: continue_prompt(model, request))

        return self._recovering(run)

    def save_state(self) -> SavedState:
        """Save the state after the last step. Raises: as `Trainer.save` and `finish_save`; `StepInterrupted`."""

        def run() -> SavedState:
            self._trainer.save()
            folder = self._trainer.finish_save()
            if folder is None:
                raise StepInterrupted("a host was lost while it was writing")
            return SavedState(self._step, str(folder))

        return self._recovering(run)

    def load_state(self, step: int | None) -> SavedState:
        """Go back to the checkpoint of `step`, or the latest; the open step is empty then.

        Raises, and nothing has changed: `InvalidConfig`, `NotFound`, `InvalidCheckpoint`. `StepInterrupted`.
        """
        coordinator = self._coordinator
        chosen = max(coordinator.saved_steps, default=0) if step is None else step
        folder = str(coordinator.folder(chosen))

        def run() -> None:
            self._accumulated = None
            self._trainer.load(chosen)

        self._recovering(run, catch_up=False)
        self._step = chosen
        self._forget_made()
        self._leave_out(list(self._open))
        return SavedState(chosen, folder)

    def weights(
        self, export: Callable[[int, Mapping[str, torch.Tensor], Callable[[LayerPath], Any]], T]
    ) -> tuple[int, T]:
        """What `export` makes of the weights after the last step, and which that is; called again after losses.

        Args: export: given the step, the state of the backbone, and what reads the weights of each expert of a layer.
        """
        made = self._recovering(lambda: export(self._step, whole_state(self._trainer.model), self._coordinator.weights))
        return self._step, made

    # --- the open step -------------------------------------------------------------------------------------
    def _admit(self, micro: MicroBatch) -> bool:
        """Whether it was not in the step before."""
        known = self._open.get(micro.micro_id)
        if known is not None:
            if not _same(known.micro, micro):
                raise InvalidRequest(f"another micro-batch has come as {micro.micro_id!r}; give each an id of its own")
            return False
        held = sum(_num_bytes(opened.micro) for opened in self._open.values())
        if held + _num_bytes(micro) > MAX_OPEN_BYTES:
            raise Overloaded(
                f"step {self._step + 1} holds {held:,} bytes of tokens already, of {MAX_OPEN_BYTES:,}: make it, or "
                "discard what is in it"
            )
        self._open[micro.micro_id] = _Open(f"{MICRO}{next(self._numbers):08d}/{micro.micro_id}", micro)
        return True

    def _accumulate(self) -> None:
        """Have the trainer accumulate what is open, and the hosts keep it."""
        accumulated, self._accumulated = self._accumulated, None  # a fault in the middle of one spoils the sums
        if accumulated is None:
            self._trainer.begin()
            accumulated = set()
        for micro_id, opened in self._open.items():
            if micro_id not in accumulated:
                try:
                    report = self._trainer.accumulate(_tensors(opened.micro), opened.micro.weight)
                except StepRefused:  # it has not gone into the sums
                    self._accumulated = accumulated
                    raise
                accumulated.add(micro_id)
                self._coordinator.keep({opened.name: opened.micro})
                tokens = {layer: tuple(counts) for layer, counts in report.tokens_per_expert.items()}
                opened.report = MicroBatchReport(micro_id, self._step + 1, report.loss, report.num_tokens, tokens)
        self._accumulated = accumulated

    def _leave_out(self, micro_ids: Collection[str]) -> None:
        """Of the open step."""
        left = [opened.name for micro_id in micro_ids if (opened := self._open.pop(micro_id, None)) is not None]
        for name in left if self._open else [MICRO] if left else []:
            self._drop(self._step, name)
        if not self._open or (self._accumulated and not self._accumulated.isdisjoint(micro_ids)):
            self._accumulated = None

    def _drop(self, step: int, name: str) -> None:
        try:
            self._coordinator.drop(step, name)
        except INTERRUPTIONS as error:  # those that live have dropped it, or will with the next snapshot
            logger.warning("not every host was told to drop %s: %s", name, error)

    # --- steps ---------------------------------------------------------------------------------------------
    def _check_next(self, options: StepOptions) -> None:
        if options.step is not None and options.step != self._step + 1:
            raise StepRefused(
                f"step {options.step} is asked for, and step {self._step} is made: the next one is {self._step + 1}"
            )

    def _make(self, options: StepOptions) -> StepResult:
        self._check_next(options)
        if not self._open:
            raise StepRefused(f"there is no micro-batch in step {self._step + 1}: call forward_backward first")

        def run() -> StepResult:
            done = self._results.get(options.op_id)
            if done is not None:  # it was made, and found when all had gone back to it
                return done
            self._accumulate()
            self._accumulated = None
            reports = [opened.report for opened in self._open.values() if opened.report is not None]
            note = _Note(options.op_id, tuple(replace(each, tokens_per_expert={}) for each in reports))
            try:
                report = self._trainer.commit(options.lr, options.clip_norm, note=note)
            except StepRefused:
                raise
            except BaseException as error:  # some hosts may have made it, or all
                self._lost = StepInterrupted(f"{type(error).__name__}: {error}")
                raise
            micros = tuple(opened.micro for opened in self._open.values())
            self._made[report.step] = _Made(micros, report.lr, options.clip_norm, note)
            return self._end(note, report)

        try:
            return self._recovering(run)
        except StepRefused as error:
            if not self._open:
                raise
            self._leave_out(list(self._open))
            raise StepRefused(f"{error}; its micro-batches were dropped") from error

    def _end(self, note: _Note, report: StepReport) -> StepResult:
        """The open step was made."""
        self._open, self._accumulated = {}, None
        self._drop(report.step - 1, MICRO)
        self._step = report.step
        every = self._trainer.snapshot_every
        self._made = {step: made for step, made in self._made.items() if step > report.step - 2 * every}
        return self._remember(note, report)

    def _remember(self, note: _Note, report: StepReport) -> StepResult:
        result = StepResult(
            report.step, report.loss, report.grad_norm, report.lr, report.num_micro_batches, report.num_tokens
        )
        self._history.append(result)
        self._results[note.op_id] = result
        self._past.update({each.micro_id: each for each in note.reports})
        for remembered in (self._results, self._past):
            while len(remembered) > NUM_REMEMBERED:
                remembered.popitem(last=False)
        return result

    def _forget_made(self) -> None:
        """After `self._step` other steps were made than those that are made now."""
        self._made.clear()
        self._results = OrderedDict((op, each) for op, each in self._results.items() if each.step <= self._step)
        self._past = OrderedDict((name, each) for name, each in self._past.items() if each.step <= self._step)
        kept = [result for result in self._history if result.step <= self._step]
        self._history = deque(kept, maxlen=NUM_HISTORY)

    # --- losses --------------------------------------------------------------------------------------------
    def _recovering(self, run: Callable[[], T], catch_up: bool = True) -> T:
        """What `run` answers, called again after hosts were lost, with the steps since the last snapshot made again."""
        for _ in range(self._max_attempts):
            try:
                if self._lost is not None:
                    self._accumulated = None
                    self._trainer.go_back(self._lost)
                    self._find_made()
                    self._lost = None
                if catch_up:
                    self._catch_up()
                return run()
            except INTERRUPTIONS as error:
                self._lost = error
        raise StepInterrupted(f"step {self._step + 1} was begun {self._max_attempts} times; at last: {self._lost}")

    def _find_made(self) -> None:
        """All may have gone back to a step that was made, snapshot and all, before something went wrong."""
        if self._trainer.step == self._step + 1:
            for note, report in self._coordinator.kept(LAST).values():
                self._end(note, report)

    def _catch_up(self) -> None:
        """Make the steps again that the snapshot did not have."""
        while self._trainer.step < self._step:
            made = self._made.get(self._trainer.step + 1)
            if made is None:
                raise self._set_back()
            self._accumulated = None
            self._trainer.begin()
            for micro in made.micros:
                self._trainer.accumulate(_tensors(micro), micro.weight)
            self._trainer.commit(made.lr, made.clip_norm, note=made.note)

    def _set_back(self) -> StepRefused:
        """Steps are lost with all that knew of them."""
        before, self._step = self._step, self._trainer.step
        self._forget_made()
        self._leave_out(list(self._open))
        return StepRefused(
            f"the steps {self._step + 1} to {before} are lost with the actors that knew of them, and what was in step "
            f"{before + 1} was dropped: training is back after step {self._step}, go on from there"
        )


def _tensors(micro: MicroBatch) -> Batch:
    return {"input_ids": torch.tensor(micro.input_ids), "labels": torch.tensor(micro.labels)}


def _num_bytes(micro: MicroBatch) -> int:
    return micro.input_ids.nbytes + micro.labels.nbytes


def _same(one: MicroBatch, other: MicroBatch) -> bool:
    return (
        one.weight == other.weight
        and np.array_equal(one.input_ids, other.input_ids)
        and np.array_equal(one.labels, other.labels)
    )
