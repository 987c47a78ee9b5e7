"""Which versions of the weights a service has: the rules of publishing, rolling back, trying out and retiring.

A version is a number, never given twice, and what its weights are. Of the versions that are *live*, which hosts hold
and routers can compute with, the *open* ones may be asked for: the current one, which new requests are computed with,
and those before it that are kept to roll back to. The others end with the last request that uses them. A *canary* is a
live version that differs from the current one in a single expert, and is tried out beside it.

Changed by making another value, each with a higher revision. Used by `actors/publisher.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ray_moe.errors import InvalidRequest, NotFound, Unavailable
from ray_moe.types import CanaryRequest, LayerPath, VersionStatus


class Source(NamedTuple):
    """Where weights were read from: the same source is the same weights."""

    number: int
    """Of the version that brought it: a directory's contents may be others later."""
    model: str
    """Directory or name of a checkpoint."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What a version's weights are: those of a checkpoint, but for some experts, which are from others.

    Where experts are cut, all the parts of such an expert are from one source (`policy/parts.py`).
    """

    base: Source
    changed: Mapping[tuple[LayerPath, int], Source] = field(default_factory=dict)

    def source(self, layer: LayerPath, expert: int) -> Source:
        """Where an expert is from."""
        return self.changed.get((layer, expert), self.base)

    @property
    def sources(self) -> frozenset[Source]:
        """All checkpoints that it needs."""
        return frozenset((self.base, *self.changed.values()))

    def __str__(self) -> str:
        firsts: dict[Source, tuple[LayerPath, int]] = {}
        for key, at in self.changed.items():  # every change has a source of its own
            firsts.setdefault(at, key)  # the first part of an expert has its number
        others = (f"expert {expert} of {layer} from {at.model}" for at, (layer, expert) in firsts.items())
        return ", ".join((self.base.model, *others))


Live = Mapping[int, Weights]
"""Live versions, and what each is."""


def num_copies(versions: Iterable[Weights], layer: LayerPath, expert: int) -> int:
    """How many different weights of an expert there are in `versions`."""
    return len({weights.source(layer, expert) for weights in versions})


def distinct(versions: Live, experts: Mapping[LayerPath, Collection[int]]) -> dict[int, dict[LayerPath, list[int]]]:
    """Experts by the version to take them from, so that what versions have in common comes once."""
    parts: dict[int, dict[LayerPath, list[int]]] = {}
    seen: set[tuple[LayerPath, int, Source]] = set()
    for version, weights in versions.items():
        for layer, ids in experts.items():
            for expert in sorted(ids):
                one = (layer, expert, weights.source(layer, expert))
                if one not in seen:
                    seen.add(one)
                    parts.setdefault(version, {}).setdefault(layer, []).append(expert)
    return parts


def by_source(weights: Weights, layer: LayerPath, experts: Iterable[int]) -> dict[Source, list[int]]:
    """Experts of a layer by where they are from."""
    parts: dict[Source, list[int]] = {}
    for expert in experts:
        parts.setdefault(weights.source(layer, expert), []).append(expert)
    return parts


class Canary(NamedTuple):
    """A version that is being tried out."""

    number: int
    request: CanaryRequest


MIN_ROWS = 32
"""Fewer rows say nothing of a canary."""


class Drift(NamedTuple):
    """How far the rows of a canary's expert are from the current one's, for the same tokens."""

    number: int
    """Of the canary."""
    num_rows: int = 0
    difference: float = 0.0
    """Sum of squares of the differences."""
    size: float = 0.0
    """Sum of squares of the current one's rows."""

    def plus(self, other: Drift) -> Drift:
        """Of the rows of both."""
        return Drift(
            self.number, self.num_rows + other.num_rows, self.difference + other.difference, self.size + other.size
        )

    @property
    def ratio(self) -> float:
        """The root of the one sum over the other; infinite where rows are not numbers, or were all zero and are not."""
        if self.difference == 0:
            return 0.0
        ratio = self.difference / self.size if self.size > 0 else math.inf
        return math.sqrt(ratio) if ratio >= 0 else math.inf


