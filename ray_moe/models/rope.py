"""Rotary embeddings that change with the length of a sequence, made safe for several sequences at a time.

`transformers` lets the ``dynamic`` and ``longrope`` kinds rewrite their frequencies inside `forward`, by the longest
sequence seen. Sequences that take turns would rewrite each other's. Called by the engine, around each sequence.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

CHANGING_KINDS = {"dynamic", "longrope"}


class ChangingRope:
    """Gives every sequence its own copy of each rotary module of a model that changes; other modules are left alone."""

    def __init__(self, model: nn.Module) -> None:
        self._current = threading.local()
        self._pristine: dict[str, nn.Module] = {}
        for name, module in list(model.named_modules()):
            if has_changing_rope(module):
                self._pristine[name] = copy.deepcopy(module)
                module.forward = self._forward_of(name)

    @contextmanager
    def of(self, copies: dict[str, nn.Module]) -> Iterator[None]:
        """While the block runs, this thread computes the sequence whose modules are `copies`: {} for a new one."""
        self._current.copies = copies
        try:
            yield
        finally:
            self._current.copies = None

    def _forward_of(self, name: str) -> Any:
        def forward(*arguments: Any, **named: Any) -> Any:
            copies = getattr(self._current, "copies", None)
            copies = {} if copies is None else copies
            if name not in copies:
                copies[name] = copy.deepcopy(self._pristine[name])
            return copies[name](*arguments, **named)

        return forward


def has_changing_rope(module: nn.Module) -> bool:
    """Whether `module` itself is a rotary embedding of a kind that changes."""
    kind: Any = getattr(module, "rope_type", None)
    return not CHANGING_KINDS.isdisjoint(kind.values() if isinstance(kind, dict) else [kind])
