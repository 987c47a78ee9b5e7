"""What is ignored: late, repeated and foreign messages, after which everything is as if they had never come."""

import copy

import pytest

from ray_moe.policy import events as ev
from ray_moe.policy.load import TokenCounts
from ray_moe.policy.tables import SKIPPED_EPOCHS
from tests.unit.policy.driver import LAYER, Driver, assert_ignored, of_kind, placement


def answers(order, incarnation=None, op_id=None):
    """All that a host could say about an order."""
    who = (op_id or order.op_id, order.host_id, incarnation or order.incarnation)
    return ev.ReplicasLoaded(*who), ev.ReplicasDropped(*who), ev.ReplicasFailed(*who, reason="no luck")


# --- routers -------------------------------------------------------------------------------------------------
def counts(sequence, *tokens, router="router", life="1", layer=LAYER):
    return ev.LoadReported(TokenCounts(router, life, sequence, {layer: tokens}), 0)


def busy():
    """Two reports of one router are in; its next would be number 3."""
    driver = Driver.ready(max_bytes=40)
    driver.route(5, 5, 5, 90)
    return driver


@pytest.mark.parametrize(
    "reports",
    [
        pytest.param([counts(1, 0, 0, 0, 0)], id="overtaken"),
        pytest.param([counts(2, 10**9, 0, 0, 0)], id="repeated"),
        pytest.param([counts(1, 10**9, 0, 0, 0, router="unknown")], id="the first of an unknown router"),
        pytest.param([counts(1, 10**9, 0, 0, 0, life="2")], id="the first of a restarted router"),
        pytest.param([counts(3, 10**9, layer="layers.9")], id="of a layer that the model lacks"),
        pytest.param([counts(3, *[10**9] * 5)], id="of other experts"),
        pytest.param([counts(1, 0, 0, 0, 0, life="2"), counts(9, 10**9, 0, 0, 0)], id="of an ended life"),
    ],
)
def test_a_load_report_is_ignored(reports):
    driver = busy()
    driver.now_s += 1.0
    assert_ignored(driver, *reports)


def test_load_that_counts_reaches_the_planner():
    driver = busy()
    driver.now_s += 1.0
    assert driver.tell(counts(3, 10**6, 100, 100, 1800)) == []
    driver.tell(ev.PlanRequested())
    assert driver.plans[0].load[LAYER].argmax() == 0


@pytest.mark.parametrize("tell", [ev.EpochSeen, lambda epoch: ev.LoadReported(counts(1, 0, 0, 0, 0).counts, epoch)])
def test_an_epoch_newer_than_ours_makes_the_next_table_well_newer_than_that(tell):
    driver = Driver.ready()
    ours, seen = driver.state.table, driver.state.table.epoch + 7
    [published] = of_kind(driver.tell(tell(seen)), ev.PublishTable)
    assert published.table.epoch > seen + SKIPPED_EPOCHS
    assert published.table.placement == ours.placement
    assert published.table.addresses == ours.addresses


def test_an_epoch_that_is_ours_or_older_is_ignored():
    driver = Driver.ready()
    assert_ignored(driver, *(ev.EpochSeen(epoch) for epoch in range(driver.state.table.epoch + 1)))


# --- hosts ---------------------------------------------------------------------------------------------------
def test_whatever_unknown_hosts_say_is_ignored():
    driver = Driver.ready()
    alien = ev.LoadReplicas("1.1", "expert-9", "expert-9:1", {LAYER: (0,)})
    said = (driver.started("expert-9", [0, 1, 2, 3]), ev.HostLost("expert-9", ""), ev.HostFailed("expert-9", "no room"))
    assert_ignored(driver, *said, *answers(alien), ev.SpeedReported("expert-9", "expert-9:1", 1.0))


def test_a_host_that_was_stopped_is_unknown():
    driver = Driver.ready(max_bytes=40)
    driver.tell(ev.DrainRequested(("expert-1",)))
    driver.run(10.0)
    assert driver.phases == {"0": "ready"}
    assert_ignored(driver, driver.started("expert-1", [2, 3]), ev.HostLost("expert-1", ""))


def test_whatever_an_ended_life_says_is_ignored_while_the_next_one_is_up():
    driver = Driver.ready()
    driver.lose("expert-1")
    driver.start("expert-1")
    order = driver.orders["expert-1"]
    old = driver.incarnation("expert-1", life=1)
    assert_ignored(
        driver,
        driver.started("expert-1", [2, 3], life=1),
        ev.HostLost("expert-1", old),
        ev.SpeedReported("expert-1", old, 1e12),
        *answers(order, incarnation=old),
    )


