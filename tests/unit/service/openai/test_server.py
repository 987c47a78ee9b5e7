"""The server itself: admission, clients that leave, stopping, ports."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from ray_moe.errors import InsufficientResources
from ray_moe.service.openai.server import HttpFrontDoor
from tests.unit.service.openai.http_door import MODEL, TellingBackend, async_client, http_door, until

JSON = {"content-type": "application/json"}
ASK = {"model": MODEL, "prompt": "a"}


# --- what the service tells about itself ---------------------------------------------------------------------
async def test_the_model_is_listed_and_found(client: openai.AsyncOpenAI, backend: TellingBackend) -> None:
    backend.model_name = "org/tiny model"
    listed = [model async for model in client.models.list()]
    assert [(model.id, model.object, model.owned_by) for model in listed] == [("org/tiny model", "model", "ray_moe")]
    assert await client.models.retrieve("org/tiny model") == listed[0]


async def test_health_and_all_else_follow_readiness(http: httpx.AsyncClient, backend: TellingBackend) -> None:
    assert (await http.get("/health")).json() == {"status": "ready"}
    backend.ready = False
    replies = [await http.get(path) for path in ("/health", "/v1/models", "/v1/models/tiny")]
    replies += [await http.post(path, json=ASK) for path in ("/v1/completions", "/v1/chat/completions")]
    for reply in replies:
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["code"] == "service_unavailable"


async def test_the_interface_is_described_and_no_page_loads_scripts_from_elsewhere(http: httpx.AsyncClient) -> None:
    pages = [await http.get(path) for path in ("/docs", "/redoc", "/docs/oauth2-redirect")]
    assert [page.status_code for page in pages] == [404] * 3
    assert "/openapi.json" in pages[0].json()["error"]["message"]
    described = (await http.get("/openapi.json")).json()
    assert set(described["paths"]) == {
        "/health",
        "/metrics",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/completions",
        "/v1/chat/completions",
    }
    assert "max_completion_tokens" in described["components"]["schemas"]["ChatRequest"]["properties"]
    assert "422" not in json.dumps(described["paths"])


async def test_every_answer_has_an_id(client: openai.AsyncOpenAI) -> None:
    done = await client.completions.with_raw_response.create(model=MODEL, prompt="a", max_tokens=1)
    assert done.headers["x-request-id"] == f"req-{done.parse().id.removeprefix('cmpl-')}"


# --- admission -----------------------------------------------------------------------------------------------
async def test_requests_over_the_limit_are_overloaded(backend: TellingBackend) -> None:
    backend.hold_after = 0
    async with http_door(backend, max_concurrent_requests=1) as address, async_client(address) as client:
        first = asyncio.create_task(client.completions.create(model=MODEL, prompt="a"))
        await backend.reached.wait()
        with pytest.raises(openai.RateLimitError, match="1 requests are being served") as failure:
            await client.completions.create(model=MODEL, prompt="a")
        assert failure.value.response.headers["retry-after"] == "1"
        assert (await client.models.list()).data
        backend.released.set()
        assert (await first).choices[0].finish_reason == "length"
        await client.completions.create(model=MODEL, prompt="a")


async def test_bodies_that_are_too_many_bytes_together_are_overloaded(backend: TellingBackend) -> None:
    sent, go_on = asyncio.Event(), asyncio.Event()
    body = json.dumps({**ASK, "user": "x" * 1000}).encode()

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:500]
        sent.set()
        await go_on.wait()
        yield body[500:]

    async with (
        http_door(backend, max_in_flight_bytes=600) as address,
        httpx.AsyncClient(base_url=address) as http,
    ):
        first = asyncio.create_task(http.post("/v1/completions", content=slowly(), headers=JSON))
        await sent.wait()
        while (second := await http.post("/v1/completions", content=body, headers=JSON)).status_code == 200:
            pass  # the first one's bytes have not arrived yet
        assert second.status_code == 429
        assert "may be in flight" in second.json()["error"]["message"]
        go_on.set()
        assert (await first).status_code == 200  # one alone may be any size
        assert (await http.post("/v1/completions", content=body, headers=JSON)).status_code == 200


# --- clients that leave --------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_after", [0, 2])
async def test_a_client_that_leaves_ends_its_generations(
    address: str, backend: TellingBackend, stream: bool, hold_after: int
) -> None:
    backend.hold_after = hold_after
    reader, writer = await connect(address)
    writer.write(post({**ASK, "n": 2, "stream": stream}))
    await asyncio.wait_for(backend.both_open.wait(), 60)
    await asyncio.wait_for(backend.reached.wait(), 60)
    if stream and hold_after:
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()
    await until(lambda: backend.num_open == 0)
    assert len(backend.requests) == 2


async def test_a_client_that_leaves_amid_its_body_costs_nothing(address: str, backend: TellingBackend) -> None:
    _, writer = await connect(address)
    writer.write(post(ASK)[:-5])
    await writer.drain()
    writer.close()
    async with async_client(address) as client:
        await client.completions.create(model=MODEL, prompt="a", max_tokens=1)
    assert len(backend.requests) == 1


# --- stopping ------------------------------------------------------------------------------------------------
async def test_stopping_lets_requests_end(backend: TellingBackend) -> None:
    backend.hold_after = 1
    door = HttpFrontDoor(backend, port=0)
    async with async_client(f"http://127.0.0.1:{await door.start()}") as client:
        asking = asyncio.create_task(client.completions.create(model=MODEL, prompt="a", max_tokens=3))
        await backend.reached.wait()
        stopping = asyncio.create_task(door.stop(60))
        await asyncio.sleep(0)
        backend.released.set()
        assert (await asking).choices[0].text == "0 1 2 "
        await stopping
        with pytest.raises(openai.APIConnectionError):
            await client.models.list()
        await door.stop(0)


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_that_outlast_the_grace_are_told_so(backend: TellingBackend, stream: bool) -> None:
    backend.hold_after = 1
    door = HttpFrontDoor(backend, port=0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{await door.start()}", timeout=60) as http:
        asking = asyncio.create_task(http.post("/v1/completions", json={**ASK, "stream": stream}))
        await backend.reached.wait()
        await door.stop(0)
        reply = await asking
    assert reply.status_code == (200 if stream else 503)
    assert "the service is stopping" in reply.text
    assert "[DONE]" not in reply.text
    assert backend.num_open == 0


async def test_a_client_that_does_not_read_does_not_hold_up_the_stop(backend: TellingBackend) -> None:
    backend.max_positions, backend.text = None, "x" * 2**16
    door = HttpFrontDoor(backend, port=0)
    _, writer = await connect(f"http://127.0.0.1:{await door.start()}")
    writer.write(post({**ASK, "stream": True, "max_tokens": 10**6}))
    await until(lambda: backend.num_open == 1)
    await asyncio.wait_for(door.stop(0), 60)
    await until(lambda: backend.num_open == 0)
    writer.close()
    assert len(backend.requests) == 1


async def test_a_door_leaves_signals_alone(backend: TellingBackend) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with http_door(backend) as address, async_client(address) as client:
        await client.models.list()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


async def test_a_door_that_never_opened_stops(backend: TellingBackend) -> None:
    door = HttpFrontDoor(backend)
    await door.stop()
    await door.stop(0)
    assert not backend.requests


# --- ports ---------------------------------------------------------------------------------------------------
async def test_a_port_in_use_is_refused_and_free_again_afterwards(backend: TellingBackend) -> None:
    door = HttpFrontDoor(backend, port=0)
    port = await door.start()
    async with async_client(f"http://127.0.0.1:{port}") as client:
        await client.completions.create(model=MODEL, prompt="a", max_tokens=1)
        with pytest.raises(
            InsufficientResources, match=rf"cannot listen on 127\.0\.0\.1:{port}: address already in use"
        ):
            await HttpFrontDoor(backend, port=port).start()
        await door.stop(0)  # the client's connection is closed by the server, so that the port waits
    again = HttpFrontDoor(backend, port=port)
    assert await again.start() == port
    await again.stop(0)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "256.1.1.1"])
async def test_an_address_that_is_not_here_is_refused(backend: TellingBackend, host: str) -> None:
    with pytest.raises(InsufficientResources, match=f"cannot listen on {host}:0"):
        await HttpFrontDoor(backend, host, 0).start()


async def test_a_host_may_be_a_name(backend: TellingBackend) -> None:
    door = HttpFrontDoor(backend, "localhost", 0)
    async with async_client(f"http://localhost:{await door.start()}") as client:
        assert (await client.models.list()).data[0].id == MODEL
    await door.stop(0)


# --- helpers -------------------------------------------------------------------------------------------------
async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.removeprefix("http://").partition(":")
    return await asyncio.open_connection(host, int(port), limit=2**10)


def post(body: Any, path: str = "/v1/completions") -> bytes:
    data = json.dumps(body)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(data)}\r\n\r\n"
    return (head + data).encode()
