"""One worker of a run: the backbone, the micro-batches of its share, and a step that all workers make together.

A step is made at once (`make_step`), or piece by piece: `begin`, `accumulate` as often as there are micro-batches,
`commit`, and `go_back` when one of them is interrupted. The gradient is that of the mean loss over the micro-batches of
all workers: sums are accumulated as they are, and divided by the sum of the weights when the step is made.

Every worker has the whole backbone and sends the rows of its micro-batches to the hosts that train the experts. A step
ends in one of three ways, on all workers alike: it is made, it is refused (NaN), or it is interrupted, after which
everything is taken back to the newest snapshot and `step` says which is next. So the loop around it is no more than
``while trainer.step < last: trainer.make_step(batches)``, with batches that depend on nothing but the step's number.
The first worker has the `Coordinator`. Runs without Ray; called by `actors/` and by whoever trains in one process.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ray_moe.errors import (
    HostLost,
    InsufficientResources,
    InvalidRequest,
    RayMoEError,
    StaleRouting,
    StepInterrupted,
    StepRefused,
)
from ray_moe.ops import norms
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.training.coordinator import Coordinator, Recovery
from ray_moe.training.dispatcher import TrainingDispatcher
from ray_moe.training.gradients import Residuals
from ray_moe.training.group import Alone, Group
from ray_moe.training.reports import Decision, MicroReport, Share, StepReport, add_counts, total_weight
from ray_moe.training.settings import StepSettings
from ray_moe.training.trained_backbone import TrainedBackbone
from ray_moe.types import HostId, RoutingTable

logger = logging.getLogger(__name__)

T = TypeVar("T")
Batch = Mapping[str, torch.Tensor]
Loss = Callable[[nn.Module, Batch], torch.Tensor]
"""The mean loss of a micro-batch, a scalar."""

RETRY_S = 0.5
"""Between two attempts to recover: a host that has just died may still be named."""

LAST = "last"
"""Under which the newest step's note and report are kept on the hosts."""

INTERRUPTIONS = (HostLost, StepInterrupted, StaleRouting)


