from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.policy.migration import Move, copied_bytes, evict, find_homes, held_bytes, loads_of, moves, rehome, waves
from ray_moe.types import Placement

NO_LOAD: dict[str, np.ndarray] = {}


def placement(*rows, layer="a"):
    """``placement("x", "xy")``: expert 0 on host x, expert 1 on x and y."""
    return Placement({layer: tuple(tuple(hosts) for hosts in rows)})


def rows_of(of, layer="a"):
    return ["".join(hosts) for hosts in of.hosts_of[layer]]


# --- moves ---------------------------------------------------------------------------------------------------
def test_a_move_says_who_comes_and_who_goes_and_what_that_is():
    changes = moves(placement("x", "x", "xy", "x"), placement("y", "xy", "y", "x"))
    assert [(move.expert, move.added, move.removed, move.kind) for move in changes] == [
        (0, ("y",), ("x",), "move"),
        (1, ("y",), (), "replicate"),
        (2, (), ("x",), "drop"),
    ]


def test_another_order_of_an_experts_hosts_is_no_move():
    assert moves(placement("xy", "yx"), placement("yx", "yx")) == []


def test_a_layer_that_nobody_had_comes_whole():
    assert moves(Placement({}), placement("x", "y")) == [Move("a", 0, (), ("x",)), Move("a", 1, (), ("y",))]


def test_copied_bytes_are_those_of_the_replicas_that_come():
    changes = [Move("a", 0, ("x",), ("y",)), Move("a", 1, ("x",), ("x", "y", "z")), Move("b", 0, ("x", "y"), ("x",))]
    assert copied_bytes(changes, {"a": 10, "b": 1000}) == 30


# --- waves ---------------------------------------------------------------------------------------------------
HOSTS = "wxyz"
host_rows = st.lists(st.sampled_from(HOSTS), max_size=3, unique=True).map(tuple)
held_rows = st.lists(st.sampled_from(HOSTS), min_size=1, max_size=3, unique=True).map(tuple)


SLACK = st.integers(0, 2)


@st.composite
def changes_of_placement(draw, before=host_rows, after=held_rows, equal_sizes=False, slack=SLACK):
    """(current, target, expert_bytes, max_bytes): both fit, each host with some slack."""
    layers = draw(st.lists(st.sampled_from("ab"), min_size=1, max_size=2, unique=True))
    counts = {layer: draw(st.integers(1, 5)) for layer in layers}
    size = {layer: 7 if equal_sizes else draw(st.sampled_from([7, 10])) for layer in layers}

    def rows(of):
        return Placement({layer: tuple(draw(of) for _ in range(count)) for layer, count in counts.items()})

    current, target = rows(before), rows(after)
    most = {host: max(held_bytes(one, size).get(host, 0) for one in (current, target)) for host in HOSTS}
    return current, target, size, {host: used + draw(slack) * max(size.values()) for host, used in most.items()}


def walk(current, steps, size):
    """(step, bytes on each host while both the old and the new are there, rows before, rows after) of each step."""
    rows = {(layer, e): hosts for layer, row in current.hosts_of.items() for e, hosts in enumerate(row)}
    for step in steps:
        before = dict(rows)
        for move in step:
            assert rows[move.layer, move.expert] == move.before
            rows[move.layer, move.expert] = move.after
        used: defaultdict[str, int] = defaultdict(int)
        for key, hosts in rows.items():
            for host in {*hosts, *before[key]}:
                used[host] += size[key[0]]
        yield step, used, before, rows


@given(changes_of_placement())
def test_waves_lead_to_the_target_and_load_each_replica_once(change):
    current, target, size, most = change
    steps = waves(current, target, size, most, NO_LOAD)
    assert all(steps)
    rows = {(layer, e): hosts for layer, row in current.hosts_of.items() for e, hosts in enumerate(row)}
    for _, _, _, rows in walk(current, steps, size):  # noqa: B007
        pass
    for layer, row in target.hosts_of.items():
        assert [set(rows[layer, e]) for e in range(len(row))] == [set(hosts) for hosts in row]
    made = [move for step in steps for move in step]
    assert copied_bytes(made, size) == copied_bytes(moves(current, target), size)


@given(changes_of_placement())
def test_no_expert_is_without_a_replica_in_any_wave(change):
    current, target, size, most = change
    for _, _, before, after in walk(current, waves(current, target, size, most, NO_LOAD), size):
        for key, hosts in before.items():
            assert after[key] or not hosts


