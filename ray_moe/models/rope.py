"""Rotary embeddings that change with the length of a sequence, made safe for several sequences at a time.

`transformers` lets the ``dynamic`` and ``longrope`` kinds rewrite their frequencies inside `forward`, by the longest
sequence seen. Two requests in two threads would rewrite each other's. Called by the engine, per request.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

from torch import nn

CHANGING_KINDS = {"dynamic", "longrope"}


class ThreadLocalRope:
    """Gives every thread its own copy of each rotary module of `model` that changes; other modules are left alone."""

    def __init__(self, model: nn.Module) -> None:
        self._copies = threading.local()
        self._pristine: dict[str, nn.Module] = {}
        for name, module in list(model.named_modules()):
            kind = getattr(module, "rope_type", None)
            kinds = kind.values() if isinstance(kind, dict) else [kind]
            if CHANGING_KINDS.isdisjoint(kinds):
                continue
            self._pristine[name] = copy.deepcopy(module)
            module.forward = self._forward_of(name)

    def forget(self) -> None:
        """Begin a sequence in this thread: its rotary modules are as they were loaded."""
        self._copies.__dict__.clear()

    def _forward_of(self, name: str) -> Any:
        def forward(*arguments: Any, **named: Any) -> Any:
            own = self._copies.__dict__.get(name)
            if own is None:
                own = self._copies.__dict__[name] = copy.deepcopy(self._pristine[name])
            return own(*arguments, **named)

        return forward
