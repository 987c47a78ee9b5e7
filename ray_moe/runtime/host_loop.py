"""The queue in front of an expert host: what waits is computed together, one batch at a time.

Small calls to an idle host are computed at once in the event loop (a hop to a thread costs more than they do); larger
ones in a worker thread, so that the loop goes on receiving, and what arrives meanwhile forms the next batch.
Called by whatever receives calls: the gRPC server of an expert actor, or the actor's own method.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from ray_moe.errors import RayMoEError, Unavailable
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.transport.base import ExpertCall, ExpertReply

INLINE_FLOPS = 20_000_000
"""Below this a batch takes about a millisecond on one core, and blocking the event loop is the faster way."""


MAX_BATCH_ROWS = 8192
"""Rows computed together at the most: more gain nothing, and the first answers would wait for the last."""


class HostLoop:
    """Feeds an `ExpertHost` from one event loop."""

    def __init__(self, host: ExpertHost, inline_flops: int = INLINE_FLOPS) -> None:
        self.host = host
        self._inline_flops = inline_flops
        self._waiting: list[tuple[ExpertCall, asyncio.Future[ExpertReply]]] = []
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="experts")
        self._pump: asyncio.Task[None] | None = None
        self._busy_since_s: float | None = None
        self._closed = False

    async def submit(self, call: ExpertCall) -> ExpertReply:
        """Compute `call`, together with what else is waiting. Raises the call's own `RayMoEError`."""
        if self._closed:
            raise Unavailable(f"host {self.host.host_id} is stopping")
        if self._pump is None and self.host.flops(call) <= self._inline_flops:
            outcome = self.host.run([call])[0]
            if isinstance(outcome, RayMoEError):
                raise outcome
            return outcome
        future: asyncio.Future[ExpertReply] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, future))
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
                self._busy_since_s = time.monotonic()
                outcomes = await loop.run_in_executor(self._worker, self.host.run, [call for call, _ in batch])
                self._busy_since_s = None
                for (_, future), outcome in zip(batch, outcomes, strict=True):
                    if future.done():
                        continue
                    if isinstance(outcome, RayMoEError):
                        future.set_exception(outcome)
                    else:
                        future.set_result(outcome)
        finally:
            self._pump = None

    def _take(self) -> list[tuple[ExpertCall, asyncio.Future[ExpertReply]]]:
        """What is computed next: calls in their order, up to `MAX_BATCH_ROWS`; given-up ones are dropped."""
        batch: list[tuple[ExpertCall, asyncio.Future[ExpertReply]]] = []
        num_rows = taken = 0
        for call, future in self._waiting:
            if batch and num_rows + call.num_rows > MAX_BATCH_ROWS:
                break
            taken += 1
            if not future.done():
                batch.append((call, future))
                num_rows += call.num_rows
        del self._waiting[:taken]
        return batch

    @property
    def busy_s(self) -> float:
        """How long the batch has run that the worker thread is at; 0 when it is idle."""
        return 0.0 if self._busy_since_s is None else time.monotonic() - self._busy_since_s

    async def close(self) -> None:
        """Refuse new calls, finish those accepted, and end the worker thread."""
        self._closed = True
        if self._pump is not None:
            await asyncio.gather(self._pump, return_exceptions=True)
        self._worker.shutdown(wait=True)
