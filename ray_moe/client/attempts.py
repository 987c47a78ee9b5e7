"""The attempts of one call: how many, after which errors, how long between them, and what is said in the end.

Another attempt may help after `Unavailable` (not reached, broken off, stopping) and `Overloaded`: at once with a router
that has not been tried, else after a pause, which grows and is drawn by lot, so that clients do not come back together.
An `Overloaded` that names no time to retry is tried at other routers only. No I/O, no clock, no chance, as `pool.py`.
"""

from __future__ import annotations

from typing import Final, TypeVar

from ray_moe.errors import Overloaded, RayMoEError, Unavailable

PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 2.0

E = TypeVar("E", bound=RayMoEError)


class Attempts:
    """Of one call."""

    def __init__(self, most: int, timeout_s: float | None, now_s: float, unit: str = "") -> None:
        """Args:
        most: attempts in all.
        timeout_s: for all of them together; None: no limit.
        unit: what a stream brings, for messages: "tokens".
        """
        self.timeout_s = timeout_s
        self.left_s = timeout_s
        """How long the present attempt may take."""
        self.began_s = now_s
        """When it began."""
        self.tried: set[str] = set()
        """Routers that have been tried since the last pause."""
        self.repeatable = True
        """Whether another attempt is as good as this one."""
        self.is_over = False
        """Whether all has come that was asked for: an error now is of no consequence."""
        self.num_received = 0
        """How much of a stream has come, in units."""
        self._deadline_s = None if timeout_s is None else now_s + timeout_s
        self._left = most
        self._num_pauses = 0
        self._unit = unit

    def begin(self, target: str, now_s: float) -> None:
        """One more, with the router at `target`."""
        self._left -= 1
        self.tried.add(target)
        self.began_s = now_s
        if self._deadline_s is not None:
            self.left_s = max(0.0, self._deadline_s - now_s)

    def pause_s(self, error: RayMoEError, has_other: bool, now_s: float, chance: float) -> float | None:
        """Seconds to wait after `error` before the next attempt; None when there is none.

        Args:
            error: of the present one.
            has_other: whether there is a router that can take the call and has not been tried.
            now_s: the time.
            chance: drawn from 0..1.
        """
        if not self.repeatable or self._left <= 0 or not isinstance(error, Unavailable | Overloaded):
            return None
        if has_other:
            return 0.0
        if isinstance(error, Overloaded) and error.retry_after_s is None:
            return None
        grown_s = min(LONGEST_PAUSE_S, PAUSE_S * 2.0**self._num_pauses)
        pause_s = grown_s * (1 + chance) / 2 + (error.retry_after_s or 0.0)
        if self._deadline_s is not None and now_s + pause_s >= self._deadline_s:
            return None
        self._num_pauses += 1
        self.tried.clear()
        return pause_s

    def last(self, error: E) -> E:
        """The error to raise: `error`, which also says how much had come before."""
        if not (self.num_received and isinstance(error, Unavailable | Overloaded)):
            return error
        return type(error)(
            f"{error.message} ({self._unit} that had come: {self.num_received})", retry_after_s=error.retry_after_s
        )
