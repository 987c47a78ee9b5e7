"""Both clients over several routers: they are found, calls are spread over them, and their ends are hidden."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from ray_moe.client import access, aio_routers, pool, sync_routers
from ray_moe.client.access import KEY_VARIABLE, Access
from ray_moe.client.channel import targets_of
from ray_moe.client.requests import Forward
from ray_moe.errors import InvalidConfig, InvalidRequest, Overloaded, Unavailable
from ray_moe.types import ChaosRequest, GenerateChunk, GenerateRequest, RouterAddress
from tests.unit.client.conftest import Connect
from tests.unit.service.certificates import AUTHORITY, files, grpc_server
from tests.unit.service.fake_backend import LAYER, WIDTH, FakeBackend, front_door

HIDDEN = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
NUM_TOKENS = 6
SAMPLED = {"temperature": 1.0}


class InPairs(FakeBackend):
    """Generates the same in other pieces."""

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:  # type: ignore[override]
        pair: list[GenerateChunk] = []
        async for chunk in super().generate(request):
            pair.append(chunk)
            if len(pair) == 2 or chunk.finish_reason:
                tokens = tuple(token for one in pair for token in one.token_ids)
                text = "".join(one.text for one in pair)
                yield GenerateChunk(tokens, text, chunk.finish_reason, chunk.num_prompt_tokens)
                pair = []


class Otherwise(FakeBackend):
    """Generates something else from the third token on."""

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:  # type: ignore[override]
        async for chunk in super().generate(request):
            token = chunk.token_ids[0] + (7 if chunk.token_ids[0] >= 2 else 0)
            yield GenerateChunk((token,), f"{token} ", chunk.finish_reason, chunk.num_prompt_tokens)


class Asked(FakeBackend):
    """Knows whether it has been asked who there is."""

    was_asked = False

    async def routers(self) -> tuple[RouterAddress, ...]:
        self.was_asked = True
        return await super().routers()


class Router:
    """One of a service, over a backend of its own."""

    def __init__(self, backend: FakeBackend, target: str, stop: Callable[[], Awaitable[None]]) -> None:
        self.backend = backend
        self.target = target
        self.stop = stop
        """At once: streams break off, and the port is closed."""


class Service:
    """Routers that know of each other."""

    def __init__(self) -> None:
        self.routers: list[Router] = []
        self._stack = contextlib.AsyncExitStack()

    async def start(self, backend: FakeBackend | None = None, **options: Any) -> Router:
        backend = backend or FakeBackend()
        door = contextlib.AsyncExitStack()
        target = await door.enter_async_context(front_door(backend, **options))
        self._stack.push_async_callback(door.aclose)
        router = Router(backend, target, door.aclose)
        self.routers.append(router)
        self.tell(*self.routers)
        return router

    def tell(self, *ready: Router) -> None:
        """What every router answers from now on."""
        addresses = tuple(RouterAddress(f"router at {r.target}", r.target, "", r in ready) for r in self.routers)
        for router in self.routers:
            router.backend.addresses = addresses

    def tell_also(self, *targets: str) -> None:
        """And addresses where there may be no router."""
        for router in self.routers:
            router.backend.addresses += tuple(RouterAddress(target, target, "", ready=True) for target in targets)

    async def __aenter__(self) -> Service:
        return self

    async def __aexit__(self, *_: object) -> None:
        for router in self.routers:
            router.backend.released.set()
        await self._stack.aclose()


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with Service() as made:
        yield made


@pytest.fixture
async def pair(service: Service) -> tuple[Router, Router]:
    return await service.start(), await service.start()


@pytest.fixture
def told_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients ask for the list with every call."""
    monkeypatch.setattr(pool, "LIST_EVERY_S", 0.0)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long clients want to wait, instead of waiting."""
    asked: list[float] = []

    async def pass_over(pause_s: float) -> None:
        asked.append(pause_s)

    monkeypatch.setattr(sync_routers, "sleep", asked.append)
    monkeypatch.setattr(aio_routers, "sleep", pass_over)
    return asked


async def find(client: Any, *routers: Router) -> None:
    """Use `client` until it knows `routers`."""
    before = {router.target: len(router.backend.calls) for router in routers}
    while any(len(router.backend.calls) == before[router.target] for router in routers):
        await client.forward(LAYER, HIDDEN)


def others(routers: tuple[Router, ...], of: Router) -> Router:
    (other,) = (router for router in routers if router is not of)
    return other


@asynccontextmanager
async def midway(
    client: Any, routers: tuple[Router, ...], num_tokens: int, **options: Any
) -> AsyncIterator[tuple[Any, list[GenerateChunk], Router]]:
    """A stream that has brought `num_tokens`, these pieces of it, and the router that it comes from."""
    for router in routers:
        router.backend.hold_after = num_tokens
    async with contextlib.aclosing(client.stream("x", max_new_tokens=NUM_TOKENS, **options)) as stream:
        chunks = [await anext(stream) for _ in range(num_tokens)]
        (router,) = (router for router in routers if router.backend.num_open)
        await router.backend.reached.wait()
        for other in routers:
            if other is not router:
                other.backend.hold_after = None
        yield stream, chunks, router


# --- which router --------------------------------------------------------------------------------------------
async def test_calls_are_spread_over_all_routers_of_the_service(connect: Connect, pair: tuple[Router, Router]) -> None:
    client = connect(pair[0].target)
    await find(client, *pair)
    for router in pair:
        router.backend.hold_after = 0
    calls = [asyncio.create_task(client.generate("x", max_new_tokens=1)) for _ in range(4)]
    await asyncio.gather(*(router.backend.both_open.wait() for router in pair))
    assert [router.backend.num_open for router in pair] == [2, 2]
    for router in pair:
        router.backend.released.set()
    assert [generation.token_ids for generation in await asyncio.gather(*calls)] == [(0,)] * 4


async def test_one_that_is_told_to_stay_with_its_target_does(connect: Connect, pair: tuple[Router, Router]) -> None:
    client = connect(pair[0].target, discover=False)
    for _ in range(20):
        await client.forward(LAYER, HIDDEN)
    assert [len(router.backend.calls) for router in pair] == [20, 0]


@pytest.mark.parametrize("as_text", [True, False])
async def test_several_targets(connect: Connect, pair: tuple[Router, Router], as_text: bool) -> None:
    targets = [router.target for router in pair]
    client = connect(", ".join(targets) if as_text else targets, discover=False)
    await client.wait_ready(10)
    for _ in range(4):
        await client.forward(LAYER, HIDDEN)
    assert [len(router.backend.calls) for router in pair] == [2, 2]
    await pair[0].stop()
    await client.wait_ready(10)
    for _ in range(4):
        await client.forward(LAYER, HIDDEN)
    assert len(pair[1].backend.calls) == 6


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("a:1", ("a:1",)),
        (" a:1 ,b:2,a:1", ("a:1", "b:2")),
        (["a:1", "ipv4:1.2.3.4:5,1.2.3.5:5"], ("a:1", "ipv4:1.2.3.4:5,1.2.3.5:5")),
        ("ipv4:1.2.3.4:5,1.2.3.5:5", ("ipv4:1.2.3.4:5,1.2.3.5:5",)),
        ("unix:/run/a,b", ("unix:/run/a,b",)),
        ("dns:///a:1", ("dns:///a:1",)),
    ],
)
def test_how_targets_are_read(target: str | list[str], expected: tuple[str, ...]) -> None:
    assert targets_of(target) == expected


@pytest.mark.parametrize("options", [{"target": ""}, {"target": "a:1,,b:1"}, {"target": []}, {"max_attempts": 0}])
async def test_settings_that_cannot_be(connect: Connect, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match="expected"):
        connect(**options)


@pytest.mark.usefixtures("told_always")
async def test_a_router_that_comes_later_is_found_and_one_that_is_gone_is_left(
    connect: Connect, service: Service
) -> None:
    first = await service.start()
    client = connect(first.target)
    await find(client, first)
    second = await service.start()
    await find(client, second)
    service.tell(second)
    num_calls = -1
    while num_calls != len(first.backend.calls):
        num_calls = len(first.backend.calls)
        for _ in range(10):
            await client.forward(LAYER, HIDDEN)


class NoList(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # the real one takes none
    """A service of a version that knows no ListRouters."""

    def __init__(self) -> None:
        self.num_asked = 0

    async def intercept_service(self, continuation: Callable[..., Awaitable[Any]], handler_call_details: Any) -> Any:
        if handler_call_details.method.endswith("/ListRouters"):
            self.num_asked += 1
            return None
        return await continuation(handler_call_details)


async def test_a_service_that_tells_of_no_routers_is_used_alone(connect: Connect) -> None:
    interceptor = NoList()
    async with grpc_server(None, [interceptor]) as port:
        client = connect(f"127.0.0.1:{port}")
        for _ in range(20):
            np.testing.assert_array_equal(await client.forward(LAYER, HIDDEN), -HIDDEN)
        assert interceptor.num_asked == 1


async def test_a_stream_learns_of_a_router_that_came_after_it_began(
    connect: Connect, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "LIST_ALONE_S", 0.0)
    num_tokens = 2000
    first = await service.start()
    first.backend.hold_after, first.backend.max_positions = num_tokens - 1, None
    second = Asked()
    second.max_positions = None
    client = connect(first.target, max_attempts=2)
    async with contextlib.aclosing(client.stream("x", max_new_tokens=num_tokens)) as stream:
        chunks = [await anext(stream)]
        await service.start(second)
        while not second.was_asked:  # else nothing comes after the last token but one, and the test fails
            chunks.append(await asyncio.wait_for(anext(stream), 10))
        await first.stop()
        chunks += [chunk async for chunk in stream]
    assert [chunk.token_ids for chunk in chunks] == [(number,) for number in range(num_tokens)]


async def test_a_list_that_leads_nowhere_breaks_nothing(connect: Connect, service: Service) -> None:
    router = await service.start()
    service.tell_also("127.0.0.1:1", "moe.invalid:8476", "0.0.0.0:1", "nonsense", "unix:/tmp/x", router.target)
    client = connect(router.target)
    for _ in range(20):
        np.testing.assert_array_equal(await client.forward(LAYER, HIDDEN), -HIDDEN)


# --- whom to believe -----------------------------------------------------------------------------------------
def told(*targets: str) -> list[RouterAddress]:
    return [RouterAddress(target, target) for target in targets]


@pytest.mark.parametrize(
    ("told_by", "targets", "believed"),
    [
        ("localhost:8476", ["127.0.0.1:8476", "127.0.0.1:9"], ["127.0.0.1:8476", "127.0.0.1:9"]),
        ("localhost:9999", ["127.0.0.1:8476", "10.0.0.1:8476"], ["10.0.0.1:8476"]),  # through a tunnel
        ("moe.example.org:8476", ["127.0.0.1:8476", "10.0.0.1:8476", "[fd00::1]:9"], ["10.0.0.1:8476", "[fd00::1]:9"]),
        ("127.0.0.1:1", ["0.0.0.0:1", "[::]:1", "unix:/x", "xds:///a:1", "", "a", "a:b", "dns:a:1", "a:1,b:1"], []),
        ("unix:/run/moe", ["127.0.0.1:8476", "a.b-c_d:8476"], ["a.b-c_d:8476"]),
    ],
)
def test_which_addresses_are_believed(told_by: str, targets: list[str], believed: list[str]) -> None:
    assert [router.grpc_address for router in Access("").believed(told(*targets), told_by)] == believed


@pytest.mark.parametrize(
    ("allowed", "believed"),
    [({}, ["127.0.0.1:1"]), ({"tls": True}, None), ({"allow_plaintext_key": True}, None), ({"api_key": ""}, None)],
)
def test_a_key_goes_to_no_listed_machine_unencrypted(allowed: dict[str, Any], believed: list[str] | None) -> None:
    targets = ["127.0.0.1:1", "10.0.0.1:1", "moe.example.org:1"]
    routers = Access(**{"api_key": "rm_1", **allowed}).believed(told(*targets), "localhost:1")
    assert [router.grpc_address for router in routers] == (believed or targets)


@pytest.mark.usefixtures("told_always")
async def test_a_client_with_a_key_stays_where_it_may_show_it(
    connect: Connect, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    here, away = await service.start(), await service.start(host="127.0.0.2")
    stays_here = access.stays_here
    monkeypatch.setattr(access, "stays_here", lambda target: "127.0.0.2" not in target and stays_here(target))
    with_key = connect(here.target, api_key="rm_1")
    for _ in range(30):
        await with_key.forward(LAYER, HIDDEN)
    assert len(here.backend.calls) == 30
    await find(connect(here.target), away)  # as one without does


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("moe.example.org:8476", "moe.example.org"),
        ("dns:///moe.example.org", "moe.example.org"),
        ("localhost:1", "localhost"),
        ("10.0.0.1:8476", ""),
        ("[fd00::1]:1", ""),
        ("unix:/run/moe", ""),
        ("ipv4:10.0.0.1:1", ""),
    ],
)
def test_the_name_in_a_target(target: str, name: str) -> None:
    assert access.name_in(target) == name


async def test_a_listed_router_proves_the_name_of_the_service(connect: Connect, service: Service) -> None:
    """Its address is not in the certificate."""
    first = await service.start(tls=files(), host="127.0.0.1")
    second = await service.start(tls=files(), host="127.0.0.2")
    await find(connect(first.target.replace("127.0.0.1", "localhost"), ca_file=AUTHORITY), first, second)
    assert first.backend.calls
    assert second.backend.calls


# --- what fails is done elsewhere ----------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "seed": 3}], ids=["greedy", "seeded"])
async def test_a_stream_goes_on_elsewhere_when_its_router_dies(
    connect: Connect, pair: tuple[Router, Router], options: dict[str, Any]
) -> None:
    client = connect(pair[0].target)
    await find(client, *pair)
    async with midway(client, pair, 2, **options) as (stream, chunks, router):
        other = others(pair, router)
        other.backend.hold_after = 1
        untouched = connect(other.target, discover=False).stream("x", max_new_tokens=NUM_TOKENS)
        its_chunks = [await anext(untouched)]
        other.backend.hold_after = None
        await router.stop()
        chunks += [chunk async for chunk in stream]
        other.backend.released.set()
        its_chunks += [chunk async for chunk in untouched]
    assert its_chunks == chunks
    assert len(other.backend.requests) == 2
    assert [chunk.token_ids for chunk in chunks] == [(number,) for number in range(NUM_TOKENS)]
    assert "".join(chunk.text for chunk in chunks) == "0 1 2 3 4 5 "
    assert chunks[-1].finish_reason == "length"


async def test_a_stream_goes_on_in_other_pieces(connect: Connect, service: Service) -> None:
    first, second = await service.start(), await service.start(InPairs())
    client = connect([first.target, second.target], discover=False)
    first.backend.hold_after = 3
    async with contextlib.aclosing(client.stream("x", max_new_tokens=NUM_TOKENS)) as stream:
        chunks = [await anext(stream) for _ in range(3)]
        await first.stop()
        chunks += [chunk async for chunk in stream]
    assert [(chunk.token_ids, chunk.text) for chunk in chunks[3:]] == [((3,), "3 "), ((4, 5), "4 5 ")]


async def test_what_goes_on_differently_is_said(connect: Connect, service: Service) -> None:
    first, second = await service.start(), await service.start(Otherwise())
    client = connect([first.target, second.target], discover=False)
    first.backend.hold_after = 3
    stream = client.stream("x", max_new_tokens=NUM_TOKENS)
    chunks = [await anext(stream) for _ in range(3)]
    await first.stop()
    with pytest.raises(Unavailable, match=r"after 3 tokens, and what another router generates .* differs from them"):
        chunks += [chunk async for chunk in stream]
    assert len(chunks) == 3
    assert len(second.backend.requests) == 1


async def test_what_is_drawn_by_lot_does_not_go_on(connect: Connect, pair: tuple[Router, Router]) -> None:
    client = connect([router.target for router in pair], discover=False)
    async with midway(client, pair, 2, **SAMPLED) as (stream, _, router):
        await router.stop()
        with pytest.raises(Unavailable, match=rf"{router.target} .*\(tokens that had come: 2\)$"):
            await anext(stream)
    assert sum(len(router.backend.requests) for router in pair) == 1


async def test_a_stream_that_has_brought_all_needs_no_orderly_end(connect: Connect, service: Service) -> None:
    class Lingering(FakeBackend):
        async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:  # type: ignore[override]
            yield GenerateChunk((1,), "a", "stop", 1)
            self.reached.set()
            await asyncio.Event().wait()

    router = await service.start(Lingering())
    generating = asyncio.create_task(connect(router.target).generate("x", max_new_tokens=4, **SAMPLED))
    await router.backend.reached.wait()
    await router.stop()
    assert (await generating).token_ids == (1,)


async def test_a_stream_of_batches_goes_on_elsewhere(connect: Connect, pair: tuple[Router, Router]) -> None:
    client = connect(pair[0].target)
    await find(client, *pair)
    asked: list[int] = []

    def requests() -> Any:
        for number in range(30):
            asked.append(number)
            yield Forward(LAYER, HIDDEN + number)

    before = [len(router.backend.calls) for router in pair]
    results: list[Any] = []
    async for result in client.forward_stream(requests()):
        results.append(result)
        if len(results) == 5:
            (busy,) = (r for r, calls in zip(pair, before, strict=True) if len(r.backend.calls) > calls)
            await busy.stop()
    for number, result in enumerate(results):
        np.testing.assert_array_equal(result, -(HIDDEN + number))
    assert asked == list(range(30))


async def test_batches_that_wait_for_their_predecessors_go_on_elsewhere(
    connect: Connect, pair: tuple[Router, Router]
) -> None:
    client = connect([router.target for router in pair], discover=False)
    arrived: list[Any] = []
    more = asyncio.Event()
    loop = asyncio.get_running_loop()

    def requests() -> Any:
        yield Forward(LAYER, HIDDEN)
        asyncio.run_coroutine_threadsafe(more.wait(), loop).result()
        yield Forward(LAYER, HIDDEN + len(arrived))

    async def requests_async() -> Any:
        yield Forward(LAYER, HIDDEN)
        await more.wait()
        yield Forward(LAYER, HIDDEN + len(arrived))

    is_async = type(client).__name__ == "AsyncClient"
    async for result in client.forward_stream(requests_async() if is_async else requests()):
        arrived.append(result)
        if len(arrived) == 1:
            (busy,) = (router for router in pair if router.backend.calls)
            await busy.stop()
            more.set()
    np.testing.assert_array_equal(arrived, [-HIDDEN, -(HIDDEN + 1)])


async def test_calls_that_one_router_cannot_answer_go_to_another_at_once(
    connect: Connect, pair: tuple[Router, Router], pauses: list[float]
) -> None:
    for failure in (Unavailable("stopping"), Overloaded("full"), Overloaded("full", retry_after_s=60.0)):
        client = connect([router.target for router in pair], discover=False)
        pair[0].backend.failure = failure
        for _ in range(4):
            np.testing.assert_array_equal(await client.forward(LAYER, HIDDEN), -HIDDEN)
        assert pauses == []


async def test_the_time_to_retry_is_waited_for(connect: Connect, service: Service, pauses: list[float]) -> None:
    backend = (await service.start()).backend
    client = connect(service.routers[0].target, max_attempts=5)
    backend.failure = Overloaded("full", retry_after_s=40.0)
    with pytest.raises(Overloaded):
        await client.forward(LAYER, HIDDEN)
    assert len(backend.calls) == 5
    assert len(pauses) == 4
    assert min(pauses) >= 40.0


async def test_nobody_waits_past_the_deadline(connect: Connect, service: Service, pauses: list[float]) -> None:
    backend = (await service.start()).backend
    client = connect(service.routers[0].target, timeout_s=30.0)
    backend.failure = Overloaded("full", retry_after_s=40.0)
    with pytest.raises(Overloaded, match="full"):
        await client.forward(LAYER, HIDDEN)
    assert (len(backend.calls), pauses) == (1, [])


async def test_the_deadline_is_of_all_attempts_together(
    connect: Connect, pair: tuple[Router, Router], monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead_s = 0.0
    monkeypatch.setattr("ray_moe.client.routers.monotonic", lambda: time.monotonic() + ahead_s)
    client = connect([router.target for router in pair], discover=False)
    async with midway(client, pair, 1, timeout_s=100.0) as (stream, _, router):
        await router.stop()
        ahead_s = 60.0
        assert (await anext(stream)).token_ids == (1,)
    first, second = router.backend.requests[0].timeout_s, others(pair, router).backend.requests[0].timeout_s
    assert first is not None
    assert second is not None
    assert second < 45 < first


async def test_the_callers_own_faults_are_told_at_once(connect: Connect, pair: tuple[Router, Router]) -> None:
    client = connect([router.target for router in pair], discover=False)
    for router in pair:
        router.backend.failure = InvalidRequest("not so")
    with pytest.raises(InvalidRequest, match="not so"):
        await client.forward(LAYER, HIDDEN)
    assert sum(len(router.backend.calls) for router in pair) == 1


async def test_one_attempt_is_no_retry(connect: Connect, service: Service) -> None:
    backend = (await service.start()).backend
    client = connect(service.routers[0].target, max_attempts=1)
    backend.failure = Unavailable("an expert is away")
    with pytest.raises(Unavailable):
        await client.forward(LAYER, HIDDEN)
    assert len(backend.calls) == 1


@pytest.mark.parametrize(
    ("wish", "num_attempts"),
    [
        (lambda client: client.plan(), 5),
        (lambda client: client.plan(dry_run=False), 1),
        (lambda client: client.resize(3), 5),
        (lambda client: client.drain("expert-0"), 1),
        (lambda client: client.chaos(ChaosRequest("kill")), 1),
        (lambda client: client.publish("/models/better"), 1),
        (lambda client: client.rollback(), 1),
        (lambda client: client.rollback(1), 5),
        (lambda client: client.canary(0, 1, "/models/better"), 1),
        (lambda client: client.end_canary(promote=True), 1),
    ],
    ids=["dry run", "plan", "resize", "drain", "chaos", "publish", "rollback", "rollback to", "canary", "promote"],
)
async def test_what_would_be_done_twice_is_not_asked_twice(
    connect: Connect, service: Service, pauses: list[float], wish: Any, num_attempts: int
) -> None:
    backend = (await service.start()).backend
    backend.failure = Unavailable("the controller is away")
    with pytest.raises(Unavailable):
        await wish(connect(service.routers[0].target, max_attempts=5))
    assert len(backend.wishes) == num_attempts
    assert len(pauses) == num_attempts - 1


# --- routers that come and go --------------------------------------------------------------------------------
@pytest.mark.usefixtures("told_always")
async def test_exchanging_all_routers_under_load_fails_no_request(connect: Connect, service: Service) -> None:
    live = [await service.start(), await service.start()]
    client = connect(live[0].target)
    is_over = False

    async def work() -> None:
        while not is_over:
            assert (await client.generate("x", max_new_tokens=20)).token_ids == tuple(range(20))
            np.testing.assert_array_equal(await client.forward(LAYER, HIDDEN), -HIDDEN)
            results = [result async for result in client.forward_stream([Forward(LAYER, HIDDEN)] * 10)]
            np.testing.assert_array_equal(results, [-HIDDEN] * 10)

    tasks = [asyncio.create_task(work()) for _ in range(4)]
    for _ in range(5):
        live.append(await service.start())
        while not live[-1].backend.requests and not any(task.done() for task in tasks):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        old = live.pop(0)
        service.tell(*live)
        await old.stop()  # without any grace
    is_over = True
    await asyncio.gather(*tasks)


# --- a process that is killed --------------------------------------------------------------------------------
SCRIPT = """
import asyncio
from tests.unit.service.fake_backend import FakeBackend, front_door

async def main():
    backend = FakeBackend()
    backend.hold_after = 3
    async with front_door(backend) as target:
        print(target, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def victim() -> Any:
    """A router in another process, whose generations stand still at the fourth token."""
    root = Path(__file__).parents[3]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, cwd=root)
    with process:
        yield process
        process.kill()


async def test_a_killed_router_costs_no_greedy_stream(
    connect: Connect, service: Service, victim: subprocess.Popen[str]
) -> None:
    router = await service.start()
    assert victim.stdout is not None
    target = (await asyncio.to_thread(victim.stdout.readline)).strip()
    client = connect([target, router.target], discover=False)
    streams = [client.stream("x", max_new_tokens=NUM_TOKENS) for _ in range(4)]
    chunks = [[await anext(stream) for _ in range(3)] for stream in streams]
    assert len(router.backend.requests) == 2
    victim.send_signal(signal.SIGKILL)
    for stream, come in zip(streams, chunks, strict=True):
        come += [chunk async for chunk in stream]
        assert [chunk.token_ids for chunk in come] == [(number,) for number in range(NUM_TOKENS)]
    assert len(router.backend.requests) == 4
