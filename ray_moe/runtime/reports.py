"""What a router tells of its hosts to whoever can do something about it, and not too often.

Called by `runtime/lines.py` and `runtime/moe_layer.py`, from whichever thread found out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ray_moe.types import HostAddress

REPORT_EVERY_S = 1.0
"""What goes on is reported again after this: the first report may have reached nobody."""


class Reports:
    """Hosts that are lost, slow or answer damaged rows, each at most once a second. Thread-safe."""

    def __init__(
        self,
        on_lost: Callable[[HostAddress], None],
        on_slow: Callable[[HostAddress, float], None],
        on_corrupt: Callable[[HostAddress], None],
    ) -> None:
        self._on_lost = on_lost
        self._on_slow = on_slow
        self._on_corrupt = on_corrupt
        self._told_s: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()

    def lost(self, address: HostAddress) -> None:
        """The host cannot be reached, or has not answered for too long."""
        if self._is_due("lost", address):
            self._on_lost(address)

    def slow(self, address: HostAddress, seconds: float) -> None:
        """The host keeps answering late; the answer it owes has taken `seconds` so far."""
        if self._is_due("slow", address):
            self._on_slow(address, seconds)

    def corrupt(self, address: HostAddress) -> None:
        """The host answered NaN or infinity where another computed numbers."""
        if self._is_due("corrupt", address):
            self._on_corrupt(address)

    def _is_due(self, kind: str, address: HostAddress) -> bool:
        now_s = time.monotonic()
        key = (kind, address.incarnation)
        with self._lock:
            if now_s - self._told_s.get(key, -REPORT_EVERY_S) < REPORT_EVERY_S:
                return False
            # Lives that ended are not told of again: keep only what still holds back a report.
            self._told_s = {k: at_s for k, at_s in self._told_s.items() if now_s - at_s < REPORT_EVERY_S}
            self._told_s[key] = now_s
            return True
