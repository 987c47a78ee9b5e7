"""How people change the hosts: growing, shrinking, draining, and what is left when it does not work out."""

import pytest

from ray_moe.policy import events as ev
from tests.unit.policy.driver import Driver, of_kind, placement, stopped

START = ["0", "0", "1", "1"]


# --- growing -------------------------------------------------------------------------------------------------
def test_growing_starts_hosts_and_plans_once_all_of_them_are_there():
    driver = Driver.ready()
    driver.route(9, 9, 9, 9)
    driver.tell(ev.SizeRequested(4))
    assert driver.to_start == {"expert-2", "expert-3"}
    assert of_kind(driver.start("expert-2"), ev.PlanPlacement) == []
    [order] = of_kind(driver.start("expert-3"), ev.PlanPlacement)
    assert [host.host_id for host in order.hosts] == [f"expert-{number}" for number in range(4)]
    assert driver.named == START
    driver.run(10.0)
    assert set("".join(driver.named)) == set("0123")
    assert driver.told("resized") == ["requested: 2 to 4 hosts"]


def test_a_standby_serves_at_once_and_another_starts_in_its_place():
    driver = Driver.ready(num_standbys=1)
    driver.route(9, 9, 9, 9)
    [order] = of_kind(driver.tell(ev.SizeRequested(3)), ev.PlanPlacement)
    assert [host.host_id for host in order.hosts] == ["expert-0", "expert-1", "expert-2"]
    assert not driver.to_start
    driver.run(5.0, starts=False)
    assert driver.told("resized") == ["requested: 2 to 3 hosts"]
    assert "2" in set("".join(driver.named))
    assert driver.to_start == {"expert-3"}
    driver.run(5.0)
    assert driver.phases == {"0": "ready", "1": "ready", "2": "ready", "3": "standby"}


def test_standbys_and_new_hosts_grow_it_together():
    driver = Driver.ready(num_standbys=1)
    driver.route(9, 9, 9, 9)
    assert of_kind(driver.tell(ev.SizeRequested(4)), ev.PlanPlacement) == []
    assert driver.to_start == {"expert-3"}
    driver.run(10.0)
    assert driver.phases == {"0": "ready", "1": "ready", "2": "ready", "3": "ready", "4": "standby"}
    assert set("".join(driver.named)) == set("0123")


@pytest.mark.parametrize("preload", [False, True])
def test_a_standby_whose_resize_is_rolled_back_is_a_standby_again(preload):
    driver = Driver.ready(num_standbys=1, preload_standbys=preload)
    driver.tell(ev.SizeRequested(4))
    driver.tell(ev.HostFailed("expert-3", "no such image"))
    driver.run(5.0, starts=False)
    assert driver.phases == {"0": "ready", "1": "ready", "2": "standby"}
    assert driver.named == driver.placed == START
    assert not driver.to_start
    driver.lose("expert-1")
    assert driver.placed == ["0", "0", "2", "2"]


def test_a_standby_that_is_lost_before_it_has_its_share_is_waited_for():
    driver = Driver.ready(num_standbys=1)
    driver.route(9, 9, 9, 9)
    driver.tell(ev.SizeRequested(3))
    driver.lose("expert-2")
    driver.run(5.0)
    assert driver.phases == {"0": "ready", "1": "ready", "2": "lost"}
    assert not driver.told("resized")
    driver.start("expert-2")
    driver.run(10.0)
    assert driver.told("resized") == ["requested: 2 to 3 hosts"]
    assert driver.phases == {"0": "ready", "1": "ready", "2": "ready", "3": "standby"}


def test_the_present_size_is_no_change():
    driver = Driver.ready()
    assert driver.tell(ev.SizeRequested(2)) == []
    driver.tell(ev.SizeRequested(3))
    assert driver.to_start == {"expert-2"}


