from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.policy import events as ev
from ray_moe.policy.cluster_state import ClusterState
from ray_moe.policy.migration import held_bytes
from ray_moe.policy.recovery import placement_by_holders
from ray_moe.policy.rows import Rows
from ray_moe.policy.tables import EPOCHS_OF_A_LIFE, SKIPPED_EPOCHS
from ray_moe.types import HostAddress, Placement
from tests.unit.policy.driver import LAYER, Driver, homes, layers_of, of_kind, placement, settings_of

# --- placement_by_holders ------------------------------------------------------------------------------------


def placed(held, budgets, fallback, num_experts=4):
    """`held` by the number of a host; `budgets` in experts."""
    rows = Rows({LAYER: num_experts})
    for number, experts in held.items():
        rows.add(f"expert-{number}", {LAYER: experts})
    budget_bytes = {f"expert-{number}": 10 * slots for number, slots in budgets.items()}
    return homes(placement_by_holders(rows, budget_bytes, fallback, {LAYER: num_experts}, {LAYER: 10}))


def test_experts_are_placed_where_they_are_held_whatever_the_placement_was_before():
    assert placed({0: [2, 3], 1: [0, 1]}, {0: 2, 1: 2}, placement("0", "0", "1", "1")) == ["1", "1", "0", "0"]


def test_the_host_that_had_an_expert_before_is_the_first_of_its_holders():
    assert placed({0: [0], 1: [0]}, {0: 2, 1: 2}, placement("1"), 1) == ["10"]


def test_further_replicas_are_kept_as_far_as_the_budgets_go():
    assert placed({0: [0, 1], 1: [0, 1, 2, 3]}, {0: 3, 1: 2}, placement("0", "0", "1", "1")) == ["0", "0", "1", "1"]
    assert placed({0: [0, 1], 1: [0, 1, 2, 3]}, {0: 3, 1: 3}, placement("0", "0", "1", "1")) == ["01", "0", "1", "1"]


def test_one_replica_is_kept_even_beyond_the_budget():
    assert placed({0: [0, 1, 2, 3]}, {0: 1, 1: 9}, placement("0", "0", "1", "1")) == ["0", "0", "0", "0"]


def test_what_nobody_holds_goes_where_it_was_before_then_to_the_emptiest_then_nowhere():
    before = placement("0", "0", "0", "0")
    assert placed({}, {0: 4, 1: 9}, before) == ["0", "0", "0", "0"]
    assert placed({}, {0: 2, 1: 1}, before) == ["0", "0", "1", ""]


def test_hosts_that_are_not_to_serve_get_nothing():
    assert placed({2: [0, 1, 2, 3]}, {0: 4, 1: 4}, placement("2", "2", "1", "1")) == ["0", "1", "1", "1"]
    assert placed({2: [0]}, {}, placement("2"), 1) == [""]


@given(
    st.dictionaries(st.integers(0, 3), st.sets(st.integers(0, 5)), max_size=4),
    st.dictionaries(st.integers(0, 3), st.integers(0, 7), max_size=4),
    st.lists(st.sampled_from(["", "0", "1", "03", "321"]), min_size=6, max_size=6),
)
def test_what_is_held_stays_reachable_and_what_is_added_fits(held, budgets, before):
    result = placed(held, budgets, placement(*before), 6)
    for expert, hosts in enumerate(result):
        holders = {str(number) for number, experts in held.items() if expert in experts and number in budgets}
        assert set(hosts) <= (holders or {str(number) for number in budgets})
        assert hosts or not holders
        assert len(hosts) <= max(1, len(holders))
    for number, slots in budgets.items():
        kept = held_bytes(placement(*(row[:1] for row in result)), {LAYER: 10}).get(f"expert-{number}", 0)
        assert held_bytes(placement(*result), {LAYER: 10}).get(f"expert-{number}", 0) <= max(10 * slots, kept)


# --- ClusterState.recovered ----------------------------------------------------------------------------------
BEFORE = placement("0", "0", "1", "1")


def report(number, held, unsettled=(), life=1):
    address = HostAddress(f"expert-{number}", f"expert-{number}:{life}", "node", 1, "", "")
    return ev.HostStarted(address, {LAYER: tuple(held)}, unsettled={LAYER: tuple(unsettled)})


def recovered(*reports, hosts=2, standbys=0, life=1, **settings):
    names = [f"expert-{number}" for number in range(hosts + standbys)]
    return ClusterState.recovered(
        settings_of(**settings), reports, names[:hosts], names[hosts:], BEFORE, life, now_s=100.0
    )


def test_what_hosts_hold_is_what_they_are_to_hold_so_nothing_is_loaded_or_dropped():
    state = recovered(report(0, [2, 3]), report(1, [0, 1, 2]))
    instructions = state.handle(ev.Ticked(), 100.0)
    assert homes(state.placement) == homes(state.table.placement) == ["1", "1", "10", "0"]
    assert state.table.addresses.keys() == {"expert-0", "expert-1"}
    assert of_kind(instructions, ev.LoadReplicas) == []
    assert of_kind(instructions, ev.DropReplicas) == []
    assert len(of_kind(instructions, ev.PublishTable)) == 1


def test_no_table_names_what_is_unsettled_until_it_is_loaded_anew():
    state = recovered(report(0, [0, 1], unsettled=[1]), report(1, [2], unsettled=[3]))
    instructions = state.handle(ev.Ticked(), 100.0)
    assert homes(state.table.placement) == ["0", "", "1", ""]
    orders = of_kind(instructions, ev.LoadReplicas)
    assert {order.host_id: layers_of(order.experts) for order in orders} == {"expert-0": (1,), "expert-1": (3,)}
    for order in orders:
        state.handle(ev.ReplicasLoaded(order.op_id, order.host_id, order.incarnation), 101.0)
    assert homes(state.table.placement) == ["0", "0", "1", "1"]


