"""Publishing versions of the weights in a running service, as its controller does it.

A version is loaded by all who will need it before any request is computed with it: by the hosts, of the experts they
hold, and by the routers, of the rest of the model. If one of them cannot, all is as before. Then the routers are told
that it is current; each request stays with the version it began with. Versions that nobody may ask for and no request
uses any more are let go of everywhere. The rules are in `policy/versions.py`. Used by `controller.py` alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from ray.exceptions import RayError, RayTaskError

from ray_moe.actors.hosts import Actor, weights_bytes
from ray_moe.actors.routers import Routers
from ray_moe.actors.spec import HostReport, ServiceSpec
from ray_moe.errors import NotFound, RayMoEError, Unavailable
from ray_moe.policy.cluster_state import ClusterState
from ray_moe.policy.hosts import HostState, difference, frozen, union
from ray_moe.policy.parts import parts_of
from ray_moe.policy.rows import Held
from ray_moe.policy.versions import Drift, Live, Versions, Weights
from ray_moe.types import CanaryRequest, HostId, VersionStatus

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2
"""How often it is looked, while hosts or routers are waited for, whether they are still there."""
ADOPT_TIMEOUT_S = 10.0
"""A router that has not taken a version up by then is not waited for: it will when it can."""


class Publisher:
    """See the module."""

    def __init__(
        self,
        spec: ServiceSpec,
        launcher: Any,
        routers: Routers,
        actors: Mapping[HostId, Actor],
        cluster: Callable[[], ClusterState],
        announce: Callable[[str, str], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._spec = spec
        self._launcher = launcher
        self._routers = routers
        self._actors = actors
        self._cluster = cluster
        self._announce = announce
        self._spawn = spawn
        self._versions = Versions.first(spec.config.model)
        self.live: Live = self._versions.live
        """What an expert must be held in to count as held."""
        self.kept: Versions | None = None
        """What the launcher was last told to remember."""
        self._changing = asyncio.Lock()
        self._shown = asyncio.Event()
        self._heard = asyncio.Event()

    async def recover(self) -> None:
        """After a restart of the controller: what was published is."""
        kept = await self._launcher.kept_versions.remote()
        if kept is not None:
            self.kept = kept
            self._show(kept.recovered())

    # --- asked by people ---------------------------------------------------------------------------------------
    @property
    def statuses(self) -> tuple[VersionStatus, ...]:
        return self._versions.statuses(self._drift)

    @property
    def _drift(self) -> Drift | None:
        return self._versions.measured(told.drift for told in self._routers.versions if told.drift is not None)

    @property
    def change(self) -> str:
        """What is under way; empty for nothing."""
        loading = self._versions.loading
        return "" if loading is None else f"loading version {loading[0]}: {loading[1]}"

    async def publish(self, model: str) -> VersionStatus:
        """Make the checkpoint `model` the current version, once everybody has loaded it.

        Raises, and then nothing has changed: `NotFound`, `InvalidCheckpoint`, `UnsupportedModel`, `InvalidRequest` (it
        is of another architecture), `InsufficientResources`, `Unavailable` (another version is being published, or this
        one was not loaded in time).
        """
        async with self._alone():
            began_s = time.monotonic()
            number = await self._have_loaded(self._versions.begin(model))
            await self._change_to(self._versions.commit(self._spec.config.versions.keep))
            await self._until_adopted()
            self._announce("published", f"version {number}: {model}, after {time.monotonic() - began_s:.1f} s")
            return self._status_of(number)

    async def begin_canary(self, request: CanaryRequest) -> VersionStatus:
        """Try out another version of one expert beside the current one.

        Raises, and then nothing has changed: what `publish` raises; `NotFound` for an expert that there is not.
        """
        num_parts = self._spec.config.experts.tensor
        num_experts = {layer.path: layer.num_experts // num_parts for layer in self._spec.layers}
        if not 0 <= request.expert < num_experts.get(request.layer, 0):
            raise NotFound(f"there is no expert {request.expert} of {request.layer!r}; there are {num_experts}")
        async with self._alone():
            parts = parts_of(request.expert, num_experts[request.layer], num_parts)
            number = await self._have_loaded(self._versions.begin_canary(request, parts))
            await self._change_to(self._versions.commit_canary())
            await self._until_adopted()
            what = f"expert {request.expert} of {request.layer} from {request.model}"
            self._announce("canary", f"version {number}: {what}, {request.mode}, share {request.share:g}")
            return self._status_of(number)

    async def end_canary(self, promote: bool) -> VersionStatus:
        """Make the canary the current version, or let it go; the version that is current then.

        Raises: `InvalidRequest` when there is none, `Unavailable`.
        """
        async with self._alone():
            keep, versions, drift = self._spec.config.versions.keep, self._versions, self._drift
            await self._change_to(versions.promote(keep) if promote else versions.cancel())
            await self._until_adopted()
            if drift is not None:
                told = f"version {drift.number}, drift {drift.ratio:.3g} over {drift.num_rows} rows"
                self._announce("promoted" if promote else "cancelled", told)
            return self._status_of(self._versions.current)

    async def _have_loaded(self, versions: Versions) -> int:
        """Have everybody load what `versions` want to be loaded; its number."""
        await self._change_to(versions)
        number, weights = versions.last, versions.wanted[versions.last]
        timeout_s = self._spec.config.versions.load_timeout_s
        self._announce("loading", f"version {number}: {weights}")
        try:
            await asyncio.wait_for(self._load(number, weights), timeout_s)
        except BaseException as error:
            await self._give_up(number, error)
            if isinstance(error, asyncio.TimeoutError):
                raise Unavailable(
                    f"{weights} was not loaded everywhere within {timeout_s:g} s (versions.load_timeout_s); nothing "
                    "has changed"
                ) from None
            raise
        return number

    async def roll_back(self, to: int | None) -> VersionStatus:
        """Make an older version current that is still held; with `to`, that one.

        Raises: `InvalidRequest`, `NotFound`, `Unavailable` (one is being published).
        """
        async with self._alone():
            before = self._versions.current
            await self._change_to(self._versions.roll_back(to))
            await self._until_adopted()
            self._announce("rolled back", f"from version {before} to {self._versions.current}")
            return self._status_of(self._versions.current)

    def _status_of(self, number: int) -> VersionStatus:
        return next(status for status in self.statuses if status.number == number)

    # --- asked by routers and hosts ----------------------------------------------------------------------------
    async def versions_after(self, revision: int, timeout_s: float) -> Versions:
        """The versions, as soon as they are newer than `revision`, or the present ones after `timeout_s`."""
        end_s = time.monotonic() + timeout_s
        while self._versions.revision <= revision and time.monotonic() < end_s:
            shown = self._shown
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(shown.wait(), max(0.0, end_s - time.monotonic()))
        return self._versions

    def heard(self) -> None:
        """A router has told what it has."""
        self._heard.set()
        if self._changing.locked():
            return
        if len(self._versions.live) > len(self._versions.open):
            self._spawn(self._retire())
        if self._versions.is_too_far(self._drift):
            self._spawn(self._take_back())

    def tidy(self, report: HostReport, handle: Any) -> None:
        """Have a host let go of versions that there are not (any more)."""
        for version in report.held:
            if version not in self._versions.wanted:
                handle.forget.remote(version)

    # --- changes -----------------------------------------------------------------------------------------------
    @contextlib.asynccontextmanager
    async def _alone(self) -> Any:
        if self._changing.locked():
            raise Unavailable("another version is being published or rolled back; retry when that is done")
        async with self._changing:
            yield
        self.heard()  # what was heard meanwhile may have made something dispensable

    async def _change_to(self, versions: Versions) -> None:
        """Routers hear of it when it will survive the controller's end."""
        await self._launcher.keep_versions.remote(versions)
        self.kept = versions
        self._show(versions)

    def _show(self, versions: Versions) -> None:
        self._versions, self.live = versions, versions.live
        self._shown.set()
        self._shown = asyncio.Event()

    async def _give_up(self, number: int, error: BaseException) -> None:
        reason = str(error) or type(error).__name__
        logger.warning("version %d is not used: %s", number, reason)
        await self._change_to(self._versions.give_up())
        self._announce("aborted", f"version {number} is not used: {reason}")
        self._forget(number)

    def _forget(self, version: int) -> None:
        for actor in self._actors.values():
            if actor.handle is not None:
                actor.handle.forget.remote(version)

    async def _retire(self) -> None:
        """Let go of what nobody may ask for and nobody uses."""
        async with self._changing:
            told = self._routers.versions
            if not self._routers.have_adopted(self._versions.revision):
                return  # requests may still begin with it
            before = self._versions
            retired = before.retire(union_of(each.in_use for each in told))
            if retired is before:
                return
            await self._change_to(retired)
            for number in before.live.keys() - retired.live.keys():
                self._announce("retired", f"version {number}: {before.live[number]}")
                self._forget(number)

    async def _take_back(self) -> None:
        """End a canary that is too far from what it is to replace."""
        async with self._changing:
            drift, canary = self._drift, self._versions.trial
            if canary is None or drift is None or not self._versions.is_too_far(drift):
                return
            await self._change_to(self._versions.cancel())
            self._announce(
                "canary rolled back",
                f"version {canary.number}: drift {drift.ratio:.3g} over {drift.num_rows} rows, and "
                f"{canary.request.max_drift:g} is allowed",
            )

    # --- loading a version -------------------------------------------------------------------------------------
    async def _load(self, number: int, weights: Weights) -> None:
        """Have every host and router load it, also those that come meanwhile and what hosts load meanwhile."""
        await self._check_room(weights)
        loaded: dict[tuple[HostId, str], Held] = {}
        while True:
            self._routers.check_loaded(number)
            lacking = self._lacking(loaded)
            if lacking:
                await asyncio.gather(*(self._load_on(host, held, number, weights, loaded) for host, held in lacking))
            elif self._routers.have_loaded(number):
                # From now on hosts load it with the others. Nothing must be awaited between this and the look above.
                self.live = {**self.live, number: weights}
                self._tell_idle_hosts()
                return
            else:
                await self._until_heard()

    def _tell_idle_hosts(self) -> None:
        """Standbys open the files of what they may have to load."""
        held = self._cluster().fleet.held
        for host_id, actor in self._actors.items():
            if actor.handle is not None and not held.on(host_id):
                actor.handle.load.remote({}, {}, self.live)

    def _lacking(self, loaded: Mapping[tuple[HostId, str], Held]) -> list[tuple[HostState, Held]]:
        """What living hosts hold, and have not loaded in the new version."""
        state = self._cluster()
        lacking = []
        for host in state.hosts.values():
            actor = self._actors.get(host.host_id)
            if host.phase != "up" or actor is None:
                continue
            held = state.fleet.held.on(host.host_id)
            rest = difference(held, loaded.get((host.host_id, host.incarnation), {}))
            if rest:
                lacking.append((host, rest))
        return lacking

    async def _load_on(
        self, host: HostState, experts: Held, number: int, weights: Weights, loaded: dict[tuple[HostId, str], Held]
    ) -> None:
        life, experts = (host.host_id, host.incarnation), union(experts)
        try:
            await self._actors[host.host_id].handle.load.remote(frozen(experts), {}, {number: weights})
        except RayTaskError as error:
            raise _cause(error, f"{host.host_id} cannot load version {number}") from None
        except RayError:  # it has died: its keeper knows, or will
            await asyncio.sleep(LOOK_EVERY_S)
        else:
            loaded[life] = union(loaded.get(life, {}), experts)

    async def _check_room(self, weights: Weights) -> None:
        """Raises `InsufficientResources` where the hosts of a node have no memory for another version."""
        state = self._cluster()
        needed: defaultdict[str, int] = defaultdict(int)
        asked: dict[str, HostId] = {}
        for host in state.hosts.values():
            if host.phase == "up" and host.host_id in self._actors:
                held = state.fleet.held.on(host.host_id)
                needed[host.node] += weights_bytes(self._spec, held, {**self.live, self._versions.last: weights})
                needed[host.node] -= weights_bytes(self._spec, held, self.live)
                asked[host.node] = host.host_id
        for node, host_id in asked.items():
            try:
                await self._actors[host_id].handle.check_room.remote(needed[node])
            except RayTaskError as error:
                raise _cause(error, f"{host_id} cannot tell whether there is room") from None
            except RayError:  # it has died
                continue

    # --- waiting for routers -----------------------------------------------------------------------------------
    async def _until_adopted(self) -> None:
        """Return when every router uses the present versions, or has had time to."""
        end_s = time.monotonic() + ADOPT_TIMEOUT_S
        while not self._routers.have_adopted(self._versions.revision) and time.monotonic() < end_s:
            await self._until_heard()

    async def _until_heard(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._heard.wait(), LOOK_EVERY_S)
        self._heard.clear()


def union_of(sets: Any) -> frozenset[int]:
    return frozenset(number for each in sets for number in each)


def _cause(error: RayTaskError, what: str) -> RayMoEError:
    cause = error.cause
    return cause if isinstance(cause, RayMoEError) else RayMoEError(f"{what}: {cause}")
