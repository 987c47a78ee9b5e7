"""Publishing as a transaction: hosts and routers that load, fail, die and come meanwhile. No Ray: handles are fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import pytest_asyncio
from ray.exceptions import RayActorError, RayTaskError

from ray_moe.actors.hosts import Actor, started
from ray_moe.actors.publisher import Publisher
from ray_moe.actors.routers import Routers
from ray_moe.actors.spec import HostReport, RouterReport, RouterVersions, ServiceSpec
from ray_moe.config import Config
from ray_moe.errors import InsufficientResources, InvalidCheckpoint, NotFound, Unavailable
from ray_moe.policy import events as ev
from ray_moe.policy.cluster_state import ClusterState
from ray_moe.policy.hosts import ClusterSettings
from ray_moe.policy.load import TokenCounts
from ray_moe.policy.versions import Drift, Versions
from ray_moe.types import CanaryRequest, HostAddress, LayerSpec, Placement, RouterAddress

LAYER = LayerSpec("layer", 4, 8, 8, "float32", 100)
HOSTS = ("expert-0", "expert-1")
HELD: dict[str, ev.Experts] = {"expert-0": {LAYER.path: (0, 1)}, "expert-1": {LAYER.path: (2, 3)}}


class Remote:
    """A handle of Ray's: ``handle.method.remote(...)`` begins at once."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> asyncio.Task[Any]:
            return asyncio.create_task(getattr(self._target, name)(*arguments))

        return type("Method", (), {"remote": staticmethod(remote)})


class Host:
    """What an expert actor is asked for; `before` is awaited (and may raise) in each load."""

    def __init__(self) -> None:
        self.loaded: dict[int, dict[str, set[int]]] = {}
        self.forgotten: list[int] = []
        self.before: Callable[[], Any] | None = None
        self.room: Exception | None = None

    async def load(self, experts: ev.Experts, copies: Any, versions: Any) -> None:
        if self.before is not None:
            await self.before()
        for version in versions:
            for layer, ids in experts.items():
                self.loaded.setdefault(version, {}).setdefault(layer, set()).update(ids)

    async def forget(self, version: int) -> None:
        self.forgotten.append(version)
        self.loaded.pop(version, None)

    async def check_room(self, num_bytes: int) -> None:
        if self.room is not None:
            raise self.room


class Launcher:
    def __init__(self) -> None:
        self.kept: Versions | None = None

    async def keep_versions(self, versions: Versions) -> None:
        self.kept = versions

    async def kept_versions(self) -> Versions | None:
        return self.kept


def address(host_id: str, life: str = "a") -> HostAddress:
    return HostAddress(host_id, life, f"node of {host_id}", 1, "127.0.0.1:1", "")


class World:
    """A publisher, two hosts that hold two experts each, and a router that does what it is told while it `follows`."""

    def __init__(self) -> None:
        settings = ClusterSettings(layers=(LAYER,), balance=False)
        config = Config.model_validate({"model": "m0", "versions": {"load_timeout_s": 5}})
        self.spec = ServiceSpec(
            config, "test", "0", "toy", (LAYER,), Placement({}), HOSTS, (), (), "token", cast(Any, None)
        )
        self.state = ClusterState(settings, HOSTS)
        self.hosts = {host_id: Host() for host_id in HOSTS}
        self.actors = {host_id: Actor(handle=Remote(host)) for host_id, host in self.hosts.items()}
        for host_id in HOSTS:
            self.state.handle(ev.HostStarted(address(host_id), HELD[host_id]), 0.0)
        self.launcher = Launcher()
        self.routers = Routers(Remote(self.launcher), lambda: None, lambda what, error: None)
        self.events: list[tuple[str, str]] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.has = RouterVersions(0, frozenset({0}), frozenset())
        self.follows, self.is_over = True, False
        self.publisher = self.make()
        self.report()

    def make(self) -> Publisher:
        return Publisher(
            self.spec,
            Remote(self.launcher),
            self.routers,
            self.actors,
            lambda: self.state,
            lambda kind, text: self.events.append((kind, text)),
            lambda coroutine: self.tasks.append(asyncio.create_task(coroutine)),
        )

    def report(self, **changes: Any) -> None:
        self.has = replace(self.has, **changes)
        counts = TokenCounts("router", "life", 1, {})
        self.routers.heard(RouterReport(RouterAddress("router", "x:1", ready=True), counts, 1, 0.0, 0.0, self.has))
        self.publisher.heard()

    async def follow(self) -> None:
        while not self.is_over:
            versions = await self.publisher.versions_after(self.has.revision, 0.05)
            if self.follows and versions.revision > self.has.revision:
                self.report(revision=versions.revision, loaded=frozenset(versions.wanted))
            await asyncio.sleep(0.001)

    @property
    def states(self) -> dict[int, str]:
        return {version.number: version.state for version in self.publisher.statuses}

    async def until(self, condition: Callable[[], bool]) -> None:
        async def look() -> None:
            while not condition():  # noqa: ASYNC110 - nobody has an event for it
                await asyncio.sleep(0.001)

        await asyncio.wait_for(look(), 10)


