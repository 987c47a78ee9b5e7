"""Both clients against a real front door over a backend without a model; every test runs with each of them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from ray_moe.client.aio import AsyncClient
from ray_moe.client.requests import Forward, Generation
from ray_moe.client.sync import Client
from ray_moe.errors import (
    Cancelled,
    DeadlineExceeded,
    InsufficientResources,
    InvalidConfig,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
    WireError,
)
from ray_moe.types import CanaryRequest, ChaosRequest, GenerateChunk, VersionStatus
from tests.unit.client.conftest import Connect
from tests.unit.service.fake_backend import (
    GATELESS,
    LAYER,
    LAYERS,
    PLAN,
    REPORT,
    STATUS,
    TABLE,
    VERSIONS,
    WIDTH,
    FakeBackend,
    front_door,
)

HIDDEN = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def client(backend: FakeBackend, connect: Connect) -> AsyncIterator[Any]:
    async with front_door(backend, max_request_bytes=64 * 2**20) as target:
        yield connect(target, timeout_s=20.0, max_attempts=4)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# --- one layer -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["<f8", "<f4", "<f2", ">f4"])
async def test_forward_answers_in_the_dtype_it_was_given(client: Any, dtype: str) -> None:
    result = await client.forward(LAYER, HIDDEN.astype(dtype))
    assert result.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(result, -HIDDEN)
    result += 1  # the caller's own


async def test_forward_takes_what_numpy_takes(client: Any, backend: FakeBackend) -> None:
    index, weight = [[0, 3], [2, 3]], [[0.5, 7.0], [1.0, 7.0]]
    expected = HIDDEN * [[0.5], [3.0]]
    for dtype in (int, np.int32, np.uint8):
        result = await client.forward(GATELESS, HIDDEN[::-1].T.T[::-1].tolist(), np.array(index, dtype), weight)
        np.testing.assert_array_equal(result, expected)
    assert (await client.forward(1, HIDDEN[:0])).shape == (0, WIDTH)
    await client.forward(1, HIDDEN)
    assert backend.calls[-1][0] == LAYERS[1]


async def test_large_batches(client: Any) -> None:
    hidden = np.full((2**17, WIDTH), 3.0)
    assert ((await client.forward(LAYER, hidden)) == -3.0).all()


async def test_a_batch_beyond_the_limit_of_the_service(client: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"takes no message of this size .*: send fewer tokens at a time"):
        await client.forward(LAYER, np.zeros((2**22, WIDTH)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LAYER, HIDDEN.astype(int)), "hidden has dtype int64"),
        ((LAYER, [[1.0], [1.0, 2.0]]), "hidden is not an array"),
        ((LAYER, [["a"]]), "hidden has dtype <U1"),
        ((LAYER, HIDDEN, [[0], [0]]), "index and weight go together"),
        ((LAYER, HIDDEN, None, [[0.0], [0.0]]), "index and weight go together"),
        ((LAYER, HIDDEN, [[0.0], [0.0]], [[0.0], [0.0]]), "index has dtype float64; expected integers"),
        ((LAYER, HIDDEN, np.zeros((2, 1), np.uint64), [[0.0], [0.0]]), "index has dtype uint64"),
        ((1.5, HIDDEN), "layer is 1.5; expected a path or an index"),
        ((2**40, HIDDEN), "layer is 1099511627776"),
        ((None, HIDDEN), "layer is None"),
        ((LAYER, HIDDEN * np.nan), r"hidden\[0, 0\] is nan"),
        ((LAYER, HIDDEN[0]), r"hidden has shape \[4\]"),
    ],
)
async def test_bad_forwards(client: Any, backend: FakeBackend, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await client.forward(*arguments)
    assert not backend.calls


async def test_the_class_and_the_message_of_the_service_arrive_as_they_were(client: Any, backend: FakeBackend) -> None:
    with pytest.raises(NotFound, match=f"^the model has no MoE layer 'nowhere': .*{LAYER}"):
        await client.forward("nowhere", HIDDEN)
    for backend.failure in (Overloaded("full: ü"), WireError("bytes")):
        with pytest.raises(type(backend.failure)) as failure:
            await client.forward(LAYER, HIDDEN)
        assert type(failure.value) is type(backend.failure)
        assert failure.value.message == backend.failure.args[0]


async def test_the_time_to_retry_arrives(client: Any, backend: FakeBackend) -> None:
    for backend.failure, expected in ((Overloaded("full", retry_after_s=0.5), 0.5), (Overloaded("full"), None)):
        with pytest.raises(Overloaded) as failure:
            await client.forward(LAYER, HIDDEN)
        assert failure.value.retry_after_s == expected


# --- streams of batches --------------------------------------------------------------------------------------
async def test_a_stream_of_batches_answers_in_order(client: Any) -> None:
    dtypes = [np.float32, np.float64, np.float16]
    requests = (Forward(LAYER, (HIDDEN + number).astype(dtypes[number % 3])) for number in range(50))
    results = [result async for result in client.forward_stream(requests)]
    assert len(results) == 50
    for number, result in enumerate(results):
        assert result.dtype == dtypes[number % 3]
        np.testing.assert_array_equal(result, -(HIDDEN + number))


async def test_an_empty_stream_of_batches(client: Any) -> None:
    assert [result async for result in client.forward_stream([])] == []


class Broken(Exception):
    """Of the caller's own iterable."""


