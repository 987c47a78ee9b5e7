"""When plans are made: when people ask, when the balancer sees traffic, when hosts come."""

import itertools

from ray_moe.policy import events as ev
from ray_moe.types import Placement
from tests.unit.policy.driver import LAYER, Driver, homes, of_kind, placement

START = ["0", "0", "1", "1"]
TARGET = placement("1", "0", "0", "1")


def test_a_plan_that_cannot_be_made_is_told_and_changes_nothing():
    driver = Driver.ready(max_bytes=40)
    driver.tell(ev.PlanRequested())
    driver.plan(why_not="the planner had no luck")
    assert driver.told("aborted") == ["no plan (requested): the planner had no luck"]
    assert driver.placed == driver.named == START
    driver.begin(TARGET)
    driver.run(10.0)
    assert driver.named == driver.placed == homes(TARGET)


def test_an_answered_plan_is_not_asked_for_again():
    driver = Driver.ready(max_bytes=40)
    driver.begin(TARGET)
    driver.run(60.0)
    assert len(driver.seen(ev.PlanPlacement)) == 1


def test_a_plan_that_is_not_answered_is_asked_for_again():
    driver = Driver.ready(max_bytes=40)
    driver.tell(ev.PlanRequested())
    driver.plans.clear()
    driver.run(10.0 + 5.0 + 1.0)  # repeat_s, replan_s
    assert len(driver.seen(ev.PlanPlacement)) >= 2


def test_the_balancer_plans_when_there_is_traffic_and_at_most_so_often():
    driver = Driver.ready(max_bytes=40, balance=True, balance_every_s=4.0)
    driver.run(20.0)
    assert driver.seen(ev.PlanPlacement) == []
    driver.route(10, 10, 10, 10)
    driver.plans.clear()
    driver.log.clear()
    asked_s = []
    for _ in range(60):
        if of_kind(driver.wait(0.5), ev.PlanPlacement):
            asked_s.append(driver.now_s)
            driver.plan(driver.state.placement)
    assert len(asked_s) > 3
    assert all(later - sooner >= 4.0 for sooner, later in itertools.pairwise(asked_s))


def test_the_balancer_waits_until_those_who_are_expected_are_back():
    driver = Driver.ready(max_bytes=40, balance=True, return_s=20.0)
    driver.lose("expert-1")
    driver.run(19.0, starts=False)
    assert driver.seen(ev.PlanPlacement) == []
    driver.run(2.0, starts=False)
    assert [host.host_id for host in driver.seen(ev.PlanPlacement)[0].hosts] == ["expert-0"]


def test_a_host_that_comes_with_nothing_to_hold_gets_its_share_by_a_plan_even_without_the_balancer():
    driver = Driver(num_hosts=3, max_bytes=40, placed=placement("0", "0", "1", "1"))
    driver.start("expert-0", "expert-1")
    driver.load_all()
    driver.route(9, 9, 9, 9)
    assert driver.seen(ev.PlanPlacement) == []
    driver.start("expert-2")
    driver.run(10.0)
    assert len(driver.seen(ev.PlanPlacement)) == 1
    assert "2" in "".join(driver.named)


def test_with_nothing_placed_everything_finds_a_home_when_hosts_come():
    driver = Driver(placed=Placement({LAYER: ((), (), (), ())}))
    driver.start("expert-0")
    assert driver.placed == ["0", "0", "0", ""]
    driver.start("expert-1")
    assert driver.placed == ["0", "0", "0", "1"]
    driver.run(10.0)
    assert "" not in driver.named
