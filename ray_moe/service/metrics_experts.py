"""Tokens of the hottest experts by name, and of all others of a layer together: few series, however large the model.

A model may have tens of thousands of experts, and which are hot changes. So that every series is a true counter, a
token is counted once, where its expert stands when it is looked at: under the expert's name while it has one, else with
the others of its layer. No series ever falls, and the increases of a layer's series add up to its tokens. An expert
that loses its name goes on from there if it gets one again. Called by `service/metrics.py`, in one thread.

Shape legend: E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_moe.types import LayerPath

Ints = npt.NDArray[np.int64]

TENURE_S = 600.0
"""An expert keeps its name at least for so long: in an hour there are at most 7 times as many names as at a time."""

MARGIN = 1.25
"""And then loses it only to one that is this much hotter."""

HALF_LIFE_S = 60.0
"""After which a token counts half in an expert's heat."""

Key = tuple[LayerPath, int]


@dataclass(frozen=True, slots=True)
class Row:
    """One series."""

    layer: LayerPath
    expert: int | None
    """None: all that have no name."""
    tokens: int


class HotExperts:
    """See the module."""

    def __init__(self, max_named: int) -> None:
        """`max_named`: experts with a name at a time, over all layers."""
        self._max_named = max_named
        self._totals: dict[LayerPath, Ints] = {}
        self._counted: dict[LayerPath, Ints] = {}
        """[E] tokens of each expert that came while it had a name."""
        self._heat: dict[LayerPath, npt.NDArray[np.float64]] = {}
        self._named: dict[Key, float] = {}
        """Since when."""
        self._at_s: float | None = None

    def count(self, totals: Mapping[LayerPath, Ints], now_s: float) -> list[Row]:
        """The series, by layer and expert; the others of a layer come last.

        Args:
            totals: [E] tokens of each expert since the beginning, by layer.
            now_s: from any origin.
        """
        is_first = self._at_s is None
        fade = 1.0 if self._at_s is None else 0.5 ** ((now_s - self._at_s) / HALF_LIFE_S)
        self._at_s = now_s
        new = {layer: self._take(layer, total, fade) for layer, total in totals.items()}
        if is_first:  # nobody has seen a series yet: whoever is hot has its name from the beginning
            self._name(now_s)
        for layer, expert in self._named:
            self._counted[layer][expert] += new[layer][expert] if layer in new else 0
        self._name(now_s)
        rows = self._rows()
        self._let_go(now_s)
        return rows

    def _take(self, layer: LayerPath, total: Ints, fade: float) -> Ints:
        """[E] tokens that are new."""
        if layer not in self._totals:
            self._totals[layer], self._counted[layer] = np.zeros_like(total), np.zeros_like(total)
            self._heat[layer] = np.zeros(len(total))
        new: Ints = np.maximum(total - self._totals[layer], 0)
        self._totals[layer] = self._totals[layer] + new
        self._heat[layer] = self._heat[layer] * fade + new
        return new

    def _name(self, now_s: float) -> None:
        """Give free names to the hottest. What they count begins now: their series begin where they will rise from."""
        for key, _ in self._hottest(self._max_named - len(self._named)):
            self._named[key] = now_s

    def _let_go(self, now_s: float) -> None:
        """Take names from experts that are no longer hot; they were shown a last time. Others get them next time."""
        due = [key for key, since_s in self._named.items() if now_s - since_s >= TENURE_S]
        due.sort(key=self._heat_of)
        for key, (_, heat) in zip(due, self._hottest(len(due)), strict=False):
            if heat > MARGIN * self._heat_of(key):
                del self._named[key]

    def _hottest(self, number: int) -> list[tuple[Key, float]]:
        """Experts without a name, the hottest first, with their heat."""
        layers = list(self._heat)
        if number <= 0 or not layers:
            return []
        heat = np.concatenate([self._heat[layer] for layer in layers])
        starts = np.cumsum([0, *(len(self._heat[layer]) for layer in layers)])
        start_of = dict(zip(layers, starts.tolist(), strict=False))
        heat[[start_of[layer] + expert for layer, expert in self._named]] = 0.0
        best = np.argsort(-heat, kind="stable")[:number]
        best = best[heat[best] > 0]
        at = np.searchsorted(starts, best, side="right") - 1
        return [
            ((layers[layer], int(flat - starts[layer])), float(heat[flat]))
            for layer, flat in zip(at.tolist(), best.tolist(), strict=True)
        ]

    def _heat_of(self, key: Key) -> float:
        return float(self._heat[key[0]][key[1]])

    def _rows(self) -> list[Row]:
        rows = []
        for layer, totals in self._totals.items():
            counted = self._counted[layer]
            named = sorted(expert for path, expert in self._named if path == layer)
            rows += [Row(layer, expert, int(counted[expert])) for expert in named]
            rows.append(Row(layer, None, int(totals.sum() - counted.sum())))
        return rows
