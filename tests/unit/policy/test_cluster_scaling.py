"""How the number of hosts follows what the service feels, down to none at all."""

import pytest

from ray_moe.policy import events as ev
from ray_moe.policy.scaling import ScalingGoals, Signals
from ray_moe.types import Placement
from tests.unit.policy.driver import LAYER, Driver, stopped

# --- scaling -------------------------------------------------------------------------------------------------
SCALING = ScalingGoals(0, 4, up_after_s=3.0, down_after_s=10.0, cool_down_s=0.0, zero_after_s=60.0)


def feel(driver, signals, seconds):
    for _ in range(seconds):
        driver.run(1.0)
        driver.tell(ev.SignalsReported(signals))


def test_what_the_service_feels_changes_the_size():
    driver = Driver.ready(scaling=SCALING, can_sleep=True)
    feel(driver, Signals(1.0), 5)
    assert driver.told("resizing") == ["scaling: 2 to 4 hosts"]
    driver.run(5.0)
    assert driver.phases == {"0": "ready", "1": "ready", "2": "ready", "3": "ready"}
    feel(driver, Signals(0.05), 12)
    driver.run(10.0)
    assert list(driver.phases.values()) == ["ready"]


def test_nothing_is_scaled_without_goals_or_during_another_change():
    driver = Driver.ready()
    feel(driver, Signals(1.0, queue_age_s=99.0), 10)
    assert driver.state.num_hosts == 2
    driver = Driver.ready(scaling=SCALING, can_sleep=True)
    driver.tell(ev.SizeRequested(3))
    for _ in range(20):
        driver.wait(1.0)
        assert driver.tell(ev.SignalsReported(Signals(1.0))) == []


def test_scaling_keeps_as_many_hosts_as_can_hold_the_experts():
    driver = Driver.ready(num_hosts=3, scaling=SCALING, can_sleep=True, max_bytes=20)
    feel(driver, Signals(0.01), 30)
    assert driver.state.num_hosts == 2


def test_scaling_never_wants_more_than_its_maximum_whatever_hosts_say_that_they_may_hold():
    driver = Driver.ready(scaling=ScalingGoals(1, 3, up_after_s=3.0), told_bytes=40)
    driver.lose("expert-1")
    driver.told_bytes = 10  # four such would be needed
    driver.start("expert-1")
    feel(driver, Signals(0.6), 10)
    assert driver.state.num_hosts <= 3


# --- sleeping ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("by", [ev.SizeRequested(0), ev.SignalsReported(Signals(0.0, idle_s=60.0))])
def test_with_a_lifeboat_all_may_end_and_are_named_no_more_first(by):
    driver = Driver.ready(num_standbys=1, scaling=SCALING, can_sleep=True)
    instructions = driver.tell(by)
    assert driver.named == ["", "", "", ""]
    assert stopped(instructions) == []
    assert stopped(driver.wait(1.9)) == []
    assert stopped(driver.wait(0.2)) == ["expert-0", "expert-1"]
    assert driver.phases == {"2": "standby"}
    assert driver.state.is_asleep
    driver.run(50.0)
    assert driver.phases == {"2": "standby"}


@pytest.mark.parametrize("by", [ev.SizeRequested(1), ev.SignalsReported(Signals(0.0))])
def test_waking_brings_hosts_and_all_experts_back(by):
    driver = Driver.ready(scaling=SCALING, can_sleep=True)
    driver.tell(ev.SizeRequested(0))
    driver.run(10.0)
    driver.tell(by)
    assert driver.to_start == {"expert-2"}
    driver.run(10.0)
    assert not driver.state.is_asleep
    assert driver.named == ["2", "2", "2", "2"]


def test_a_sleep_that_takes_too_long_is_slept_all_the_same():
    driver = Driver.ready(can_sleep=True, drain_s=50.0, resize_s=5.0)
    driver.tell(ev.SizeRequested(0))
    driver.run(20.0)
    assert driver.phases == {"0": "draining", "1": "draining"}
    assert driver.named == ["", "", "", ""]
    driver.run(40.0)
    assert driver.phases == {}


def test_a_cluster_that_begins_asleep_wakes_up():
    driver = Driver(num_hosts=0, placed=Placement({LAYER: ((), (), (), ())}), can_sleep=True)
    driver.wait(1.0)
    assert driver.state.is_asleep
    driver.tell(ev.SizeRequested(2))
    driver.run(10.0)
    assert list(driver.phases.values()) == ["ready", "ready"]
    assert "" not in driver.named
