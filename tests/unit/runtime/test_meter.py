import pytest

from ray_moe.runtime.meter import LEAST_FLOPS, MEMORY_S, Meter


def test_speed_is_that_of_the_last_seconds_of_computing():
    meter = Meter()
    assert meter.flops_per_s == 0
    for number in range(100):
        meter.add(1e9, number * 10.0, number * 10.0 + 0.5)  # idle in between: no matter
    assert meter.flops_per_s == pytest.approx(2e9)
    for number in range(100, 130):
        meter.add(1e9, number * 10.0, number * 10.0 + 2.0)
    assert meter.flops_per_s == pytest.approx(0.5e9, rel=0.01)


def test_batches_too_small_to_tell_are_left_out():
    meter = Meter()
    meter.add(1e9, 0.0, 1.0)
    meter.add(LEAST_FLOPS - 1, 1.0, 3.0)
    assert meter.flops_per_s == pytest.approx(1e9)


def test_busy_is_the_part_of_the_time_that_went_into_computing():
    meter = Meter()
    assert meter.busy_fraction(0.0) == 0
    for number in range(4000):
        meter.add(1e9, number * 0.01, number * 0.01 + 0.0025)
    assert meter.busy_fraction(40.0) == pytest.approx(0.25, abs=0.01)
    assert meter.busy_fraction(40.0 + 20 * MEMORY_S) == pytest.approx(0, abs=1e-6)
    assert meter.busy_fraction(40.0 + 20 * MEMORY_S, busy_since_s=40.0) == pytest.approx(1, abs=1e-6)


def test_overlapping_batches_count_once():
    meter = Meter()
    for number in range(2000):
        meter.add(1e9, number * 0.01, number * 0.01 + 0.03)
    assert meter.busy_fraction(20.02) == pytest.approx(1, abs=0.02)
