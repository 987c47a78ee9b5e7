"""What is refused: each with an error that says what to do, and as if it had never been asked for."""

import copy

import pytest

from ray_moe.errors import InsufficientResources, InvalidConfig, NotFound, Unavailable
from ray_moe.policy import events as ev
from ray_moe.policy.cluster_state import ClusterState
from ray_moe.policy.scaling import ScalingGoals
from tests.unit.policy.driver import Driver, assert_refused, placement, settings_of


# --- bad input -----------------------------------------------------------------------------------------------
def test_a_cluster_without_hosts_is_refused():
    with pytest.raises(InsufficientResources, match="no hosts to place experts on; start at least one"):
        ClusterState(settings_of(), [])


def test_sleep_after_silence_is_refused_where_nobody_could_answer_after_it():
    with pytest.raises(InvalidConfig, match=r"give routers a lifeboat .* or leave scaling.zero_after_s unset"):
        settings_of(scaling=ScalingGoals(0, 2, zero_after_s=60.0))
    assert settings_of(scaling=ScalingGoals(0, 2, zero_after_s=60.0), can_sleep=True).can_sleep


def test_a_plan_with_fewer_slots_than_experts_is_refused():
    driver = Driver.ready(max_bytes=20)
    driver.lose("expert-1")
    assert_refused(driver, ev.PlanRequested(), InsufficientResources, "2 slots for 4 experts", "experts.max_bytes")


def test_a_plan_is_refused_when_an_expert_is_larger_than_what_any_host_may_hold():
    driver = Driver.ready(max_bytes=9)
    assert_refused(driver, ev.PlanRequested(), InsufficientResources, "0 slots for 4 experts", "experts.max_bytes")


def test_a_plan_is_refused_when_nobody_is_there():
    driver = Driver()
    assert_refused(driver, ev.PlanRequested(), InsufficientResources, "0 expert actors have 0 slots")


def test_a_drain_of_unknown_hosts_is_refused_and_the_known_ones_are_named():
    driver = Driver.ready()
    for targets in (("expert-9",), ("expert-0", "expert-9")):
        for replaces in (True, False):
            assert_refused(
                copy.deepcopy(driver),
                ev.DrainRequested(targets, replace=replaces),
                NotFound,
                "no expert actors expert-9; there are expert-0, expert-1",
            )


def test_a_drain_for_which_the_others_have_no_room_is_refused_with_the_bytes_that_are_missing():
    driver = Driver.ready(max_bytes=30)
    assert_refused(
        driver,
        ev.DrainRequested(("expert-1",)),
        InsufficientResources,
        "expert-1 cannot go",
        "no room for 1 of the experts",
        "10 bytes more",
        "start others first",
    )


def test_a_drain_of_all_is_refused_even_if_there_may_be_no_host():
    for can_sleep in (True, False):
        driver = Driver.ready(can_sleep=can_sleep)
        assert_refused(
            driver,
            ev.DrainRequested(("expert-0", "expert-1")),
            InsufficientResources,
            "expert-0, expert-1 cannot go",
            "no room for 4 of the experts",
        )


def test_a_drain_into_a_host_that_is_lost_is_refused():
    driver = Driver.ready(num_hosts=3, max_bytes=30)
    driver.lose("expert-2")
    assert_refused(driver, ev.DrainRequested(("expert-1",)), InsufficientResources, "expert-1 cannot go")


# --- sizes ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [0, -1])
def test_no_hosts_at_all_are_refused_where_nobody_else_could_answer(size):
    assert_refused(
        Driver.ready(), ev.SizeRequested(size), InvalidConfig, f"{size} expert actors", "expected 1 to 1024,"
    )


def test_fewer_than_no_hosts_are_refused_even_if_there_may_be_none():
    assert_refused(Driver.ready(can_sleep=True), ev.SizeRequested(-1), InvalidConfig, "expected 0 to 1024,")


def test_more_hosts_than_a_controller_plans_for_are_refused():
    assert_refused(
        Driver.ready(), ev.SizeRequested(100_000), InvalidConfig, "100000 expert actors", "expected 1 to 1024"
    )


@pytest.mark.parametrize("size", [1, 5])
def test_a_size_beyond_the_limits_of_scaling_is_refused_with_the_limits(size):
    driver = Driver.ready(scaling=ScalingGoals(min_hosts=2, max_hosts=4))
    assert_refused(driver, ev.SizeRequested(size), InvalidConfig, f"{size} expert actors", "2 to 4, the limits of scal")


def test_a_size_that_cannot_hold_the_experts_is_refused_with_one_that_can():
    by_setting, by_host = Driver.ready(num_hosts=4, max_bytes=15), Driver.ready(num_hosts=4, told_bytes=15)
    for driver in (by_setting, by_host):
        assert_refused(driver, ev.SizeRequested(3), InsufficientResources, "3 expert actors cannot hold the 4", "4 can")


def test_no_size_is_allowed_when_an_expert_is_larger_than_what_any_host_may_hold():
    driver = Driver.ready(max_bytes=9)
    assert_refused(driver, ev.SizeRequested(1), InsufficientResources, "cannot hold the 4 experts", "experts.max_bytes")


def test_a_smaller_size_for_which_the_hosts_that_would_stay_have_no_room_is_refused():
    driver = Driver.ready(num_hosts=4, num_experts=4, max_bytes=20)
    driver.lose("expert-0")
    driver.lose("expert-1")  # their experts are on the other two now, and who is not there goes first
    driver.run(5.0, starts=False)
    assert_refused(driver, ev.SizeRequested(1), InsufficientResources, "1 expert actors cannot hold", "2 can")
    driver.tell(ev.SizeRequested(2))
    driver.run(20.0)
    assert driver.phases == {"2": "ready", "3": "ready"}


# --- another change under way --------------------------------------------------------------------------------
WISHES = [ev.SizeRequested(1), ev.SizeRequested(3), ev.PlanRequested(), ev.DrainRequested(("expert-1",), replace=True)]


@pytest.mark.parametrize("wish", WISHES)
def test_while_the_cluster_grows_every_other_wish_is_refused(wish):
    driver = Driver.ready(max_bytes=40)
    driver.tell(ev.SizeRequested(3))
    assert_refused(driver, wish, Unavailable, "requested: 2 to 3 hosts", "retry when it has ended")


@pytest.mark.parametrize("wish", WISHES)
def test_while_a_host_leaves_every_other_wish_is_refused(wish):
    driver = Driver.ready(max_bytes=40)
    driver.tell(ev.DrainRequested(("expert-0",)))
    assert_refused(driver, wish, Unavailable, "drain of expert-0", "retry when it has ended")


@pytest.mark.parametrize("wish", WISHES)
def test_while_a_plan_is_carried_out_every_other_wish_is_refused(wish):
    driver = Driver.ready(max_bytes=40)
    driver.begin(placement("1", "0", "1", "1"))
    assert_refused(driver, wish, Unavailable, "a plan is being carried out", "retry when it has ended")


def test_while_a_plan_is_only_made_others_are_welcome_and_it_is_forgotten():
    driver = Driver.ready(max_bytes=40)
    driver.tell(ev.PlanRequested())
    driver.tell(ev.SizeRequested(3))
    driver.plan(placement("1", "0", "1", "1"))
    assert driver.placed == ["0", "0", "1", "1"]
    assert not driver.orders


def test_once_a_change_has_ended_the_next_is_welcome():
    driver = Driver.ready(max_bytes=40)
    for size in (3, 1, 2):
        driver.tell(ev.SizeRequested(size))
        driver.run(10.0)
        assert list(driver.phases.values()) == ["ready"] * size
