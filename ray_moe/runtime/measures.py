"""What a router has counted, taken together at one moment, for `actors/router.py` and `service/metrics.py`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import psutil

from ray_moe.runtime.vitals import Vitals
from ray_moe.types import LayerPath, RouterStatus, RoutingTable

if TYPE_CHECKING:
    from ray_moe.runtime.engine import Engine
    from ray_moe.runtime.moe_layer import ExpertDispatcher

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Measures:
    """Totals are since the router began."""

    router: RouterStatus
    tokens_per_expert: Mapping[LayerPath, Ints] = field(default_factory=dict)
    """[E] tokens routed to each expert, by layer."""
    table: RoutingTable | None = None
    """The one in use."""
    vitals: Vitals | None = None
    """None while the model is being loaded."""
    hedges_won: int = 0
    """Calls that another host answered before the slow one."""
    kv_used_bytes: int = 0
    """Keys and values that are held, those of ended generations included that are kept for others."""
    kv_max_bytes: int = 0
    version: int | None = None
    """Of the weights that new requests are computed with; None while the model is being loaded."""
    replicas_wanted: int = 1
    """Of every expert, by the configuration."""


def measure(
    router: RouterStatus, engine: Engine | None, dispatcher: ExpertDispatcher | None, replicas_wanted: int = 1
) -> Measures:
    """Of a router that has come so far."""
    used_bytes, max_bytes = (0, 0) if engine is None else engine.kv_cache_bytes
    return Measures(
        router=router,
        tokens_per_expert={} if dispatcher is None else dispatcher.statistics.totals(),
        table=None if dispatcher is None else dispatcher.table,
        vitals=None if engine is None else engine.vitals,
        hedges_won=0 if dispatcher is None else dispatcher.statistics.num_hedges_won,
        kv_used_bytes=used_bytes,
        kv_max_bytes=max_bytes,
        version=None if engine is None else engine.version,
        replicas_wanted=replicas_wanted,
    )


def router_status(
    router_id: str, backbone_bytes: int, engine: Engine | None, dispatcher: ExpertDispatcher | None
) -> RouterStatus:
    """Of a router that has come so far, in this process."""
    status = RouterStatus(
        pid=os.getpid(),
        rss_bytes=psutil.Process().memory_info().rss,
        backbone_bytes=backbone_bytes,
        router_id=router_id,
    )
    if engine is not None:
        status = replace(
            status,
            active_requests=engine.active_requests,
            queued_requests=engine.queued_requests,
            generated_tokens=engine.num_generated_tokens,
            failed_requests=engine.vitals.num_failed,
            longest_pause_s=engine.vitals.longest_pause_s(),
        )
    if dispatcher is not None:
        statistics, own = dispatcher.statistics, dispatcher.own
        recent = statistics.balancedness()
        status = replace(
            status,
            retried_calls=statistics.num_retried_calls,
            hedged_calls=statistics.num_hedged_calls,
            own_rows=0 if own is None else own.num_rows,
            own_bytes=0 if own is None else own.held_bytes,
            lifeboat_loads=0 if own is None else own.num_lifeboat_loads,
            balancedness=sum(recent) / len(recent) if recent else 1.0,
        )
    return status
