"""Where rows can go at one moment, and how evenly a batch loads the hosts. What a router does, without the computing.

A layer's routes are worked out again only when its part of the table, or who is there, has changed. Balancedness is
mean / highest over all hosts that serve, whether or not they hold an expert of the layer: all of them are paid for.

Shape legend: L layers, E experts, R replicas, H hosts that count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ray_moe.policy.rows import Row
from ray_moe.policy.split import Replicas, choose_replicas, split_tokens
from ray_moe.simulate.trace import Floats, Ints
from ray_moe.types import HostId, LayerPath, Placement

FEW_ROWS = 32
"""A batch with no more rows than this costs the hosts the experts that they touch, and no expert is split."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerRoutes:
    """Where the experts of one layer are."""

    rows: tuple[Row, ...]
    """As the table has them."""
    named: frozenset[HostId]
    replicas: Replicas
    orphans: Ints
    """Experts that no living host is named for."""


class Routes:
    """See the module."""

    def __init__(self, layers: Sequence[LayerPath]) -> None:
        self.hosts: tuple[HostId, ...] = ()
        """[H] the hosts that count: those that serve, and those that rows are sent to."""
        self._layers = layers
        self._routes: list[LayerRoutes] = []

    def refresh(self, placement: Placement, alive: Mapping[HostId, bool]) -> None:
        """Look again at the table.

        Args: alive: hosts that live, and whether each of them serves (standbys and leaving ones do not).
        """
        rows = [placement.hosts_of[layer] for layer in self._layers]
        old: Sequence[LayerRoutes | None] = self._routes or [None] * len(rows)
        names = [
            route.named if route is not None and route.rows is now else frozenset().union(*now)
            for route, now in zip(old, rows, strict=True)
        ]
        named: frozenset[HostId] = frozenset().union(*names)
        hosts = tuple(sorted(host for host, serves in alive.items() if serves or host in named))
        number = {host: place for place, host in enumerate(hosts)}
        self._routes = [
            route if route is not None and route.rows is now and hosts == self.hosts else _routes(now, mine, number)
            for route, now, mine in zip(old, rows, names, strict=True)
        ]
        self.hosts = hosts

    def orphans(self) -> list[tuple[int, Ints]]:
        """Number of each layer with experts that nobody holds, and which."""
        return [(number, route.orphans) for number, route in enumerate(self._routes) if len(route.orphans)]

    def split(self, batch: Ints) -> Floats:
        """What each host has to do for a batch.

        Args: batch: [L, E] rows.

        Returns: [L, H] rows, or distinct experts for a batch of a few rows.
        """
        load = np.zeros((len(self._routes), len(self.hosts)))
        for layer, route in enumerate(self._routes):
            count, replicas = batch[layer, : len(route.rows)], route.replicas
            if not len(replicas.host):
                continue
            if int(count.sum()) > FEW_ROWS:
                load[layer] = np.bincount(replicas.host, split_tokens(count, replicas), len(self.hosts))
            else:
                chosen = choose_replicas(np.flatnonzero(count), replicas)
                load[layer] = np.bincount(replicas.host[chosen[chosen >= 0]], minlength=len(self.hosts))
        return load


def balancedness(load: Floats) -> float:
    """[L, H] -> mean over the layers with any load of mean / highest; 1 without any."""
    most = load.max(-1, initial=0.0)
    busy = most > 0
    return float((load[busy].mean(-1) / most[busy]).mean()) if busy.any() else 1.0


def _routes(rows: tuple[Row, ...], named: frozenset[HostId], number: Mapping[HostId, int]) -> LayerRoutes:
    homes = [[number[host] for host in hosts if host in number] for hosts in rows]
    orphans = np.array([expert for expert, there in enumerate(homes) if not there], dtype=np.int64)
    return LayerRoutes(rows, named, Replicas.of(homes, len(number)), orphans)