def causal_lm_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of a `transformers` causal language model: mean cross-entropy over the labels that count."""
    loss: torch.Tensor = model(**batch).loss
    return loss


class Trainer:
    """One worker. Not thread-safe: one thread trains at a time."""

    def __init__(  # noqa: PLR0913  (as many parts as it has)
        self,
        model: nn.Module,
        dispatcher: TrainingDispatcher,
        optimizer: OptimizerSettings,
        *,
        coordinator: Coordinator | None,
        group: Group | None = None,
        settings: StepSettings | None = None,
        loss: Loss = causal_lm_loss,
        schedule: Callable[[int], float] | None = None,
        initial: Callable[[], Mapping[str, torch.Tensor]] | None = None,
        prepare: Callable[[int], None] = lambda step: None,
    ) -> None:
        """
        Args:
            model: the backbone, with `dispatcher.forward` in place of its experts; what requires a gradient is trained.
            dispatcher: to the hosts that train the experts.
            optimizer: of the backbone.
            coordinator: given to the first worker only.
            group: all workers; None is this one alone.
            settings: as the coordinator's.
            loss: of a micro-batch.
            schedule: learning rate of a step (from 1); None is the optimizer's own.
            initial: what `state` was in the beginning, for a run that has lost everything since; None keeps a copy.
            prepare: told the number of a step, from 0, before each attempt at it (`ops/methods/`).
        """
        self.model = model
        self.dispatcher = dispatcher
        self.step = 0
        """The last one that was made."""
        self._group = group or Alone()
        if (self._group.rank == 0) != (coordinator is not None):
            raise ValueError("the first worker has the coordinator, and no other")
        self.coordinator = coordinator
        self._settings = settings or StepSettings()
        self._loss = loss
        self._schedule = schedule or (lambda step: optimizer.lr)
        self._prepare = prepare
        self._backbone = TrainedBackbone(model, optimizer)
        self._interruptions = 0
        self._attempt = ""
        """That is open; empty when no step is."""
        self._losses: list[tuple[float, float]] = []
        """And weights, of the micro-batches in it."""
        self._num_tokens = 0
        self._began_s = 0.0
        self._snapshots: dict[int, tuple[dict[str, torch.Tensor], Residuals]] = {}
        """By step: `state`, and what this worker had not sent yet."""
        if initial is None:
            beginning = self.state()
            self._initial: Callable[[], Mapping[str, torch.Tensor]] = lambda: beginning
        else:
            self._initial = initial

    @property
    def rank(self) -> int:
        """Of this worker; 0 is the first."""
        return self._group.rank

    @property
    def num_workers(self) -> int:
        return self._group.size

    # --- the beginning -------------------------------------------------------------------------------------
    def start(self) -> Recovery:
        """Join the run: with what its hosts hold, a checkpoint, or the model as it is."""
        recovery: Recovery = self._decide(lambda coordinator: coordinator.start())
        self._go_to(recovery)
        return recovery

    def _decide(self, ask: Callable[[Coordinator], Any]) -> Any:
        """What the coordinator answers, on every worker. Raises its errors on every worker."""
        answer: Any = None
        if self.coordinator is not None:
            try:
                answer = ask(self.coordinator)
            except RayMoEError as error:
                answer = error
        answer = self._group.share(answer)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def last(self) -> tuple[Any, StepReport] | None:
        """The note and the report of the step that all are after, where the hosts keep them: what a worker that has
        taken another's place has not seen itself."""
        try:
            found: list[tuple[Any, StepReport]] = self._decide(
                lambda coordinator: list(coordinator.kept(LAST).values())
            )
        except INTERRUPTIONS as error:
            logger.warning("no report of step %d: %s", self.step, error)
            return None
        return found[0] if found else None

    def forget(self) -> None:
        """Have the hosts forget the run: it is over, and saved."""
        self._decide(lambda coordinator: coordinator.forget())

    def close(self) -> None:
        """Leave the run: lines and checkpoint writers are closed. The hosts keep what they have."""
        self.dispatcher.close()
        if self.coordinator is not None:
            self.coordinator.leave()

    # --- a step --------------------------------------------------------------------------------------------
    def make_step(self, batches: Callable[[int], Sequence[Batch]], *, note: Any = None) -> StepReport:
        """Make the next step, or go back to where it can be made from.

        Args:
            batches: this worker's micro-batches of a step, the same whenever they are asked for.
            note: as of `commit`.

        Raises: `StepInterrupted` when a step has been begun too often; `InsufficientResources` when no host is left.
        """
        step = self.step + 1
        try:
            self.begin()
            report = self.commit(note=note, error=self._accumulate_all(batches, step))
        except StepRefused as error:
            return StepReport(step, "refused", error=str(error), lr=self._schedule(step))
        except INTERRUPTIONS as error:
            self._interruptions += 1
            if self._interruptions >= self._settings.max_attempts:
                raise StepInterrupted(f"step {step} was begun {self._interruptions} times; at last: {error}") from error
            return StepReport(step, "interrupted", error=str(error), recovery=self.go_back(error))
        self._interruptions = 0
        return report

    def begin(self) -> None:
        """Begin an attempt at the next step; what was accumulated for another one is forgotten. Called by all workers.

        Raises: `HostLost` (call `go_back`).
        """
        self._began_s = time.monotonic()
        self._prepare(self.step)
        self._backbone.forget_gradients()
        self._losses, self._num_tokens = [], 0
        self._attempt = ""
        attempt: str = self._decide(lambda coordinator: coordinator.begin(self.step + 1))
        self.dispatcher.begin(attempt)
        self._attempt = attempt

    def accumulate(self, batch: Batch, weight: float = 1.0) -> MicroReport:
        """Forward and backward over one micro-batch of this worker's, as part of the step that was begun.

        Args: weight: of its loss in the mean over the step.

        Raises: `StepRefused` for a loss that is not finite: what was accumulated before stands. After any other error
            it does not: `HostLost`, `StepInterrupted` (call `go_back`), `ExpertFailed` (call `begin`).
        """
        step = self.step + 1
        if not self._attempt:
            raise StepRefused(f"step {step} was not begun: call begin first")
        before = {layer: counts.copy() for layer, counts in self.dispatcher.tokens_per_expert.items()}
        with _seeded(self._settings.seed, step, self._group.rank, len(self._losses)):
            loss = self._loss(self.model, batch)
            value = _finite(loss, step)
            (loss * weight).backward()
        self._losses.append((value, weight))
        self._num_tokens += _num_tokens(batch)
        counts = {
            layer: (after - before.get(layer, 0)).tolist() for layer, after in self.dispatcher.tokens_per_expert.items()
        }
        return MicroReport(value, _num_tokens(batch), counts)

    def commit(
        self,
        lr: float | None = None,
        clip_norm: float | None = None,
        *,
        note: Any = None,
        error: RayMoEError | None = None,
    ) -> StepReport:
        """Make the step that was begun, of all that all workers have accumulated. Called by all workers.

        Args:
            lr: learning rate; None is that of the schedule.
            clip_norm: largest global norm, `math.inf` for none; None is that of the settings.
            note: kept with the state after the step, and with its report, for `last`.
            error: why this worker has not accumulated all of its share; then the step is made nowhere.

        Raises: `StepRefused` for gradients that are not finite: nothing has changed, and nothing is accumulated any
            more. `HostLost`, `StepInterrupted` (call `go_back`). The error of another worker.
        """
        step, attempt = self.step + 1, self._attempt
        lr = self._schedule(step) if lr is None else lr
        shares: list[Share] = self._group.gather(self._share(error))
        self._attempt = ""
        for share in shares:
            if share.error is not None:
                raise share.error
        if not any(share.losses for share in shares):
            raise InvalidRequest("the step has no micro-batch on any worker; accumulate at least one")
        decision = self._commit(attempt, shares, lr, clip_norm)
        if decision.error is not None:
            raise decision.error
        self._backbone.optimizer.step(lr, grads_scale=decision.scale)
        self._backbone.compressor.keep()
        self.step = step
        losses = [loss * weight for share in shares for loss, weight in zip(share.losses, share.weights, strict=True)]
        report = StepReport(
            step,
            "made",
            loss=sum(losses) / total_weight(shares),
            grad_norm=decision.norm,
            lr=lr,
            seconds=time.monotonic() - self._began_s,
            num_tokens=sum(share.num_tokens for share in shares),
            tokens_per_expert=add_counts(shares),
            num_dropped=sum(share.num_dropped for share in shares),
            num_micro_batches=len(losses),
        )
        every = self._settings.snapshot_every
        if every and step % every == 0:
            self._snapshot({} if note is None else {LAST: (note, report)})
        return report

    def _accumulate_all(self, batches: Callable[[int], Sequence[Batch]], step: int) -> RayMoEError | None:
        """This worker's share of a step; what went wrong with it, for all workers to hear."""
        try:
            mine = batches(step)
            if self._settings.in_flight > 1:
                self._accumulate_overlapped(step, mine)
            else:
                for batch in mine:
                    self.accumulate(batch)
        except RayMoEError as error:
            return error
        except Exception as error:
            if self._group.size == 1:
                raise
            # The others wait for this worker: they must hear of it.
            logger.exception("worker %d failed in step %d", self._group.rank, step)
            return RayMoEError(f"worker {self._group.rank}: {type(error).__name__}: {error}")
        return None

    def _share(self, error: RayMoEError | None) -> Share:
        try:
            self._backbone.optimizer.prepare(missing_as_zero=True)
        except InsufficientResources as full:
            error = error or full
        if error is not None:
            return Share(error=error)
        return Share(
            tuple(loss for loss, _ in self._losses),
            tuple(weight for _, weight in self._losses),
            self._num_tokens,
            dict(self.dispatcher.num_backward_calls),
            {layer: counts.tolist() for layer, counts in self.dispatcher.tokens_per_expert.items()},
            self._backbone.learned,
            self.dispatcher.num_dropped,
        )

    def _accumulate_overlapped(self, step: int, batches: Sequence[Batch]) -> None:
        """Several micro-batches at a time: while one waits for the experts, another computes.

        Each has gradients of its own, which are added up in the order of the micro-batches, whichever ends first.
        """
        parameters = [p for p in self._backbone.parameters.values() if p.requires_grad]  # none is frozen

        def compute(batch: Batch) -> tuple[float, Sequence[torch.Tensor | None]]:
            loss = self._loss(self.model, batch)
            value = _finite(loss, step)
            *grads, _ = torch.autograd.grad(loss, [*parameters, self.dispatcher.anchor], allow_unused=True)
            return value, grads

        waiting = iter(batches)
        with (
            _seeded(self._settings.seed, step, self._group.rank, 0),
            ThreadPoolExecutor(self._settings.in_flight, thread_name_prefix="micro-batch") as pool,
        ):
            begun = deque(pool.submit(compute, batch) for batch in islice(waiting, self._settings.in_flight))
            while begun:
                value, grads = begun.popleft().result()
                begun.extend(pool.submit(compute, batch) for batch in islice(waiting, 1))
                self._losses.append((value, 1.0))
                for parameter, grad in zip(parameters, grads, strict=True):
                    if grad is not None:
                        parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        self._num_tokens += sum(map(_num_tokens, batches))

    def _commit(self, attempt: str, shares: Sequence[Share], lr: float, clip_norm: float | None) -> Decision:
        learned = frozenset[str]().union(*(share.learned for share in shares))
        grads = self._backbone.sums(learned, self._group, self._settings.compression(self.step + 1))
        square_sum = math.fsum(norms.squares(grads.values()))
        num_calls: Counter[HostId] = Counter()
        for share in shares:
            num_calls.update(share.num_calls)
        decision: Any = None
        if self.coordinator is not None:
            try:
                weight = total_weight(shares)
                scale, norm = self.coordinator.commit(attempt, num_calls, square_sum, lr, weight, clip_norm)
                decision = Decision(scale=scale, norm=norm)
            except RayMoEError as error:
                decision = Decision(error=error)
        decided: Decision = self._group.share(decision)
        return decided

    @property
    def snapshot_every(self) -> int:
        """Steps from one snapshot to the next; 0 for none."""
        return self._settings.snapshot_every

    def evaluate(self, run: Callable[[nn.Module], T]) -> T:
        """What `run` answers of the model, in evaluation mode and without gradients, between two micro-batches.

        Raises: as `accumulate`; a step must have been begun.
        """
        counts = dict(self.dispatcher.tokens_per_expert)
        self.model.eval()
        try:
            with torch.no_grad():
                return run(self.model)
        finally:
            self.model.train()
            self.dispatcher.tokens_per_expert = counts

    def validate(self, batches: Sequence[Batch]) -> float:
        """The mean loss over the micro-batches of all workers, without learning, while no step is open.

        NaN when a host is lost meanwhile.
        """
        losses: list[float] | None = None
        try:
            self.begin()
            losses = self.evaluate(lambda model: [self._loss(model, batch).item() for batch in batches])
        except INTERRUPTIONS as error:
            logger.warning("no loss after step %d: %s", self.step, error)
        every: list[list[float] | None] = self._group.gather(losses)
        known = [loss for one in every if one is not None for loss in one]
        return sum(known) / len(known) if known and None not in every else math.nan

    # --- going back ----------------------------------------------------------------------------------------
    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all that this worker has learned, see `TrainedBackbone.state`."""
        return self._backbone.state()

    def publish(self, publish: Callable[[int], str]) -> str:
        """Have the first worker publish the weights of the step just made; what it says of it. Raises its errors."""
        said: str = self._decide(lambda coordinator: publish(self.step))
        return said

    def save(self) -> None:
        """Begin the checkpoint of the step just made; training goes on while it is written.

        Raises: what went wrong with the one before (disk full ...): that is what is lost, and the ones before it stay.
        """
        state = self.state() if self.coordinator is not None else {}
        try:
            self._decide(lambda coordinator: coordinator.save(state))
        except INTERRUPTIONS as error:
            logger.warning("no checkpoint of step %d: %s", self.step, error)

    def finish_save(self) -> Path | None:
        """Wait until the checkpoint that was begun is whole; its folder. Raises: as `save`."""
        folder: Path | None = self._decide(lambda coordinator: coordinator.finish_save())
        return folder

    def _snapshot(self, notes: Mapping[str, Any]) -> None:
        """Remember this step, here and on the hosts. When that fails, the one before still counts."""
        state = self.state()
        self._snapshots[self.step] = state, self._backbone.compressor.residuals
        before = self.step - self._settings.snapshot_every
        self._snapshots = {step: kept for step, kept in self._snapshots.items() if step >= before}
        try:
            self._decide(lambda coordinator: coordinator.snapshot({"worker": state, **notes}))
            if self._decide(lambda coordinator: coordinator.rebalance()):
                self._adopt()
        except (*INTERRUPTIONS, InsufficientResources) as error:
            logger.warning("no snapshot after step %d: %s", self.step, error)

    def go_back(self, error: RayMoEError) -> Recovery:
        """After an interruption: be, with all hosts, as after the newest step of which everything is left.

        Raises: `InsufficientResources` when no host is left.
        """
        logger.warning("step %d is interrupted: %s", self.step + 1, error)
        self._attempt = ""
        recovery: Recovery = self._decide(self._recover)
        self._go_to(recovery)
        return recovery

    def load(self, step: int) -> Recovery:
        """Be, with all hosts, as after `step`, of which there is a checkpoint. Raises: as `Coordinator.load`."""
        recovery: Recovery = self._decide(lambda coordinator: coordinator.load(step))
        self._attempt = ""
        self._snapshots = {}
        self._go_to(recovery)
        return recovery

    def _recover(self, coordinator: Coordinator) -> Recovery:
        for _ in range(self._settings.max_attempts):
            try:
                return coordinator.recover()
            except (*INTERRUPTIONS, InsufficientResources) as error:
                last = error
                time.sleep(RETRY_S)
        raise last

    def _go_to(self, recovery: Recovery) -> None:
        """Be as after the step at which the hosts are."""
        self._adopt()
        missing = recovery.source != "model" and recovery.step not in self._snapshots
        if any(self._group.gather(missing)):  # this worker is new
            self._backbone.load_state(self._worker_state(recovery))
        else:
            known = self._snapshots[recovery.step][0] if recovery.source != "model" else self._initial()
            self._backbone.load_state(known)
        self._backbone.compressor.restore(self._snapshots.get(recovery.step, ({}, {}))[1])
        self._snapshots = {step: kept for step, kept in self._snapshots.items() if step <= recovery.step}
        self.step = recovery.step

    def _worker_state(self, recovery: Recovery) -> Mapping[str, torch.Tensor]:
        state: Mapping[str, torch.Tensor] = self._decide(lambda coordinator: coordinator.worker(recovery))
        return state

    def _adopt(self) -> None:
        table: RoutingTable = self._decide(lambda coordinator: coordinator.table)
        self.dispatcher.update(table)


def _finite(loss: torch.Tensor, step: int) -> float:
    """The value of a loss. Raises: `StepRefused`."""
    value = loss.item()
    if not math.isfinite(value):
        raise StepRefused(f"the loss of step {step} is {value}; the step was not made and nothing changed")
    return value


@contextlib.contextmanager
def _seeded(*of: int) -> Iterator[None]:
    """What is random inside is the same in every attempt, and leaves the caller's generators as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(hash(of) & 0x7FFF_FFFF_FFFF_FFFF)
        yield


def _num_tokens(batch: Batch) -> int:
    first = batch.get("input_ids")
    return 0 if first is None else first.numel()
