"""Keys and values of the sequences that are being generated, and of ended ones whose beginning may come again.

Each sequence has one contiguous buffer per layer, which grows in blocks: attention reads it in place, on any device,
without a kernel of its own. A pool keeps all buffers within a budget; what it gives up first are the sequences that
have ended, the longest unused first. A new sequence that begins like one of those takes its keys and values over.

Knows nothing of models or of scheduling. Used by `scheduler.py` (room) and `packing.py` (contents), in one thread.

Shape legend: H key/value heads, C capacity in tokens, Q new tokens, D head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

BLOCK_TOKENS = 64
"""Buffers grow by whole blocks."""

GROWTH = 4
"""And by at least one part in this many, so that growing a long sequence copies each token a few times at most."""

MIN_REUSED_TOKENS = 16
"""A shorter common beginning is computed again: looking for it would cost as much."""


class KVCache:
    """Of one sequence."""

    def __init__(self) -> None:
        self.capacity = 0
        """Tokens there is room for."""
        self.length = 0
        """Tokens whose keys and values are there. What lies behind them is of a step that has not ended well."""
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, begin: int | None = None) -> None:
        """Put [1, H, Q, D] behind what is there, or at `begin`.

        The tokens count as there once `length` says so: a step that fails half-way is simply done again.
        """
        begin = self.length if begin is None else begin
        if layer not in self._buffers:
            self._buffers[layer] = (_room(keys, self.capacity), _room(values, self.capacity))
        for buffer, new in zip(self._buffers[layer], (keys, values), strict=True):
            buffer.narrow(2, begin, new.shape[2]).copy_(new)

    def read(self, layer: int, end: int, begin: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of a layer from `begin` to before `end`: [1, H, end - begin, D] keys and values, as views."""
        keys, values = self._buffers[layer]
        return keys.narrow(2, begin, end - begin), values.narrow(2, begin, end - begin)

    def resize(self, capacity: int) -> None:
        """Make room for `capacity` tokens, and keep what is there as far as it fits."""
        length, old = min(self.length, capacity), self._buffers if capacity else {}
        # First: there may be no memory for it, and then all is as it was.
        self._buffers = {
            layer: (_moved(keys, length, capacity), _moved(values, length, capacity))
            for layer, (keys, values) in old.items()
        }
        self.capacity, self.length = capacity, length

    def copy_of(self, length: int, capacity: int) -> KVCache:
        """Another cache that begins with the first `length` tokens of this one."""
        other = KVCache()
        other.capacity, other.length = capacity, length
        other._buffers = {
            layer: (_moved(keys, length, capacity), _moved(values, length, capacity))
            for layer, (keys, values) in self._buffers.items()
        }
        return other

    def bytes_per_token(self) -> int:
        """0 before anything was written."""
        return sum(
            part.shape[1] * part.shape[3] * part.element_size() for both in self._buffers.values() for part in both
        )


@dataclass(slots=True)
class _Ended:
    """A sequence that has ended, kept for its beginning."""

    tokens: np.ndarray
    cache: KVCache
    version: int
    """Of the weights that computed it: no other version goes on from it."""


