"""The queue in front of an expert host: what waits is computed together, one batch at a time.

Small batches are computed in the event loop, because going to a thread and back costs a tenth of their time and more;
larger ones in a worker thread, so that the loop goes on receiving. What arrives meanwhile forms the next batch. It
measures how fast and how busy the host is, and can be told to misbehave, for drills. Called by whatever receives calls:
the servers of an expert actor, or the actor's own method.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ray_moe.errors import RayMoEError, Unavailable
from ray_moe.runtime.expert_host import ExpertHost, Outcome
from ray_moe.runtime.meter import Meter
from ray_moe.runtime.tracing import Span, Tracer, Value
from ray_moe.transport.base import ExpertCall, ExpertReply

INLINE_FLOPS = 100_000_000
"""Up to here a batch takes a few milliseconds on one core, and blocking the event loop is the faster way."""

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


class _Waiting(NamedTuple):
    call: ExpertCall
    future: asyncio.Future[ExpertReply]
    since_s: float


class HostLoop:
    """Feeds an `ExpertHost` from one event loop."""

    def __init__(self, host: ExpertHost, inline_flops: int = INLINE_FLOPS, tracer: Tracer | None = None) -> None:
        self.host = host
        self.tracer = tracer
        """None: what it computes is not recorded."""
        self._inline_flops = inline_flops
        self._waiting: list[_Waiting] = []
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="experts")
        self._pump: asyncio.Task[None] | None = None
        self._busy_since_s: float | None = None
        self._closed = False
        self._meter = Meter()
        self._disturbance: Disturbance | None = None
        self._hung_until_s = 0.0
        self._random = random.Random()
        self._disturbed = asyncio.Event()

    async def submit(self, call: ExpertCall) -> ExpertReply:
        """Compute `call`, together with what else is waiting. Raises the call's own `RayMoEError`."""
        if self._closed:
            raise Unavailable(f"host {self.host.host_id} is stopping")
        future: asyncio.Future[ExpertReply] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(call, future, time.monotonic()))
        if self._pump is None:
            self._pump = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                batch = self._take()
                if not batch:
                    continue
                calls = [each.call for each in batch]
                begin_s = self._busy_since_s = time.monotonic()
                await self._hang()
                spans = self._record(calls, [each.since_s for each in batch])
                flops = sum(map(self.host.flops, calls))
                outcomes: Sequence[Outcome]
                if flops <= self._inline_flops:
                    outcomes = self.host.run(calls)
                else:
                    outcomes = await loop.run_in_executor(self._worker, self.host.run, calls)
                if self._disturbance is not None:
                    outcomes = await self._disturb(self._disturbance, outcomes, time.monotonic() - begin_s)
                self._meter.add(flops, begin_s, time.monotonic())
                self._busy_since_s = None
                _end(spans, outcomes)
                for (_, future, _), outcome in zip(batch, outcomes, strict=True):
                    if future.done():
                        continue
                    if isinstance(outcome, RayMoEError):
                        future.set_exception(outcome)
                    else:
                        future.set_result(outcome)
                if self._waiting:
                    await asyncio.sleep(0)  # these answers go out first
        finally:
            self._pump = None

    def _record(self, calls: Sequence[ExpertCall], since_s: Sequence[float]) -> dict[int, Span]:
        """What is computed from now on, of a batch: spans of those calls that are traced, by position.

        Args: since_s: when each of them came.
        """
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
                    "queue_wait_s": time.monotonic() - since_s[position],
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

    def _take(self) -> list[_Waiting]:
        """What is computed next: calls in their order, up to `MAX_BATCH_ROWS`; given-up ones are dropped."""
        batch: list[_Waiting] = []
        num_rows = taken = 0
        for waiting in self._waiting:
            call = waiting.call
            if batch and num_rows + call.num_rows > MAX_BATCH_ROWS:
                break
            taken += 1
            if not waiting.future.done():
                batch.append(waiting)
                num_rows += call.num_rows
        del self._waiting[:taken]
        return batch

    @property
    def busy_s(self) -> float:
        """How long the batch has run that the worker thread is at; 0 when it is idle."""
        return 0.0 if self._busy_since_s is None else time.monotonic() - self._busy_since_s

    @property
    def queued_rows(self) -> int:
        """Rows that wait to be computed."""
        return sum(each.call.num_rows for each in self._waiting if not each.future.done())

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
        if self._pump is not None:
            await asyncio.gather(self._pump, return_exceptions=True)
        self._worker.shutdown(wait=True)


def _end(spans: Mapping[int, Span], outcomes: Sequence[Outcome]) -> None:
    for position, span in spans.items():
        outcome = outcomes[position]
        span.end(outcome if isinstance(outcome, RayMoEError) else None)