@given(changes_of_placement())
def test_no_host_exceeds_its_budget_by_more_than_an_expert(change):
    current, target, size, most = change
    for _, used, _, _ in walk(current, waves(current, target, size, most, NO_LOAD), size):
        assert all(used[host] <= most[host] + max(size.values()) for host in HOSTS)


one_host = st.sampled_from(HOSTS).map(lambda host: (host,))


@given(changes_of_placement(one_host, one_host, equal_sizes=True, slack=st.just(1)))
def test_with_room_for_one_expert_more_on_each_host_budgets_are_never_exceeded(change):
    current, target, size, most = change
    for _, used, _, _ in walk(current, waves(current, target, size, most, NO_LOAD), size):
        assert all(used[host] <= most[host] for host in HOSTS)


def test_what_has_no_room_beside_the_old_waits_for_the_next_wave():
    current, target = placement("x", "y", "y"), placement("y", "z", "y")
    steps = waves(current, target, {"a": 10}, {"x": 10, "y": 20, "z": 10}, NO_LOAD)
    assert [[move.expert for move in step] for step in steps] == [[1], [0]]


def test_a_ring_of_full_hosts_turns_in_one_step_each_with_an_expert_too_many():
    current, target = placement("x", "y", "x"), placement("y", "x", "x")
    steps = waves(current, target, {"a": 10}, {"x": 20, "y": 10}, NO_LOAD)
    assert [{move.expert for move in step} for step in steps] == [{0, 1}]


def test_a_replica_that_is_not_the_last_goes_first_where_its_room_is_lacking():
    current, target = placement("xy", "z"), placement("xz", "y")
    steps = waves(current, target, {"a": 10}, {"x": 10, "y": 10, "z": 10}, NO_LOAD)
    made = [[(move.expert, "".join(move.before), "".join(move.after)) for move in step] for step in steps]
    assert made == [[(1, "z", "y"), (0, "xy", "x")], [(0, "x", "xz")]]


def test_what_only_adds_waits_while_others_need_the_room():
    load = {"a": np.array([9.0, 1.0, 1.0])}
    current, target = placement("x", "x", "x"), placement("xy", "y", "y")
    steps = waves(current, target, {"a": 10}, {"y": 20}, load)
    assert [{move.expert for move in step} for step in steps] == [{1, 2}, {0}]


def test_experts_without_a_replica_go_first_and_then_the_hottest():
    load = {"a": np.array([1.0, 9.0, 5.0, 0.0])}
    current, target = placement("x", "x", "x", ""), placement("y", "y", "y", "y")
    assert [move.expert for move in waves(current, target, {"a": 10}, {}, load)[0]] == [3, 1, 2, 0]
    steps = waves(current, target, {"a": 10}, {"y": 20}, load)
    assert [move.expert for move in steps[0]] == [3, 1]


def test_a_host_over_its_limit_takes_nothing_more():
    current, target = placement("x", "x", "y", "y"), placement("y", "z", "y", "y")
    steps = waves(current, target, {"a": 10}, {"x": 20, "y": 15, "z": 10}, NO_LOAD)
    assert [[move.expert for move in step] for step in steps] == [[1]]
    assert waves(placement("x", "y"), placement("y", "y"), {"a": 10}, {"y": 5}, NO_LOAD) == []


def test_there_are_no_waves_when_there_is_nothing_to_do():
    assert waves(placement("xy"), placement("yx"), {"a": 10}, {}, NO_LOAD) == []


# --- homes ---------------------------------------------------------------------------------------------------
def test_the_hottest_orphans_get_the_room_and_the_others_are_named_homeless():
    load = {"a": np.array([1.0, 9.0, 5.0])}
    homes, homeless = find_homes([("a", 0), ("a", 1), ("a", 2)], {"x": 10, "y": 19}, {}, {"a": 10}, load, {})
    assert homes.keys() == {("a", 1), ("a", 2)}
    assert set(homes.values()) == {"x", "y"}
    assert homeless == [("a", 0)]


def test_an_orphan_goes_where_the_load_is_least_for_the_speed():
    load = {"a": np.array([10.0])}
    room, at_work = {"x": 99, "y": 99}, {"x": 30.0, "y": 10.0}
    assert find_homes([("a", 0)], room, at_work, {"a": 10}, load, {})[0] == {("a", 0): "y"}
    assert find_homes([("a", 0)], room, at_work, {"a": 10}, load, {"x": 4.0})[0] == {("a", 0): "x"}


