"""What the dashboard shows at one moment, ready to be JSON.

Counts are totals, as everywhere: the page makes rates of two pictures. Where which expert is comes only with a table
that the page does not have yet. Nothing is kept here but the last answer of the controller, so that any number of open
pages asks it no more often than one. Called by `routes.py`.

Shape legend: L layers, E experts of a layer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ray_moe.errors import RayMoEError
from ray_moe.runtime.histogram import Histogram
from ray_moe.runtime.measures import Measures
from ray_moe.service.backend import Backend
from ray_moe.types import LayerPath, RoutingTable, ServiceStatus

STATUS_TIMEOUT_S = 2.0
"""What the controller has not said by then is left out of the picture."""
SHARED_S = 0.5
"""For so long one answer of the controller is good for every page."""


class Pictures:
    """Of the service, as one router and the controller see it."""

    def __init__(self, backend: Backend, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds from any origin; never goes back."""
        self._backend = backend
        self._clock = clock
        self._lock = asyncio.Lock()
        self._status: ServiceStatus | None = None
        self._asked_s = float("-inf")

    async def take(self, known_epoch: int | None = None) -> dict[str, Any]:
        """Everything, but for the placement of `known_epoch`, which the page has."""
        status = await self._ask()
        measures = self._backend.measures()
        layers = self._layers(measures)
        table = measures.table
        return {
            "at_s": self._clock(),
            "unix_s": time.time(),
            "service": _service(status),
            "router": asdict(measures.router),
            "kv_used_bytes": measures.kv_used_bytes,
            "kv_max_bytes": measures.kv_max_bytes,
            "hedges_won": measures.hedges_won,
            "hosts": _hosts(status, table),
            "layers": layers,
            "tokens": [measures.tokens_per_expert[path].tolist() for path in layers],
            "epoch": 0 if table is None else table.epoch,
            "placement": None if table is None or table.epoch == known_epoch else _placement(table, layers, measures),
            "vitals": _vitals(measures),
            "events": [] if status is None else [asdict(event) for event in status.events],
            "versions": [] if status is None else [asdict(version) for version in status.versions],
        }

    async def _ask(self) -> ServiceStatus | None:
        async with self._lock:
            if self._clock() - self._asked_s >= SHARED_S:
                try:
                    self._status = await asyncio.wait_for(self._backend.status(), STATUS_TIMEOUT_S)
                except (RayMoEError, asyncio.TimeoutError):
                    self._status = None
                self._asked_s = self._clock()
            return self._status

    def _layers(self, measures: Measures) -> list[LayerPath]:
        """In the order of the model, once that is known."""
        counted = measures.tokens_per_expert
        known = [path for path in self._backend.layers if path in counted] if self._backend.ready else []
        return known or list(counted)


def _service(status: ServiceStatus | None) -> dict[str, Any] | None:
    """None where the controller did not tell."""
    if status is None:
        return None
    names = ("model", "model_type", "version", "state", "uptime_s", "changing", "p_lossless")
    return {name: getattr(status, name) for name in names} | {"routers": [asdict(each) for each in status.routers]}


def _hosts(status: ServiceStatus | None, table: RoutingTable | None) -> list[dict[str, Any]]:
    speeds: Mapping[str, float] = {} if table is None else table.speeds
    return [
        asdict(host) | {"speed": speeds.get(host.host_id, 1.0)} for host in (() if status is None else status.hosts)
    ]


def _placement(table: RoutingTable, layers: Sequence[LayerPath], measures: Measures) -> dict[str, Any]:
    """Which of the hosts that are there have each expert, by number, and how many whole replicas that makes."""
    hosts = list(table.addresses)
    number = {host_id: index for index, host_id in enumerate(hosts)}
    holders, replicas = [], []
    for path in layers:
        num_experts = len(measures.tokens_per_expert[path])
        there = [[number[host] for host in named if host in number] for named in table.placement.hosts_of.get(path, ())]
        # Where experts are cut (`policy/parts.py`), part p of expert e is at p·E + e, and whole is what all parts are.
        parts = [there[expert::num_experts] for expert in range(num_experts)]
        holders.append([sorted({host for part in each for host in part}) for each in parts])
        replicas.append([min(map(len, each), default=0) for each in parts])
    return {"hosts": hosts, "holders": holders, "replicas": replicas}


def _vitals(measures: Measures) -> dict[str, Any] | None:
    """None while the model is being loaded."""
    vitals = measures.vitals
    if vitals is None:
        return None
    return {
        "queue_age_s": vitals.queue_age_s,
        "first_tokens_s": _counts(vitals.first_tokens_s),
        "token_gaps_s": _counts(vitals.token_gaps_s),
    }


def _counts(histogram: Histogram) -> dict[str, Any]:
    reading = histogram.read()
    return {"bounds": reading.bounds, "counts": reading.counts}
