"""Where a batch's answers arrive: the thread that waits for them reads the lines itself, where it can.

Reading takes a wake-up less than being told by a thread that reads: for small batches those are most of the time. Used
by one exchange, in one thread, but for `put`. Called by `runtime/exchange.py`.
"""

from __future__ import annotations

import os
import select
import threading
import time
from queue import SimpleQueue

from ray_moe.runtime.lines import Sent
from ray_moe.transport.base import Attendable


class Arrivals:
    """The answers to what one exchange has sent."""

    def __init__(self) -> None:
        self._told: SimpleQueue[Sent] = SimpleQueue()
        self._lines: dict[int, Attendable] = {}
        """Those that are read here, by their files."""
        self._is_polling = False

    def attend(self, line: Attendable) -> bool:
        """Read `line` while waiting, if it can be: what is submitted there is attended then."""
        file = line.fileno()
        if file < 0:
            return False
        if self._lines.get(file) is not line:
            if not self._lines:
                self._bell = _bell()
                self._poll = select.poll()
                self._poll.register(self._bell.file, select.POLLIN)
            self._lines[file] = line
            self._poll.register(file, select.POLLIN)
        return True

    def leave(self) -> None:
        """Read the lines no more: others wait for nothing there, or this thread is about to do something long."""
        for line in self._lines.values():
            line.leave()
        self._lines.clear()

    def put(self, sent: Sent) -> None:
        """An answer came, or will not. From any thread."""
        self._told.put(sent)
        if self._is_polling:
            self._bell.ring()

    def empty(self) -> bool:
        return self._told.empty()

    def get_nowait(self) -> Sent:
        """Raises `Empty`."""
        return self._told.get_nowait()

    def get(self, timeout_s: float) -> Sent:
        """The next answer. Raises `Empty` after `timeout_s`; what had come by then has been seen."""
        if not self._lines:
            return self._told.get(timeout=timeout_s) if timeout_s > 0 else self._told.get_nowait()
        until_s = time.monotonic() + timeout_s
        while self._told.empty():
            self._is_polling = True  # before looking again: from here on whoever puts rings
            try:
                left_s = until_s - time.monotonic() if self._told.empty() else 0.0
                ready = self._poll.poll(max(left_s, 0.0) * 1000)
            finally:
                self._is_polling = False
            for file, _ in ready:
                if file == self._bell.file:
                    self._bell.quiet()
                elif not self._lines[file].take_in():
                    self._poll.unregister(file)
                    del self._lines[file]
            if not ready and left_s <= 0:
                break
        return self._told.get_nowait()


class _Bell:
    """Wakes the thread it belongs to, out of a poll."""

    def __init__(self) -> None:
        self.file = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def ring(self) -> None:
        os.eventfd_write(self.file, 1)

    def quiet(self) -> None:
        os.eventfd_read(self.file)

    def __del__(self) -> None:
        os.close(self.file)


_of_thread = threading.local()


def _bell() -> _Bell:
    """The one of this thread."""
    bell: _Bell | None = getattr(_of_thread, "bell", None)
    if bell is None:
        bell = _of_thread.bell = _Bell()
    return bell