def test_the_first_event_brings_a_table_and_nothing_does_before():
    state = recovered(report(0, [0, 1]), report(1, [2, 3]))
    assert state.table.addresses == {}
    [published] = of_kind(state.handle(ev.Ticked(), 100.0), ev.PublishTable)
    assert homes(published.table.placement) == ["0", "0", "1", "1"]


def test_the_first_table_of_a_life_is_newer_than_all_of_the_lives_before_even_if_no_router_has_heard_of_them():
    epochs = []
    for life in (1, 2, 3):
        state = recovered(report(0, [0, 1]), report(1, [2, 3]), life=life)
        for event in (ev.Ticked(), ev.HostLost("expert-1", "")):
            [published] = of_kind(state.handle(event, 100.0), ev.PublishTable)
            epochs.append(published.table.epoch)
    assert epochs == sorted(set(epochs))


def test_what_is_dropped_is_named_by_no_table_of_a_life_before_that_a_router_may_still_use():
    tables = []
    for life, held in ((1, []), (2, [0, 1])):
        state = recovered(report(0, held), report(1, [0, 1, 2, 3]), life=life)
        tables += [one.table for one in of_kind(state.handle(ev.Ticked(), 100.0), ev.PublishTable)]
    in_use = max(tables, key=lambda table: table.epoch)  # by a router, which never goes back
    [order] = of_kind(state.handle(ev.Ticked(), 102.0), ev.DropReplicas)
    assert (order.host_id, layers_of(order.experts)) == ("expert-1", (1,))
    assert homes(in_use.placement) == ["01", "0", "1", "1"]


def test_a_router_with_a_table_of_nobody_here_gets_one_well_after_its_own():
    state = recovered(report(0, [0, 1]), report(1, [2, 3]))
    state.handle(ev.Ticked(), 100.0)
    foreign = 2 * EPOCHS_OF_A_LIFE + 7000
    [published] = of_kind(state.handle(ev.EpochSeen(foreign), 100.5), ev.PublishTable)
    assert published.table.epoch == state.table.epoch > foreign + SKIPPED_EPOCHS
    assert homes(published.table.placement) == ["0", "0", "1", "1"]


def test_answers_to_orders_of_the_life_before_are_ignored():
    driver = Driver()
    driver.start("expert-0", "expert-1")
    old = driver.orders["expert-0"]
    state = recovered(report(0, []), report(1, [2, 3]))
    [order] = of_kind(state.handle(ev.Ticked(), 100.0), ev.LoadReplicas)
    assert order.op_id != old.op_id
    assert state.handle(ev.ReplicasLoaded(old.op_id, "expert-0", "expert-0:1"), 101.0) == []
    assert homes(state.table.placement) == ["", "", "1", "1"]


def test_a_host_that_says_nothing_keeps_its_place_for_a_while_and_then_others_stand_in():
    state = recovered(report(1, [2, 3]), return_s=60.0, max_bytes=40)
    for now_s in (100.0, 159.9):
        assert of_kind(state.handle(ev.Ticked(), now_s), ev.LoadReplicas) == []
        assert homes(state.placement) == ["0", "0", "1", "1"]
    [order] = of_kind(state.handle(ev.Ticked(), 160.0), ev.LoadReplicas)
    assert (order.host_id, layers_of(order.experts)) == ("expert-1", (0, 1))
    assert homes(state.placement) == ["10", "10", "1", "1"]


def test_what_only_a_standby_holds_is_named_there_and_loaded_by_those_that_serve():
    state = recovered(report(0, [0, 1]), report(1, [2]), report(2, [3]), standbys=1)
    [order] = of_kind(state.handle(ev.Ticked(), 100.0), ev.LoadReplicas)
    assert homes(state.table.placement) == ["0", "0", "1", "2"]
    assert (order.host_id, layers_of(order.experts)) == ("expert-1", (3,))
    state.handle(ev.ReplicasLoaded(order.op_id, order.host_id, order.incarnation), 101.0)
    assert homes(state.table.placement) == ["0", "0", "1", "1"]


def test_reports_of_hosts_that_are_not_named_and_experts_that_the_model_lacks_are_passed_over():
    alien = replace(report(0, [0, 1, 4, -1]), held={LAYER: (0, 1, 4, -1), "other": (0,)})
    state = recovered(alien, report(1, [2, 3]), report(9, [0]))
    assert of_kind(state.handle(ev.Ticked(), 100.0), ev.LoadReplicas) == []
    assert set(state.hosts) == {"expert-0", "expert-1"}
    assert homes(state.table.placement) == ["0", "0", "1", "1"]


@pytest.mark.parametrize("can_sleep", [True, False])
def test_with_nobody_there_the_first_table_names_nobody(can_sleep):
    state = recovered(hosts=0, can_sleep=can_sleep)
    [published] = of_kind(state.handle(ev.Ticked(), 100.0), ev.PublishTable)
    assert published.table.placement == Placement({LAYER: ((), (), (), ())})
    assert state.is_asleep == can_sleep


def test_names_of_new_hosts_are_none_that_were_used():
    state = recovered(report(0, [0, 1]), report(1, [2, 3]), standbys=3)
    state.handle(ev.Ticked(), 100.0)
    assert ev.StartHost("expert-5") in state.handle(ev.SizeRequested(3), 101.0)