@dataclass(slots=True)
class KVPool:
    """Buffers within a budget."""

    max_bytes: int
    keeps_prefixes: bool = True
    """Whether ended sequences are kept while there is room."""
    bytes_per_token: int = 0
    """Of the model; 0 until the first sequence has written, and then everything fits."""
    used_tokens: int = 0
    """Capacity of all buffers together."""
    _ended: OrderedDict[int, _Ended] = field(default_factory=OrderedDict)
    _num_ended: int = 0

    @property
    def max_tokens(self) -> float:
        """Tokens that fit in all."""
        return self.max_bytes // self.bytes_per_token if self.bytes_per_token else float("inf")

    def fits(self, num_tokens: int) -> bool:
        """Whether a single sequence of so many tokens could ever be held."""
        return _blocks(num_tokens) <= self.max_tokens

    def grow(self, cache: KVCache, num_tokens: int) -> bool:
        """Give `cache` room for `num_tokens`, at the cost of ended sequences; false where that is not enough."""
        if cache.capacity >= num_tokens:
            return True
        wished = _blocks(max(num_tokens, cache.capacity + cache.capacity // GROWTH))
        for capacity in (wished, _blocks(num_tokens)):
            if self._make_room(capacity - cache.capacity):
                more = capacity - cache.capacity
                cache.resize(capacity)
                self.used_tokens += more
                return True
        return False

    def free(self, cache: KVCache) -> None:
        """Give up a cache."""
        self.used_tokens -= cache.capacity
        cache.resize(0)

    def retire(self, cache: KVCache, tokens: Sequence[int], version: int = 0) -> None:
        """A sequence has ended; `tokens` are all of its, `version` the weights that computed it."""
        if not self.keeps_prefixes or cache.length < MIN_REUSED_TOKENS:
            self.free(cache)
            return
        self._num_ended += 1
        self._ended[self._num_ended] = _Ended(np.array(tokens[: cache.length], dtype=np.int64), cache, version)

    def forget(self, version: int) -> None:
        """Keep nothing of what was computed by a version of the weights."""
        for number in [number for number, ended in self._ended.items() if ended.version == version]:
            self.free(self._ended.pop(number).cache)

    def begin(self, tokens: Sequence[int], num_tokens: int, version: int = 0) -> KVCache | None:
        """A cache with room for `num_tokens` for a sequence that begins with `tokens`; None where there is no room.

        It has the keys and values of the beginning it shares with an ended sequence of the same version, but never
        those of the last of `tokens`: that one has to be computed, or there would be nothing to go on from.
        """
        number, shared = self._longest_shared(np.array(tokens[:-1], dtype=np.int64), version)
        if number is not None:
            ended = self._ended[number]
            if shared == len(ended.tokens):  # it goes on where the other has ended: no copy
                del self._ended[number]
                if not self.grow(ended.cache, num_tokens):
                    self._ended[number] = ended
                    return None
                return ended.cache
            self._ended.move_to_end(number)
            capacity = _blocks(num_tokens)
            if self._make_room(capacity, but=number):
                cache = ended.cache.copy_of(shared, capacity)
                self.used_tokens += capacity
                return cache
        cache = KVCache()
        return cache if self.grow(cache, num_tokens) else None

    def _longest_shared(self, tokens: np.ndarray, version: int) -> tuple[int | None, int]:
        """The ended sequence that shares most of its beginning with `tokens`, and how many of them."""
        best: tuple[int | None, int] = (None, MIN_REUSED_TOKENS - 1)
        for number, ended in self._ended.items():
            if ended.version != version:
                continue
            length = min(len(tokens), len(ended.tokens))
            differs = np.flatnonzero(tokens[:length] != ended.tokens[:length])
            shared = int(differs[0]) if len(differs) else length
            if shared > best[1]:
                best = (number, shared)
        return best

    def _make_room(self, num_tokens: int, but: int | None = None) -> bool:
        """Whether there is room for so many more, once ended sequences other than `but` have been given up."""
        kept = 0 if but is None else self._ended[but].cache.capacity
        spare = sum(ended.cache.capacity for ended in self._ended.values()) - kept
        if self.used_tokens - spare + num_tokens > self.max_tokens:
            return False
        for number in list(self._ended):
            if self.used_tokens + num_tokens <= self.max_tokens:
                break
            if number != but:
                self.free(self._ended.pop(number).cache)
        return True


def _room(like: torch.Tensor, capacity: int) -> torch.Tensor:
    return like.new_empty((1, like.shape[1], capacity, like.shape[3]))


def _moved(old: torch.Tensor, length: int, capacity: int) -> torch.Tensor:
    """The first `length` tokens of a buffer in one for `capacity`."""
    new = _room(old, capacity)
    new[:, :, :length] = old[:, :, :length]
    return new


def _blocks(num_tokens: int) -> int:
    """Tokens of as many whole blocks as `num_tokens` need."""
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
