"""The loop: who shares a step, who is told what, and that nobody's trouble becomes another's. Nothing is computed."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import pytest
import torch

from ray_moe.errors import DeadlineExceeded, ExpertFailed, InvalidRequest, RayMoEError, Unavailable
from ray_moe.runtime.generation import GenerationLoop
from ray_moe.runtime.kv_cache import BLOCK_TOKENS, KVPool
from ray_moe.runtime.scheduler import Scheduler
from ray_moe.runtime.stream import Stream
from ray_moe.runtime.vitals import Vitals
from ray_moe.types import GenerateRequest

VOCABULARY = 1000
LONG_S = 10.0
"""Nothing that a test waits for takes so long."""


class Counting:
    """Behind each token comes the next number."""

    packs = True

    def __init__(self) -> None:
        self.steps: list[list[list[int]]] = []
        """Tokens of each sequence in each step that was tried."""
        self.before: Any = lambda sequences: None
        """Called with the sequences of a step; what it raises, the step raises."""

    def compute(self, work, pool):
        self.steps.append([list(sequence.tokens) for sequence, _ in work])
        self.before([sequence for sequence, _ in work])
        logits = torch.zeros(len(work), VOCABULARY)
        for row, (sequence, number) in enumerate(work):
            assert sequence.room.capacity >= sequence.num_computed + number
            sequence.num_computed += number
            sequence.room.length = sequence.num_computed
            logits[row, (sequence.tokens[sequence.num_computed - 1] + 1) % VOCABULARY] = 50.0
        pool.bytes_per_token = pool.bytes_per_token or 1
        return logits


class Listener:
    """A request, and what it was told."""

    def __init__(self, prompt, deadline_s=None, **wishes):
        self.items: queue.Queue[Any] = queue.Queue()
        request = GenerateRequest(token_ids=tuple(prompt), **wishes)
        self.stream = Stream(request, list(prompt), None, frozenset(), 1.0, self.hear, deadline_s)

    def hear(self, item):
        self.items.put(item)

    def next(self):
        return self.items.get(timeout=LONG_S)

    def outcome(self):
        """The tokens it was told, and in the end why it ended: a reason, or the class of an error."""
        tokens = list[int]()
        while True:
            item = self.next()
            if isinstance(item, BaseException):
                return tokens, type(item)
            tokens += item.token_ids
            if item.finish_reason:
                return tokens, item.finish_reason


class Setting:
    """A loop with all it needs."""

    def __init__(self, num_blocks=100, bytes_per_token=1, max_running=8, max_step_tokens=64):
        self.stepper, self.vitals = Counting(), Vitals()
        self.pool = KVPool(num_blocks * BLOCK_TOKENS, bytes_per_token=bytes_per_token)
        scheduler = Scheduler(self.pool, max_running, max_step_tokens)
        stepper: Any = self.stepper
        self.loop = GenerationLoop(stepper, scheduler, self.vitals)
        self.gates: list[threading.Event] = []

    def add(self, *listeners):
        for listener in listeners:
            self.loop.add(listener.stream)

    def hold(self, last_token=0):
        """Let no step go on that has a sequence ending in `last_token` before `go` is set; `begun` tells of the first.

        Call it while nothing is computed.
        """
        begun, go, before = threading.Event(), threading.Event(), self.stepper.before
        self.gates.append(go)

        def wait(sequences):
            if any(sequence.tokens[-1] == last_token for sequence in sequences):
                begun.set()
                assert go.wait(LONG_S)
            before(sequences)

        self.stepper.before = wait
        return begun, go

    def add_together(self, *listeners):
        """All of them, so that they are in the same steps."""
        begun, go = self.hold()
        first = Listener([0], max_new_tokens=1)
        self.add(first)
        assert begun.wait(LONG_S)
        self.add(*listeners)
        go.set()
        assert first.outcome() == ([1], "length")


@pytest.fixture
def setting():
    made = []

    def make(**settings):
        made.append(Setting(**settings))
        return made[-1]

    yield make
    for one in made:
        one.loop.stop()
        for gate in one.gates:
            gate.set()


def test_requests_share_steps_and_each_is_told_its_own(setting):
    made = setting()
    listeners = [Listener([first], max_new_tokens=number) for first, number in ((10, 3), (20, 5), (30, 1))]
    made.add_together(*listeners)
    assert [listener.outcome() for listener in listeners] == [
        ([11, 12, 13], "length"),
        ([21, 22, 23, 24, 25], "length"),
        ([31], "length"),
    ]
    assert [len(step) for step in made.stepper.steps] == [1, 3, 2, 2, 1, 1]
    assert made.loop.num_generated_tokens == 1 + 9
    assert (made.loop.num_running, made.loop.num_waiting_tokens, made.vitals.queue_age_s) == (0, 0, 0.0)


def test_nothing_is_said_of_a_prompt_before_all_of_it_is_computed(setting):
    made = setting(max_step_tokens=4)
    long = Listener(range(10), max_new_tokens=2)
    made.add(long)
    assert long.outcome() == ([10, 11], "length")
    assert len(made.stepper.steps) == 4


def test_a_beginning_that_another_had_is_told_to_be_known(setting):
    made = setting()
    for known in (0, 30):
        listener = Listener(range(31), max_new_tokens=1)
        made.add(listener)
        assert listener.next().num_cached_tokens == known


def test_requests_steps_and_tokens_are_counted_as_they_were(setting, monkeypatch):
    made = setting(max_step_tokens=4)
    late, gone = Listener([10], time.monotonic() - 1.0, max_new_tokens=3), Listener([20], max_new_tokens=3)
    long, bad = Listener(range(30, 36), max_new_tokens=3), Listener([70], max_new_tokens=3, temperature=1.0)
    monkeypatch.setattr(bad.stream.sampler, "sample", None)  # it cannot be called
    made.loop.leave(gone.stream)
    made.add_together(late, gone, long, bad)
    ended = [("cancelled", 1), ("deadline", 1), ("failed", 1), ("length", 2)]
    give_up_at = time.monotonic() + LONG_S
    while sum(made.vitals.outcomes.values()) < 5 and time.monotonic() < give_up_at:
        time.sleep(0.001)
    vitals = made.vitals
    assert sorted((outcome, number) for (_, outcome), number in vitals.outcomes.items()) == ended
    assert sum(vitals.durations_s["generate"].read().counts) == 5
    assert sum(vitals.step_durations_s.read().counts) == len(made.stepper.steps)
    assert vitals.step_sequences.read().total == sum(map(len, made.stepper.steps))
    firsts, gaps = sum(vitals.first_tokens_s.read().counts), sum(vitals.token_gaps_s.read().counts)
    assert firsts + gaps == made.loop.num_generated_tokens
    assert vitals.num_prompt_tokens == 1 + 6


# --- trouble -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "told", "num_failed"),
    [(ValueError("bad luck"), ExpertFailed, 1), (InvalidRequest("no"), InvalidRequest, 0)],
)
def test_a_step_that_fails_is_done_again_one_by_one_and_harms_only_whose_fault_it_is(setting, error, told, num_failed):
    made = setting()
    good = [Listener([first], max_new_tokens=5) for first in (10, 20)]
    bad = Listener([664], max_new_tokens=5)

    def fail(sequences):
        if any(666 in sequence.tokens for sequence in sequences):
            raise error

    made.stepper.before = fail
    made.add_together(good[0], bad, good[1])
    assert bad.outcome() == ([665, 666], told)
    assert [listener.outcome() for listener in good] == [
        ([11, 12, 13, 14, 15], "length"),
        ([21, 22, 23, 24, 25], "length"),
    ]
    assert made.vitals.num_failed == num_failed
    assert [len(step) for step in made.stepper.steps] == [1, 3, 3, 3, 1, 1, 1, 2, 2]


def test_experts_that_are_away_fail_all_of_a_step_at_once_and_none_that_wait(setting):
    made = setting(max_running=2)
    listeners = [Listener([first], max_new_tokens=3) for first in (10, 20, 30)]

    def fail(sequences):
        if any(12 in sequence.tokens for sequence in sequences):
            raise Unavailable("experts are away")

    made.stepper.before = fail
    made.add_together(*listeners)
    assert [listener.outcome() for listener in listeners] == [
        ([11, 12], Unavailable),
        ([21, 22], Unavailable),
        ([31, 32, 33], "length"),
    ]
    assert made.vitals.num_failed == 2
    assert [len(step) for step in made.stepper.steps] == [1, 2, 2, 2, 1, 1, 1]


def test_wishes_that_cannot_be_met_harm_no_other(setting, monkeypatch):
    made = setting()
    good, bad = Listener([10], max_new_tokens=3), Listener([20], max_new_tokens=3, temperature=1.0)

    def draw(*_):
        raise RuntimeError("probability tensor contains either inf, nan or element < 0")

    monkeypatch.setattr(bad.stream.sampler, "sample", draw)
    made.add_together(good, bad)
    assert bad.outcome() == ([], ExpertFailed)
    assert good.outcome() == ([11, 12, 13], "length")


def test_a_sequence_that_turns_out_never_to_fit_is_told_so_and_keeps_out_no_other(setting):
    made = setting(num_blocks=2, bytes_per_token=0)  # what a token takes is known after the first step
    large, small = Listener([10], max_new_tokens=500), Listener([20], max_new_tokens=3)
    made.add(large, small)
    assert small.outcome() == ([21, 22, 23], "length")
    tokens, reason = large.outcome()
    assert len(tokens) <= 2 * BLOCK_TOKENS
    assert issubclass(reason, RayMoEError)


def test_what_fails_between_two_steps_is_told_and_the_loop_goes_on(setting, monkeypatch):
    made = setting()
    bad, good = Listener([10], max_new_tokens=3), Listener([20], max_new_tokens=3)
    begin = KVPool.begin

    def begin_or_fail(pool, tokens, num_tokens, version):
        if tokens == [10]:
            raise torch.OutOfMemoryError("no room on the device")
        return begin(pool, tokens, num_tokens, version)

    monkeypatch.setattr(KVPool, "begin", begin_or_fail)
    made.add(bad)
    assert bad.outcome() == ([], ExpertFailed)
    made.add(good)
    assert good.outcome() == ([21, 22, 23], "length")


# --- the end of patience -------------------------------------------------------------------------------------
def test_a_request_whose_time_was_over_before_its_turn_is_not_computed(setting):
    made = setting()
    late, good = Listener([10], time.monotonic() - 1.0, max_new_tokens=3), Listener([20], max_new_tokens=3)
    made.add_together(late, good)
    assert late.outcome() == ([], DeadlineExceeded)
    assert good.outcome() == ([21, 22, 23], "length")
    assert not any([10] in step for step in made.stepper.steps)


def test_a_request_whose_time_is_over_is_told_how_far_it_came(setting):
    made = setting()
    listener = Listener([10], max_new_tokens=100)

    def look(sequences):
        if 12 in sequences[0].tokens:
            listener.stream.deadline_s = time.monotonic() - 1.0

    made.stepper.before = look
    made.add(listener)
    assert [listener.next().token_ids for _ in range(3)] == [(11,), (12,), (13,)]
    assert listener.next().message == "the time of the request is over; 3 tokens were generated"
    assert made.pool.used_tokens == 0


def test_leaving_frees_the_place_and_the_room_before_the_next_step(setting):
    made = setting(num_blocks=2, max_running=1)
    leaves, waits = Listener([10], max_new_tokens=100), Listener([20], max_new_tokens=100)
    used = []

    def look(sequences):
        used.append((sequences[0].tokens[0], made.pool.used_tokens))
        if sequences[0].tokens[-1] == 12:
            made.loop.leave(leaves.stream)
            made.loop.leave(leaves.stream)  # once more changes nothing

    made.stepper.before = look
    made.add(leaves, waits)
    assert waits.outcome() == (list(range(21, 121)), "length")
    assert used[:4] == [(10, BLOCK_TOKENS * 2)] * 3 + [(20, BLOCK_TOKENS * 2)]
    assert len(used) == 3 + 100


def test_those_that_leave_before_they_were_let_in_are_never_computed(setting):
    made = setting()
    begun, go = made.hold(10)
    first, gone, last = (Listener([number], max_new_tokens=2) for number in (10, 20, 30))
    made.add(first)
    assert begun.wait(LONG_S)
    assert made.vitals.queue_age_s == 0.0
    made.add(gone, last)
    assert made.vitals.queue_age_s > 0.0
    made.loop.leave(gone.stream)
    go.set()
    assert last.outcome() == ([31, 32], "length")
    assert gone.items.empty()
    assert not any([20] in step for step in made.stepper.steps)
    assert made.vitals.queue_age_s == 0.0 < made.vitals.idle_s


def test_stopping_tells_all_who_listen_wherever_they_are(setting):
    made = setting(max_running=1)
    running, waiting, new, gone = (Listener([number], max_new_tokens=100) for number in (10, 20, 30, 40))
    begun, go = made.hold(14)
    made.add_together(running, waiting)
    assert begun.wait(LONG_S)
    made.add(new, gone)  # while a step is being computed
    made.loop.leave(gone.stream)
    made.loop.stop()
    go.set()
    assert running.outcome() == ([11, 12, 13, 14, 15], Unavailable)
    assert waiting.outcome() == ([], Unavailable)
    assert new.outcome() == ([], Unavailable)
    assert gone.items.empty()
    assert made.pool.used_tokens == 0