def breaking(at_fault: Any) -> Iterator[Forward]:
    yield Forward(LAYER, HIDDEN)
    yield Forward(LAYER, HIDDEN)
    if isinstance(at_fault, Exception):
        raise at_fault
    yield at_fault
    yield Forward(LAYER, HIDDEN)


@pytest.mark.parametrize(
    ("at_fault", "error"),
    [
        (Forward("nowhere", HIDDEN), NotFound),
        (Forward(LAYER, [["a"]]), InvalidRequest),
        (Broken("mine"), Broken),
    ],
    ids=["service", "client", "caller"],
)
async def test_a_stream_of_batches_ends_with_the_first_error(
    client: Any, at_fault: Any, error: type[Exception]
) -> None:
    results = []
    with pytest.raises(error):
        async for result in client.forward_stream(breaking(at_fault)):
            results.append(result)  # noqa: PERF401  (kept although the loop raises)
    assert len(results) == 2


async def test_the_asyncio_client_reads_async_iterables(backend: FakeBackend) -> None:
    async def requests() -> AsyncIterator[Forward]:
        for item in breaking(Broken("mine")):
            await asyncio.sleep(0)
            yield item

    async with front_door(backend) as target, AsyncClient(target) as client:
        with pytest.raises(Broken):
            assert [result async for result in client.forward_stream(requests())] == []
    assert len(backend.calls) == 2


# --- generation ----------------------------------------------------------------------------------------------
async def test_generate(client: Any, backend: FakeBackend) -> None:
    assert await client.generate("x", max_new_tokens=3) == Generation("0 1 2 ", (0, 1, 2), "length", 1)
    options = {"max_new_tokens": 4, "temperature": 0.5, "top_p": 0.9, "seed": 2**63, "ignore_eos": True}
    generation = await client.generate(token_ids=np.array([1, 2]), **options)
    assert generation.num_prompt_tokens == 2
    request = backend.requests[-1]
    assert (request.prompt, request.token_ids) == (None, (1, 2))
    assert {name: getattr(request, name) for name in options} == options


