"""Files that are read again when they change, without a restart: API keys and certificates.

Nothing runs in the background. Whoever needs the value asks for it, and at most once a second that costs one `stat` for
each file. A change that cannot be read is logged, and what was read last stays in force.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from ray_moe.errors import InvalidConfig

CHECK_EVERY_S = 1.0
NUM_TRIES = 3

T = TypeVar("T")
_Signature = tuple[tuple[int, ...], ...]

logger = logging.getLogger(__name__)


class Reloading(Generic[T]):
    """What some files together say, as of about a second ago. Thread-safe."""

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[], T],
        *,
        every_s: float = CHECK_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads nothing yet.

        Args:
            paths: the files that `read` depends on.
            read: the value; raises `InvalidConfig`, with a message that names the file, when it cannot be had.
            every_s: seconds in which the files are looked at no more than once.
            clock: seconds from any origin; never goes back.
        """
        self._paths = tuple(paths)
        self._read = read
        self._every_s = every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._value: T | None = None
        self._signature: _Signature | None = None
        self._checked_s = 0.0
        self._complaint = ""

    def load(self) -> T:
        """Read the files now, changed or not.

        Raises:
            InvalidConfig: they cannot be read, or are wrong; what was read before stays in force.
        """
        with self._lock:
            return self._load()

    def current(self) -> T:
        """The value in force.

        Raises:
            InvalidConfig: there is none, as the files could not be read even once.
        """
        if self._value is None:
            return self.load()
        if self._lock.acquire(blocking=False):  # while one looks, others go on with what there is
            try:
                self._refresh()
            finally:
                self._lock.release()
        return self._value

    def _refresh(self) -> None:
        now_s = self._clock()
        if now_s - self._checked_s < self._every_s:
            return
        self._checked_s = now_s
        if _signature(self._paths) == self._signature:
            return
        names = ", ".join(map(str, self._paths))
        try:
            self._load()
        except InvalidConfig as error:
            if error.message != self._complaint:
                logger.error("%s changed and cannot be used; what it said before stays in force: %s", names, error)
            self._complaint = error.message
        else:
            self._complaint = ""
            logger.info("read %s again", names)

    def _load(self) -> T:
        for _ in range(NUM_TRIES):
            self._checked_s = self._clock()
            before = _signature(self._paths)
            value = self._read()
            if _signature(self._paths) == before:  # else they changed meanwhile, and this may be half of either
                self._value, self._signature = value, before
                return value
        raise InvalidConfig(
            f"{', '.join(map(str, self._paths))} changed while being read; write to another file, then rename it"
        )


def _signature(paths: Sequence[Path]) -> _Signature | None:
    """Changes whenever a file is written, replaced or given other permissions; None when one is not there."""
    try:
        stats = [os.stat(path) for path in paths]
    except OSError:
        return None
    return tuple((it.st_dev, it.st_ino, it.st_size, it.st_mtime_ns, it.st_ctime_ns) for it in stats)
