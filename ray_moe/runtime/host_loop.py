"""The queue in front of an expert host: what waits is computed together, one batch at a time.

Small batches are computed in the event loop, because going to a thread and back costs a tenth of their time and more;
larger ones in a worker thread, so that the loop goes on receiving. What arrives meanwhile forms the next batch. It
measures how fast and how busy the host is, and can be told to misbehave, for drills. Called by whatever receives calls:
the servers of an expert actor, or the actor's own method.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ray_moe.errors import ExpertFailed, RayMoEError, Unavailable
from ray_moe.runtime.expert_host import ExpertHost, Outcome
from ray_moe.runtime.meter import Meter
from ray_moe.runtime.tracing import Span, Tracer, Value
from ray_moe.transport.base import Answer, ExpertCall, ExpertReply

_log = logging.getLogger(__name__)

INLINE_FLOPS = 100_000_000
"""Up to here a batch takes a few milliseconds on one core, and blocking the event loop is the faster way."""

INLINE_FLOPS_GPU = 1_000_000_000_000
"""The same for a GPU."""

MAX_BATCH_ROWS = 8192
"""Rows computed together at the most: more gain nothing, and the first answers would wait for the last."""


@dataclass(frozen=True, slots=True)
class Disturbance:
    """How a host is to misbehave, so that those who depend on it can be tried out."""

    slow_factor: float = 1.0
    """Each batch takes so many times as long."""
    extra_s: float = 0.0
    """And so many seconds more."""
    hang_s: float = 0.0
    """From now on nothing is answered for so long; calls wait, and the process lives."""
    corrupt_probability: float = 0.0
    """Part of the answers that are NaN."""
    seed: int = 0
    """Of the choice which ones."""


Batch: TypeAlias = Sequence[tuple[Answer, float]]
"""What is computed together, and when each of it came."""


class HostLoop:
    """Feeds an `ExpertHost` from one event loop."""

    def __init__(self, host: ExpertHost, inline_flops: int = INLINE_FLOPS, tracer: Tracer | None = None) -> None:
        self.host = host
        self.tracer = tracer
        """None: what it computes is not recorded."""
        self._inline_flops = inline_flops
        self._waiting: list[tuple[Answer, float]] = []
        """With the time when each came."""
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="experts")
        self._is_draining = False
        """Whether what waits will be computed without being asked for again."""
        self._pump: asyncio.Task[None] | None = None
        """At what takes longer than a moment."""
        self._busy_since_s: float | None = None
        self._closed = False
        self._meter = Meter()
        self._disturbance: Disturbance | None = None
        self._hung_until_s = 0.0
        self._random = random.Random()
        self._disturbed = asyncio.Event()

    def accept(self, call: ExpertCall) -> Answer:
        """Compute `call`, together with what else is waiting, from the next turn of the event loop on.

        The answer may be the call's own `RayMoEError`. Raises: `Unavailable` when the host is stopping.
        """
        if self._closed:
            raise Unavailable(f"host {self.host.host_id} is stopping")
        answer = Answer(call)
        self._waiting.append((answer, time.monotonic()))
        if not self._is_draining:
            self._is_draining = True
            asyncio.get_running_loop().call_soon(self._drain)
        return answer

    async def submit(self, call: ExpertCall) -> ExpertReply:
        """The same, awaited. Raises the call's own `RayMoEError`."""
        return await self.accept(call)

    def _drain(self) -> None:
        """Compute a batch of what waits."""
        batch = self._take()
        if batch:
            calls = [answer.call for answer, _ in batch]
            flops = sum(map(self.host.flops, calls))
            limit = INLINE_FLOPS_GPU if self.host.is_on_gpu(calls[0]) else self._inline_flops
            if flops > limit or self._disturbance is not None:
                self._pump = asyncio.create_task(self._compute(batch, calls, flops, flops <= limit))
                return
            begin_s = self._busy_since_s = time.monotonic()
            spans = self._record(calls, batch)
            self._finish(batch, flops, begin_s, spans, self._run(calls))
        self._go_on()

    def _go_on(self) -> None:
        self._is_draining = bool(self._waiting)
        if self._is_draining:
            asyncio.get_running_loop().call_soon(self._drain)  # what has been answered goes out first

    async def _compute(self, batch: Batch, calls: Sequence[ExpertCall], flops: int, is_small: bool) -> None:
        """The same for one that is large, or if the host is to misbehave."""
        begin_s = self._busy_since_s = time.monotonic()
        await self._hang()
        spans = self._record(calls, batch)
        if is_small:
            outcomes = self._run(calls)
        else:
            outcomes = await asyncio.get_running_loop().run_in_executor(self._worker, self._run, calls)
        if self._disturbance is not None:
            outcomes = await self._disturb(self._disturbance, outcomes, time.monotonic() - begin_s)
        self._finish(batch, flops, begin_s, spans, outcomes)
        self._pump = None
        self._go_on()

    def _run(self, calls: Sequence[ExpertCall]) -> Sequence[Outcome]:
        try:
            return self.host.run(calls)
        except Exception as error:  # not one of a call: those are outcomes
            _log.exception("a batch of host %s failed as a whole", self.host.host_id)
            return [ExpertFailed(f"host {self.host.host_id}: {type(error).__name__}: {error}") for _ in calls]

    def _finish(
        self, batch: Batch, flops: int, begin_s: float, spans: Mapping[int, Span], outcomes: Sequence[Outcome]
    ) -> None:
        self._meter.add(flops, begin_s, time.monotonic())
        self._busy_since_s = None
        _end(spans, outcomes)
        for (answer, _), outcome in zip(batch, outcomes, strict=True):
            answer.set(outcome)

    def _record(self, calls: Sequence[ExpertCall], batch: Batch) -> dict[int, Span]:
        """What is computed from now on: spans of those calls that are traced, by position."""
        spans: dict[int, Span] = {}
        if self.tracer is None:
            return spans
        for position, call in enumerate(calls):
            if call.trace:
                how: dict[str, Value] = {
                    "layer": call.layer,
                    "rows": call.num_rows,
                    "experts": len(call.experts),
                    "batch.calls": len(calls),
                    "queue_wait_s": time.monotonic() - batch[position][1],
                }
                span = self.tracer.start("experts.compute", {"traceparent": call.trace}, how)
                if span is not None:
                    spans[position] = span
        return spans

    # --- drills --------------------------------------------------------------------------------------------
    def disturb(self, disturbance: Disturbance | None) -> None:
        """Misbehave like this from the next batch on, in place of how it was told before; None is to behave again.

        A host that hangs and is told to behave does so at once.
        """
        self._disturbance = disturbance
        self._hung_until_s = time.monotonic() + disturbance.hang_s if disturbance is not None else 0.0
        self._random = random.Random(0 if disturbance is None else disturbance.seed)
        self._disturbed.set()

    async def _hang(self) -> None:
        while (left_s := self._hung_until_s - time.monotonic()) > 0:
            self._disturbed.clear()
            try:
                await asyncio.wait_for(self._disturbed.wait(), left_s)
            except asyncio.TimeoutError:
                return

    async def _disturb(self, how: Disturbance, outcomes: Sequence[Outcome], seconds: float) -> list[Outcome]:
        """What is answered in place of `outcomes`, which took `seconds`."""
        await asyncio.sleep((how.slow_factor - 1.0) * seconds + how.extra_s)
        await self._hang()  # it may have begun while this was computed
        answered: list[Outcome] = []
        for outcome in outcomes:
            if isinstance(outcome, ExpertReply) and self._random.random() < how.corrupt_probability:
                answered.append(ExpertReply(torch.full_like(outcome.rows, torch.nan), outcome.release))
            else:
                answered.append(outcome)
        return answered

    def _take(self) -> Batch:
        """What is computed next: calls in their order, up to `MAX_BATCH_ROWS`; given-up ones are dropped."""
        batch: list[tuple[Answer, float]] = []
        num_rows = taken = 0
        for waiting in self._waiting:
            rows = waiting[0].call.num_rows
            if batch and num_rows + rows > MAX_BATCH_ROWS:
                break
            taken += 1
            if not waiting[0].is_over:
                batch.append(waiting)
                num_rows += rows
        del self._waiting[:taken]
        return batch

    @property
    def busy_s(self) -> float:
        """How long the batch has run that the worker thread is at; 0 when it is idle."""
        return 0.0 if self._busy_since_s is None else time.monotonic() - self._busy_since_s

    @property
    def queued_rows(self) -> int:
        """Rows that wait to be computed."""
        return sum(answer.call.num_rows for answer, _ in self._waiting if not answer.is_over)

    @property
    def flops_per_s(self) -> float:
        """How fast it has computed lately; 0 while it has computed nothing that takes a while."""
        return self._meter.flops_per_s

    @property
    def busy_fraction(self) -> float:
        """Part of the last seconds that it was computing."""
        return self._meter.busy_fraction(time.monotonic(), self._busy_since_s)

    async def close(self) -> None:
        """Refuse new calls, finish those accepted (even if it was told to hang), and end the worker thread."""
        self._closed = True
        self.disturb(None)
        while self._is_draining:
            await asyncio.sleep(0)
            if self._pump is not None:
                await asyncio.gather(self._pump, return_exceptions=True)
        self._worker.shutdown(wait=True)


def _end(spans: Mapping[int, Span], outcomes: Sequence[Outcome]) -> None:
    for position, span in spans.items():
        outcome = outcomes[position]
        span.end(outcome if isinstance(outcome, RayMoEError) else None)
