"""Which router a call goes to: properties over any course of events, on a clock that the tests turn."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ray_moe.client.pool import LIST_AGAIN_S, LIST_ALONE_S, LIST_EVERY_S, LONGEST_REST_S, REFUSED_S, Pool, Question
from ray_moe.errors import DeadlineExceeded, InvalidRequest, Overloaded, PermissionDenied, Unavailable
from ray_moe.types import RouterAddress

A, B, C = "10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"
GIVEN = "moe.example.org:8476"


def routers(*targets: str, ready: bool = True) -> list[RouterAddress]:
    return [RouterAddress(f"router at {target}", target, "", ready) for target in targets]


def pool_of(*targets: str, now_s: float = 0.0) -> Pool:
    """One that has been told of `targets`, all of which have answered."""
    pool = Pool([GIVEN])
    (question,) = pool.questions(now_s)
    pool.heard(question, routers(*targets), now_s, 0.5)
    for question in pool.questions(now_s):
        pool.heard(question, routers(*targets), now_s, 0.5)
    return pool


def picks(pool: Pool, number: int, now_s: float = 0.0) -> Counter[str]:
    """Calls that go on."""
    return Counter(pool.pick(now_s) for _ in range(number))


def test_calls_are_spread_evenly() -> None:
    assert picks(pool_of(A, B, C), 30) == {A: 10, B: 10, C: 10}


def test_calls_go_where_fewest_are_in_flight() -> None:
    pool = pool_of(A, B)
    picks(pool, 10)
    for _ in range(3):
        pool.release(B)
    assert picks(pool, 3) == {B: 3}


def test_calls_one_after_the_other_take_turns() -> None:
    pool = pool_of(A, B, C)
    order = []
    for _ in range(6):
        order.append(pool.pick(0.0))
        pool.release(order[-1])
    assert order[:3] == order[3:]
    assert set(order) == {A, B, C}


def test_several_given_routers_take_turns_before_the_service_has_told_of_any() -> None:
    assert picks(Pool([A, B]), 10) == {A: 5, B: 5}


def test_a_listed_router_takes_no_call_before_it_has_answered() -> None:
    pool = Pool([GIVEN])
    (question,) = pool.questions(0.0)
    assert question == Question(GIVEN, for_list=True)
    assert pool.questions(0.0) == []  # it is on its way
    pool.heard(question, routers(A, B), 0.0, 0.5)
    assert picks(pool, 2) == {GIVEN: 2}
    of_a, of_b = pool.questions(0.0)
    assert (of_a, of_b) == (Question(A, for_list=False), Question(B, for_list=False))
    pool.heard(of_a, routers(A, B), 0.0, 0.5)
    pool.unheard(of_b, Unavailable("refused"), 0.0, 0.5)
    assert picks(pool, 2) == {A: 2}
    assert Question(B, for_list=False) in pool.questions(LONGEST_REST_S)


@pytest.mark.parametrize(
    "answer",
    [routers(B), routers(A, ready=False), [RouterAddress("of another service", A, "", True)]],
    ids=["knows nothing of itself", "stops", "is another"],
)
def test_an_address_at_which_another_router_answers_takes_no_calls(answer: list[RouterAddress]) -> None:
    pool = Pool([GIVEN])
    (question,) = pool.questions(0.0)
    pool.heard(question, routers(A), 0.0, 0.5)
    (question,) = pool.questions(0.0)
    pool.heard(question, answer, 0.0, 0.5)
    assert picks(pool, 2) == {GIVEN: 2}


def test_one_that_failed_rests_and_has_to_answer_before_it_takes_calls() -> None:
    pool = pool_of(A, B)
    pool.failed(A, 1.0, 0.5)
    assert picks(pool, 4, 1.0) == {B: 4}
    later_s = 1.0 + LONGEST_REST_S
    assert picks(pool, 4, later_s) == {B: 4}
    asked = {question.target: question for question in pool.questions(later_s) if not question.for_list}
    pool.heard(asked[A], routers(A, B), later_s, 0.5)
    assert pool.pick(later_s) == A


def test_rests_grow_and_no_accident_counts_twice() -> None:
    def rest_s(*failures_s: float) -> float:
        pool = Pool([A, B], discover=False)
        for at_s in failures_s:
            pool.failed(A, at_s, 1.0)
        quarters = range(int(4 * failures_s[-1]), 10_000)
        return next(n / 4 for n in quarters if pool.has_other(n / 4, [B])) - failures_s[-1]

    assert rest_s(0.0) == rest_s(0.0, 0.0, 0.0)
    alone = [rest_s(*(100.0 * number for number in range(many))) for many in range(1, 12)]
    assert alone == sorted(alone)
    assert alone[0] < alone[-1] == LONGEST_REST_S


def test_a_rest_lasts_as_long_as_the_router_asked_for() -> None:
    pool = Pool([A, B])
    pool.failed(A, 0.0, 0.0, retry_after_s=60.0)
    assert picks(pool, 3, 59.0) == {B: 3}
    assert pool.has_other(60.0, [B])


def test_a_success_that_began_before_a_failure_proves_nothing() -> None:
    pool = pool_of(A, B)
    pool.failed(A, 5.0, 0.5)
    pool.answered(A, since_s=4.0)
    assert picks(pool, 2, 5.0) == {B: 2}
    pool.answered(A, since_s=5.0)
    assert pool.pick(5.0) == A


def test_when_all_rest_the_first_to_be_rested_is_tried() -> None:
    pool = Pool([A, B])
    pool.failed(A, 0.0, 0.0, retry_after_s=9.0)
    pool.failed(B, 0.0, 0.0, retry_after_s=7.0)
    assert not pool.has_other(1.0, [])
    assert pool.pick(1.0) == B


@pytest.mark.parametrize(("known", "again_s"), [((), LIST_ALONE_S), ((A,), LIST_ALONE_S), ((A, B), LIST_EVERY_S)])
def test_who_knows_one_router_only_soon_asks_for_others(known: tuple[str, ...], again_s: float) -> None:
    pool = pool_of(*known)
    assert not any(question.for_list for question in pool.questions(again_s - 0.01))
    assert any(question.for_list for question in pool.questions(again_s))


def test_what_is_not_listed_any_more_is_forgotten_when_its_last_call_has_ended() -> None:
    pool = pool_of(A, B)
    assert picks(pool, 2) == {A: 1, B: 1}
    (question,) = pool.questions(LIST_EVERY_S)
    pool.heard(question, routers(B), LIST_EVERY_S, 0.5)
    assert picks(pool, 3, LIST_EVERY_S) == {B: 3}
    assert pool.gone() == []
    pool.release(A)
    assert pool.gone() == [A]
    assert pool.gone() == []


@pytest.mark.parametrize(
    ("error", "again_s"),
    [
        (InvalidRequest("unknown method"), REFUSED_S),
        (PermissionDenied("needs infer"), REFUSED_S),
        (Unavailable("gone"), LIST_AGAIN_S),
        (DeadlineExceeded("silent"), LIST_AGAIN_S),
        (Overloaded("full"), LIST_AGAIN_S),
    ],
)
def test_a_list_that_is_not_to_be_had_is_asked_for_again(error: Unavailable, again_s: float) -> None:
    pool = Pool([GIVEN])
    (question,) = pool.questions(0.0)
    pool.unheard(question, error, 0.0, 0.5)
    assert pool.questions(again_s * 0.99) == []
    assert pool.questions(again_s) == [Question(GIVEN, for_list=True)]
    assert picks(pool, 2) == {GIVEN: 2}


def test_a_failure_makes_the_list_due() -> None:
    pool = pool_of(A, B)
    pool.failed(A, 2.0, 0.5)
    assert Question(B, for_list=True) in pool.questions(2.0)


def test_nothing_is_asked_unless_it_is_wanted() -> None:
    pool = Pool([A, B], discover=False)
    pool.failed(A, 0.0, 0.5)
    assert pool.questions(1e9) == []


ADDRESSES = st.sampled_from([A, B, C])
CHANCES = st.floats(0.0, 1.0)


class Courses(RuleBasedStateMachine):
    """Calls, failures, answers and lists in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.pool = Pool([GIVEN, A])
        self.calls: list[str] = []
        self.open: list[Question] = []
        self.listed: set[str] = set()
        self.proven: set[str] = set()
        self.resting: dict[str, float] = {}
        """Until when at most."""

    def known(self) -> set[str]:
        return {GIVEN, A} | self.listed | set(self.calls) | {question.target for question in self.open}

    @rule(seconds=st.floats(0.0, 20.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def call(self) -> None:
        target = self.pool.pick(self.now_s)
        rested = {t for t in self.known() if self.resting.get(t, -1.0) <= self.now_s}
        able = rested & self.listed & self.proven
        if able:
            assert target in self.listed & self.proven
            assert all(self.calls.count(target) <= self.calls.count(other) for other in able)
        assert target in {GIVEN, A} | self.listed
        self.calls.append(target)

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), outcome=st.sampled_from(["well", "failed", "left"]), chance=CHANCES)
    def end(self, data: st.DataObject, outcome: str, chance: float) -> None:
        target = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        if outcome == "well":
            self.pool.answered(target, self.now_s)
            self.proven.add(target)
            self.resting.pop(target, None)
        elif outcome == "failed":
            self.pool.failed(target, self.now_s, chance)
            self.proven.discard(target)
            self.resting[target] = self.now_s + LONGEST_REST_S
            assert not self.pool.has_other(self.now_s, self.known() - {target})
        self.pool.release(target)

    @rule()
    def ask(self) -> None:
        questions = self.pool.questions(self.now_s)
        assert len({question.target for question in questions}) == len(questions)
        assert sum(question.for_list for question in [*self.open, *questions]) <= 1
        self.open += questions

    @precondition(lambda self: self.open)
    @rule(told=st.sets(ADDRESSES), chance=CHANCES)
    def hear(self, told: set[str], chance: float) -> None:
        question = self.open.pop(0)
        if question.for_list:
            self.proven -= self.listed ^ told
            self.listed = told
        self.pool.heard(question, routers(*sorted(told)), self.now_s, chance)
        if question.target in self.listed & told:
            self.proven.add(question.target)
            self.resting.pop(question.target, None)
        elif question.target in self.listed:
            self.proven.discard(question.target)
            self.resting[question.target] = self.now_s + LONGEST_REST_S

    @precondition(lambda self: self.open)
    @rule(error=st.sampled_from([Unavailable("gone"), PermissionDenied("no")]), chance=CHANCES)
    def miss(self, error: Unavailable, chance: float) -> None:
        question = self.open.pop(0)
        self.pool.unheard(question, error, self.now_s, chance)
        if question.for_list and isinstance(error, PermissionDenied):
            self.proven -= self.listed
            self.listed = set()
        else:
            self.proven.discard(question.target)
            self.resting[question.target] = self.now_s + LONGEST_REST_S

    @rule()
    def tidy(self) -> None:
        gone = self.pool.gone()
        assert not set(gone) & self.known()

    @invariant()
    def somebody_always_takes_a_call(self) -> None:
        target = self.pool.pick(self.now_s)
        self.pool.release(target)
        assert target in {GIVEN, A} | self.listed

    def teardown(self) -> None:
        """Whatever happened: once all answer again, calls are spread over all."""
        now_s = self.now_s + REFUSED_S + LONGEST_REST_S
        for question in self.open:
            self.pool.unheard(question, Unavailable("gone"), now_s, 1.0)
        for target in self.calls:
            self.pool.release(target)
        for _ in range(3):
            now_s += REFUSED_S
            for question in self.pool.questions(now_s):
                self.pool.heard(question, routers(A, B, C), now_s, 0.5)
        assert picks(self.pool, 9, now_s) == {A: 3, B: 3, C: 3}


TestCourses = Courses.TestCase
TestCourses.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
