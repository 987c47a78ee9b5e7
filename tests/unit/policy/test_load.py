import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.policy.load import LoadTracker, TokenCounts

HALF_LIFE_S = 5.0


def tracker():
    return LoadTracker(HALF_LIFE_S, {"a": 2, "b": 1})


def report(sequence, first, second=0, other=0, router="r", life="1"):
    return TokenCounts(router, life, sequence, {"a": (first, second), "b": (other,)})


def rates_of(load, now_s, layer="a"):
    return load.rates(now_s)[layer].tolist()


def test_the_first_report_of_a_router_only_tells_where_its_totals_are():
    load = tracker()
    assert load.report(report(7, 1_000_000, 5), 1.0)
    assert rates_of(load, 1.0) == [0.0, 0.0]
    load.report(report(8, 1_000_100, 5), 2.0)
    assert 0 < rates_of(load, 2.0)[0] < 100
    assert rates_of(load, 2.0)[1] == 0.0


def test_each_half_life_of_an_even_flow_brings_the_rate_half_the_way_to_it():
    load = tracker()
    for second in range(16):
        load.report(report(second, 80 * second), float(second))
        if second in {5, 10, 15}:
            assert rates_of(load, second)[0] == pytest.approx(80 * (1 - 0.5 ** (second / HALF_LIFE_S)))


def test_each_half_life_of_silence_halves_the_rate():
    load = tracker()
    load.report(report(1, 0), 0.0)
    load.report(report(2, 8000), 100.0)
    before = rates_of(load, 100.0)[0]
    assert before == pytest.approx(80, rel=1e-5)
    assert rates_of(load, 100.0 + HALF_LIFE_S)[0] == pytest.approx(before / 2)
    load.report(report(3, 8000), 100.0 + 2 * HALF_LIFE_S)  # a report of nothing is silence as well
    assert rates_of(load, 100.0 + 2 * HALF_LIFE_S)[0] == pytest.approx(before / 4)


@given(st.sets(st.integers(1, 29)), st.integers(0, 10**6))
def test_lost_reports_of_an_even_flow_cost_nothing(lost, rate):
    all_of_them, some_of_them = tracker(), tracker()
    for second in range(31):
        counts = report(second, rate * second, 3 * second, 2 * second)
        all_of_them.report(counts, float(second))
        if second not in lost:
            some_of_them.report(counts, float(second))
    for layer, rates in all_of_them.rates(30.0).items():
        np.testing.assert_allclose(some_of_them.rates(30.0)[layer], rates)


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 3)), max_size=30))
def test_repeated_and_overtaken_reports_change_nothing(arrivals):
    """However they arrive, only those count whose number is higher than any before."""
    load, risen = tracker(), tracker()
    now_s, newest = 0.0, -1
    for number, pause_s in arrivals:
        now_s += pause_s
        is_new = number > newest
        assert load.report(report(number, 100 * number, number), now_s) == is_new
        if is_new:
            newest = number
            risen.report(report(number, 100 * number, number), now_s)
    for layer, rates in load.rates(now_s).items():
        assert rates.tolist() == risen.rates(now_s)[layer].tolist()


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=5))
def test_several_routers_add_up(rates):
    load, alone = tracker(), tracker()
    for second in range(8):
        for number, rate in enumerate(rates):
            load.report(report(second, rate * second, router=f"r{number}"), float(second))
        alone.report(report(second, sum(rates) * second), float(second))
    assert rates_of(load, 9.0) == pytest.approx(rates_of(alone, 9.0))


def test_a_restarted_router_begins_anew_and_what_it_had_counted_stays():
    load = tracker()
    load.report(report(1, 0), 0.0)
    load.report(report(2, 5000), 10.0)
    before = rates_of(load, 10.0)
    assert load.report(report(1, 300, life="2"), 10.0)
    assert rates_of(load, 10.0) == before
    load.report(report(2, 400, life="2"), 11.0)
    assert rates_of(load, 11.0)[0] == pytest.approx(before[0] * 0.5**0.2 + 100 * (1 - 0.5**0.2))


def test_a_late_report_of_an_ended_life_is_refused_for_ever():
    load = tracker()
    for life in ("1", "2", "3"):
        load.report(report(1, 0, life=life), 0.0)
    load.report(report(2, 100, life="3"), 1.0)
    before = rates_of(load, 1.0)
    for life in ("1", "2"):
        assert not load.report(report(99, 10**9, life=life), 2.0)
    assert rates_of(load, 1.0) == before
    assert load.report(report(3, 200, life="3"), 2.0)


@pytest.mark.parametrize("alien", [{}, {"c": (1, 2)}, {"a": (1, 2, 3)}, {"a": (9,)}, {"a": ()}])
def test_layers_that_the_model_lacks_or_has_with_other_experts_are_passed_over(alien):
    load = tracker()
    load.report(TokenCounts("r", "1", 1, {"b": (0,)} | alien), 0.0)
    assert load.report(TokenCounts("r", "1", 2, {"b": (50,)} | alien), 1.0)
    assert set(load.rates(1.0)) == {"a", "b"}
    assert rates_of(load, 1.0) == [0.0, 0.0]
    assert rates_of(load, 1.0, "b")[0] > 0


def test_totals_that_fall_count_as_nothing():
    load = tracker()
    load.report(report(1, 1000, 0), 0.0)
    load.report(report(2, 10, 10), 1.0)
    assert rates_of(load, 1.0)[0] == 0.0
    assert rates_of(load, 1.0)[1] > 0.0


def test_of_two_reports_in_one_moment_nothing_is_counted_twice_or_lost():
    load, plain = tracker(), tracker()
    for one in (load, plain):
        one.report(report(1, 0), 0.0)
        one.report(report(2, 100), 1.0)
    assert load.report(report(3, 170), 1.0)
    for one in (load, plain):
        one.report(report(4, 300), 2.0)
    assert rates_of(load, 2.0) == rates_of(plain, 2.0)


def test_the_rate_of_all_is_that_of_the_busiest_layer_and_asking_changes_nothing():
    load = tracker()
    assert load.tokens_per_s(0.0) == 0.0
    load.report(report(1, 0), 0.0)
    load.report(report(2, 30, 40, 60), 1.0)
    first = load.tokens_per_s(3.0)
    assert first == pytest.approx(sum(rates_of(load, 3.0)))
    assert first > sum(rates_of(load, 3.0, "b"))
    load.rates(1000.0)["a"].fill(7.0)
    assert load.tokens_per_s(3.0) == first
