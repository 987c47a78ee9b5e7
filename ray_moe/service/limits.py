"""How much one caller may ask for: requests and tokens in a minute, and requests at a time.

Each front door's process counts for itself. Nothing here waits: what is too much is refused, with the time after which
it would not be.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ray_moe.errors import Overloaded

WINDOW_S = 60.0
_ROUNDING_S = 1e-6


@dataclass(frozen=True, slots=True)
class Limits:
    """None is without limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None


UNLIMITED = Limits()


class TokenBucket:
    """Holds a minute's worth and fills up evenly; starts full.

    All it keeps is when it will be full again, so that a new limit counts from then on and not for what was spent.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds from any origin; never goes back."""
        self._clock = clock
        self._full_at_s = clock()

    def wait_s(self, per_minute: int, amount: int) -> float:
        """Seconds until `amount`, at most `per_minute`, is there; 0 if it is."""
        now_s = self._clock()
        wait_s = max(self._full_at_s, now_s) + amount * WINDOW_S / per_minute - now_s - WINDOW_S
        return wait_s if wait_s > _ROUNDING_S else 0.0

    def take(self, per_minute: int, amount: int) -> None:
        """Spend `amount`, whether or not it is there: what is owed has to fill up first."""
        self._full_at_s = max(self._full_at_s, self._clock()) + amount * WINDOW_S / per_minute


class Meter:
    """What one caller has used lately. Thread-safe; outlives changes of the caller's limits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._requests = TokenBucket(clock)
        self._tokens = TokenBucket(clock)
        self._num_active = 0

    @contextmanager
    def request(self, limits: Limits) -> Iterator[None]:
        """Around a request. A refused one counts for nothing.

        Raises:
            Overloaded: a limit is reached. `retry_after_s` says when it will not be, except for `max_concurrent`.
        """
        with self._lock:
            if limits.max_concurrent is not None and self._num_active >= limits.max_concurrent:
                raise Overloaded(
                    f"{self._num_active} requests with this API key are being answered, which is its limit: "
                    "wait for one of them, or ask for a higher limit"
                )
            self._check_tokens(limits)
            if limits.requests_per_minute is not None:
                wait_s = self._requests.wait_s(limits.requests_per_minute, 1)
                if wait_s > 0:
                    raise _too_much(f"{limits.requests_per_minute} requests", wait_s)
                self._requests.take(limits.requests_per_minute, 1)
            self._num_active += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_active -= 1

    def spend(self, limits: Limits, num_tokens: int, *, begun: bool = False) -> None:
        """Count tokens: those of a prompt or a batch before they are computed, generated ones as they come.

        How many a request takes is known only when it has ended, and one may take more than a minute's worth. So it is
        let in while anything is left, and what it takes beyond that has to fill up before the next one is.

        Args:
            limits: of the key that the request came with.
            num_tokens: to count.
            begun: the request is being answered: it is not broken off, whatever is left.

        Raises:
            Overloaded: nothing is left, and the request is not `begun`. Nothing is counted then.
        """
        if limits.tokens_per_minute is None:
            return
        with self._lock:
            if not begun:
                self._check_tokens(limits)
            self._tokens.take(limits.tokens_per_minute, num_tokens)

    def _check_tokens(self, limits: Limits) -> None:
        if limits.tokens_per_minute is not None:
            wait_s = self._tokens.wait_s(limits.tokens_per_minute, 1)
            if wait_s > 0:
                raise _too_much(f"{limits.tokens_per_minute} tokens", wait_s)


def _too_much(what: str, wait_s: float) -> Overloaded:
    return Overloaded(
        f"the limit of this API key, {what} a minute, is reached: retry in {wait_s:.1f} s, or ask for a higher limit",
        retry_after_s=wait_s,
    )