@pytest_asyncio.fixture
async def world() -> Any:
    made = World()
    following = asyncio.create_task(made.follow())
    yield made
    made.is_over = True
    await asyncio.gather(following, *made.tasks, return_exceptions=True)


async def test_everybody_has_a_version_before_it_is_current(world: World) -> None:
    may_go = asyncio.Event()
    world.hosts["expert-1"].before = may_go.wait
    publishing = asyncio.create_task(world.publisher.publish("m1"))
    await world.until(lambda: 1 in world.has.loaded and 1 in world.hosts["expert-0"].loaded)
    assert world.states == {0: "current", 1: "loading"}
    assert list(world.publisher.live) == [0]
    with pytest.raises(Unavailable, match="another version is being published"):
        await world.publisher.publish("m2")
    may_go.set()
    assert (await publishing).state == "current"
    assert world.states == {0: "kept", 1: "current"}
    assert {name: host.loaded[1] for name, host in world.hosts.items()} == {
        "expert-0": {LAYER.path: {0, 1}},
        "expert-1": {LAYER.path: {2, 3}},
    }
    assert world.launcher.kept is not None
    assert world.launcher.kept.current == 1


@pytest.mark.parametrize("error", [InvalidCheckpoint("torn"), OSError("no disk")])
async def test_what_a_host_cannot_load_is_taken_back_and_its_number_is_not_used_again(
    world: World, error: Exception
) -> None:
    async def fail() -> None:
        raise RayTaskError("load", "traceback", cast(Any, error))

    world.hosts["expert-0"].before = fail
    with pytest.raises(Exception, match=str(error)):
        await world.publisher.publish("m1")
    await world.until(lambda: all(host.forgotten == [1] for host in world.hosts.values()))
    assert (world.states, list(world.publisher.live)) == ({0: "current"}, [0])
    assert world.events[-1][0] == "aborted"
    world.hosts["expert-0"].before = None
    assert (await world.publisher.publish("m2")).number == 2
    assert 1 not in world.hosts["expert-1"].loaded


async def test_what_a_router_cannot_load_is_taken_back(world: World) -> None:
    world.follows = False
    publishing = asyncio.create_task(world.publisher.publish("m1"))
    await world.until(lambda: world.states == {0: "current", 1: "loading"})
    world.report(failed=1, failure=InsufficientResources("no memory"))
    with pytest.raises(InsufficientResources, match="no memory"):
        await publishing
    assert world.states == {0: "current"}
    world.follows = True
    assert (await world.publisher.publish("m2")).number == 2, "what failed before must not fail this one"


async def test_no_room_on_a_node_is_found_before_anything_is_loaded(world: World) -> None:
    world.hosts["expert-1"].room = RayTaskError("check_room", "traceback", cast(Any, InsufficientResources("full")))
    with pytest.raises(InsufficientResources, match="full"):
        await world.publisher.publish("m1")
    assert not any(host.loaded for host in world.hosts.values())
    assert world.states == {0: "current"}


async def test_a_host_that_dies_meanwhile_holds_nothing_up(world: World) -> None:
    async def die() -> None:
        world.state.handle(ev.HostLost("expert-0", ""), 1.0)
        raise RayActorError

    world.hosts["expert-0"].before = die
    assert (await world.publisher.publish("m1")).state == "current"
    assert list(world.publisher.live) == [0, 1], "when it is back it is to load both"


async def test_a_new_life_of_a_host_must_load_it_too(world: World) -> None:
    host, may_go = world.hosts["expert-1"], asyncio.Event()
    host.before = may_go.wait
    publishing = asyncio.create_task(world.publisher.publish("m1"))
    await world.until(lambda: 1 in world.hosts["expert-0"].loaded)
    world.hosts["expert-0"].loaded.clear()
    world.state.handle(ev.HostStarted(address("expert-0", "b"), HELD["expert-0"]), 1.0)
    may_go.set()
    await publishing
    assert world.hosts["expert-0"].loaded[1] == {LAYER.path: {0, 1}}


async def test_what_a_host_loads_meanwhile_is_loaded_in_the_new_version_too(world: World) -> None:
    may_go = asyncio.Event()
    world.hosts["expert-1"].before = may_go.wait
    publishing = asyncio.create_task(world.publisher.publish("m1"))
    await world.until(lambda: 1 in world.hosts["expert-0"].loaded)
    world.state.fleet.held.add("expert-0", {LAYER.path: {3}})
    may_go.set()
    await publishing
    assert world.hosts["expert-0"].loaded[1] == {LAYER.path: {0, 1, 3}}


