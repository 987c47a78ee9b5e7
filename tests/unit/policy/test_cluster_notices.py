"""What follows from the notice that nodes are going: what can be saved is saved, whatever else is under way."""

import pytest

from ray_moe.policy import events as ev
from tests.unit.policy.driver import Driver, layers_of, placement

START = ["0", "0", "1", "1"]


def loads(driver):
    """Experts that each host was told to load, in order."""
    told: dict[str, list[int]] = {}
    for order in driver.seen(ev.LoadReplicas):
        told.setdefault(order.host_id, []).extend(layers_of(order.experts))
    return told


def notice(*numbers, replaces=False):
    return ev.DrainRequested(tuple(f"expert-{number}" for number in numbers), replace=replaces, notice=True)


def test_a_notice_moves_what_is_placed_there_the_hottest_first():
    driver = Driver.ready(max_bytes=40, chunk_bytes=10)
    driver.route(1, 1, 3, 9)
    driver.tell(notice(1))
    driver.load_all()
    assert loads(driver) == {"expert-0": [3, 2]}
    assert driver.named == ["0", "0", "0", "0"]
    driver.run(5.0)
    assert driver.phases == {"0": "ready"}


def test_after_a_notice_as_much_is_saved_as_there_is_room_for_and_the_rest_is_served_to_the_end():
    driver = Driver.ready(max_bytes=30)
    driver.route(1, 1, 9, 3)
    driver.tell(notice(1))
    assert any("no room for 1 experts" in text for text in driver.told("homeless"))
    driver.run(20.0)
    assert driver.named == ["0", "0", "0", "1"]
    assert driver.phases["1"] == "draining"
    driver.lose("expert-1")
    assert driver.named == ["0", "0", "0", ""]
    assert driver.phases == {"0": "ready"}


def test_what_has_no_room_after_a_notice_is_told_once():
    driver = Driver.ready(max_bytes=20)
    driver.tell(notice(1))
    driver.run(20.0)
    assert len(driver.told("homeless")) == 1


def test_a_notice_about_unknown_hosts_is_no_error():
    driver = Driver.ready(max_bytes=40)
    assert driver.tell(notice(9)) == []
    driver.tell(notice(1, 9))
    driver.run(10.0)
    assert driver.phases == {"0": "ready"}


def test_a_notice_that_comes_twice_is_one():
    driver = Driver.ready(max_bytes=40)
    driver.tell(notice(1))
    assert driver.tell(notice(1, replaces=True)) == []
    driver.run(10.0)
    assert driver.phases == {"0": "ready"}


def test_a_notice_aborts_a_plan_that_is_carried_out_and_saves_what_can_be_saved():
    driver = Driver.ready(num_hosts=3, max_bytes=40)
    driver.begin(placement("1", "1", "2", "2"))
    driver.tell(notice(2))
    assert driver.told("aborted") == ["requested: drain of expert-2"]
    driver.run(10.0)
    assert "" not in driver.named
    assert "2" not in "".join(driver.named)
    assert driver.phases == {"0": "ready", "1": "ready"}


def test_after_a_notice_a_cluster_that_grows_saves_first_and_grows_then():
    driver = Driver.ready(num_hosts=2, max_bytes=40)
    driver.tell(ev.SizeRequested(3))
    driver.start("expert-2")
    driver.plan(placement("2", "0", "1", "1"))
    driver.tell(notice(1))
    driver.run(20.0)
    assert driver.phases == {"0": "ready", "2": "ready"}
    assert "" not in driver.named
    assert driver.told("resized") == ["requested: 2 to 3 hosts"]


def test_after_a_notice_a_cluster_that_shrinks_saves_what_is_on_all_that_go():
    driver = Driver.ready(num_hosts=3, max_bytes=40)
    driver.tell(ev.DrainRequested(("expert-0",)))
    driver.tell(notice(1))
    driver.run(20.0)
    assert driver.phases == {"2": "ready"}
    assert driver.named == ["2", "2", "2", "2"]
    assert driver.told("resized") == ["drain of expert-0"]


