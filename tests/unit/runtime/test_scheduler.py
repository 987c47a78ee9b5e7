"""Who is computed when: within the limits, nobody forgotten, nobody kept out by a caller with more to do."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.runtime.kv_cache import BLOCK_TOKENS, KVPool
from ray_moe.runtime.scheduler import Scheduler, Sequence


def scheduler(num_blocks=100, max_running=8, max_step_tokens=32, in_chunks=True, keeps_prefixes=True):
    pool = KVPool(num_blocks * BLOCK_TOKENS, keeps_prefixes, bytes_per_token=1)
    return Scheduler(pool, max_running, max_step_tokens, in_chunks)


def sequence(num_prompt, num_generated=8, caller="", first=0):
    return Sequence(list(range(first, first + num_prompt)), num_prompt + num_generated, caller)


def with_encoder(num_source, num_generated=8, first=0):
    tokens = list(range(first, first + num_source + 1))  # and the token with which a decoder begins
    return Sequence(tokens, len(tokens) + num_generated, num_source=num_source)


def carry_out(scheduler, step):
    """What a model and its streams do: compute, append the next token, end at the last."""
    for one, number in step:
        assert 0 < number <= one.num_new
        assert one.room.capacity >= one.num_computed + number
        one.num_computed += number
        one.room.length = one.num_computed
        if one.num_new == 0:
            one.tokens.append(100_000 + len(one.tokens))
            if len(one.tokens) == one.max_tokens:
                scheduler.remove(one, keep=True)


def steps(scheduler, number):
    """The next steps, carried out."""
    done = []
    for _ in range(number):
        done.append(scheduler.next_step())
        carry_out(scheduler, done[-1])
    return done


def run_to_the_end(scheduler):
    return list(iter(lambda: steps(scheduler, 1)[0], []))


def test_nothing_to_do_is_an_empty_step():
    assert scheduler().next_step() == []


def test_prompts_are_computed_in_chunks_and_tokens_one_by_one():
    made, one = scheduler(max_step_tokens=32), sequence(70, num_generated=3)
    made.add(one)
    assert made.num_waiting_tokens == 70
    assert [[number for _, number in step] for step in run_to_the_end(made)] == [[32], [32], [6], [1], [1]]
    assert len(one.tokens) == 73
    assert (made.num_waiting, made.num_waiting_tokens, made.running) == (0, 0, [])


def test_those_that_generate_come_before_prompts_and_prompts_get_what_is_left():
    made, early, late = scheduler(max_step_tokens=10), [sequence(2), sequence(3)], sequence(50)
    for one in early:
        made.add(one)
    steps(made, 1)
    made.add(late)
    third = sequence(1, first=7)
    made.add(third)
    assert steps(made, 2) == [[(early[0], 1), (early[1], 1), (late, 8)]] * 2
    assert third in made.waiting()


def test_a_prompt_that_was_begun_before_the_others_generate_does_not_hold_them_up():
    made, long, short = scheduler(max_step_tokens=10), sequence(25), sequence(3)
    made.add(long)
    steps(made, 1)
    made.add(short)
    assert [dict(step) for step in steps(made, 3)] == [{long: 10}, {long: 5, short: 3}, {long: 1, short: 1}]


def test_a_sequence_that_has_lost_all_is_a_prompt_again_and_comes_after_those_that_generate():
    made, lost, other = scheduler(max_step_tokens=10), sequence(6), sequence(4)
    made.add(lost)
    made.add(other)
    steps(made, 5)
    lost.num_computed = 0
    assert steps(made, 1) == [[(other, 1), (lost, 9)]]


@pytest.mark.parametrize("num_running", [0, 2])
def test_what_cannot_be_computed_in_parts_is_computed_whole_and_alone(num_running):
    made = scheduler(max_step_tokens=10, in_chunks=False)
    for _ in range(num_running):
        made.add(sequence(4))
    steps(made, min(num_running, 1))
    long, late = sequence(50), sequence(3)
    made.add(long)
    made.add(late)
    sizes = [dict(step) for step in run_to_the_end(made)]
    assert {long: 50} in sizes
    assert all(number in (1, len(one.tokens) - 8) for step in sizes for one, number in step.items())
    assert all(sum(step.values()) <= 10 for step in sizes if step != {long: 50})


def test_what_an_encoder_reads_is_computed_at_once_and_what_was_generated_behind_it_in_chunks():
    made, one = scheduler(max_step_tokens=10), with_encoder(9)
    made.add(one)
    assert [[number for _, number in step] for step in steps(made, 3)] == [[10], [1], [1]]
    made.put_back(one)
    one.tokens += range(20)
    assert [[number for _, number in step] for step in steps(made, 4)] == [[10], [10], [10], [3]]


def test_a_prompt_for_an_encoder_waits_for_one_that_comes_before_it_and_not_for_those_that_generate():
    made, early, first, second = scheduler(max_step_tokens=10), with_encoder(2), with_encoder(10), with_encoder(9)
    for one in (early, first, second):
        made.add(one)
    steps(made, 1)
    assert [dict(step) for step in steps(made, 2)] == [{early: 1, first: 11}, {early: 1, first: 1, second: 10}]
    assert (first.num_prompt, first.num_generated, first.target) == (10, 2, first.tokens[10:])


def test_no_more_run_together_than_may():
    made = scheduler(max_running=3)
    for _ in range(7):
        made.add(sequence(2))
    assert max(len(step) for step in run_to_the_end(made)) == 3


def test_the_first_runs_alone_until_it_is_known_what_a_token_takes():
    made = Scheduler(KVPool(max_bytes=1000), 8, 32)
    made.add(sequence(2))
    made.add(sequence(2))
    assert [len(step) for step in steps(made, 2)] == [1, 1]
    made.pool.bytes_per_token = 1
    assert len(steps(made, 1)[0]) == 2


def test_nobody_is_let_in_without_some_room_to_generate():
    made = scheduler(num_blocks=3, max_step_tokens=500, keeps_prefixes=False)
    running, too_early, small = sequence(50, 50), sequence(50, 50), sequence(50, 14)
    for one in (running, too_early):
        made.add(one)
    assert steps(made, 1) == [[(running, 50)]]
    made.remove(too_early)
    made.add(small)
    assert steps(made, 1) == [[(running, 1), (small, 50)]]


def test_when_room_runs_out_the_latest_waits_and_is_computed_anew_with_what_it_has():
    made = scheduler(num_blocks=4, max_running=2, keeps_prefixes=False)
    early, late, third = sequence(60, 140), sequence(60, 140, first=500), sequence(8, 2)
    for one in (early, late, third):
        made.add(one)
    while len(late.tokens) == 60 or late in made.running:
        steps(made, 1)
    known = list(late.tokens)
    assert early in made.running
    assert 60 < len(known) < 200
    assert (late.cache, late.num_computed, list(made.waiting())) == (None, 0, [late, third])
    assert made.num_waiting_tokens == len(known) + 8
    while len(early.tokens) < early.max_tokens:
        steps(made, 1)
    computed = sum(number for step in run_to_the_end(made) for one, number in step if one is late)
    assert late.tokens[: len(known)] == known
    assert computed == 199  # all anew; the last one is nobody's beginning
    assert made.pool.used_tokens == 0


def test_those_that_left_are_forgotten_wherever_they_were():
    made, running, waiting = scheduler(max_running=1), sequence(3), sequence(4, caller="other")
    made.add(running)
    made.add(waiting)
    steps(made, 1)
    made.remove(waiting)
    made.remove(running)
    assert (made.num_waiting, made.num_waiting_tokens, made.running, made.pool.used_tokens) == (0, 0, [], 0)
    assert made.next_step() == []


def test_a_beginning_that_was_computed_before_is_not_computed_again():
    made, first, second = scheduler(max_step_tokens=100), sequence(90, 1), sequence(80, 1)
    made.add(first)
    steps(made, 1)
    made.add(second)
    assert [[number for _, number in step] for step in run_to_the_end(made)] == [[1]]
    assert second.num_cached == 79


# --- turns ---------------------------------------------------------------------------------------------------
def test_places_that_are_free_at_the_same_time_are_dealt_out_in_turns():
    made = scheduler(max_running=4)
    for caller in ("many", "few"):
        for _ in range(8 if caller == "many" else 2):
            made.add(sequence(2, caller=caller))
    made.next_step()
    assert Counter(one.caller for one in made.running) == {"many": 2, "few": 2}


@pytest.mark.parametrize("num_others", [1, 3])
def test_a_caller_with_many_requests_does_not_keep_out_one_with_few(num_others):
    """While both have something that waits, what they are served differs by what can be on its way at the most."""
    made, served = scheduler(max_running=4), Counter[str]()
    few = [f"few {number}" for number in range(num_others)]
    for _ in range(200):
        made.add(sequence(2, 30, caller="many"))
    most = 2 * 4 * 32  # sequences that run, times tokens of each
    for number in range(400):
        waiting = Counter(one.caller for one in made.waiting())
        for caller in few:
            if number >= 20 and not waiting[caller]:
                made.add(sequence(16, 2, caller=caller))
        for one, tokens in steps(made, 1)[0]:
            served[one.caller] += tokens if number >= 20 else 0
        assert max(served.values(), default=0) - min(served[caller] for caller in ["many", *few]) <= most
    assert min(served.values()) > most
    assert set(served) == {"many", *few}


def test_a_caller_that_idled_has_saved_nothing_up():
    made = scheduler(max_running=1)
    made.add(sequence(2, 3, caller="idle"))
    for _ in range(40):
        made.add(sequence(2, 3, caller="busy"))
    steps(made, 60)
    for _ in range(10):
        made.add(sequence(2, 3, caller="idle"))
    turns = [one.caller for step in steps(made, 30) for one, number in step if number == 2]
    assert turns.count("busy") in (4, 5, 6)


# --- everything at once --------------------------------------------------------------------------------------
arrivals = st.lists(
    st.tuples(
        st.integers(0, 20),
        st.none() | st.integers(0, 60),
        st.builds(sequence, st.integers(1, 150), st.integers(1, 100), st.sampled_from("abc"))
        | st.builds(with_encoder, st.integers(1, 80), st.integers(1, 100)),
    ),
    min_size=1,
    max_size=20,
)
"""(step before which it comes, how many later nobody wants it any more, the sequence)."""


@given(arrivals, st.integers(4, 12), st.integers(1, 6), st.integers(1, 80), st.booleans(), st.booleans())
def test_everybody_is_served_in_the_end_and_no_limit_is_broken(
    arrivals, num_blocks, max_running, max_step_tokens, in_chunks, keeps_prefixes
):
    keeps_prefixes = keeps_prefixes and in_chunks and not any(one.num_source for _, _, one in arrivals)
    made = scheduler(num_blocks, max_running, max_step_tokens, in_chunks, keeps_prefixes)
    left = set()
    for number in range(10_000):
        for at, stay, one in arrivals:
            if at == number:
                made.add(one)
            if stay is not None and at + stay == number and len(one.tokens) < one.max_tokens:
                made.remove(one)
                left.add(one)
        step = made.next_step()
        assert step or not (made.running or made.num_waiting)
        assert len(dict(step)) == len(step) <= len(made.running) <= max_running
        assert all(one in made.running for one, _ in step)
        beyond = [one for one, tokens in step if one.num_source and not one.num_computed]
        assert all(tokens > one.num_source for one, tokens in step if one in beyond)
        assert (
            sum(tokens for _, tokens in step) <= max_step_tokens
            or (len(step) == 1 and not in_chunks)
            or (len(beyond) == 1 and all(tokens == 1 for one, tokens in step if one not in beyond))
        )
        assert in_chunks or all(tokens == one.num_new for one, tokens in step)
        carry_out(made, step)
        assert made.num_waiting_tokens == sum(len(one.tokens) for one in made.waiting())
        assert made.pool.used_tokens <= made.pool.max_tokens
        if not step and number > 20:
            break
    assert all(len(one.tokens) == one.max_tokens or one in left for _, _, one in arrivals)
    assert (made.running, made.num_waiting) == ([], 0)
