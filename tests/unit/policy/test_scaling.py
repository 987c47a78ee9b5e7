import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import InvalidConfig
from ray_moe.policy.scaling import ScalingGoals, ScalingMemory, Signals, decide

GOALS = ScalingGoals(
    min_hosts=1,
    max_hosts=16,
    target_utilisation=0.5,
    tolerance=0.2,
    max_queue_age_s=1.0,
    up_after_s=3.0,
    down_after_s=60.0,
    cool_down_s=15.0,
    zero_after_s=100.0,
)
ON_TARGET = Signals(0.5)


class Service:
    """Feels something once a second, and has as many hosts as are wanted at once."""

    def __init__(self, num_hosts, goals=GOALS):
        self.goals, self.num_hosts, self.now_s, self.memory = goals, num_hosts, 0.0, ScalingMemory()

    def feel(self, *signals, seconds=1):
        """The number of hosts after each second of these signals."""
        sizes = []
        for _ in range(seconds):
            for one in signals:
                self.now_s += 1.0
                self.num_hosts, self.memory = decide(self.goals, self.memory, one, self.num_hosts, self.now_s)
                sizes.append(self.num_hosts)
        return sizes

    def work(self, amount, seconds):
        """Likewise for work that would keep `amount` hosts computing all the time."""
        sizes = []
        for _ in range(seconds):
            sizes += self.feel(Signals(min(1.0, amount / self.num_hosts) if self.num_hosts else 0.0))
        return sizes


# --- hysteresis ----------------------------------------------------------------------------------------------
def test_more_hosts_are_wanted_once_too_much_work_has_lasted():
    assert Service(4).feel(Signals(0.8), seconds=4) == [4, 4, 4, 7]


def test_fewer_hosts_are_wanted_once_too_little_work_has_lasted():
    sizes = Service(4).feel(Signals(0.2), seconds=61)
    assert sizes[:60] == [4] * 60
    assert sizes[60] == 2


@pytest.mark.parametrize("utilisation", [0.41, 0.5, 0.59])
def test_within_the_tolerance_nothing_is_done_however_long(utilisation):
    assert set(Service(4).feel(Signals(utilisation), seconds=500)) == {4}


def test_a_moment_on_target_begins_the_patience_anew():
    service = Service(4)
    assert set(service.feel(Signals(0.9), Signals(0.9), Signals(0.9), ON_TARGET, seconds=20)) == {4}
    assert set(service.feel(*[Signals(0.1)] * 59, ON_TARGET, seconds=5)) == {4}


def test_after_a_change_there_is_a_pause_and_what_is_wanted_in_it_counts_towards_the_patience():
    service = Service(2)
    sizes = service.feel(Signals(1.0), seconds=20)
    assert sizes[:4] == [2, 2, 2, 4]
    assert sizes[3:19] == [4] * 15 + [8]


def test_shrinking_goes_to_the_most_that_was_wanted_while_less_was_wanted():
    service = Service(8)
    assert set(service.feel(Signals(0.05), seconds=30)) == {8}
    service.feel(Signals(0.25))  # 4 hosts
    assert service.feel(Signals(0.05), seconds=30)[-1] == 4


def test_one_step_up_is_no_more_than_the_largest_factor():
    assert Service(3, dataclasses.replace(GOALS, max_step=1.5)).feel(Signals(1.0), seconds=4)[-1] == 4
    assert Service(1, dataclasses.replace(GOALS, max_step=1.0)).feel(Signals(1.0), seconds=4)[-1] == 2


# --- limits --------------------------------------------------------------------------------------------------
def test_no_more_than_the_maximum_is_wanted():
    service = Service(2, dataclasses.replace(GOALS, max_hosts=3))
    assert service.feel(Signals(1.0, queue_age_s=99), seconds=100)[-1] == 3


def test_no_fewer_than_the_minimum_are_wanted():
    service = Service(4, dataclasses.replace(GOALS, min_hosts=3))
    assert service.feel(Signals(0.0), seconds=1000)[-1] == 3
    service = Service(4, dataclasses.replace(GOALS, min_hosts=0))
    assert service.feel(Signals(0.0), seconds=1000)[-1] == 1


