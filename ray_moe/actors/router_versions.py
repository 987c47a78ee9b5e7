"""The versions of the weights on one router: it has those that the controller wants, and uses those that it says.

Which versions there are, the controller decides (`publisher.py`); reading them is `router_weights.py`. A version that
cannot be loaded is told of and tried again when the controller wants others; meanwhile the router stays with what it
has. A part of `router.py`, in its event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError

from ray_moe.actors.router_weights import RouterWeights
from ray_moe.actors.spec import RouterVersions
from ray_moe.errors import RayMoEError
from ray_moe.policy.versions import Versions, Weights

if TYPE_CHECKING:
    from ray_moe.runtime.engine import Engine
    from ray_moe.runtime.moe_layer import ExpertDispatcher

logger = logging.getLogger(__name__)

POLL_TIMEOUT_S = 10.0
"""How long one question for what comes next, versions or a routing table, stays open."""
AGAIN_S = 1.0
"""Pause before a version that could not be loaded is tried again."""


class VersionFollower:
    """`begin`, and then `follow` for as long as the router lives."""

    def __init__(self, router_id: str, weights: RouterWeights, controller: Callable[[], Any]) -> None:
        """Args: controller: the handle of the controller, which may be another one after a while."""
        self._router_id = router_id
        self._weights = weights
        self._controller = controller
        self._engine: Engine | None = None
        self._dispatcher: ExpertDispatcher | None = None
        self._adopted: Versions | None = None
        self._failed: tuple[int, RayMoEError] | None = None
        """A version that it cannot load, and why."""

    async def after(self, revision: int) -> Versions:
        """The versions, as soon as the controller has others than those of `revision`."""
        while True:
            try:
                versions: Versions = await self._controller().versions_after.remote(revision, POLL_TIMEOUT_S)
            except (RayError, ValueError) as error:  # it is being restarted, or failed
                logger.warning("the controller does not tell the versions: %s", error)
                await asyncio.sleep(0.1)
                continue
            if versions.revision > revision:
                return versions

    def begin(self, engine: Engine, dispatcher: ExpertDispatcher, versions: Versions) -> None:
        """Use `versions`, which the engine has, from now on."""
        self._engine, self._dispatcher, self._adopted = engine, dispatcher, versions
        self._use(engine, dispatcher, versions)

    async def follow(self, engine: Engine, dispatcher: ExpertDispatcher) -> None:
        """Have the versions that the controller wants, and use those that it says."""
        while True:
            await self._tell()
            versions = await self.after(0 if self._adopted is None else self._adopted.revision)
            self._failed = None
            for number, weights in versions.wanted.items():
                if number not in engine.versions:
                    await self._try_to_load(engine, number, weights)
            if engine.versions.issuperset(versions.live):
                await self._adopt(engine, dispatcher, versions)
            else:
                await asyncio.sleep(AGAIN_S)  # it stays with what it has

    def has(self) -> RouterVersions | None:
        """What the controller is told; None before the beginning."""
        engine, versions = self._engine, self._adopted
        if engine is None or versions is None:
            return None
        failed, failure = self._failed or (None, None)
        meter = None if self._dispatcher is None else self._dispatcher.drift
        drift = None if meter is None else meter.drift
        return RouterVersions(versions.revision, engine.versions, engine.versions_in_use, failed, failure, drift)

    async def _try_to_load(self, engine: Engine, number: int, weights: Weights) -> None:
        try:
            await asyncio.to_thread(self._weights.load_version, engine, number, weights)
        except Exception as error:  # whatever reading files or allocating memory raises
            logger.warning("version %d (%s) cannot be loaded: %s", number, weights, error)
            failure = error if isinstance(error, RayMoEError) else RayMoEError(f"{weights}: {error}")
            self._failed = (number, failure)

    async def _adopt(self, engine: Engine, dispatcher: ExpertDispatcher, versions: Versions) -> None:
        self._use(engine, dispatcher, versions)
        for number in engine.versions - versions.wanted.keys():
            engine.drop_version(number)
            await asyncio.to_thread(dispatcher.forget, number)
            self._weights.forget(number)
        self._adopted = versions

    def _use(self, engine: Engine, dispatcher: ExpertDispatcher, versions: Versions) -> None:
        """Compute new requests with the current version, and try out what is to be tried out."""
        from ray_moe.runtime.drift import DriftMeter

        canary, meter = versions.trial, dispatcher.drift
        if meter is not None and meter.canary != canary:
            dispatcher.drift = None
            meter.close()
        if canary is None:
            engine.use_version(versions.current, versions.open)
            return
        if dispatcher.drift is None:
            dispatcher.drift = DriftMeter(dispatcher.rows_of, canary, versions.current)
        share = canary.request.share if canary.request.mode == "traffic" else 0.0
        engine.use_version(versions.current, versions.open, (canary.number, share))

    async def _tell(self) -> None:
        has = self.has()
        if has is not None:
            with contextlib.suppress(RayError, ValueError):  # the next report says it too
                await self._controller().router_has.remote(self._router_id, has)