def test_a_resize_that_does_not_start_in_time_is_rolled_back_and_the_next_one_succeeds():
    driver = Driver.ready(resize_s=30.0)
    driver.tell(ev.SizeRequested(4))
    driver.start("expert-2")
    driver.run(29.5, starts=False)
    assert driver.phases == {"0": "ready", "1": "ready", "2": "ready", "3": "starting"}
    driver.run(5.0, starts=False)
    assert driver.phases == {"0": "ready", "1": "ready"}
    assert driver.named == driver.placed == START
    assert "not done within 30 s; is there room in the cluster" in driver.told("aborted")[0]
    driver.tell(ev.SizeRequested(3))
    driver.run(10.0)
    assert driver.phases == {"0": "ready", "1": "ready", "4": "ready"}
    assert driver.told("resized") == ["requested: 2 to 3 hosts"]


def test_a_resize_is_rolled_back_at_once_when_a_host_cannot_start():
    driver = Driver.ready()
    driver.tell(ev.SizeRequested(4))
    driver.start("expert-2")
    driver.tell(ev.HostFailed("expert-3", "no such image"))
    assert "expert-3 cannot start: no such image" in driver.told("aborted")[0]
    driver.run(5.0, starts=False)
    assert driver.phases == {"0": "ready", "1": "ready"}
    assert not driver.to_start


def test_a_host_that_cannot_start_and_is_not_waited_for_is_only_told_of():
    driver = Driver.ready()
    driver.lose("expert-1")
    driver.tell(ev.HostFailed("expert-1", "no such image"))
    assert driver.told("failed") == ["expert-1 cannot start: no such image"]
    assert driver.state.num_hosts == 2
    driver.start("expert-1")
    driver.load_all()
    assert driver.phases == {"0": "ready", "1": "ready"}


def test_a_resize_without_a_plan_is_rolled_back_and_the_next_one_succeeds():
    driver = Driver.ready()
    driver.tell(ev.SizeRequested(3))
    driver.start("expert-2")
    driver.plan(why_not="no luck")
    assert "no luck" in driver.told("aborted")[-1]
    driver.run(5.0, starts=False)
    assert driver.phases == {"0": "ready", "1": "ready"}
    driver.tell(ev.SizeRequested(3))
    driver.run(10.0)
    assert driver.phases == {"0": "ready", "1": "ready", "3": "ready"}


@pytest.mark.parametrize("fault", ["fails", "is lost"])
def test_a_new_host_that_breaks_while_it_loads_its_share_takes_the_resize_back_and_the_next_one_succeeds(fault):
    driver = Driver.ready()
    driver.tell(ev.SizeRequested(3))
    driver.start("expert-2")
    driver.plan(placement("2", "0", "1", "1"))
    if fault == "fails":
        driver.answer("expert-2", failure="disk full")
    else:
        driver.lose("expert-2")
    assert driver.named == driver.placed == START
    driver.run(5.0, starts=False)
    assert driver.phases == {"0": "ready", "1": "ready"}
    driver.tell(ev.SizeRequested(3))
    driver.run(10.0)
    assert driver.phases == {"0": "ready", "1": "ready", "3": "ready"}


def test_a_resize_whose_plan_names_a_host_that_has_gone_asks_for_another():
    driver = Driver.ready(num_hosts=3, max_bytes=40)
    driver.tell(ev.SizeRequested(4))
    driver.start("expert-3")
    driver.lose("expert-2")
    [again] = of_kind(driver.plan(placement("0", "1", "2", "3")), ev.PlanPlacement)
    assert [host.host_id for host in again.hosts] == ["expert-0", "expert-1", "expert-3"]
    driver.run(20.0)
    assert driver.told("resized") == ["requested: 3 to 4 hosts"]


# --- shrinking and draining ----------------------------------------------------------------------------------
def test_who_leaves_hands_over_first_and_ends_when_routers_can_have_forgotten_it():
    driver = Driver.ready(max_bytes=40)
    driver.tell(ev.SizeRequested(1))
    [order] = driver.orders.values()
    leaving = "1" if order.host_id == "expert-0" else "0"
    assert driver.named == START
    assert driver.phases[leaving] == "draining"
    assert stopped(driver.answer(order.host_id)) == []
    assert leaving not in "".join(driver.named)
    assert stopped(driver.wait(1.9)) == []
    assert stopped(driver.wait(0.2)) == [f"expert-{leaving}"]
    assert len(driver.told("resized")) == 1