def test_fewer_than_the_minimum_become_so_many_at_once():
    service = Service(1, dataclasses.replace(GOALS, min_hosts=3))
    service.memory = ScalingMemory(changed_s=0.5)
    assert service.feel(ON_TARGET) == [3]


def test_more_than_the_maximum_become_fewer_in_time():
    service = Service(9, dataclasses.replace(GOALS, max_hosts=3))
    assert service.feel(Signals(0.9), seconds=61)[-1] == 3


@pytest.mark.parametrize("limits", [(3, 2), (-1, 2), (0, 0)])
def test_impossible_limits_are_refused_with_both_numbers(limits):
    with pytest.raises(InvalidConfig, match=f"min_actors is {limits[0]} and scaling.max_actors is {limits[1]}"):
        ScalingGoals(*limits)


# --- queues and silence --------------------------------------------------------------------------------------
def test_a_queue_that_is_too_old_asks_for_half_as_many_more_whatever_the_utilisation():
    assert Service(4).feel(Signals(0.1, queue_age_s=1.1), seconds=4)[-1] == 6
    assert Service(1).feel(Signals(0.1, queue_age_s=1.1), seconds=4)[-1] == 2
    assert set(Service(4).feel(Signals(0.5, queue_age_s=1.0), seconds=100)) == {4}


def test_after_silence_no_host_is_wanted_without_patience_or_pause():
    service = Service(4)
    service.memory = ScalingMemory(changed_s=0.0)
    assert service.feel(Signals(0.0, idle_s=99.9)) == [4]
    assert service.feel(Signals(0.0, idle_s=100.0)) == [0]
    assert service.feel(Signals(0.0, idle_s=101.0), seconds=50) == [0] * 50


@pytest.mark.parametrize(("min_hosts", "expected"), [(0, 1), (1, 1), (3, 3)])
def test_the_first_request_after_that_wakes_as_many_as_there_should_be_at_least(min_hosts, expected):
    service = Service(4, dataclasses.replace(GOALS, min_hosts=min_hosts))
    assert service.feel(Signals(0.0, idle_s=100.0)) == [0]
    assert service.feel(Signals(0.0, idle_s=0.0)) == [expected]


def test_without_zero_after_silence_never_ends_the_last_host():
    service = Service(2, dataclasses.replace(GOALS, zero_after_s=None))
    assert service.feel(Signals(0.0, idle_s=1e9), seconds=1000)[-1] == 1


# --- no swinging ---------------------------------------------------------------------------------------------
goals_st = st.builds(
    ScalingGoals,
    min_hosts=st.integers(0, 3),
    max_hosts=st.integers(3, 12),
    target_utilisation=st.floats(0.1, 0.95),
    tolerance=st.floats(0.0, 0.4),
    up_after_s=st.sampled_from([0.0, 3.0]),
    down_after_s=st.sampled_from([0.0, 10.0]),
    cool_down_s=st.sampled_from([0.0, 5.0]),
    max_step=st.sampled_from([1.0, 1.5, 2.0]),
)


@given(goals_st, st.integers(1, 14), st.floats(0, 14))
def test_at_constant_work_the_size_goes_one_way_and_then_stays(goals, num_hosts, amount):
    sizes = Service(num_hosts, goals).work(amount, seconds=400)
    ups = [after > before for before, after in zip([num_hosts, *sizes], sizes, strict=False) if after != before]
    assert len(set(ups)) <= 1
    assert set(sizes[200:]) == {sizes[-1]}


@given(goals_st, st.integers(1, 14), st.floats(0, 14))
def test_at_constant_work_the_size_ends_within_the_tolerance_or_at_a_limit_or_cannot_be_less(goals, num_hosts, amount):
    size = Service(num_hosts, goals).work(amount, seconds=400)[-1]
    low, target, slack = max(1, goals.min_hosts), goals.target_utilisation, 1 + 1e-6
    assert low <= size <= goals.max_hosts
    if size < goals.max_hosts:
        assert min(1.0, amount / size) <= target * (1 + goals.tolerance) * slack
    if size > low:  # with one fewer they would do too much, or this many are within the tolerance
        too_much = amount / (size - 1) * slack > target
        assert too_much or amount / size * slack >= target * (1 - goals.tolerance)
