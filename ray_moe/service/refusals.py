"""How many requests were refused for who asked, at which door and why; kept by `admission.py`, for `metrics_page.py`.

Every pair of door and reason is there from the beginning, so that the first refusal is a rise for Prometheus, and there
are never more, whatever callers send.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from ray_moe.errors import PermissionDenied
from ray_moe.service.requests import current

Reason = Literal["no_key", "unknown_key", "expired_key", "role", "host", "page"]
"""The request's key is absent, unknown, expired or lacks the role; without keys: it is called by a name that could be
rebound, or a web page other than the service's own wants something changed."""

OF_DOOR: dict[str, tuple[Reason, ...]] = {
    "grpc": ("no_key", "unknown_key", "expired_key", "role"),
    "kserve": ("no_key", "unknown_key", "expired_key", "role"),
    "openai": ("no_key", "unknown_key", "expired_key", "role", "host", "page"),
}
"""What can happen at each door, by its name in `service/requests.py`."""


class Refusals:
    """Of one router. Not thread-safe: for the event loop that answers requests."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, Reason]] = Counter(
            {(door, reason): 0 for door, reasons in OF_DOOR.items() for reason in reasons}
        )
        """(door, reason) -> requests."""

    def count(self, reason: Reason) -> None:
        """The request that this task answers is refused."""
        request = current()
        if request is not None:
            self.counts[request.door, reason] += 1

    @contextmanager
    def counted(self, reason: Reason) -> Iterator[None]:
        """Around a check: if it denies, it is for this reason."""
        try:
            yield
        except PermissionDenied:
            self.count(reason)
            raise
