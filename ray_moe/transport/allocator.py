"""Settings of the C allocator for processes that move large buffers. Called once, early, by every actor.

grpc copies each message into fresh memory. By default glibc maps and unmaps everything over 128 KiB, so each message
pays for new zeroed pages; keeping freed memory makes 2 MiB messages 1.5 to 2 times as fast.
"""

from __future__ import annotations

import ctypes
from typing import Final

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3
_MIB: Final = 1024 * 1024


def tune_malloc() -> bool:
    """Let glibc keep freed memory instead of returning it. True when it did; False where there is no mallopt.

    Up to 512 MiB of freed memory may stay with the process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_THRESHOLD, 32 * _MIB), (_M_TRIM_THRESHOLD, 512 * _MIB), (_M_TOP_PAD, 64 * _MIB))
    accepted = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(accepted)
