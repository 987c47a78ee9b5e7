"""What a router has counted, taken together at one moment, for whoever tells others of it (`service/metrics.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

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


def measure(router: RouterStatus, engine: Engine | None, dispatcher: ExpertDispatcher | None) -> Measures:
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
    )
