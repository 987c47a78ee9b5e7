"""What is written is read again, by whoever may; and no more room is given out than there is."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ray_moe.runtime.kv_cache import BLOCK_TOKENS, MIN_REUSED_TOKENS, KVCache, KVPool

HEADS, WIDTH, LAYERS = 2, 3, 2
BYTES = LAYERS * 2 * HEADS * WIDTH * 4


def meaning(tokens):
    """[1, H, L, D] that is different for each beginning of `tokens`, as keys are, and exact in float32."""
    folded = list(itertools.accumulate(tokens, lambda known, token: (known * 31 + token + 1) % 1_000_003, initial=7))
    return torch.tensor(folded[1:], dtype=torch.float32)[None, None, :, None].expand(1, HEADS, -1, WIDTH)


def compute(cache, tokens):
    """Keys and values of all of `tokens` that `cache` lacks."""
    new = meaning(tokens)[:, :, cache.length :]
    for layer in range(LAYERS):
        cache.write(layer, new + layer, -new - layer)
    cache.length = len(tokens)


def holds(cache, tokens):
    """Whether what is there is that of `tokens`."""
    expected = meaning(tokens)[:, :, : cache.length]
    return cache.length == 0 or all(
        torch.equal(keys, expected + layer) and torch.equal(values, -expected - layer)
        for layer in range(LAYERS)
        for keys, values in [cache.read(layer, cache.length)]
    )


def pool_of(num_blocks, **settings):
    return KVPool(num_blocks * BLOCK_TOKENS * BYTES, bytes_per_token=BYTES, **settings)


def started(pool, tokens, num_tokens=None):
    """A sequence whose tokens are all computed but the last."""
    cache = pool.begin(tokens, num_tokens or len(tokens))
    assert cache is not None
    compute(cache, tokens[:-1])
    return cache


def random_tokens(seed, number):
    return np.random.default_rng(seed).integers(0, 1000, number).tolist()


# --- one cache -----------------------------------------------------------------------------------------------
def test_what_is_written_is_read_and_outlives_growing():
    pool, cache, tokens = pool_of(100), KVCache(), random_tokens(0, 700)
    for end in (1, 2, 63, 64, 65, 300, 301, 700):
        assert pool.grow(cache, end)
        compute(cache, tokens[:end])
        assert cache.capacity >= cache.length == end
        assert holds(cache, tokens)
    assert cache.bytes_per_token() == BYTES


def test_what_is_read_is_what_was_there_and_what_is_new():
    cache, tokens = KVCache(), random_tokens(0, 10)
    cache.resize(10)
    compute(cache, tokens[:6])
    new = meaning(tokens)[:, :, 6:]
    cache.write(0, new, -new)
    keys, values = cache.read(0, 10)
    assert torch.equal(keys, meaning(tokens))
    assert torch.equal(values, -meaning(tokens))


def test_a_step_that_failed_half_way_is_written_over():
    cache, tokens = KVCache(), random_tokens(0, 10)
    cache.resize(10)
    compute(cache, tokens[:4])
    wrong = torch.full((1, HEADS, 5, WIDTH), torch.nan)
    cache.write(0, wrong, wrong)  # the other layer is not reached, and the length not advanced
    assert holds(cache, tokens)
    compute(cache, tokens)
    assert holds(cache, tokens)


def test_a_copy_and_its_original_go_separate_ways():
    shared, one, other = random_tokens(0, 20), random_tokens(1, 8), random_tokens(2, 8)
    cache = KVCache()
    cache.resize(30)
    compute(cache, shared + one[:2])
    copy = cache.copy_of(20, 40)
    compute(copy, shared + other)
    compute(cache, shared + one)
    assert holds(cache, shared + one)
    assert holds(copy, shared + other)
    cache.resize(0)
    assert holds(copy, shared + other)


# --- a pool --------------------------------------------------------------------------------------------------
def test_everything_fits_until_it_is_known_what_a_token_takes():
    pool, cache = KVPool(max_bytes=BLOCK_TOKENS * BYTES), KVCache()
    assert pool.fits(10**6)
    assert pool.grow(cache, 3)
    compute(cache, [1, 2, 3])
    pool.bytes_per_token = cache.bytes_per_token()
    assert pool.max_tokens == BLOCK_TOKENS
    assert pool.fits(BLOCK_TOKENS)
    assert not pool.fits(BLOCK_TOKENS + 1)


def test_a_sequence_that_goes_on_where_another_ended_takes_its_cache_over():
    pool, tokens = pool_of(4), random_tokens(0, 100)
    ended = started(pool, tokens[:41])
    pool.retire(ended, tokens[:41])
    cache = pool.begin(tokens, 100)
    assert cache is ended
    assert cache.length == 40
    assert cache.capacity >= 100
    assert holds(cache, tokens)
    stranger = pool.begin(tokens, 100)
    assert stranger is not None
    assert stranger.length == 0  # what was taken over is not there for a second one


def test_the_longest_shared_beginning_is_found_and_stays_for_others():
    pool, tokens = pool_of(20), random_tokens(0, 120)
    for shared in (50, 90, 70):
        ended = tokens[:shared] + random_tokens(shared, 20)
        pool.retire(started(pool, ended), ended)
    for _ in range(2):
        cache = pool.begin(tokens, 120)
        assert cache is not None
        assert cache.length == 90
        assert holds(cache, tokens)


def test_the_last_token_of_a_prompt_is_never_taken_from_another():
    tokens = random_tokens(0, 60)
    for longer in (0, 1, 30):
        pool, ended = pool_of(8), tokens + random_tokens(1, longer)
        cache = started(pool, ended)
        compute(cache, ended)
        pool.retire(cache, ended)
        again = pool.begin(tokens, 60)
        assert again is not None
        assert again.length == 59
        assert holds(again, tokens)


@pytest.mark.parametrize(("length", "reused"), [(MIN_REUSED_TOKENS - 1, 0), (MIN_REUSED_TOKENS, MIN_REUSED_TOKENS)])
def test_short_beginnings_are_not_worth_looking_for(length, reused):
    pool, tokens = pool_of(8), random_tokens(0, 60)
    for ended in (tokens[: length + 1], tokens[:length] + random_tokens(1, 40)):
        pool.retire(started(pool, ended), ended)
        cache = pool.begin(tokens, 60)
        assert cache is not None
        assert cache.length == reused
        pool.free(cache)


def test_a_pool_that_keeps_nothing_is_empty_in_the_end():
    pool, tokens = pool_of(4, keeps_prefixes=False), random_tokens(0, 60)
    pool.retire(started(pool, tokens), tokens)
    assert pool.used_tokens == 0
    cache = pool.begin(tokens, 60)
    assert cache is not None
    assert cache.length == 0


def test_what_was_used_longest_ago_is_given_up_first():
    pool = pool_of(4)
    texts = [random_tokens(seed, 40) for seed in range(3)]
    for text in texts:
        pool.retire(started(pool, text), text)
    user = pool.begin(texts[0][:30], 30)  # used again; the pool is full now
    assert user is not None
    assert user.length == 29
    stranger = pool.begin([5, 6], 2 * BLOCK_TOKENS)  # takes the room of two
    assert stranger is not None
    pool.free(stranger)
    lengths = []
    for text in texts:
        cache = pool.begin(text, 40)
        assert cache is not None
        lengths.append(cache.length)
        pool.free(cache)
    assert lengths == [39, 0, 0]


def test_running_sequences_are_never_given_up():
    pool, tokens = pool_of(2), random_tokens(0, 60)
    running = [started(pool, tokens), started(pool, tokens)]
    assert pool.begin(tokens, 60) is None
    assert not pool.grow(running[0], BLOCK_TOKENS + 1)
    assert all(holds(cache, tokens) for cache in running)
    pool.free(running[1])
    assert pool.grow(running[0], BLOCK_TOKENS + 1)


def test_what_has_no_room_now_finds_its_beginning_later():
    pool, tokens = pool_of(3), random_tokens(0, 100)
    pool.retire(started(pool, tokens[:41]), tokens[:41])
    running = started(pool, [1, 2], 2 * BLOCK_TOKENS)
    assert pool.begin(tokens, 100) is None
    pool.free(running)
    cache = pool.begin(tokens, 100)
    assert cache is not None
    assert cache.length == 40


class Pool(RuleBasedStateMachine):
    """Sequences come, go on and end in any order, many of them with the same beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(6)
        self.running: list[tuple[KVCache, list[int]]] = []
        self.known: dict[int, KVCache] = {}
        """All that there ever were, given up or not."""

    texts = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 40)), min_size=1, max_size=4).map(
        lambda runs: [token for token, number in runs for _ in range(number)]
    )

    @rule(tokens=texts, spare=st.integers(0, 130))
    def begin(self, tokens: list[int], spare: int) -> None:
        number = len(tokens) + spare
        cache = self.pool.begin(tokens, number)
        if cache is None:  # even without all that has ended
            assert sum(one.capacity for one, _ in self.running) + number > self.pool.max_tokens - BLOCK_TOKENS
            return
        assert all(cache is not one for one, _ in self.running)
        assert cache.length < len(tokens)
        assert cache.capacity >= number
        self.known[id(cache)] = cache
        compute(cache, tokens)
        self.running.append((cache, tokens))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=texts)
    def go_on(self, data: Any, more: list[int]) -> None:
        cache, tokens = self.running[data.draw(st.integers(0, len(self.running) - 1))]
        if self.pool.grow(cache, len(tokens) + len(more)):
            tokens += more
            compute(cache, tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), keep=st.booleans(), last=st.integers(0, 1))
    def end(self, data: Any, keep: bool, last: int) -> None:
        cache, tokens = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if keep:
            self.pool.retire(cache, [*tokens, last])  # which was never computed
        else:
            self.pool.free(cache)
            assert cache.capacity == 0

    @invariant()
    def accounts_are_right(self) -> None:
        assert self.pool.used_tokens == sum(cache.capacity for cache in self.known.values()) <= self.pool.max_tokens

    @invariant()
    def each_has_its_own(self) -> None:
        assert all(cache.length == len(tokens) and holds(cache, tokens) for cache, tokens in self.running)


Pool.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestPool = Pool.TestCase
