"""What a router counts of its requests, and how distributions are kept."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import (
    DeadlineExceeded,
    ExpertFailed,
    HostLost,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from ray_moe.runtime.histogram import Histogram
from ray_moe.runtime.vitals import Vitals

NUMBERS = st.floats(0, 1e6)


@given(st.lists(NUMBERS, min_size=1, max_size=8, unique=True).map(sorted), st.lists(NUMBERS, max_size=50))
def test_a_histogram_counts_what_is_up_to_each_bound(bounds, values):
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    reading = histogram.read()
    assert reading.bounds == tuple(bounds)
    assert reading.cumulative == (*(sum(value <= bound for value in values) for bound in bounds), len(values))
    assert reading.total == pytest.approx(sum(values))


def test_a_histogram_loses_nothing_to_threads():
    histogram = Histogram([0.5])

    def observe():
        for _ in range(5000):
            histogram.observe(1.0)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (histogram.read().counts, histogram.read().total) == ((0, 20_000), 20_000.0)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (asyncio.CancelledError(), "cancelled"),
        (DeadlineExceeded("late"), "deadline"),
        (Overloaded("full"), "overloaded"),
        (InvalidRequest("wrong"), "invalid"),
        (NotFound("no such layer"), "invalid"),
        (Unavailable("gone"), "failed"),
        (HostLost("gone"), "failed"),
        (ExpertFailed("broken"), "failed"),
        (RuntimeError("of torch"), "failed"),
    ],
)
def test_a_request_is_counted_by_how_it_ended(error, outcome):
    vitals = Vitals()
    with pytest.raises(type(error)), vitals.timed("forward"):
        raise error
    with vitals.timed("forward"):
        pass
    assert vitals.outcomes == {("forward", outcome): 1, ("forward", "done"): 1}
    assert sum(vitals.durations_s["forward"].read().counts) == 2


def test_waiting_is_measured_once_and_only_of_those_that_got_their_turn():
    vitals = Vitals()
    for request in ("first", "second"):
        vitals.opened(request)
    vitals.begun("first")
    vitals.begun("first")
    vitals.closed("first")
    vitals.closed("second")
    assert sum(vitals.queue_times_s.read().counts) == 1


def test_every_pause_is_in_the_distribution_though_only_the_longest_of_a_second_is_remembered():
    vitals = Vitals()
    pauses = np.linspace(0.001, 0.1, 50)
    for pause_s in pauses:
        vitals.paused(float(pause_s))
    reading = vitals.token_gaps_s.read()
    assert sum(reading.counts) == 50
    assert reading.total == pytest.approx(pauses.sum())
    assert vitals.longest_pause_s() == pytest.approx(0.1)
