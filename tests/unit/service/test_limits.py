"""What one caller may ask for."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import Overloaded
from ray_moe.service.limits import UNLIMITED, WINDOW_S, Limits, Meter
from tests.unit.service.test_reloading import Clock


def ask(meter: Meter, limits: Limits) -> float | None:
    """None when a request is let in, else the seconds until the next may be."""
    try:
        with meter.request(limits):
            return None
    except Overloaded as error:
        return error.retry_after_s


@given(
    per_minute=st.integers(1, 20),
    pauses_s=st.lists(st.floats(0, 90), min_size=1, max_size=120),
)
def test_never_more_requests_than_a_minutes_worth_and_what_fills_up(per_minute: int, pauses_s: list[float]) -> None:
    clock = Clock()
    meter = Meter(clock)
    limits = Limits(requests_per_minute=per_minute)
    admitted_s: list[float] = []
    for pause_s in pauses_s:
        clock.now_s += pause_s
        if ask(meter, limits) is None:
            admitted_s.append(clock.now_s)
    for first, begin_s in enumerate(admitted_s):
        for count, end_s in enumerate(admitted_s[first:], 1):
            assert count <= per_minute * (1 + (end_s - begin_s) / WINDOW_S) + 1e-3


@given(per_minute=st.integers(1, 1000), use=st.integers(1, 3000))
def test_the_time_to_retry_is_exact(per_minute: int, use: int) -> None:
    clock = Clock()
    meter = Meter(clock)
    limits = Limits(tokens_per_minute=per_minute)
    meter.spend(limits, use)
    wait_s = ask(meter, limits)
    if wait_s is None:
        assert use < per_minute
        return
    clock.now_s += wait_s * 0.999
    assert ask(meter, limits) is not None
    clock.now_s += wait_s * 0.001
    assert ask(meter, limits) is None


def test_a_refused_request_counts_for_nothing() -> None:
    clock = Clock()
    meter = Meter(clock)
    limits = Limits(requests_per_minute=2)
    assert [ask(meter, limits) for _ in range(2)] == [None, None]
    assert [ask(meter, limits) for _ in range(100)] == [30.0] * 100
    clock.now_s += 30.0
    assert ask(meter, limits) is None


def test_a_request_may_take_more_tokens_than_there_are_but_the_next_one_waits_for_them() -> None:
    clock = Clock()
    meter = Meter(clock)
    limits = Limits(tokens_per_minute=60)
    with meter.request(limits):
        meter.spend(limits, 100)
        meter.spend(limits, 20, begun=True)
        with pytest.raises(Overloaded, match="60 tokens a minute"):  # another batch of the same stream
            meter.spend(limits, 1)
    assert ask(meter, limits) == 61.0
    clock.now_s += 61.0
    assert ask(meter, limits) is None


def test_so_many_at_a_time_and_no_more() -> None:
    meter = Meter(Clock())
    limits = Limits(max_concurrent=2)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(meter.request(limits))
        with pytest.raises(Overloaded, match="2 requests with this API key") as refusal:
            stack.enter_context(meter.request(limits))
        assert refusal.value.retry_after_s is None
    with pytest.raises(ZeroDivisionError), meter.request(limits):
        _ = 1 / 0
    with ExitStack() as stack:
        assert [stack.enter_context(meter.request(limits)) for _ in range(2)] == [None, None]


def test_without_limits_nothing_is_refused() -> None:
    meter = Meter(Clock())
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(meter.request(UNLIMITED))
            meter.spend(UNLIMITED, 10**9)
    assert ask(meter, UNLIMITED) is None


def test_a_new_limit_counts_from_then_on() -> None:
    clock = Clock()
    meter = Meter(clock)
    for _ in range(60):
        assert ask(meter, Limits(requests_per_minute=60)) is None
    wait_s = ask(meter, Limits(requests_per_minute=1))
    assert wait_s is not None
    assert math.isclose(wait_s, 60.0)
    assert ask(meter, UNLIMITED) is None
