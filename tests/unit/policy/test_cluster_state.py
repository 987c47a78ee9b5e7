"""How the placement changes: as a transaction, with tables that name only what is there."""

import itertools

import pytest

from ray_moe.policy import events as ev
from ray_moe.policy.hosts import MAX_FAILURES
from tests.unit.policy.driver import EXPERT_BYTES, LAYER, Driver, homes, layers_of, of_kind, placement

START = ["0", "0", "1", "1"]
TARGET = placement("1", "0", "0", "1")


def preparing():
    """Two hosts have each an expert to load for a plan; nothing of it is there yet."""
    driver = Driver.ready(max_bytes=40)
    driver.begin(TARGET)
    assert {host: layers_of(order.experts) for host, order in driver.orders.items()} == {
        "expert-0": (2,),
        "expert-1": (0,),
    }
    driver.log.clear()
    return driver


def assert_next_plan_succeeds(driver):
    driver.run(30.0)
    driver.begin(TARGET)
    driver.run(10.0)
    assert driver.named == driver.placed == homes(TARGET)


# --- the first tables ----------------------------------------------------------------------------------------
def test_experts_are_dealt_out_evenly_and_named_as_they_are_loaded():
    driver = Driver()
    assert driver.placed == START
    driver.start("expert-0", "expert-1")
    assert driver.named == ["", "", "", ""]
    driver.answer("expert-1")
    assert driver.named == ["", "", "1", "1"]
    driver.answer("expert-0")
    assert driver.named == START
    assert driver.state.table.is_complete


def test_each_table_has_a_higher_epoch_and_there_is_none_without_a_difference():
    driver = Driver()
    driver.run(5.0)
    driver.tell(ev.SizeRequested(3))
    driver.run(20.0)
    driver.lose("expert-1")
    driver.run(20.0)
    tables = [one.table for one in driver.seen(ev.PublishTable)]
    assert [table.epoch for table in tables] == list(range(1, len(tables) + 1))
    for one, other in itertools.pairwise(tables):
        assert (one.placement, one.addresses, one.speeds) != (other.placement, other.addresses, other.speeds)


def test_a_host_that_holds_nothing_has_no_address_in_the_table_and_one_that_is_lost_loses_its_own():
    driver = Driver()
    driver.start("expert-0", "expert-1")
    driver.answer("expert-0")
    assert set(driver.state.table.addresses) == {"expert-0"}
    driver.answer("expert-1")
    assert set(driver.state.table.addresses) == {"expert-0", "expert-1"}
    driver.lose("expert-0")
    assert set(driver.state.table.addresses) == {"expert-1"}


def test_speeds_that_differ_much_are_told_and_small_differences_are_not():
    driver = Driver.ready(num_hosts=4)
    for number, speed in enumerate((1e9, 1e9, 1.5e9, 4e9)):
        name = f"expert-{number}"
        driver.tell(ev.SpeedReported(name, driver.incarnation(name), speed))
    driver.wait(1.0)
    assert driver.state.table.speeds == {"expert-3": 4.0}
    driver.tell(ev.SpeedReported("expert-3", driver.incarnation("expert-3"), 4.4e9))
    assert driver.wait(1.0) == []


# --- loading -------------------------------------------------------------------------------------------------
def test_a_host_loads_one_chunk_at_a_time_what_nobody_holds_first_and_then_the_hottest():
    driver = Driver.ready(max_bytes=40, chunk_bytes=10)
    driver.route(1, 3, 2, 4)
    driver.lose("expert-1")
    driver.load_all()
    loads = [layers_of(order.experts) for order in driver.seen(ev.LoadReplicas) if order.host_id == "expert-0"]
    assert loads == [(3,), (2,)]


def test_an_expert_larger_than_a_chunk_is_loaded_alone():
    driver = Driver(chunk_bytes=3)
    driver.run(5.0)
    assert all(len(layers_of(order.experts)) == 1 for order in driver.seen(ev.LoadReplicas))
    assert driver.named == START