def test_of_those_that_could_leave_who_is_lost_goes_first_then_who_gives_least_then_who_came_last():
    driver = Driver.ready(num_hosts=4, max_bytes=40)
    driver.route(9, 1, 2, 9)
    driver.lose("expert-2")
    driver.tell(ev.SizeRequested(3))
    driver.run(10.0, starts=False)
    assert set(driver.phases) == {"0", "1", "3"}
    driver.tell(ev.SizeRequested(2))
    driver.run(10.0)
    assert set(driver.phases) == {"0", "3"}
    quiet = Driver.ready(num_hosts=4, max_bytes=40)
    quiet.tell(ev.SizeRequested(3))
    quiet.run(10.0)
    assert set(quiet.phases) == {"0", "1", "2"}


def test_a_drained_host_is_not_replaced_unless_that_is_asked_for():
    driver = Driver.ready(num_hosts=3, max_bytes=40)
    driver.tell(ev.DrainRequested(("expert-0", "expert-0")))
    driver.run(10.0)
    assert driver.phases == {"1": "ready", "2": "ready"}
    assert "" not in driver.named


def test_who_replaces_a_drained_host_gets_its_share_before_that_ends():
    driver = Driver.ready(max_bytes=20)  # there is no room but in the new one
    driver.tell(ev.DrainRequested(("expert-1",), replace=True))
    assert driver.phases == {"0": "ready", "1": "ready", "2": "starting"}
    driver.start("expert-2")
    assert [host.host_id for host in driver.plans[0].hosts] == ["expert-0", "expert-2"]
    driver.plan()
    assert driver.named == START
    driver.load_all()
    assert driver.named == ["0", "0", "2", "2"]
    driver.run(5.0)
    assert driver.phases == {"0": "ready", "2": "ready"}


def test_all_hosts_can_be_replaced_at_once():
    driver = Driver.ready(max_bytes=20)
    driver.tell(ev.DrainRequested(("expert-0", "expert-1"), replace=True))
    driver.run(20.0)
    assert driver.phases == {"2": "ready", "3": "ready"}
    assert set("".join(driver.named)) == {"2", "3"}


@pytest.mark.parametrize("replaces", [False, True])
def test_a_drained_standby_ends_and_its_replacement_is_a_standby(replaces):
    driver = Driver.ready(num_standbys=1)
    driver.tell(ev.DrainRequested(("expert-2",), replace=replaces))
    driver.run(10.0)
    assert driver.phases == {"0": "ready", "1": "ready"} | ({"3": "standby"} if replaces else {})
    assert driver.named == START


def test_a_drain_during_which_a_load_fails_is_taken_back_and_the_next_one_succeeds():
    driver = Driver.ready(max_bytes=40)
    driver.tell(ev.DrainRequested(("expert-1",)))
    driver.answer("expert-0", failure="disk full")
    assert driver.phases == {"0": "ready", "1": "ready"}
    assert driver.named == driver.placed == START
    driver.run(10.0)
    driver.tell(ev.DrainRequested(("expert-1",)))
    driver.run(10.0)
    assert driver.phases == {"0": "ready"}


def test_a_leaving_host_that_is_lost_is_not_waited_for():
    driver = Driver.ready(max_bytes=40)
    driver.tell(ev.DrainRequested(("expert-1",)))
    assert stopped(driver.lose("expert-1")) == ["expert-1"]
    driver.load_all()
    assert driver.named == ["0", "0", "0", "0"]
    assert driver.told("resized") == ["drain of expert-1"]


