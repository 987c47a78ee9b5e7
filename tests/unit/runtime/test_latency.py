import math
import random

import pytest

from ray_moe.runtime.latency import FEWEST, LatencyHistory


def history(answers):
    made = LatencyHistory()
    for rows, seconds in answers:
        made.add(rows, seconds)
    return made


def test_nothing_is_expected_of_a_stranger():
    assert math.isinf(LatencyHistory().expected_s(1))
    assert math.isinf(history([(1, 0.1)] * (FEWEST - 1)).expected_s(1))
    assert history([(1, 0.1)] * FEWEST).expected_s(1) == pytest.approx(0.1)


def test_time_for_a_call_and_time_for_a_row_are_told_apart():
    rng = random.Random(0)
    rows = [rng.randint(1, 1000) for _ in range(200)]
    made = history([(n, 0.002 + n * 1e-4) for n in rows])
    for n in (1, 10, 500):
        assert made.expected_s(n) == pytest.approx(0.002 + n * 1e-4, rel=0.05, abs=1e-4)


def test_a_call_larger_than_any_before_is_given_time_in_proportion():
    made = history([(1, 0.001)] * 50)
    assert made.expected_s(4000) == pytest.approx(4.0)


def test_scattered_answers_leave_room():
    rng = random.Random(1)
    made = history([(8, rng.uniform(0.005, 0.015)) for _ in range(100)])
    assert 0.012 < made.expected_s(8) < 0.02


def test_a_host_that_became_slow_is_soon_known_to_be_slow():
    made = history([(8, 0.001)] * 100 + [(8, 0.1)] * 25)
    assert made.expected_s(8) > 0.08
    made = history([(8, 0.1)] * 100 + [(8, 0.001)] * 50)
    assert made.expected_s(8) < 0.02


@pytest.mark.parametrize("seed", range(20))
def test_an_expectation_is_positive_and_does_not_fall_with_the_rows(seed):
    rng = random.Random(seed)
    made = history([(rng.randint(1, 64), rng.uniform(0.001, 0.1)) for _ in range(rng.randint(5, 200))])
    expected = [made.expected_s(n) for n in (1, 2, 8, 64, 65, 1000)]
    assert expected == sorted(expected)
    assert expected[0] > 0
