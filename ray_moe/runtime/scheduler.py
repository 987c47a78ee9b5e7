"""Which tokens of which sequences are computed in the next step.

Continuous batching: sequences join and leave between two steps. Those that generate come first, one token each; what
is left of a step's tokens goes to prompts, in chunks if need be. Sequences are let in while there is room for their
keys and values; when it runs out later, the last that came in gives its up and is computed again when there is room.

Callers take turns by what they have been served (Sheng et al., "Fairness in Serving Large Language Models", 2024): a
caller with many requests does not keep out one with few. Knows nothing of models and text, reads no clock. Driven by
`generation.py`, in one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

from ray_moe.runtime.kv_cache import KVCache, KVPool

FIRST_ROOM_TOKENS = 64
"""Room for so many generated tokens is wanted before a sequence is let in, so that it is not put out again at once."""


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and what has been generated behind it."""

    tokens: list[int]
    """All that are known; those behind `num_computed` are still to be computed."""
    max_tokens: int
    """It ends at this length at the latest."""
    caller: str = ""
    """Callers take turns."""
    version: int = 0
    """Of the weights that compute it, from its beginning to its end."""
    num_computed: int = 0
    cache: KVCache | None = None
    """None while it waits."""
    state: Any = None
    """What the model keeps for it instead of `cache`, if it cannot be packed."""
    num_cached: int = 0
    """Tokens of its beginning that another sequence had computed."""
    num_source: int = 0
    """The first of its tokens that an encoder reads, all at once; behind them are those of the decoder."""
    _num_first: int = field(init=False)
    """Tokens that it began with."""

    def __post_init__(self) -> None:
        self._num_first = len(self.tokens)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt, without what a decoder needs to begin."""
        return self.num_source or self._num_first

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self._num_first

    @property
    def target(self) -> list[int]:
        """What the next token is chosen by: all tokens of a decoder."""
        return self.tokens[self.num_source :] if self.num_source else self.tokens

    @property
    def room(self) -> KVCache:
        """The cache of a sequence that is running."""
        if self.cache is None:
            raise RuntimeError("a sequence that waits has no cache")
        return self.cache

    @property
    def num_new(self) -> int:
        """Tokens to compute before the next one is known."""
        return len(self.tokens) - self.num_computed


Work = Items[tuple[Sequence, int]]
"""Sequences, and how many of their new tokens are to be computed in a step."""


class Scheduler:
    """See the module."""

    def __init__(self, pool: KVPool, max_running: int, max_step_tokens: int, in_chunks: bool = True) -> None:
        """Args:
        max_running: sequences that are computed at the same time.
        max_step_tokens: tokens of a step, all sequences together.
        in_chunks: whether a prompt may be computed in parts, but for what an encoder reads.
        """
        self.pool = pool
        self.running: list[Sequence] = []
        """In the order in which they were let in."""
        self.num_waiting_tokens = 0
        """Tokens of prompts that wait."""
        self._max_running = max_running
        self._max_step_tokens = max_step_tokens
        self._in_chunks = in_chunks
        self._waiting: dict[str, deque[Sequence]] = {}
        self._served: dict[str, float] = {}
        """Tokens that callers with something to do have been served, from a common beginning."""

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def waiting(self) -> Iterator[Sequence]:
        return (sequence for queue in self._waiting.values() for sequence in queue)

    def add(self, sequence: Sequence) -> None:
        """It waits from now on."""
        self._enter(sequence.caller)
        self._waiting.setdefault(sequence.caller, deque()).append(sequence)
        self.num_waiting_tokens += len(sequence.tokens)

    def remove(self, sequence: Sequence, keep: bool = False) -> None:
        """It has ended, or nobody wants it any more; `keep` its keys and values for others that begin like it."""
        if sequence in self.running:
            self.running.remove(sequence)
            if sequence.cache is not None:
                if keep:
                    self.pool.retire(sequence.cache, sequence.tokens, sequence.version)
                else:
                    self.pool.free(sequence.cache)
        else:
            self._waiting[sequence.caller].remove(sequence)
            self.num_waiting_tokens -= len(sequence.tokens)
        sequence.cache = sequence.state = None
        self._leave(sequence.caller)

    def put_back(self, sequence: Sequence) -> None:
        """What was computed of it is lost, or its room is needed: it waits, before all others of its caller."""
        self.running.remove(sequence)
        if sequence.cache is not None:
            self.pool.free(sequence.cache)
        sequence.cache = sequence.state = None
        sequence.num_computed = 0
        self._waiting.setdefault(sequence.caller, deque()).appendleft(sequence)
        self.num_waiting_tokens += len(sequence.tokens)

    def next_step(self) -> list[tuple[Sequence, int]]:
        """Sequences and how many of their new tokens are to be computed now; empty when there is nothing to do."""
        left, step = self._max_step_tokens, list[tuple[Sequence, int]]()
        for sequence in sorted(self.running, key=lambda one: one.num_new > 1):
            number = self._part(sequence, left, step)
            if number and sequence in self.running and self._hold(sequence, sequence.num_computed + number):
                step.append((sequence, number))
                left -= number
        # Somebody may have been put out after it was chosen.
        step = [(sequence, number) for sequence, number in step if sequence in self.running]
        for sequence, number in step:
            self._served[sequence.caller] += number
        while len(self.running) < self._max_running and (caller := self._next_caller()) is not None:
            sequence = self._waiting[caller][0]
            if not self._part(sequence, left, step) or not self._let_in(sequence):
                break
            number = self._part(sequence, left, step)
            step.append((sequence, number))
            left -= number
            self._served[caller] += number
        return step

    def _part(self, sequence: Sequence, left: int, step: Work) -> int:
        """How many of a sequence's new tokens are computed in `step`, in which there is room for `left` more."""
        wanted = sequence.num_new
        if wanted <= left:
            return wanted
        least = max(1, sequence.num_source + 1 - sequence.num_computed) if self._in_chunks else wanted
        if least <= left:
            return left
        # What must be computed at once and does not fit goes by itself; what an encoder reads also beside those that
        # generate, or nobody would be let in until the last of them has ended.
        is_only_prompt = sequence.num_source > 0 and least > 1 and all(number == 1 for _, number in step)
        return least if not step or is_only_prompt else 0

    def _let_in(self, sequence: Sequence) -> bool:
        """Give it room, if there is any."""
        number = min(sequence.max_tokens, len(sequence.tokens) + FIRST_ROOM_TOKENS)
        if self.running and not self.pool.bytes_per_token:
            return False  # what tokens take is not known before the first is through
        cache = self.pool.begin(sequence.tokens, number, sequence.version)
        if cache is None:
            return False
        self._waiting[sequence.caller].popleft()
        self.num_waiting_tokens -= len(sequence.tokens)
        sequence.cache, sequence.num_computed, sequence.num_cached = cache, cache.length, cache.length
        self.running.append(sequence)
        return True

    def _hold(self, sequence: Sequence, num_tokens: int) -> bool:
        """Room for so many tokens of a running sequence, at the cost of those that came after it."""
        if sequence.cache is None:
            return True
        while not self.pool.grow(sequence.cache, num_tokens):
            last = self.running[-1]
            self.put_back(last)
            if last is sequence:
                return False
        return True

    # --- turns ------------------------------------------------------------------------------------------------
    def _enter(self, caller: str) -> None:
        """A caller that had nothing to do begins where the one that was served least is: idling earns nothing."""
        if caller not in self._served:
            self._served[caller] = min(self._served.values(), default=0.0)

    def _leave(self, caller: str) -> None:
        if not self._waiting.get(caller):
            self._waiting.pop(caller, None)
            if all(sequence.caller != caller for sequence in self.running):
                del self._served[caller]

    def _next_caller(self) -> str | None:
        waiting = [caller for caller, queue in self._waiting.items() if queue]
        return min(waiting, key=lambda caller: self._served[caller], default=None)
