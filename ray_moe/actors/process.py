"""What a process that computes, of a router or of an expert host, does at its start."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from ray_moe.actors import logs
from ray_moe.config import LogsConfig


def set_up(log: LogsConfig, name: str, num_threads: int) -> None:
    """Logging under `name`, memory for large messages, and torch on `num_threads` threads."""
    import torch  # here, so that whoever only names an actor's class does not load it

    from ray_moe.transport.allocator import tune_malloc

    logs.configure(log, name)
    tune_malloc()
    torch.set_num_threads(num_threads)


@contextmanager
def made_to_stay() -> Iterator[None]:
    """Around imports and loading: no garbage is looked for meanwhile but once at the end, nor ever among what stays.

    Looking all the time takes a tenth of a start, and later one full collection stops everything for a quarter of a
    second: torch and transformers are 400,000 objects.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.collect()  # what is frozen is kept for ever, so nothing may be that nobody holds: weights, perhaps
        gc.freeze()
        gc.enable()
