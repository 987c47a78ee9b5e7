"""What Prometheus scrapes from a router: its own counts, and what the controller says of the cluster.

Nothing is counted for it but a few distributions (`runtime/vitals.py`); all else is read when somebody asks. Served by
`service/openai/app.py`.
"""

from __future__ import annotations

import asyncio
import time

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from ray_moe.errors import RayMoEError
from ray_moe.service.backend import Backend
from ray_moe.service.metrics_experts import HotExperts
from ray_moe.service.metrics_page import Page
from ray_moe.service.refusals import Refusals
from ray_moe.types import ServiceStatus

STATUS_TIMEOUT_S = 2.0
"""What the controller has not said by then is left out: Prometheus gives up a scrape after ten seconds."""


class Metrics:
    """Of one router."""

    def __init__(self, backend: Backend, refusals: Refusals, max_experts: int) -> None:
        """Args:
        backend: what is told of.
        refusals: of all doors of the router.
        max_experts: that have a series of their own, over all layers.
        """
        self._backend = backend
        self._refusals = refusals
        self._experts = HotExperts(max_experts)

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        """All metrics in the format that the `Accept` header `accept` asks for, and the content type of that."""
        status = await self._status()
        measures = self._backend.measures()
        experts = self._experts.count(measures.tokens_per_expert, time.monotonic())
        registry = CollectorRegistry()  # not the process's own, which others may fill
        registry.register(Page(self._backend.model_name, measures, experts, status, self._refusals.counts))
        encode, content_type = choose_encoder(accept)
        return await asyncio.to_thread(encode, registry), content_type

    async def _status(self) -> ServiceStatus | None:
        try:
            return await asyncio.wait_for(self._backend.status(), STATUS_TIMEOUT_S)
        except (RayMoEError, asyncio.TimeoutError):
            return None
