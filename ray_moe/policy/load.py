"""How many tokens each expert gets per second, from the routers' counts, with what is old fading.

Pure: the time comes with each report. Reports carry totals since a router began, so a lost one costs nothing, a
repeated or overtaken one changes nothing, and a restarted router begins anew. Called by `cluster_state.py` and the
simulator.

Shape legend: E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ray_moe.types import LayerPath

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """One router's report."""

    router: str
    incarnation: str
    """This life of the router: its totals begin at zero."""
    sequence: int
    """Rises with each report of a life."""
    tokens: Mapping[LayerPath, tuple[int, ...]]
    """[E] tokens routed to each expert since that life began, by layer."""


@dataclass(slots=True)
class _Seen:
    incarnation: str
    sequence: int
    at_s: float
    tokens: Mapping[LayerPath, npt.NDArray[np.int64]]


@dataclass(slots=True)
class LoadTracker:
    """Exponential moving average of tokens per second, by layer and expert, over all routers."""

    half_life_s: float
    """After this long without traffic the rates are half of what they were."""
    num_experts: Mapping[LayerPath, int]
    _rate: dict[LayerPath, Floats] = field(init=False)
    _at_s: float | None = field(init=False, default=None)
    _seen: dict[str, _Seen] = field(init=False, default_factory=dict)
    _ended: set[tuple[str, str]] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._rate = {layer: np.zeros(count) for layer, count in self.num_experts.items()}

    def report(self, counts: TokenCounts, now_s: float) -> bool:
        """Take a report in; False when it is stale (overtaken, repeated, or of an ended life) and changed nothing.

        The first report of a life only tells where its totals are. Layers that the model does not have, or has with
        another number of experts, are passed over: the sender runs another model.
        """
        if (counts.router, counts.incarnation) in self._ended:
            return False
        seen = self._seen.get(counts.router)
        if seen is not None and seen.incarnation != counts.incarnation:
            self._ended.add((counts.router, seen.incarnation))
            seen = None
        if seen is not None and counts.sequence <= seen.sequence:
            return False
        tokens = {
            layer: np.asarray(counts.tokens[layer], dtype=np.int64)
            for layer, count in self.num_experts.items()
            if len(counts.tokens.get(layer, ())) == count
        }
        if seen is None:
            self._seen[counts.router] = _Seen(counts.incarnation, counts.sequence, now_s, tokens)
            return True
        seen.sequence = counts.sequence
        past_s = now_s - seen.at_s
        if past_s > 0:  # else the next report tells it all
            # What came since the last report counts as an even flow over that time.
            self._fade(now_s)
            share = (1.0 - 0.5 ** (past_s / self.half_life_s)) / past_s
            for layer, total in tokens.items():
                if layer in seen.tokens:
                    self._rate[layer] += share * np.maximum(total - seen.tokens[layer], 0)
            seen.at_s, seen.tokens = now_s, tokens
        return True

    def rates(self, now_s: float) -> dict[LayerPath, Floats]:
        """[E] tokens per second of each expert, by layer. Asking changes nothing."""
        factor = self._factor(now_s)
        return {layer: factor * rate for layer, rate in self._rate.items()}

    def tokens_per_s(self, now_s: float) -> float:
        """Of the busiest layer (every layer sees every token, unless layers differ in their top-k)."""
        return self._factor(now_s) * max((float(rate.sum()) for rate in self._rate.values()), default=0.0)

    def _fade(self, now_s: float) -> None:
        self._rate = self.rates(now_s)
        self._at_s = now_s if self._at_s is None else max(now_s, self._at_s)

    def _factor(self, now_s: float) -> float:
        """What is left of the rates as they were when they were last written down."""
        return 1.0 if self._at_s is None else float(0.5 ** (max(0.0, now_s - self._at_s) / self.half_life_s))