async def test_stream(client: Any) -> None:
    chunks = [chunk async for chunk in client.stream("x", max_new_tokens=2)]
    assert chunks == [GenerateChunk((0,), "0 ", "", 1), GenerateChunk((1,), "1 ", "length", 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of prompt"),
        ({"prompt": "x", "token_ids": [1]}, "exactly one of prompt"),
        ({"prompt": "x", "max_tokens": 3}, "unexpected keyword argument 'max_tokens'"),
        ({"prompt": "x", "max_new_tokens": 2**40}, "cannot be sent"),
        ({"prompt": "x", "temperature": "hot"}, "cannot be sent"),
        ({"prompt": "x", "seed": -1}, "cannot be sent"),
        ({"prompt": "\ud800"}, "cannot be sent"),
        ({"prompt": b"x\xff"}, "cannot be sent"),
        ({"prompt": 5}, "cannot be sent"),
        ({"token_ids": 5}, "cannot be made"),
        ({"token_ids": [1.5]}, "cannot be sent"),
        ({"token_ids": ["a"]}, "cannot be sent"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
async def test_bad_generates(client: Any, backend: FakeBackend, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await client.generate(**arguments)
    assert not backend.requests


async def test_closing_a_stream_ends_the_work(client: Any, backend: FakeBackend) -> None:
    backend.hold_after = 2
    async with contextlib.aclosing(client.stream("x", max_new_tokens=5)) as stream:
        assert [(await anext(stream)).token_ids for _ in range(2)] == [(0,), (1,)]
        await backend.reached.wait()
    await asyncio.wait_for(backend.closed.wait(), 5)
    assert backend.num_open == 0


async def test_cancelling_a_task_ends_its_work(backend: FakeBackend) -> None:
    backend.hold_after = 1
    async with front_door(backend) as target, AsyncClient(target) as client:
        task = asyncio.create_task(client.generate("x", max_new_tokens=5))
        await backend.reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(backend.closed.wait(), 5)
    assert backend.num_open == 0


async def test_many_streams_at_once(backend: FakeBackend) -> None:
    async with front_door(backend) as target, AsyncClient(target) as client:
        generations = await asyncio.gather(*(client.generate("x", max_new_tokens=1 + n) for n in range(32)))
    assert [len(generation.token_ids) for generation in generations] == list(range(1, 33))
    assert backend.num_open == 0


def test_a_generation_that_broke_off() -> None:
    with pytest.raises(WireError, match="without a finish_reason"):
        Generation.of([GenerateChunk((1,), "a")])


# --- the service itself --------------------------------------------------------------------------------------
async def test_status_and_placement(client: Any) -> None:
    assert await client.status() == STATUS
    assert await client.placement() == TABLE


async def test_wait_ready(client: Any, backend: FakeBackend) -> None:
    backend.ready = False
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:\d+ is not ready after 0.1 s: it is starting"):
        await client.wait_ready(0.1)
    waiting = asyncio.create_task(client.wait_ready(20))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    backend.ready = True
    await waiting


async def test_wait_ready_for_a_service_that_starts_later(connect: Connect, backend: FakeBackend) -> None:
    port = free_port()
    client = connect(f"127.0.0.1:{port}")
    with pytest.raises(Unavailable, match=f"127.0.0.1:{port} is not ready after 0.1 s: .*refused"):
        await client.wait_ready(0.1)
    waiting = asyncio.create_task(client.wait_ready(20))
    async with front_door(backend, port=port):
        await waiting
        await client.forward(LAYER, HIDDEN)


# --- services that do not answer -----------------------------------------------------------------------------
async def test_pointed_at_nothing(connect: Connect) -> None:
    target = f"127.0.0.1:{free_port()}"
    client = connect(target, max_attempts=3)
    calls = (client.status(), client.generate("x"), client.forward(LAYER, HIDDEN))
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, Unavailable)
        assert f"the service at {target} cannot be reached" in error.message
        assert "refused" in error.message


async def test_pointed_at_a_name_that_does_not_exist(connect: Connect) -> None:
    with pytest.raises(Unavailable, match=r"the service at ray-moe\.invalid:1 cannot"):
        await connect("ray-moe.invalid:1", max_attempts=2).status()


async def test_pointed_at_something_that_never_answers(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DeadlineExceeded, match=f"no answer from {target} within 0.3 s"):
            await connect(target, timeout_s=0.3).status()


async def test_pointed_at_another_service(connect: Connect) -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        with pytest.raises(InvalidRequest, match=f"127.0.0.1:{port} is not a ray_moe service"):
            await connect(f"127.0.0.1:{port}").status()
        add_HealthServicer_to_server(HealthServicer(), server)  # healthy, as servers of Ray are, and still not ours
        with pytest.raises(Unavailable, match=f"not ready .*127.0.0.1:{port} is not a ray_moe service"):
            await connect(f"127.0.0.1:{port}").wait_ready(0.3)
    finally:
        await server.stop(None)


async def test_the_time_of_a_call(client: Any, backend: FakeBackend) -> None:
    backend.hold_after, backend.max_positions = 0, None
    for method, arguments in ((client.generate, ("x",)), (client.forward, (LAYER, HIDDEN))):
        with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s; give it more"):
            await method(*arguments, timeout_s=0.2)


async def test_what_is_unavailable_is_asked_again(client: Any, backend: FakeBackend) -> None:
    backend.failure = Unavailable("an expert is away")
    with pytest.raises(Unavailable, match=r"^an expert is away$"):
        await client.forward(LAYER, HIDDEN)
    assert len(backend.calls) == 4
    backend.calls.clear()
    waiting = asyncio.create_task(client.forward(LAYER, HIDDEN))
    while not backend.calls:  # noqa: ASYNC110
        await asyncio.sleep(0)
    backend.failure = None
    np.testing.assert_array_equal(await waiting, -HIDDEN)


async def test_what_has_begun_and_is_drawn_by_lot_is_not_asked_again(client: Any, backend: FakeBackend) -> None:
    backend.hold_after = 1
    stream = client.stream("x", max_new_tokens=5, temperature=1.0)
    assert (await anext(stream)).token_ids == (0,)
    backend.failure = Unavailable("an expert is away")
    backend.released.set()
    with pytest.raises(Unavailable, match=r"^an expert is away \(tokens that had come: 1\)$"):
        await anext(stream)
    assert len(backend.requests) == 1


async def test_nothing_else_is_asked_again(client: Any, backend: FakeBackend) -> None:
    backend.failure = Overloaded("full")
    with pytest.raises(Overloaded):
        await client.forward(LAYER, HIDDEN)
    assert len(backend.calls) == 1


async def test_a_service_that_stops_in_the_middle(connect: Connect, backend: FakeBackend) -> None:
    backend.hold_after = 1
    async with front_door(backend) as target:
        stream = connect(target, max_attempts=2).stream("x", max_new_tokens=5)
        await anext(stream)
        await backend.reached.wait()
    with pytest.raises(Unavailable, match=target):
        await anext(stream)


async def test_a_closed_client(client: Any) -> None:
    await client.status()
    await client.close()
    await client.close()
    with pytest.raises(Cancelled, match="is closed"):
        await client.status()
    with pytest.raises(Cancelled, match="is closed"):
        await client.generate("x")


async def test_with_closes(backend: FakeBackend) -> None:
    async with front_door(backend) as target:
        async with AsyncClient(target) as aio:
            assert await aio.status() == STATUS
        with Client(target) as sync:
            assert await asyncio.to_thread(sync.status) == STATUS
        for call in (aio.status(), asyncio.to_thread(sync.status)):
            with pytest.raises(Cancelled):
                await call


# --- changing the cluster ------------------------------------------------------------------------------------
async def test_wishes_reach_the_backend_and_answers_come_back(client: Any, backend: FakeBackend) -> None:
    request = ChaosRequest("slow", "expert-1", 0.5, 2.0, 8.0, 3)
    assert await client.plan() == PLAN
    assert await client.plan(dry_run=False) == PLAN
    assert await client.resize(3) is None
    assert await client.drain("expert-0", replace=True) == ("expert-0", "expert-9")
    assert await client.publish("/models/better") == VersionStatus(3, "/models/better", "current")
    assert await client.rollback() == VERSIONS[0]
    assert await client.rollback(1) == VERSIONS[1]
    assert await client.versions() == VERSIONS
    tried = await client.canary(1, 2, "/models/better", share=0.5, mode="traffic", max_drift=0.3)
    assert tried == VersionStatus(3, "/models/better", "canary", 0.25, 7)
    await client.canary(LAYER, 2, "/models/better")
    assert await client.end_canary(promote=True) == VERSIONS[1]
    assert await client.chaos(request) == REPORT
    assert backend.wishes == [
        ("plan", True),
        ("plan", False),
        ("resize", 3),
        ("drain", "expert-0", True),
        ("publish", "/models/better"),
        ("roll back", None),
        ("roll back", 1),
        ("canary", CanaryRequest(LAYERS[1], 2, "/models/better", 0.5, "traffic", 0.3)),
        ("canary", CanaryRequest(LAYER, 2, "/models/better")),
        ("end canary", True),
        ("chaos", request),
    ]


@pytest.mark.parametrize("failure", [InvalidConfig("too few"), InsufficientResources("no room")])
async def test_a_wish_that_cannot_be_granted_says_why(client: Any, backend: FakeBackend, failure: Exception) -> None:
    backend.failure = failure
    for wish in (client.resize(0), client.drain("expert-0"), client.chaos(ChaosRequest("kill"))):
        with pytest.raises(type(failure), match=str(failure)):
            await wish


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (lambda client: client.resize(-1), "num_actors is -1"),
        (lambda client: client.resize(10**9), "num_actors is 1000000000"),
        (lambda client: client.resize("three"), "num_actors is 'three'"),
        (lambda client: client.drain(""), "expected the name of an expert actor"),
        (lambda client: client.publish(""), "expected the directory of a checkpoint"),
        (lambda client: client.rollback("two"), "version is 'two'"),
        (lambda client: client.canary(0, "two", "/models/better"), "cannot be sent"),
        (lambda client: client.canary(0, 1, "/models/better", mode="coal"), "mode is 'coal'"),
        (lambda client: client.chaos(ChaosRequest("explode")), "expected one of kill, hang, slow, corrupt, partition"),
        (lambda client: client.chaos(ChaosRequest("kill", target="")), "target is empty"),
        (lambda client: client.chaos(ChaosRequest("slow", duration_s=1e9)), "duration_s is"),
        (lambda client: client.chaos(ChaosRequest("slow", at_s=float("nan"))), "at_s is nan"),
        (lambda client: client.chaos(ChaosRequest("slow", factor=0.5)), "factor is 0.5"),
    ],
)
async def test_a_wish_that_makes_no_sense_is_refused(client: Any, backend: FakeBackend, wish: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        await wish(client)
    assert backend.wishes == []
