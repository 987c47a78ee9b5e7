"""The routers of a service, as its controller sees them.

Those that the service starts itself are kept alive, each by a task of its own; those that Ray Serve keeps only report.
Clients are told of both. Used by `controller.py` alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from ray_moe.actors.spec import RouterReport, RouterVersions
from ray_moe.policy.scaling import Signals
from ray_moe.types import RouterAddress

RETRY_S = 0.05
"""Pause before a router that is restarting is asked again."""
FAILED_S = 1.0
"""Pause before what failed is tried again."""
SILENT_S = 10.0
"""A router that has said nothing for so long is taken for gone. They report each second."""


@dataclass(slots=True)
class _Router:
    address: RouterAddress
    handle: Any = None
    """Of one that is kept here."""
    report: RouterReport | None = None
    versions: RouterVersions | None = None
    heard_s: float = 0.0


class Routers:
    """All that is known of them."""

    def __init__(
        self,
        launcher: Any,
        on_ready: Callable[[], None],
        on_failure: Callable[[str, RayError], None],
    ) -> None:
        """`on_ready` hears that a router has become ready, `on_failure` that one cannot start and why."""
        self._launcher = launcher
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._routers: dict[str, _Router] = {}

    # --- what they say ---------------------------------------------------------------------------------------
    def heard(self, report: RouterReport) -> None:
        """Take a router's report in."""
        router = self._routers.setdefault(report.router.router_id, _Router(report.router))
        router.report, router.heard_s = report, time.monotonic()
        router.versions = report.versions
        if router.handle is None:
            router.address = report.router

    def has(self, router_id: str, versions: RouterVersions) -> None:
        """Take in which versions of the weights a router has."""
        router = self._routers.get(router_id)
        if router is not None:
            router.versions = versions

    def left(self, router_id: str) -> None:
        """A router that is not kept here has ended as it should."""
        self._routers.pop(router_id, None)

    @property
    def addresses(self) -> tuple[RouterAddress, ...]:
        """Of all that listen, also of those that are not ready."""
        self._forget_silent()
        addresses = (self._routers[router_id].address for router_id in sorted(self._routers))
        return tuple(address for address in addresses if address.grpc_address)

    @property
    def num_ready(self) -> int:
        return sum(address.ready for address in self.addresses)

    def signals(self, utilisation: float) -> Signals | None:
        """What the service feels, all routers together; None while none has told."""
        now_s = time.monotonic()
        felt = [r.report for r in self._routers.values() if r.report is not None and now_s - r.heard_s < SILENT_S]
        if not felt:
            return None
        return Signals(utilisation, max(report.queue_age_s for report in felt), min(report.idle_s for report in felt))

    # --- versions of the weights -----------------------------------------------------------------------------
    @property
    def versions(self) -> list[RouterVersions]:
        """Of all that have told, those that are ending included."""
        self._forget_silent()
        return [router.versions for router in self._routers.values() if router.versions is not None]

    def check_loaded(self, version: int) -> None:
        """Raises what a router says why it cannot load `version`."""
        for told in self.versions:
            if told.failure is not None and told.failed == version:
                raise told.failure

    def have_loaded(self, version: int) -> bool:
        """Whether all that answer requests have. Those that start load what there is before they do."""
        return all(told is not None and version in told.loaded for told in self._ready_versions())

    def have_adopted(self, revision: int) -> bool:
        """Whether all that answer requests know this revision of the versions."""
        return all(told is not None and told.revision >= revision for told in self._ready_versions())

    def _ready_versions(self) -> list[RouterVersions | None]:
        self._forget_silent()
        return [router.versions for router in self._routers.values() if router.address.ready]

    def _forget_silent(self) -> None:
        now_s = time.monotonic()
        for router_id, router in list(self._routers.items()):
            if router.report is not None and router.handle is None and now_s - router.heard_s > SILENT_S:
                self.left(router_id)

    # --- the lives of those that are kept here ---------------------------------------------------------------
    async def keep(self, router_id: str) -> None:
        """Bring a router up, wait for its end, again and again."""
        router = self._routers.setdefault(router_id, _Router(RouterAddress(router_id, "")))
        ended = False
        while True:
            try:
                router.handle = await self._launcher.start_router.remote(router_id, ended)
                ended = False
                router.address = await router.handle.start.remote(router.address)
                self._on_ready()
                await router.handle.until_lost.remote()
            except ActorUnavailableError:  # Ray restarts it
                router.address, router.versions = replace(router.address, ready=False), None
            except RayError as error:  # for good, or it cannot start
                router.address, router.versions = replace(router.address, ready=False), None
                ended = not isinstance(error, RayTaskError)
                self._on_failure(f"{router_id} cannot start", error)
                await asyncio.sleep(FAILED_S)
            await asyncio.sleep(RETRY_S)

    @property
    def handles(self) -> list[Any]:
        """Of the kept ones."""
        return [router.handle for router in self._routers.values() if router.handle is not None]
