"""Where a layer's slots go, given a routing table."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ray_moe.runtime.routing import FEW_ROWS, LayerRoutes, View
from ray_moe.types import HostAddress, Placement, RoutingTable

LAYER, NUM_EXPERTS, HOSTS = "experts", 6, ("a", "b", "c")


def routes_of(*homes: tuple[str, ...]) -> LayerRoutes:
    addresses = {name: HostAddress(name, "1", "node", 1, "", "") for name in HOSTS}
    return View(RoutingTable(1, Placement({LAYER: homes}), addresses)).routes(LAYER)


def homes_of(routes: LayerRoutes, index: np.ndarray, rows: tuple[float, ...] = (0, 0, 0, 0)) -> np.ndarray:
    homes = routes.hosts_of(index, lambda hosts: (np.array(rows, dtype=float), np.zeros(4)))
    assert homes is not None
    return homes


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
