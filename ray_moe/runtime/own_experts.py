"""The router's own experts: the hottest ones, which then cost no hop, and those that nobody else can compute.

One store, two budgets. The *cache* is kept full of the experts that most tokens went to. The *lifeboat* takes an expert
aboard when a batch needs it and no host has it; there it stays until a host has it again, or others need the room.
Experts come through a callable, so nothing here knows where they are kept. They are never trained: a batch with
gradients does not come here. Called by `runtime/exchange.py`; the cache is kept up by whoever owns the dispatcher.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from ray_moe.errors import RayMoEError, StaleRouting
from ray_moe.ops.dispatch import Ints
from ray_moe.ops.experts import ExpertGroup
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.types import LayerPath

logger = logging.getLogger(__name__)

Load = Callable[[LayerPath, Sequence[int], int], ExpertGroup]
"""Reads experts (ascending) of a layer, in a version of the weights, into a group: local number r is the r-th."""

Split = Callable[[LayerPath, Sequence[int], int], Iterable[Sequence[int]]]
"""Which of some experts can be read into one group."""

Place = tuple[int, LayerPath]
"""A version of the weights, and a layer in it."""

Key = tuple[Place, int]

TENURE = 1.25
"""An expert leaves the cache only for one that is this much hotter: loading costs more than a little heat gains."""

RETRY_EVERY_S = 1.0
"""After a failed load the lifeboat leaves a layer alone for so long."""


@dataclass(slots=True)
class _Entry:
    num_bytes: int
    is_cached: bool
    """Else it is in the lifeboat."""
    used: int
    """Number of the last batch that used it."""


class OwnExperts:
    """Experts held in this process, within budgets. Thread-safe."""

    def __init__(
        self,
        load: Load,
        expert_bytes: Mapping[LayerPath, int],
        *,
        cache_bytes: int = 0,
        lifeboat_bytes: int = 0,
        half_life_s: float = 30.0,
        split: Split = lambda layer, experts, version: [experts],
    ) -> None:
        """
        Args:
            load: reads experts; called from the thread that needs them.
            expert_bytes: of one expert of each layer.
            cache_bytes: budget for the hottest experts; 0 is no cache.
            lifeboat_bytes: budget for experts that no host has; 0 is no lifeboat. The experts of the batch that is
                running may exceed it.
            half_life_s: after which a token counts half in an expert's heat.
            split: which experts are not read in one go.
        """
        self.cache_bytes = cache_bytes
        self.lifeboat_bytes = lifeboat_bytes
        self.num_lifeboat_loads = 0
        """Experts that were taken aboard."""
        self._load = load
        self._split = split
        self._expert_bytes = expert_bytes
        self._half_life_s = half_life_s
        self._host = ExpertHost("router")
        self._lock = threading.RLock()
        self._entries: dict[Key, _Entry] = {}
        self._loading: dict[Key, Future[None]] = {}
        self._failed_s: dict[Place, float] = {}
        self._num_forgets = 0
        """What was being read at a `forget` is not kept."""
        self._batch = 0
        self._reading = threading.Lock()
        self._rebalancing = threading.Lock()
        self._counted: dict[LayerPath, Ints] = {}
        """[E] tokens that are in the heat already."""
        self._heat: dict[LayerPath, npt.NDArray[np.float64]] = {}
        """[E] tokens that went to each expert, the older ones faded."""
        self._rebalanced_s: float | None = None

    # --- what there is -------------------------------------------------------------------------------------
    @property
    def has_lifeboat(self) -> bool:
        return self.lifeboat_bytes > 0

    @property
    def cached(self) -> dict[Place, frozenset[int]]:
        """Experts of the cache, by version and layer."""
        return self._held(is_cached=True)

    @property
    def aboard(self) -> dict[Place, frozenset[int]]:
        """Experts in the lifeboat, by version and layer."""
        return self._held(is_cached=False)

    def _held(self, is_cached: bool) -> dict[Place, frozenset[int]]:
        with self._lock:
            keys = sorted(key for key, entry in self._entries.items() if entry.is_cached == is_cached)
        return {place: frozenset(e for _, e in group) for place, group in groupby(keys, key=lambda key: key[0])}

    @property
    def held_bytes(self) -> int:
        with self._lock:
            return sum(entry.num_bytes for entry in self._entries.values())

    @property
    def num_rows(self) -> int:
        """(token, expert) rows computed here."""
        return self._host.num_rows

    def has(self, layer: LayerPath, experts: Collection[int], version: int = 0) -> bool:
        """Whether all of them are here now."""
        with self._lock:
            return all(((version, layer), expert) in self._entries for expert in experts)

    def may_load(self, layer: LayerPath, version: int = 0) -> bool:
        """Whether the lifeboat can be tried for an expert of the layer."""
        with self._lock:
            failed_s = self._failed_s.get((version, layer))
        return self.has_lifeboat and (failed_s is None or time.monotonic() - failed_s >= RETRY_EVERY_S)

    # --- computing -----------------------------------------------------------------------------------------
    def run(self, call: ExpertCall, likely: Sequence[int] = ()) -> ExpertReply | None:
        """Compute `call`, taking aboard what is not here; None when that cannot be.

        Args:
            likely: experts of the layer that will be asked for soon as well: read in one go with the others, as far as
                there is room in the lifeboat.

        Raises: `ExpertFailed`, `WireError`, as a host does.
        """
        while self._embark((call.version, call.layer), call.experts, likely):
            outcome = self._host.run([call])[0]
            if isinstance(outcome, StaleRouting):
                continue  # thrown out by another batch between the two lines above
            if isinstance(outcome, RayMoEError):
                raise outcome
            self._trim()
            return outcome
        return None

    def _embark(self, place: Place, experts: Sequence[int], likely: Sequence[int]) -> bool:
        """Have `experts` here; each is read once, however many batches wait for it."""
        version, layer = place
        with self._lock:
            self._batch += 1
            for expert in experts:
                entry = self._entries.get((place, expert))
                if entry is not None:
                    entry.used = self._batch
            missing = [expert for expert in experts if (place, expert) not in self._entries]
            if not missing:
                return True
            if not self.may_load(layer, version):
                return False
            others = [self._loading[place, expert] for expert in missing if (place, expert) in self._loading]
            mine = [expert for expert in missing if (place, expert) not in self._loading]
            if mine:
                mine = sorted({*mine, *self._fitting(place, likely, len(mine))})
            done: Future[None] = Future()
            self._loading.update({(place, expert): done for expert in mine})
        if mine:
            try:
                is_kept = self._take(place, mine, is_cached=False)
            finally:
                with self._lock:
                    for expert in mine:
                        del self._loading[place, expert]
                done.set_result(None)
            if not is_kept:
                return False
        for other in others:
            other.result()
        return self.has(layer, experts, version)

    def _fitting(self, place: Place, experts: Sequence[int], num_others: int) -> list[int]:
        """Those of `experts` that are not here nor on their way, as many as fit beside `num_others` of the layer."""
        absent = [e for e in experts if (place, e) not in self._entries and (place, e) not in self._loading]
        keys = [*(key for key, entry in self._entries.items() if not entry.is_cached), *self._loading]
        free_bytes = self.lifeboat_bytes - sum(self._expert_bytes[aboard] for (_, aboard), _ in keys)
        number = free_bytes // max(1, self._expert_bytes[place[1]]) - num_others
        return absent[: max(0, number)]

    def _take(self, place: Place, experts: Sequence[int], is_cached: bool) -> bool:
        """Read `experts` and hold them; false when they could not be read, or are out of date already."""
        num_forgets, (version, layer) = self._num_forgets, place
        try:
            with self._reading:  # side by side, readers would only take the interpreter from each other
                groups = [(part, self._load(layer, part, version)) for part in self._split(layer, experts, version)]
        except Exception as error:  # whatever reading files or allocating memory raises: the rows can still wait
            logger.warning("experts %s of %s could not be read by the router: %s", list(experts), layer, error)
            with self._lock:
                self._failed_s[place] = time.monotonic()
            return False
        with self._lock:
            if num_forgets != self._num_forgets:
                return False
            for part, group in groups:
                self._host.hold(layer, part, group, version)
            for expert in experts:
                self._entries[place, expert] = _Entry(self._expert_bytes[layer], is_cached, self._batch)
            self._failed_s.pop(place, None)
            if not is_cached:
                self.num_lifeboat_loads += len(experts)
        return True

    # --- making room ---------------------------------------------------------------------------------------
    def _trim(self) -> None:
        """Throw out of the lifeboat what was used longest ago, down to the budget, but not what the last batch used."""
        with self._lock:
            aboard = [(entry.used, key) for key, entry in self._entries.items() if not entry.is_cached]
            if not aboard:
                return
            over_bytes = sum(self._entries[key].num_bytes for _, key in aboard) - self.lifeboat_bytes
            leaving = []
            for used, key in sorted(aboard):
                if over_bytes <= 0 or used >= self._batch:
                    break
                leaving.append(key)
                over_bytes -= self._entries[key].num_bytes
            self._drop(leaving)

    def disembark(self, is_elsewhere: Callable[[LayerPath, int], bool]) -> None:
        """Let go of the lifeboat's experts that a host has again."""
        with self._lock:
            self._drop(
                [
                    ((version, layer), expert)
                    for ((version, layer), expert), entry in self._entries.items()
                    if not entry.is_cached and is_elsewhere(layer, expert)
                ]
            )

    def forget(self, version: int) -> None:
        """Let go of a version of the weights, which nobody uses any more."""
        with self._lock:
            self._num_forgets += 1
            self._drop([key for key in self._entries if key[0][0] == version])

    def _drop(self, keys: Sequence[Key]) -> None:
        for place, group in groupby(sorted(keys), key=lambda key: key[0]):
            version, layer = place
            experts = [expert for _, expert in group]
            self._host.drop(layer, experts, (version,))
            for expert in experts:
                del self._entries[place, expert]

    # --- the cache -----------------------------------------------------------------------------------------
    def rebalance(self, tokens_per_expert: Mapping[LayerPath, Ints], now_s: float, version: int = 0) -> None:
        """Bring what became hot into the cache, and let go of what cooled. Reads files; one at a time.

        Args:
            tokens_per_expert: [E] tokens routed to each expert since the start, by layer.
            now_s: any clock that goes on.
            version: of the weights that are cached; those of others leave.
        """
        if not self.cache_bytes or not self._rebalancing.acquire(blocking=False):
            return
        try:
            self._feel(tokens_per_expert, now_s)
            chosen = self._hottest(version)
            with self._lock:
                self._drop([k for k, entry in self._entries.items() if entry.is_cached and k not in chosen])
                for key in chosen & self._entries.keys():
                    self._entries[key].is_cached = True  # from the lifeboat, perhaps
                wanted = sorted(chosen - self._entries.keys() - self._loading.keys())
            for place, expert in wanted:  # one by one: one that cools leaves without its neighbours being copied
                self._take(place, [expert], is_cached=True)
        finally:
            self._rebalancing.release()

    def _feel(self, tokens_per_expert: Mapping[LayerPath, Ints], now_s: float) -> None:
        """Add the tokens since the last time to the heat, which fades."""
        elapsed_s = 0.0 if self._rebalanced_s is None else now_s - self._rebalanced_s
        self._rebalanced_s = now_s
        kept = 0.5 ** (elapsed_s / self._half_life_s)
        for layer, tokens in tokens_per_expert.items():
            now = tokens.copy()  # the dispatcher goes on counting
            self._heat[layer] = self._heat.get(layer, np.zeros(len(now))) * kept + (now - self._counted.get(layer, 0))
            self._counted[layer] = now

    def _hottest(self, version: int) -> set[Key]:
        """What the cache should hold: most tokens for its bytes, those it holds already at an advantage."""
        with self._lock:
            held = {key for key, entry in self._entries.items() if entry.is_cached}
        ranked = []
        for layer, heat in self._heat.items():
            num_bytes = self._expert_bytes.get(layer, 0)
            for expert in np.flatnonzero(heat > 0).tolist() if num_bytes else ():
                value = float(heat[expert]) / num_bytes * (TENURE if ((version, layer), expert) in held else 1.0)
                ranked.append((-value, layer, expert))
        chosen: set[Key] = set()
        left_bytes = self.cache_bytes
        for _, layer, expert in sorted(ranked):
            if self._expert_bytes[layer] <= left_bytes:
                left_bytes -= self._expert_bytes[layer]
                chosen.add(((version, layer), expert))
        return chosen
