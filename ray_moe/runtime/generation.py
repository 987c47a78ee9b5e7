"""The loop that generates: one thread, one step after the other, all sequences that are due together in each, and those
of each version of the weights by themselves.

Between two steps requests join, leave and are given up on; a step that fails is done again for each of its sequences by
itself, so that a request that cannot be computed harms no other. Knows nothing of Ray, gRPC and asyncio. Owned by
`engine.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from ray_moe.errors import DeadlineExceeded, ExpertFailed, InvalidRequest, RayMoEError, Unavailable
from ray_moe.runtime.scheduler import Scheduler, Sequence, Work
from ray_moe.runtime.stepper import Stepper
from ray_moe.runtime.stream import Stream
from ray_moe.runtime.tracing import step, within
from ray_moe.runtime.versions import computing
from ray_moe.runtime.vitals import Outcome, Vitals, outcome_of

logger = logging.getLogger(__name__)


class GenerationLoop:
    """See the module."""

    def __init__(self, stepper: Stepper, scheduler: Scheduler, vitals: Vitals, version: int = 0) -> None:
        self.num_generated_tokens = 0
        self._steppers = {version: stepper}
        """By version of the weights."""
        self._scheduler = scheduler
        self._vitals = vitals
        self._streams: dict[Sequence, Stream] = {}
        self._num_traced = 0
        """Of them."""
        self._inbox: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._has_ended = False

    # --- asked from other threads -----------------------------------------------------------------------------
    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting_tokens(self) -> int:
        """Of prompts that wait."""
        return self._scheduler.num_waiting_tokens

    def add(self, stream: Stream) -> None:
        """It is computed from now on, as soon as there is room."""
        self._vitals.opened(stream)
        self._post(lambda: self._join(stream))

    def leave(self, stream: Stream) -> None:
        """Nobody listens to it any more. Its room is free before the next step; idempotent."""
        stream.is_left = True
        self._post(lambda: self._end(stream))

    def add_version(self, version: int, stepper: Stepper) -> None:
        """From now on streams may be of `version` too."""
        self._steppers[version] = stepper

    def share_version(self, version: int, of: int) -> None:
        """Streams of `version` are computed by the same model as those `of` another one, with other experts."""
        self._steppers[version] = self._steppers[of]

    def drop_version(self, version: int, then: Callable[[], None]) -> None:
        """Forget a version, of which there is no stream that was not told to leave; `then` is called after that."""

        def forget() -> None:
            self._steppers.pop(version, None)
            self._scheduler.pool.forget(version)
            then()

        self._post(forget)

    def stop(self) -> None:
        """End after the present step. Whoever still listens is told that the service stops."""
        self._is_stopping = True
        self._post(lambda: None)

    def _post(self, what: Callable[[], None]) -> None:
        with self._changed:
            self._inbox.append(what)
            self._changed.notify()
            if self._thread is None or self._has_ended:  # then it only tells those who come that they are too late
                self._has_ended = False
                self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
                self._thread.start()

    # --- the thread -------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while not self._is_stopping:
            with self._changed:
                while not self._inbox and not self._streams and not self._is_stopping:
                    self._changed.wait()
            try:
                self._take_in()
                self._give_up_the_late()
                work = self._scheduler.next_step()
            except Exception as error:  # no memory for keys and values, for example
                self._fail_all(error)
                continue
            if work:
                for version in sorted({sequence.version for sequence, _ in work}):
                    self._step([one for one in work if one[0].version == version])
            else:
                self._refuse_the_too_large()
        self._wind_up()

    def _take_in(self) -> None:
        with self._changed:
            inbox, self._inbox = self._inbox, []
        for what in inbox:
            what()

    def _wind_up(self) -> None:
        """Tell all who listen, and those who come meanwhile, that it is over."""
        gone = Unavailable("the generation was stopped because the service is stopping; retry")
        while True:
            self._take_in()
            for stream in list(self._streams.values()):
                self._end(stream, gone)
            with self._changed:
                if not self._inbox:
                    self._has_ended = True
                    return

    def _refuse_the_too_large(self) -> None:
        """Nothing can be computed: then there are sequences for which there can never be room.

        They came when it was not known yet what a token takes.
        """
        pool = self._scheduler.pool
        for stream in list(self._streams.values()):
            if not pool.fits(stream.sequence.max_tokens):
                error = InvalidRequest(
                    f"prompt and max_new_tokens are {stream.sequence.max_tokens} tokens together, but there is room "
                    f"for the keys and values of {pool.max_tokens:,.0f} (router.kv_cache_bytes); shorten one"
                )
                self._end(stream, error)

    def _fail_all(self, error: Exception) -> None:
        for stream in list(self._streams.values()):
            self._fail(stream, error)

    def _join(self, stream: Stream) -> None:
        if not stream.is_left:
            self._streams[stream.sequence] = stream
            self._num_traced += stream.phases is not None
            self._scheduler.add(stream.sequence)
        else:
            self._closed(stream, outcome_of(None))
            if stream.phases is not None:
                stream.phases.end()

    def _end(self, stream: Stream, error: BaseException | None = None, outcome: Outcome | None = None) -> None:
        """Give up what is kept for a stream, unless that was done before.

        Its keys and values are kept for others that begin like it where it has come to an `outcome` of its own.
        """
        if self._streams.pop(stream.sequence, None) is None:
            return
        if stream.phases is not None:
            self._num_traced -= 1
            stream.phases.end(error)
        self._scheduler.remove(stream.sequence, keep=outcome is not None)
        self._closed(stream, outcome or outcome_of(error))
        if error is not None:
            stream.tell(error)

    def _closed(self, stream: Stream, outcome: Outcome) -> None:
        self._vitals.closed(stream)
        self._vitals.ended("generate", outcome, time.monotonic() - stream.arrived_s)

    def _give_up_the_late(self) -> None:
        now_s = time.monotonic()
        for stream in list(self._streams.values()):
            if stream.deadline_s is not None and now_s > stream.deadline_s:
                number = stream.sequence.num_generated
                self._end(stream, DeadlineExceeded(f"the time of the request is over; {number} tokens were generated"))

    def _step(self, work: Work) -> None:
        """Compute sequences of one version."""
        version = work[0][0].version
        for sequence, _ in work:
            stream = self._streams[sequence]
            if not stream.has_begun:
                stream.has_begun = True
                self._vitals.begun(stream)
                if stream.phases is not None:
                    stream.phases.enter("prefill")
        began_s = time.monotonic()
        try:
            with self._traced(work), computing(version):
                logits = self._steppers[version].compute(work, self._scheduler.pool)
        except Exception as error:
            self._step_failed(work, error)
            return
        self._vitals.stepped(len(work), sum(number for _, number in work), time.monotonic() - began_s)
        greedy = logits.argmax(-1).tolist()
        for row, (sequence, _) in enumerate(work):
            if sequence.num_new:  # a part of a prompt
                continue
            stream = self._streams[sequence]
            try:
                chunk = stream.take(greedy[row]) if stream.wants_greedy else stream.choose(logits[row].float().cpu())
            except Exception as error:  # of its own wishes: it harms no other
                self._fail(stream, error)
                continue
            self._generated(stream)
            stream.tell(chunk)
            if chunk.finish_reason:
                self._end(stream, outcome=chunk.finish_reason)

    def _traced(self, work: Work) -> AbstractContextManager[None]:
        """Around a step: what it makes experts compute is a part of it."""
        if not self._num_traced:
            return nullcontext()
        phases = [self._streams[sequence].phases for sequence, _ in work]
        tokens = sum(number for _, number in work)
        return within(step([one for one in phases if one], {"batch.tokens": tokens, "batch.sequences": len(work)}))

    def _generated(self, stream: Stream) -> None:
        now_s = time.monotonic()
        if stream.last_token_s is None:
            sequence = stream.sequence
            self._vitals.first_token(now_s - stream.arrived_s, sequence.num_prompt, sequence.num_cached)
            if stream.phases is not None:
                stream.phases.enter("decode")
        else:
            self._vitals.paused(now_s - stream.last_token_s)
        stream.last_token_s = now_s
        self.num_generated_tokens += 1

    def _step_failed(self, work: Work, error: Exception) -> None:
        """Tell those whose fault it is, as far as that can be told."""
        if len(work) > 1 and not isinstance(error, Unavailable):
            for one in work:
                if one[0] in self._streams:
                    self._step([one])
            return
        for sequence, _ in work:
            self._fail(self._streams[sequence], error)

    def _fail(self, stream: Stream, error: Exception) -> None:
        if not isinstance(error, RayMoEError):
            stream.context.run(logger.error, "a generation failed", exc_info=error)
            failure = ExpertFailed(f"generation failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            error = failure
        if isinstance(error, (Unavailable, ExpertFailed)):
            self._vitals.failed()
        self._end(stream, error)