async def test_what_is_not_loaded_in_time_is_taken_back(world: World) -> None:
    changed = world.spec.config.model_copy(
        update={"versions": world.spec.config.versions.model_copy(update={"load_timeout_s": 0.05})}
    )
    world.spec = replace(world.spec, config=changed)
    world.publisher = world.make()
    world.hosts["expert-1"].before = asyncio.Event().wait
    with pytest.raises(Unavailable, match=r"not loaded everywhere within 0\.05 s"):
        await world.publisher.publish("m1")
    assert world.states == {0: "current"}


async def test_a_version_is_retired_when_no_router_uses_it_any_more(world: World) -> None:
    for model in ("m1", "m2"):
        world.report(in_use=frozenset({0}))
        await world.publisher.publish(model)
    world.report()
    assert world.states == {0: "ending", 1: "kept", 2: "current"}
    await world.until(lambda: all(task.done() for task in world.tasks))
    assert world.states[0] == "ending"
    world.report(in_use=frozenset({2}))
    await world.until(lambda: world.states == {1: "kept", 2: "current"})
    await world.until(lambda: all(host.forgotten == [0] for host in world.hosts.values()))
    assert list(world.publisher.live) == [1, 2]


async def test_another_life_of_the_controller_knows_the_versions_and_takes_back_what_was_loading(world: World) -> None:
    await world.publisher.publish("m1")
    world.hosts["expert-1"].before = asyncio.Event().wait
    publishing = asyncio.create_task(world.publisher.publish("m2"))
    await world.until(lambda: 2 in world.hosts["expert-0"].loaded)
    publishing.cancel()
    assert world.launcher.kept is not None
    died = replace(world.launcher.kept)
    await asyncio.gather(publishing, return_exceptions=True)
    world.launcher.kept, world.hosts["expert-1"].before = died, None
    before = world.publisher
    world.publisher = world.make()
    await world.publisher.recover()
    assert world.states == {0: "kept", 1: "current"}
    assert (await world.publisher.versions_after(0, 1.0)).revision > died.revision
    assert (await world.publisher.publish("m3")).number == 3
    assert before is not world.publisher


async def test_a_host_is_told_to_forget_versions_that_there_are_not(world: World) -> None:
    held = dict.fromkeys((0, 7), HELD["expert-0"])
    report = HostReport("a", "node", "", 1, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0, held, address("expert-0"))
    world.publisher.tidy(report, Remote(world.hosts["expert-0"]))
    await world.until(lambda: world.hosts["expert-0"].forgotten == [7])


def test_a_host_holds_an_expert_if_it_does_so_in_all_live_versions() -> None:
    held: dict[int, ev.Experts] = {0: {"layer": (0, 1, 2)}, 1: {"layer": (1, 2)}, 5: {"layer": (3,)}}
    report = HostReport("a", "node", "zone", 1, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0, held, address("expert-0"))
    event = started(report, [0, 1])
    assert (event.held, event.unsettled) == ({"layer": (0, 1, 2, 3)}, {"layer": (0, 3)})
    assert started(report, [0]).unsettled == {"layer": (3,)}
    assert event.domain == "zone"


# --- canaries ------------------------------------------------------------------------------------------------
ASKED = CanaryRequest(LAYER.path, 2, "better", max_drift=0.1)


async def test_a_canary_that_is_too_far_is_taken_back_and_what_is_close_goes_on(world: World) -> None:
    assert (await world.publisher.begin_canary(ASKED)).state == "canary"
    world.report(drift=Drift(1, 100, 0.5, 100.0))
    await asyncio.gather(*world.tasks)
    assert world.states == {0: "current", 1: "canary"}
    assert world.publisher.statuses[1].num_rows == 100
    world.report(drift=Drift(1, 200, 50.0, 200.0))
    await world.until(lambda: world.states == {0: "current"})
    (text,) = (text for kind, text in world.events if kind == "canary rolled back")
    assert text == "version 1: drift 0.5 over 200 rows, and 0.1 is allowed"
    await world.until(lambda: all(host.forgotten == [1] for host in world.hosts.values()))


@pytest.mark.parametrize(("promote", "states"), [(True, {0: "kept", 1: "current"}), (False, {0: "current"})])
async def test_a_canary_ends_as_it_is_told(world: World, promote: bool, states: dict[int, str]) -> None:
    await world.publisher.begin_canary(ASKED)
    assert (await world.publisher.end_canary(promote)).number == int(promote)
    await world.until(lambda: world.states == states)


async def test_a_canary_of_an_expert_that_there_is_not_is_refused(world: World) -> None:
    for changes in ({"expert": 4}, {"layer": "elsewhere"}):
        with pytest.raises(NotFound, match="there is no expert"):
            await world.publisher.begin_canary(replace(ASKED, **changes))
    assert world.states == {0: "current"}