def test_a_notice_while_new_hosts_are_awaited_leaves_the_wait_as_it_is():
    driver = Driver.ready(num_hosts=2, max_bytes=40)
    driver.tell(ev.SizeRequested(3))
    driver.tell(notice(1))
    driver.run(5.0, starts=False)
    assert driver.phases == {"0": "ready", "2": "starting"}
    driver.run(10.0)
    assert driver.phases == {"0": "ready", "2": "ready"}
    assert driver.told("resized") == ["requested: 2 to 3 hosts"]


def test_a_new_host_that_must_go_again_is_not_waited_for():
    driver = Driver.ready(max_bytes=40, resize_s=300.0)
    driver.tell(ev.SizeRequested(4))
    driver.start("expert-2")
    driver.tell(notice(2, replaces=True))
    driver.run(5.0, starts=False)
    driver.run(10.0)
    assert driver.phases == {"0": "ready", "1": "ready", "3": "ready", "4": "ready"}
    driver.tell(ev.SizeRequested(3))
    driver.run(10.0)
    assert driver.state.num_hosts == 3


def test_a_notice_with_replacement_starts_others_that_get_their_share_when_they_are_up():
    driver = Driver.ready(max_bytes=40)
    driver.route(9, 9, 9, 9)
    driver.tell(notice(1, replaces=True))
    assert driver.to_start == {"expert-2"}
    driver.run(5.0, starts=False)
    assert driver.named == ["0", "0", "0", "0"]
    driver.run(10.0)
    assert driver.phases == {"0": "ready", "2": "ready"}
    assert "" not in driver.named
    assert "2" in "".join(driver.named)


def test_a_host_for_which_no_plan_could_be_made_gets_its_share_by_a_later_one():
    driver = Driver.ready(max_bytes=40, replan_s=5.0)
    driver.route(9, 9, 9, 9)
    driver.tell(notice(1, replaces=True))
    driver.start("expert-2")
    driver.load_all()
    driver.wait(5.0)
    driver.plan(why_not="no luck")
    assert driver.named == ["0", "0", "0", "0"]
    driver.run(10.0)
    assert "2" in "".join(driver.named)


def test_a_standby_that_must_go_is_replaced_by_a_standby():
    driver = Driver.ready(num_standbys=1)
    driver.tell(notice(2, replaces=True))
    driver.run(10.0)
    assert driver.phases == {"0": "ready", "1": "ready", "3": "standby"}


def test_a_notice_about_all_hosts_keeps_them_until_others_have_taken_over():
    driver = Driver.ready(max_bytes=20)
    driver.tell(notice(0, 1, replaces=True))
    driver.run(5.0, starts=False)
    assert driver.named == START
    driver.run(20.0)
    assert driver.phases == {"2": "ready", "3": "ready"}
    assert "" not in driver.named


def test_a_load_that_fails_during_an_evacuation_is_made_elsewhere():
    driver = Driver.ready(num_hosts=3, num_experts=3, max_bytes=30)
    driver.tell(notice(2))
    [(first, _)] = driver.orders.items()
    driver.answer(first, failure="disk full")
    [(second, _)] = driver.orders.items()
    assert {first, second} == {"expert-0", "expert-1"}
    driver.answer(second)
    assert driver.named[2] == second[-1]


@pytest.mark.parametrize("is_last", [False, True])
def test_the_death_of_a_node_before_all_was_saved_leaves_the_rest_to_stand_ins(is_last):
    driver = Driver.ready(max_bytes=40, chunk_bytes=10)
    driver.route(1, 1, 3, 9)
    driver.tell(notice(1))
    if is_last:
        driver.answer("expert-0")
    driver.lose("expert-1")
    assert driver.phases == {"0": "loading"}
    driver.load_all()
    assert driver.named == driver.placed == ["0", "0", "0", "0"]