@pytest.mark.parametrize(("donors", "expected"), [("any", {"expert-0": {LAYER: (0,)}}), ("node", {}), ("none", {})])
def test_weights_come_from_the_donors_that_are_allowed(donors, expected):
    driver = Driver.ready(max_bytes=40, donors=donors)  # each host on a node of its own
    driver.begin(placement("01", "0", "1", "1"))
    [order] = driver.seen(ev.LoadReplicas)
    assert order.donors == expected


def test_an_order_that_is_not_answered_is_given_again_under_the_same_name():
    driver = preparing()
    first = dict(driver.orders)
    assert driver.wait(9.9) == []
    again = of_kind(driver.wait(0.2), ev.LoadReplicas)
    assert {order.host_id: order for order in again} == first
    assert driver.wait(9.9) == []
    assert len(of_kind(driver.wait(0.2), ev.LoadReplicas)) == 2
    driver.load_all()
    assert driver.named == homes(TARGET)


def test_a_host_that_could_not_load_tries_again_after_a_pause_that_doubles():
    driver = Driver(retry_s=1.0)
    driver.start("expert-0")
    for failures in range(4):
        driver.answer("expert-0", failure="disk full")
        pause_s = 1.0 * 2**failures
        assert of_kind(driver.wait(pause_s - 0.1), ev.LoadReplicas) == []
        assert len(of_kind(driver.wait(0.1), ev.LoadReplicas)) == 1
    driver.load_all()
    assert driver.named == ["0", "0", "", ""]
    assert driver.told("failed") == ["expert-0: disk full"] * 4


def test_a_host_that_cannot_load_is_not_planned_for_until_it_can():
    driver = Driver.ready(max_bytes=40)
    driver.begin(placement("01", "01", "01", "01"))
    driver.load_all()
    driver.lose("expert-1")
    driver.start("expert-1")
    for failures in range(MAX_FAILURES):
        driver.answer("expert-1", failure="disk full")
        driver.wait(2.0**failures)
    driver.tell(ev.PlanRequested())
    assert [host.host_id for host in driver.plans.pop().hosts] == ["expert-0"]
    driver.answer("expert-1")
    driver.tell(ev.PlanRequested())
    assert [host.host_id for host in driver.plans.pop().hosts] == ["expert-0", "expert-1"]


# --- transactions --------------------------------------------------------------------------------------------
def test_nothing_of_a_step_is_named_or_counts_as_placed_before_all_of_it_is_loaded():
    driver = preparing()
    driver.answer("expert-0")
    assert driver.named == driver.placed == START
    driver.answer("expert-1")
    assert driver.named == driver.placed == homes(TARGET)
    assert len(driver.seen(ev.PublishTable)) == 1


def test_nothing_is_dropped_until_routers_can_have_forgotten_it():
    driver = preparing()
    driver.load_all()
    assert driver.wait(1.9) == []
    dropped = of_kind(driver.wait(0.2), ev.DropReplicas)
    assert {order.host_id: layers_of(order.experts) for order in dropped} == {"expert-0": (0,), "expert-1": (2,)}


def test_nothing_is_dropped_until_a_router_from_an_earlier_life_can_have_forgotten_its_table():
    driver = preparing()
    driver.load_all()
    driver.wait(1.5)
    driver.tell(ev.EpochSeen(9999))
    assert driver.wait(1.9) == []
    assert len(of_kind(driver.wait(0.2), ev.DropReplicas)) == 2


def test_what_is_to_be_dropped_is_kept_if_it_is_wanted_again_in_time():
    driver = preparing()
    driver.load_all()
    driver.begin(placement(*START))
    assert driver.named == START
    driver.run(10.0)
    assert {order.host_id: layers_of(order.experts) for order in driver.seen(ev.DropReplicas)} == {
        "expert-0": (2,),
        "expert-1": (0,),
    }


def test_a_plan_that_does_not_fit_beside_the_old_placement_is_carried_out_in_steps():
    driver = Driver.ready(max_bytes=30)
    driver.begin(placement("1", "1", "0", "0"))
    names = []
    for _ in range(20):
        driver.load_all()
        names.append(driver.named)
        driver.wait(1.0)
        assert all("" not in table for table in names)
    assert names[-1] == ["1", "1", "0", "0"]
    steps = [table for number, table in enumerate(names) if table not in names[:number]]
    assert len(steps) > 1


