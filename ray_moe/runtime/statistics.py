"""What a dispatcher counts: tokens of each expert, repeated and hedged calls, and how evenly batches load the hosts.

Cheap enough for every step of a decode. Called by `runtime/moe_layer.py` and `runtime/exchange.py`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from ray_moe.ops.dispatch import Ints
from ray_moe.types import LayerPath

WINDOW = 1024
"""Batches whose balancedness is remembered."""


class Statistics:
    """Counters of one dispatcher. Thread-safe."""

    def __init__(self) -> None:
        self.tokens_per_expert: dict[LayerPath, Ints] = {}
        """[E] tokens routed to each expert since the start, by layer."""
        self.num_retried_calls = 0
        """Calls whose rows were sent again, because a host was lost or did not hold an expert."""
        self.num_hedged_calls = 0
        """Calls that were overdue and sent to others as well."""
        self.num_hedges_won = 0
        """Of those, the ones that the others answered first."""
        self._balancedness: deque[float] = deque(maxlen=WINDOW)
        self._lock = threading.Lock()

    def add_layers(self, num_experts: Mapping[LayerPath, int]) -> None:
        for layer, number in num_experts.items():
            self.tokens_per_expert.setdefault(layer, np.zeros(number, dtype=np.int64))

    def add_tokens(self, layer: LayerPath, slots: Ints) -> Ints | None:
        """[N] expert of each slot; what is above all experts is "no expert". [E] slots of each, of a layer there is."""
        counts = self.tokens_per_expert.get(layer)
        if counts is None:
            return None
        mine: Ints = np.bincount(slots, minlength=len(counts) + 1)[:-1]
        with self._lock:
            counts += mine
        return mine

    def add_batch(self, rows: Sequence[int], speeds: Sequence[float], speed_in_all: float) -> None:
        """Rows that a batch sent to each host that got any, their speeds, and that of all that hold the layer."""
        if rows:
            longest = max(number / speed for number, speed in zip(rows, speeds, strict=True))
            self._balancedness.append(sum(rows) / (longest * max(speed_in_all, sum(speeds))))

    def totals(self) -> dict[LayerPath, Ints]:
        """`tokens_per_expert` at one moment: copies."""
        with self._lock:
            return {layer: counts.copy() for layer, counts in self.tokens_per_expert.items()}

    def balancedness(self) -> list[float]:
        """Mean over largest host load of each of the last batches, the oldest first; 1 is perfect.

        A load is rows over the host's relative speed. The mean is over the hosts that hold an expert of the batch's
        layer; rows computed in the router are on none.
        """
        return list(self._balancedness)

    def add_retry(self) -> None:
        with self._lock:
            self.num_retried_calls += 1

    def add_hedge(self) -> None:
        with self._lock:
            self.num_hedged_calls += 1

    def add_hedge_won(self) -> None:
        with self._lock:
            self.num_hedges_won += 1
