"""What follows when hosts are lost: standbys inherit their places, or others stand in until they are back."""

from ray_moe.policy import events as ev
from ray_moe.types import Placement
from tests.unit.policy.driver import LAYER, Driver, layers_of, of_kind, placement

START = ["0", "0", "1", "1"]


# --- heirs ---------------------------------------------------------------------------------------------------
def test_a_standby_takes_the_place_of_a_lost_host_which_is_a_standby_when_it_is_back():
    driver = Driver.ready(num_standbys=1)
    driver.lose("expert-1")
    assert driver.placed == ["0", "0", "2", "2"]
    assert driver.told("repaired") == ["expert-2 takes the place of expert-1"]
    driver.load_all()
    assert driver.named == ["0", "0", "2", "2"]
    driver.start("expert-1")
    driver.run(10.0)
    assert driver.phases == {"0": "ready", "1": "standby", "2": "ready"}
    assert driver.named == ["0", "0", "2", "2"]


def test_a_standby_that_holds_everything_is_named_at_once():
    driver = Driver.ready(num_standbys=1, preload_standbys=True)
    driver.lose("expert-1")
    assert driver.named == ["0", "0", "2", "2"]


def test_of_several_standbys_the_one_that_holds_most_of_it_takes_the_place():
    driver = Driver.ready(num_standbys=3)
    driver.lose("expert-3")
    driver.num_lives["expert-3"] = 2
    driver.tell(driver.started("expert-3", [2, 3]))
    driver.lose("expert-1")
    assert driver.named == driver.placed == ["0", "0", "3", "3"]


def test_with_fewer_standbys_than_losses_the_others_get_stand_ins():
    driver = Driver.ready(num_hosts=3, num_experts=3, num_standbys=1)
    driver.lose("expert-0")
    driver.lose("expert-1")
    driver.load_all()
    assert driver.placed[0] == "3"
    assert driver.named[1] in {"2", "3"}
    assert "1" in driver.placed[1]


def test_it_is_told_when_a_host_that_was_lost_has_its_experts_again():
    driver = Driver.ready()
    driver.lose("expert-1")
    driver.start("expert-1")
    assert driver.told("repaired") == []
    driver.load_all()
    assert driver.told("repaired") == ["expert-1 has its experts again"]


def test_a_standby_that_is_lost_changes_nothing_and_takes_nobodys_place():
    driver = Driver.ready(num_standbys=1)
    driver.lose("expert-2")
    assert driver.named == driver.placed == START
    driver.lose("expert-1")
    assert driver.told("repaired") == []


def test_a_standby_that_comes_late_takes_the_place_that_is_free():
    driver = Driver(num_standbys=1, return_s=60.0)
    driver.start("expert-0", "expert-1")
    driver.load_all()
    driver.lose("expert-1")
    driver.start("expert-2")
    driver.load_all()
    assert driver.named == ["0", "0", "2", "2"]


# --- stand-ins -----------------------------------------------------------------------------------------------
def test_without_a_standby_others_stand_in_as_far_as_there_is_room_for_the_hottest():
    driver = Driver.ready(max_bytes=30)
    driver.route(1, 1, 3, 9)
    driver.lose("expert-1")
    driver.load_all()
    assert driver.named == ["0", "0", "", "0"]
    assert driver.placed == ["0", "0", "1", "01"]


SPARE = placement("0", "12", "1", "2")


def test_a_spare_replica_makes_room_for_an_expert_that_nobody_else_would_compute():
    driver = Driver.ready(num_hosts=3, placed=SPARE, max_bytes=20, return_s=100.0)
    driver.lose("expert-0")
    driver.run(10.0, starts=False)
    assert driver.named == ["1", "2", "1", "2"]


def test_with_a_lifeboat_spare_replicas_stay():
    driver = Driver.ready(num_hosts=3, placed=SPARE, max_bytes=20, return_s=100.0, can_sleep=True)
    driver.lose("expert-0")
    driver.run(10.0, starts=False)
    assert driver.named == ["", "12", "1", "2"]


def test_a_stand_in_is_dismissed_when_the_lost_host_is_back_and_drops_what_it_took():
    driver = Driver.ready(max_bytes=40)
    driver.lose("expert-1")
    driver.load_all()
    assert driver.named == ["0", "0", "0", "0"]
    driver.start("expert-1")
    assert driver.named == ["0", "0", "0", "0"]
    driver.answer("expert-1")
    assert driver.named == driver.placed == START
    driver.log.clear()
    assert of_kind(driver.wait(1.9), ev.DropReplicas) == []
    [order] = of_kind(driver.wait(0.2), ev.DropReplicas)
    assert (order.host_id, layers_of(order.experts)) == ("expert-0", (2, 3))


def test_a_lost_host_that_is_there_after_all_serves_on_with_what_it_holds():
    driver = Driver.ready()
    driver.lose("expert-1")
    driver.tell(driver.started("expert-1", [2, 3]))
    assert driver.named == driver.placed == START
    driver.run(10.0)
    assert driver.named == driver.placed == START


def test_nobody_stands_in_for_a_host_that_is_only_starting_until_it_is_overdue():
    driver = Driver(return_s=60.0, max_bytes=40)
    driver.start("expert-0")
    driver.load_all()
    driver.run(59.0, starts=False)
    assert driver.named == ["0", "0", "", ""]
    driver.run(2.0, starts=False)
    assert driver.named == ["0", "0", "0", "0"]


def test_a_replica_elsewhere_needs_no_stand_in():
    driver = Driver.ready(num_hosts=3, max_bytes=40, placed=placement("0", "0", "12", "12"))
    driver.lose("expert-1")
    assert driver.named == ["0", "0", "2", "2"]
    assert driver.placed == ["0", "0", "12", "12"]
    assert driver.orders == {}


def test_room_that_comes_later_is_used():
    driver = Driver.ready(num_hosts=3, max_bytes=20)
    driver.lose("expert-0")
    driver.lose("expert-1")
    driver.load_all()
    homeless = driver.named.count("")
    assert homeless > 0
    driver.tell(ev.SizeRequested(4))
    driver.start("expert-3")
    driver.load_all()
    assert driver.named.count("") < homeless


def test_a_plan_that_takes_the_room_is_aborted_when_an_expert_that_nobody_holds_needs_it():
    driver = Driver.ready(num_hosts=3, num_experts=3, max_bytes=20)
    driver.begin(placement("02", "1", "20"))
    driver.lose("expert-1")
    assert driver.told("aborted") == ["requested: experts without a host need the room"]
    driver.run(5.0, starts=False)
    assert "" not in driver.named


# --- everything at once --------------------------------------------------------------------------------------
def test_when_all_are_lost_and_come_back_everything_is_as_it_was():
    driver = Driver.ready()
    driver.lose("expert-0")
    driver.lose("expert-1")
    assert driver.named == ["", "", "", ""]
    assert driver.state.table.placement == Placement({LAYER: ((), (), (), ())})
    driver.start("expert-0", "expert-1")
    driver.run(10.0)
    assert driver.named == driver.placed == START