def test_without_load_orphans_spread_over_the_room():
    homes, _ = find_homes([("a", e) for e in range(4)], {"x": 40, "y": 40}, {}, {"a": 10}, NO_LOAD, {})
    assert sorted(homes.values()) == ["x", "x", "y", "y"]


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9)), unique=True), st.lists(st.integers(0, 60), max_size=4)
)
def test_homes_keep_to_the_room_and_nobody_is_homeless_beside_room(orphans, room):
    room_bytes, size = dict(zip(HOSTS, room, strict=False)), {"a": 10, "b": 25}
    homes, homeless = find_homes(orphans, room_bytes, {}, size, NO_LOAD, {})
    assert homes.keys() | set(homeless) == set(orphans)
    assert not homes.keys() & set(homeless)
    left = dict(room_bytes)
    for (layer, _), host in homes.items():
        left[host] -= size[layer]
    assert all(free >= 0 for free in left.values())
    assert all(free < size[layer] for free in left.values() for layer, _ in homeless)


def test_an_experts_load_is_divided_over_its_replicas():
    load = {"a": np.array([6.0, 5.0, 7.0])}
    assert loads_of(placement("xy", "x", ""), load) == {"x": 8.0, "y": 3.0}
    assert loads_of(placement("xy"), NO_LOAD) == {"x": 0.0, "y": 0.0}


# --- rehome --------------------------------------------------------------------------------------------------
def test_only_experts_that_would_have_no_replica_left_get_a_new_home():
    after, homeless = rehome(placement("x", "xy", "z"), {"x"}, {"y": 99, "z": 0}, {"a": 10}, NO_LOAD, {})
    assert rows_of(after) == ["y", "y", "z"]
    assert homeless == []


def test_hosts_that_are_absent_keep_their_place_but_do_not_count():
    after, homeless = rehome(placement("xy", "x"), {"x"}, {"z": 10}, {"a": 10}, NO_LOAD, {}, absent={"y"})
    assert rows_of(after) == ["zy", ""]
    assert homeless == [("a", 1)]


@pytest.mark.parametrize("leaving", [{"z"}, set()])
def test_a_host_without_experts_goes_without_a_change(leaving):
    before = placement("x", "xy")
    assert rehome(before, leaving, {}, {"a": 10}, NO_LOAD, {}) == (before, [])


@given(changes_of_placement(), st.sets(st.sampled_from(HOSTS)), st.integers(0, 4))
def test_after_rehoming_nobody_is_on_a_leaving_host_and_the_rest_stays(change, leaving, slots):
    current, _, size, _ = change
    room = {host: 10 * slots for host in HOSTS if host not in leaving}
    after, homeless = rehome(current, leaving, room, size, NO_LOAD, {})
    rows = [hosts for experts in current.hosts_of.values() for hosts in experts]
    nobody_moves = all(set(hosts) - leaving for hosts in rows if hosts)
    for layer, experts in current.hosts_of.items():
        for expert, before in enumerate(experts):
            now, stays = after.hosts_of[layer][expert], tuple(host for host in before if host not in leaving)
            assert not leaving & set(now)
            if stays or not before:
                assert set(now) <= set(stays)  # a spare replica may make room
                assert now == stays or (now and not nobody_moves)
            else:
                assert (len(now) == 1) != ((layer, expert) in homeless)


# --- spare replicas make room ----------------------------------------------------------------------------------
def test_the_coldest_spare_replica_makes_room_and_never_the_last_that_is_loaded():
    load = {"a": np.array([1.0, 8.0, 2.0, 5.0])}
    rows = placement("xy", "xy", "yz", "")
    homes, shorter, homeless = evict([("a", 3)], rows.hosts_of, {"x": 0, "y": 0}, {"a": 10}, load, rows)
    assert (homes, shorter, homeless) == ({("a", 3): "x"}, {("a", 0): ("y",)}, [])
    there = placement("x", "xy", "yz", "")  # expert 0 is on its way to y
    homes, shorter, homeless = evict([("a", 3)], rows.hosts_of, {"x": 0, "y": 0}, {"a": 10}, load, there)
    assert (homes, shorter) == ({("a", 3): "y"}, {("a", 0): ("x",)})
    assert evict([("a", 3)], rows.hosts_of, {"z": 0}, {"a": 99}, load, rows)[0] == {("a", 3): "z"}
    assert evict([("a", 3)], placement("x", "y", "z", "").hosts_of, {"x": 0}, {"a": 1}, load, rows)[2] == [("a", 3)]
