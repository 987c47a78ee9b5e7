"""How a router feels: requests that wait, tokens that pause, requests that failed. Thread-safe, and cheap per token.

Measured where clients would feel it, between two tokens of a running generation. Filled by `engine.py` and
`generation.py`; read by the router for its reports, by the number of actors that are wanted, by the report on a fault,
and by `service/metrics.py`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from ray_moe.errors import DeadlineExceeded, ExpertFailed, Overloaded, RayMoEError, Unavailable
from ray_moe.runtime.histogram import Histogram

WINDOW_S = 60.0
"""Pauses are remembered for so long."""

WAITS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Bounds for what a client waits for once in a request."""
STEPS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Bounds for what comes again with each token."""
TOKENS = tuple(2**n for n in range(15))
SEQUENCES = tuple(2**n for n in range(11))

Kind = Literal["generate", "forward"]
Outcome = str
"""How a request ended: a generation by its reason (``stop``, ``length``), a layer call ``done``; ``cancelled`` by the
caller, past its ``deadline``; refused as ``overloaded`` or ``invalid``; ``failed``, which is not the caller's fault."""


def outcome_of(error: BaseException | None) -> Outcome:
    """Of a request that ended with `error`; None is that nobody listened any more."""
    if not isinstance(error, Exception):
        return "cancelled"
    if isinstance(error, DeadlineExceeded):
        return "deadline"
    if isinstance(error, Overloaded):
        return "overloaded"
    if isinstance(error, RayMoEError) and not isinstance(error, (Unavailable, ExpertFailed)):
        return "invalid"
    return "failed"


class Vitals:
    """Of one engine."""

    def __init__(self) -> None:
        self.num_failed = 0
        """Requests that ended with an error that was not the caller's."""
        self.num_prompt_tokens = 0
        """Of the generations that have begun to answer."""
        self.num_cached_tokens = 0
        """Of those, the ones that did not have to be computed."""
        self.outcomes: Counter[tuple[Kind, Outcome]] = Counter()
        """Requests that have ended."""
        self.durations_s: dict[Kind, Histogram] = {"generate": Histogram(WAITS_S), "forward": Histogram(WAITS_S)}
        """Of requests that were not refused, until the last token or the error."""
        self.queue_times_s = Histogram(WAITS_S)
        """Until the first token of the prompt was computed."""
        self.first_tokens_s = Histogram(WAITS_S)
        """From a generation's coming to its first token."""
        self.token_gaps_s = Histogram(STEPS_S)
        """Between two tokens of a generation."""
        self.step_durations_s = Histogram(STEPS_S)
        self.step_tokens = Histogram(TOKENS)
        """Tokens computed in a step, those of prompts included."""
        self.step_sequences = Histogram(SEQUENCES)
        """Generations that shared a step."""
        self._lock = threading.Lock()
        self._waiting: dict[object, float] = {}
        self._num_open = 0
        self._idle_since_s = time.monotonic()
        self._pauses: deque[tuple[float, float]] = deque()  # (when it ended, how long), one for each second at the most

    # --- told by the engine ----------------------------------------------------------------------------------
    def opened(self, request: object, waits: bool = True) -> None:
        """A request has come; with `waits` it is in the queue until `begun`."""
        with self._lock:
            self._num_open += 1
            if waits:
                self._waiting[request] = time.monotonic()

    def begun(self, request: object) -> None:
        with self._lock:
            since_s = self._waiting.pop(request, None)
        if since_s is not None:
            self.queue_times_s.observe(time.monotonic() - since_s)

    def first_token(self, after_s: float, num_prompt: int, num_cached: int) -> None:
        """A generation has its first token, `after_s` after it came; of its prompt `num_cached` tokens were there."""
        self.first_tokens_s.observe(after_s)
        with self._lock:
            self.num_prompt_tokens += num_prompt
            self.num_cached_tokens += num_cached

    def stepped(self, num_sequences: int, num_tokens: int, duration_s: float) -> None:
        """A step was computed."""
        self.step_sequences.observe(num_sequences)
        self.step_tokens.observe(num_tokens)
        self.step_durations_s.observe(duration_s)

    def closed(self, request: object) -> None:
        with self._lock:
            self._waiting.pop(request, None)
            self._num_open -= 1
            self._idle_since_s = time.monotonic()

    def ended(self, kind: Kind, outcome: Outcome, duration_s: float | None = None) -> None:
        """A request has ended, `duration_s` after it came; None for one that was refused at once."""
        with self._lock:
            self.outcomes[kind, outcome] += 1
        if duration_s is not None:
            self.durations_s[kind].observe(duration_s)

    @contextmanager
    def timed(self, kind: Kind) -> Iterator[None]:
        """Around a request: it has ended when the block does."""
        began_s, outcome = time.monotonic(), outcome_of(None)
        try:
            yield
            outcome = "done"
        except BaseException as error:
            outcome = outcome_of(error)
            raise
        finally:
            self.ended(kind, outcome, time.monotonic() - began_s)

    def failed(self) -> None:
        with self._lock:
            self.num_failed += 1

    def paused(self, pause_s: float) -> None:
        """Two tokens of a generation came `pause_s` apart."""
        now_s = time.monotonic()
        self.token_gaps_s.observe(pause_s)
        with self._lock:
            if self._pauses and int(self._pauses[-1][0]) == int(now_s):
                pause_s = max(pause_s, self._pauses.pop()[1])
            self._pauses.append((now_s, pause_s))
            while self._pauses[0][0] < now_s - WINDOW_S:
                self._pauses.popleft()

    # --- asked -----------------------------------------------------------------------------------------------
    @property
    def queue_age_s(self) -> float:
        """How long the oldest request has waited that has not begun; 0 without any."""
        with self._lock:
            return time.monotonic() - min(self._waiting.values()) if self._waiting else 0.0

    @property
    def idle_s(self) -> float:
        """Time since there was a request; 0 while there is one."""
        with self._lock:
            return 0.0 if self._num_open else time.monotonic() - self._idle_since_s

    def longest_pause_s(self, since_s: float = float("-inf")) -> float:
        """Of the last `WINDOW_S`, and of those only pauses that ended after `since_s` (monotonic); 0 without any."""
        start_s = max(since_s, time.monotonic() - WINDOW_S)
        with self._lock:
            return max((pause_s for end_s, pause_s in self._pauses if end_s >= start_s), default=0.0)