@dataclass(frozen=True, slots=True)
class Versions:
    """See the module."""

    live: Live
    open: tuple[int, ...]
    """The current one, then those that were current before it, the last one first."""
    loading: tuple[int, Weights] | None = None
    """A version that is being published, or is to be tried out."""
    canary: Canary | None = None
    """What is tried out, once it is live."""
    last: int = 0
    """The highest number that was ever given."""
    revision: int = 1
    """Of this value: whoever follows never goes back."""

    @classmethod
    def first(cls, model: str) -> Versions:
        """Of a service that starts with `model`."""
        return cls({0: Weights(Source(0, model))}, (0,))

    @property
    def current(self) -> int:
        return self.open[0]

    @property
    def wanted(self) -> dict[int, Weights]:
        """What routers are to have: live versions, and the one that is being loaded."""
        return dict(self.live) | ({} if self.loading is None else dict([self.loading]))

    @property
    def trial(self) -> Canary | None:
        """The canary, once it is live."""
        return self.canary if self.canary is not None and self.canary.number in self.live else None

    def begin(self, model: str) -> Versions:
        """Publish `model`: it is loaded first."""
        self._refuse_beside_a_canary()
        number = self.last + 1
        return self._next(loading=(number, Weights(Source(number, model))), last=number)

    def begin_canary(self, request: CanaryRequest, parts: Sequence[int] = ()) -> Versions:
        """Try out another expert: it is loaded first. Args: parts: of the expert, where it is cut."""
        self._refuse_beside_a_canary()
        number, current = self.last + 1, self.live[self.current]
        source = Source(number, request.model)
        changed = {**current.changed, **{(request.layer, part): source for part in parts or (request.expert,)}}
        weights = Weights(current.base, changed)
        return self._next(loading=(number, weights), last=number, canary=Canary(number, request))

    def _refuse_beside_a_canary(self) -> None:
        if self.canary is not None:
            raise Unavailable(f"version {self.canary.number} is being tried out; promote or cancel it first")

    def give_up(self) -> Versions:
        """What is being published will not be."""
        is_canary = self.loading is not None and self.canary is not None and self.loading[0] == self.canary.number
        return self._next(loading=None, canary=None if is_canary else self.canary)

    def commit(self, keep: int) -> Versions:
        """What was being published is the current version; `keep` versions stay open."""
        if self.loading is None:
            raise InvalidRequest("no version is being published")
        number, weights = self.loading
        return self._next(live={**self.live, number: weights}, open=(number, *self.open)[:keep], loading=None)

    def commit_canary(self) -> Versions:
        """What is to be tried out is live."""
        if self.loading is None:
            raise InvalidRequest("no version is being tried out")
        return self._next(live=dict([*self.live.items(), self.loading]), loading=None)

    def promote(self, keep: int) -> Versions:
        """The canary is the current version; `keep` versions stay open."""
        return self._next(open=(self._trial().number, *self.open)[:keep], canary=None)

    def cancel(self) -> Versions:
        """The canary ends with the last request that uses it."""
        self._trial()
        return self._next(canary=None)

    def _trial(self) -> Canary:
        if self.trial is None:
            raise InvalidRequest("no version is being tried out")
        return self.trial

    def roll_back(self, to: int | None = None) -> Versions:
        """Make an older version current, and try nothing out any more; `to`: that one, older or not.

        Raises: `NotFound` when it is not open (any more), `InvalidRequest` when there is no older one.
        """
        if to is None:
            older = [number for number in self.open if number < self.current]
            if not older:
                raise InvalidRequest(
                    f"there is no version before {self.current} to roll back to; versions.keep says how many are kept"
                )
            to = max(older)
        if to not in self.open:
            raise NotFound(f"version {to} is not there to roll back to; there are {sorted(self.open)}")
        return self._next(open=(to, *(number for number in self.open if number != to)), canary=None)

    def retire(self, in_use: Collection[int]) -> Versions:
        """Without the versions that are neither open nor in use; the same value when there are none."""
        stay = {*self.open, *in_use, *(() if self.canary is None else (self.canary.number,))}
        live = {number: weights for number, weights in self.live.items() if number in stay}
        return self if len(live) == len(self.live) else self._next(live=live)

    def recovered(self) -> Versions:
        """After a restart of whoever keeps it: what was being published is not any more."""
        return self.give_up()

    def measured(self, drifts: Iterable[Drift]) -> Drift | None:
        """What all routers have measured of the canary; None without one."""
        if self.trial is None:
            return None
        total = Drift(self.trial.number)
        for drift in drifts:
            total = total.plus(drift) if drift.number == total.number else total
        return total

    def is_too_far(self, drift: Drift | None) -> bool:
        """Whether the canary must not go on."""
        if self.trial is None or drift is None or drift.num_rows < MIN_ROWS:
            return False
        return not drift.ratio <= self.trial.request.max_drift

    def statuses(self, drift: Drift | None = None) -> tuple[VersionStatus, ...]:
        """What people are told, the oldest first."""
        states = {number: "kept" if number in self.open else "ending" for number in self.live}
        states[self.current] = "current"
        if self.trial is not None:
            states[self.trial.number] = "canary"
        if self.loading is not None:
            states[self.loading[0]] = "loading"
        wanted = self.wanted
        return tuple(
            VersionStatus(number, str(wanted[number]), states[number], drift.ratio, drift.num_rows)
            if drift is not None and drift.number == number
            else VersionStatus(number, str(wanted[number]), states[number])
            for number in sorted(states)
        )

    def _next(self, **changes: object) -> Versions:
        return replace(self, revision=self.revision + 1, **changes)  # type: ignore[arg-type]