def test_a_life_whose_end_nobody_noticed_ends_when_the_next_one_speaks():
    driver = Driver.ready()
    driver.num_lives["expert-1"] = 2
    driver.tell(driver.started("expert-1"))
    assert driver.named == ["0", "0", "", ""]
    driver.load_all()
    assert driver.named == ["0", "0", "1", "1"]
    assert driver.state.table.addresses["expert-1"].incarnation == driver.incarnation("expert-1", life=2)


def test_the_loss_of_a_host_that_is_lost_is_ignored():
    driver = Driver.ready()
    driver.lose("expert-1")
    assert_ignored(driver, ev.HostLost("expert-1", ""), ev.HostLost("expert-1", driver.incarnation("expert-1")))


def test_a_host_that_is_up_is_not_taken_for_one_that_cannot_start():
    assert_ignored(Driver.ready(), ev.HostFailed("expert-1", "said before it could"))


def test_a_host_that_says_again_that_it_lives_changes_nothing_even_if_it_said_so_before_it_had_loaded():
    driver = Driver.ready()
    assert_ignored(driver, driver.started("expert-1", [2, 3]), driver.started("expert-1", []))


def test_answers_to_past_orders_are_ignored():
    driver = Driver.ready(max_bytes=40)
    driver.begin(placement("0", "0", "01", "01"))
    past = driver.orders["expert-0"]
    driver.load_all()
    driver.begin(placement("01", "01", "01", "01"))
    present = driver.orders["expert-1"]
    unheard_of = answers(present, op_id="0.000000.999")
    assert_ignored(driver, *answers(past), *unheard_of, *answers(present, incarnation="expert-1:9"))


@pytest.mark.parametrize("number", range(3))
def test_an_answer_that_comes_twice_counts_once(number):
    """Loaded, dropped or failed; the second may say anything."""
    driver = Driver.ready(max_bytes=40)
    driver.begin(placement("1", "0", "1", "1"))
    if number == 1:
        driver.load_all()
        driver.wait(2.0)
    [(host_id, order)] = driver.orders.items()
    driver.tell(answers(order)[number])
    del driver.orders[host_id]
    assert_ignored(driver, *answers(order))


def test_speeds_that_are_no_speeds_are_ignored():
    driver = Driver.ready()
    mine = driver.incarnation("expert-1")
    assert_ignored(driver, *(ev.SpeedReported("expert-1", mine, v) for v in (0.0, -1.0, float("inf"), float("nan"))))


# --- plans ---------------------------------------------------------------------------------------------------
def test_a_plan_of_another_operation_is_ignored():
    driver = Driver.ready(max_bytes=40)
    for op_id in ("0.000000.1", ""):
        assert_ignored(copy.deepcopy(driver), ev.PlacementPlanned(op_id, placement("1", "1", "0", "0")))
    driver.tell(ev.PlanRequested())
    overtaken = driver.plans.pop()
    driver.tell(ev.PlanRequested())
    assert_ignored(driver, ev.PlacementPlanned(overtaken.op_id, placement("1", "1", "0", "0")))


def test_a_plan_that_comes_twice_counts_once():
    driver = Driver.ready(max_bytes=40)
    driver.tell(ev.PlanRequested())
    order = driver.plans[0]
    driver.plan(placement("1", "0", "1", "1"))
    driver.run(10.0)
    assert_ignored(driver, ev.PlacementPlanned(order.op_id, placement("0", "0", "1", "1")))


def test_a_plan_that_was_asked_for_and_names_a_host_that_has_gone_is_made_anew_without_it():
    driver = Driver.ready(num_hosts=3, max_bytes=40)
    driver.tell(ev.PlanRequested())
    driver.lose("expert-2")
    driver.load_all()
    [again] = of_kind(driver.plan(placement("0", "1", "2", "2")), ev.PlanPlacement)
    assert [host.host_id for host in again.hosts] == ["expert-0", "expert-1"]
    assert "2" not in "".join(driver.named)


def test_a_plan_of_the_balancer_that_names_a_host_that_has_gone_is_forgotten():
    driver = Driver.ready(num_hosts=3, max_bytes=40, balance=True)
    driver.route(5, 5, 5, 90)
    driver.wait(5.0)
    assert driver.plans
    driver.lose("expert-2")
    driver.load_all()
    before = driver.placed
    driver.plan(placement("2", "2", "2", "2"))
    assert driver.placed == before
    assert not driver.plans
    assert not driver.orders


def test_a_plan_that_changes_nothing_is_no_change():
    driver = Driver.ready()
    assert driver.begin(placement("0", "0", "1", "1")) == []
    driver.tell(ev.SizeRequested(3))
    assert driver.to_start == {"expert-2"}
