"""Where a layer's slots go, given a routing table."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.runtime.routing import FEW_ROWS, LayerRoutes, Routes, View
from ray_moe.types import HostAddress, Placement, RoutingTable

LAYER, NUM_EXPERTS, HOSTS = "experts", 6, ("a", "b", "c")


def routes_of(*homes: tuple[str, ...]) -> LayerRoutes:
    addresses = {name: HostAddress(name, "1", "node", 1, "", "") for name in HOSTS}
    return View(RoutingTable(1, Placement({LAYER: homes}), addresses)).routes(LAYER)


def homes_of(routes: LayerRoutes, index: np.ndarray, rows: tuple[float, ...] = (0, 0, 0, 0)) -> np.ndarray:
    owner, host = routes.hosts_of(index, lambda hosts: (np.array(rows, dtype=float), np.zeros(4)))
    return owner[index] if host is None else host


@pytest.mark.parametrize("rows", [1, 5, FEW_ROWS])
def test_where_no_expert_has_many_rows_none_is_split_and_hosts_read_equally_many(rows: int) -> None:
    routes = routes_of(*[("a", "b"), ("b", "c"), ("c", "a")] * 2)
    index = np.repeat(np.arange(NUM_EXPERTS), rows)
    homes = homes_of(routes, index)
    of_expert = [set(homes[index == expert]) for expert in range(NUM_EXPERTS)]
    assert all(len(one) == 1 for one in of_expert)
    assert set(Counter(min(one) for one in of_expert).values()) == {2}


def test_where_an_expert_has_many_rows_they_are_divided() -> None:
    routes = routes_of(*[("a", "b", "c")] * NUM_EXPERTS)
    index = np.concatenate([np.zeros(3 * FEW_ROWS, dtype=np.int64), np.arange(1, NUM_EXPERTS)])
    assert sorted(Counter(homes_of(routes, index).tolist()).values()) == [17, 18, 18]


def test_the_sentinel_goes_nowhere() -> None:
    routes = routes_of(*[("a", "b")] * NUM_EXPERTS)
    for rows in (1, 2 * FEW_ROWS):
        index = np.repeat([2, NUM_EXPERTS, 4], rows)
        homes = homes_of(routes, index)
        assert (homes[index == NUM_EXPERTS] == -1).all()
        assert (homes[index != NUM_EXPERTS] >= 0).all()


def test_replicas_of_a_lone_expert_take_turns() -> None:
    routes = routes_of(*[("a", "b", "c")] * NUM_EXPERTS)
    homes = [int(homes_of(routes, np.full(4, 3))[0]) for _ in range(30)]
    assert set(Counter(homes).values()) == {10}


def table_of(epoch: int, rows: tuple[tuple[str, ...], ...], there: set[str]) -> RoutingTable:
    addresses = {name: HostAddress(name, "1", "node", 1, "", "") for name in sorted(there)}
    return RoutingTable(epoch, Placement({LAYER: rows}), addresses)


SOME_HOSTS = st.frozensets(st.sampled_from(HOSTS))
SOME_EXPERTS = st.frozensets(st.integers(0, 3))


@given(
    st.lists(st.lists(st.sampled_from(HOSTS), unique=True).map(tuple), min_size=4, max_size=4).map(tuple),
    st.lists(SOME_HOSTS, min_size=5, max_size=5),
    st.lists(st.tuples(st.sampled_from(HOSTS), st.integers(0, 3)), max_size=3),
    st.tuples(SOME_EXPERTS, SOME_EXPERTS),
    st.booleans(),
)
def test_an_expert_is_asked_of_whom_the_rules_name(rows, hosts, missing, own, has_lifeboat) -> None:
    there, out, late, hung, avoid = hosts
    late, place = late | hung, (0, LAYER)
    view = View(
        table_of(1, rows, set(there)),
        out=out,
        late=late,
        hung=hung,
        missing=frozenset((host, place, expert) for host, expert in missing),
        cached={place: own[0]},
        aboard={place: own[1]},
        has_lifeboat=has_lifeboat,
    )
    routes = view.routes(LAYER, avoid)
    for expert, names in enumerate(rows):
        live = [n for n in names if n in there and n not in out and n not in avoid and (n, expert) not in missing]
        prompt = [name for name in live if name not in late]
        expected = prompt or live
        if expert in own[0] or (not prompt and (expert in own[1] or (has_lifeboat and set(live) <= hung))):
            expected = []
        numbers = [view.hosts.index(name) for name in expected] or [view.here]
        assert routes.owner[expert] == numbers[0]
        if routes.replicas is None:
            assert len(numbers) == 1
        else:
            start = routes.replicas.start
            assert routes.replicas.host[start[expert] : start[expert + 1]].tolist() == numbers


def test_what_a_table_names_is_read_once_for_all_views_of_it_and_for_tables_with_the_same_layer() -> None:
    rows = (("a", "b"), ("c",))
    routes = Routes()
    routes.update(table_of(1, rows, set(HOSTS)))
    first = routes.view
    first.routes(LAYER)
    routes.set_late("a", True)
    routes.view.routes(LAYER)
    assert routes.view.named[LAYER] is first.named[LAYER]
    routes.update(table_of(2, rows, set(HOSTS)))
    assert routes.view.routes(LAYER).owner.tolist() == [1, 2, -1]  # one is late
    assert routes.view.named[LAYER] is first.named[LAYER]
    routes.update(table_of(3, rows, {"b", "c"}))  # other numbers
    assert routes.view.routes(LAYER).owner.tolist() == [0, 1, -1]
    routes.update(table_of(4, (("c",), ("b",)), {"b", "c"}))
    assert routes.view.routes(LAYER).owner.tolist() == [1, 0, -1]
