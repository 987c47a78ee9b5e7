"""Coding of large messages where it holds nobody up. Called by the front doors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")

INLINE_BYTES = 2**20
"""Smaller messages are coded in the event loop (under a millisecond), larger ones in a thread."""


async def off_loop(num_bytes: int, work: Callable[..., R], *arguments: Any) -> R:
    """Do `work` on about `num_bytes`."""
    if num_bytes <= INLINE_BYTES:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)
