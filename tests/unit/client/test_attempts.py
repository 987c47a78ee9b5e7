"""How often a call is made, and after what pauses, on a clock that the tests turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.client.attempts import LONGEST_PAUSE_S, PAUSE_S, Attempts
from ray_moe.errors import (
    Cancelled,
    DeadlineExceeded,
    HostLost,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    RayMoEError,
    Unavailable,
)


@given(
    most=st.integers(1, 8),
    timeout_s=st.none() | st.floats(0.0, 10.0),
    errors=st.lists(
        st.tuples(
            st.sampled_from(
                [Unavailable("a"), Unavailable("b", retry_after_s=3.0), Overloaded("c", retry_after_s=2.0)]
            ),
            st.booleans(),
            st.floats(0.0, 1.0),
            st.floats(0.0, 2.0),
        ),
        min_size=10,
        max_size=10,
    ),
)
def test_attempts_are_bounded_by_their_number_and_by_the_deadline(
    most: int, timeout_s: float | None, errors: list[tuple[RayMoEError, bool, float, float]]
) -> None:
    now_s = 100.0
    attempts = Attempts(most, timeout_s, now_s)
    num_attempts = num_pauses = 0
    for error, has_other, chance, takes_s in errors:
        attempts.begin(f"router {num_attempts}", now_s)
        num_attempts += 1
        if timeout_s is not None:
            assert attempts.left_s == max(0.0, 100.0 + timeout_s - now_s)
        now_s += takes_s
        pause_s = attempts.pause_s(error, has_other, now_s, chance)
        if pause_s is None:
            break
        if has_other:
            assert pause_s == 0.0
        else:
            least_s = error.retry_after_s or 0.0
            longest_s = min(LONGEST_PAUSE_S, PAUSE_S * 2**num_pauses)
            assert least_s + longest_s / 2 <= pause_s <= least_s + longest_s
            assert timeout_s is None or now_s + pause_s < 100.0 + timeout_s
            assert not attempts.tried  # all may be tried again
            num_pauses += 1
        now_s += pause_s
    assert num_attempts <= most
    if timeout_s is None:
        assert num_attempts == most


def test_pauses_are_drawn_from_the_upper_half_of_their_range() -> None:
    attempts = Attempts(10, None, 0.0)
    attempts.begin("a", 0.0)
    assert attempts.pause_s(Unavailable("x"), False, 0.0, 0.0) == PAUSE_S / 2
    assert attempts.pause_s(Unavailable("x"), False, 0.0, 1.0) == 2 * PAUSE_S
    assert attempts.pause_s(Unavailable("x"), False, 0.0, 0.5) == 3 * PAUSE_S


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("x"),
        NotFound("x"),
        PermissionDenied("x"),
        DeadlineExceeded("x"),
        Cancelled("x"),
        RayMoEError("x"),
    ],
)
def test_what_another_attempt_cannot_help_is_told_at_once(error: RayMoEError) -> None:
    attempts = Attempts(5, None, 0.0)
    attempts.begin("a", 0.0)
    assert attempts.pause_s(error, True, 0.0, 0.5) is None


def test_a_full_router_that_names_no_time_is_not_asked_again_but_another_is() -> None:
    attempts = Attempts(5, None, 0.0)
    attempts.begin("a", 0.0)
    assert attempts.pause_s(Overloaded("full"), True, 0.0, 0.5) == 0.0
    assert attempts.pause_s(Overloaded("full"), False, 0.0, 0.5) is None


def test_what_cannot_be_repeated_is_not() -> None:
    attempts = Attempts(5, None, 0.0)
    attempts.begin("a", 0.0)
    attempts.repeatable = False
    assert attempts.pause_s(Unavailable("x"), True, 0.0, 0.5) is None


def test_the_last_error_says_how_much_had_come() -> None:
    attempts = Attempts(5, None, 0.0, "tokens")
    error = Unavailable("gone", retry_after_s=2.0)
    assert attempts.last(error) is error
    attempts.num_received = 3
    last = attempts.last(error)
    assert (type(last), last.message, last.retry_after_s) == (Unavailable, "gone (tokens that had come: 3)", 2.0)
    assert isinstance(attempts.last(HostLost("gone")), Unavailable)
    other = InvalidRequest("wrong")
    assert attempts.last(other) is other