def test_a_leaving_host_that_is_lost_is_left_nothing_by_the_steps_that_are_still_to_come():
    driver = Driver.ready(num_hosts=3, placed=placement("01", "1", "2", "2"), max_bytes=20)
    driver.tell(ev.DrainRequested(("expert-0",), replace=True))
    driver.start("expert-3")
    driver.plan(placement("2", "1", "1", "2"))  # a swap between full hosts, for which expert 0 leaves expert-1 early
    assert driver.placed == ["01", "1", "2", "2"]
    driver.lose("expert-0")
    driver.answer("expert-1")
    assert driver.placed == driver.named == ["1", "1", "1", "2"]
    driver.run(10.0)
    assert driver.placed == driver.named == ["2", "1", "1", "2"]


# --- roll-back of a drain ------------------------------------------------------------------------------------
def test_a_serving_host_whose_drain_is_rolled_back_serves_on():
    driver = Driver.ready(resize_s=30.0)
    driver.tell(ev.DrainRequested(("expert-1",), replace=True))
    driver.run(31.0, starts=False)
    assert driver.phases == {"0": "ready", "1": "ready"}
    assert driver.named == START


def test_a_standby_whose_replacement_does_not_start_in_time_stays_a_standby():
    driver = Driver.ready(num_standbys=1, resize_s=30.0)
    driver.tell(ev.DrainRequested(("expert-2",), replace=True))
    driver.run(31.0, starts=False)
    assert driver.phases == {"0": "ready", "1": "ready", "2": "standby"}
    assert driver.state.num_hosts == 2


def test_a_standby_whose_drain_is_not_done_in_time_is_a_standby_again():
    driver = Driver(num_standbys=1, drain_s=20.0, resize_s=5.0)
    driver.run(1.0)
    driver.tell(ev.DrainRequested(("expert-2",)))
    assert driver.phases["2"] == "draining"  # what a table named of it before this is not known
    driver.run(6.0)
    assert len(driver.told("aborted")) == 1
    assert driver.phases == {"0": "ready", "1": "ready", "2": "standby"}
    assert driver.state.num_hosts == 2


def test_a_standby_for_whose_replacement_there_is_no_plan_is_a_standby_again():
    driver = Driver(num_standbys=1, drain_s=20.0)
    driver.run(1.0)
    driver.tell(ev.DrainRequested(("expert-2",), replace=True))
    driver.start("expert-3")
    driver.plan(why_not="no luck")
    assert driver.phases["2"] == "standby"
    driver.run(30.0)
    assert driver.phases == {"0": "ready", "1": "ready", "2": "standby"}
    assert driver.state.num_hosts == 2


def test_a_standby_that_is_drained_beside_a_host_whose_load_fails_is_a_standby_again():
    driver = Driver(num_standbys=1, drain_s=20.0, max_bytes=40)
    driver.run(1.0)
    driver.tell(ev.DrainRequested(("expert-1", "expert-2")))
    driver.answer("expert-0", failure="disk full")
    assert driver.phases == {"0": "ready", "1": "ready", "2": "standby"}
    assert driver.state.num_hosts == 2


def test_a_host_whose_place_was_taken_is_a_standby_again_when_its_drain_is_rolled_back():
    driver = Driver.ready(num_standbys=1, resize_s=30.0, drain_s=1.0)
    driver.tell(ev.DrainRequested(("expert-1",), replace=True))
    driver.lose("expert-1")
    driver.load_all()
    assert driver.named == ["0", "0", "2", "2"]
    driver.start("expert-1")
    driver.run(31.0, starts=False)
    assert driver.phases == {"0": "ready", "1": "standby", "2": "ready"}
    assert driver.state.num_hosts == 2


def test_shrinking_gives_up_spare_replicas_for_what_only_the_going_hosts_hold():
    driver = Driver.ready(num_hosts=3, placed=placement("0", "12", "1", "2"), max_bytes=20)
    driver.tell(ev.SizeRequested(2))
    driver.run(10.0)
    assert driver.phases == {"0": "ready", "1": "ready"}
    assert sorted(driver.named) == ["0", "0", "1", "1"]