@pytest.mark.parametrize("first", [(), ("expert-0",)])
def test_a_load_that_fails_during_prepare_aborts_all_of_it_and_the_next_plan_succeeds(first):
    driver = preparing()
    for host_id in first:
        driver.answer(host_id)
    table = driver.state.table
    driver.answer("expert-1", failure="disk full")
    assert driver.told("aborted") == ["requested: expert-1 could not load: disk full"]
    assert driver.state.table == table
    assert driver.placed == driver.named == START
    assert_next_plan_succeeds(driver)


def test_what_was_loaded_for_an_aborted_plan_is_dropped():
    driver = preparing()
    driver.answer("expert-0")
    driver.answer("expert-1", failure="disk full")
    driver.run(10.0)
    dropped = {order.host_id: layers_of(order.experts) for order in driver.seen(ev.DropReplicas)}
    assert dropped == {"expert-0": (2,), "expert-1": (0,)}  # the second may have loaded it after all
    assert driver.seen(ev.LoadReplicas) == []


def test_a_load_that_fails_and_has_nothing_to_do_with_the_plan_is_only_tried_again():
    driver = Driver.ready(num_hosts=3, max_bytes=40)
    driver.lose("expert-0")
    driver.start("expert-0")
    driver.begin(placement("01", "02", "12", "2"))
    driver.answer("expert-0", failure="disk full")
    assert driver.told("aborted") == []
    driver.run(10.0)
    assert driver.named == ["0", "0", "12", "2"]  # nobody stands in any more


def test_what_goes_waits_for_those_that_stay_to_be_loaded():
    driver = Driver.ready(num_hosts=3, max_bytes=40)
    driver.lose("expert-0")
    driver.load_all()  # others stand in for it
    driver.start("expert-0")
    driver.begin(placement("0", "0", "12", "2"))
    driver.answer("expert-2")
    assert driver.placed == ["10", "20", "1", "2"] and driver.named == ["1", "2", "1", "2"]
    driver.answer("expert-0")
    assert driver.placed == driver.named == ["0", "0", "12", "2"]


def test_a_host_loads_no_more_than_one_expert_beyond_its_limit():
    driver = Driver(num_hosts=1, told_bytes=2 * EXPERT_BYTES)
    driver.run(5.0)
    assert driver.placed == ["0", "0", "0", "0"]
    assert sorted(driver.named) == ["", "0", "0", "0"]


def test_a_life_that_comes_back_is_asked_to_drop_what_it_may_still_have():
    driver = Driver.ready(num_hosts=2, max_bytes=40)
    driver.lose("expert-0")
    driver.run(1.0, starts=False)
    driver.log.clear()
    driver.tell(driver.started("expert-0"))  # sent before it had anything, and late
    driver.begin(placement("1", "1", "1", "1"))
    driver.run(10.0)
    assert [layers_of(order.experts) for order in driver.seen(ev.DropReplicas)] == [(0, 1)]


def test_a_host_that_is_lost_during_prepare_aborts_it_and_the_next_plan_succeeds():
    driver = Driver.ready(num_hosts=3, max_bytes=40, placed=placement("0", "0", "1", "12"))
    driver.begin(placement("02", "0", "12", "1"))
    driver.lose("expert-2")
    assert driver.told("aborted") == ["requested: expert-2 was lost"]
    assert driver.placed == ["0", "0", "1", "12"]
    assert driver.named == ["0", "0", "1", "1"]
    driver.start("expert-2")
    assert_next_plan_succeeds(driver)


def test_a_plan_goes_on_without_a_lost_host_that_it_gives_nothing():
    driver = Driver.ready(num_hosts=3, num_experts=3, max_bytes=30)
    driver.begin(placement("01", "1", "2"))
    driver.lose("expert-2")
    assert driver.told("aborted") == []
    driver.answer("expert-1")
    assert driver.placed[0] == driver.named[0] == "01"
