"""Names by which the HTTP door is called: without keys, none that somebody else can let point to this machine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ray_moe.service.admission import Admission
from ray_moe.service.auth import KeyRing
from ray_moe.service.openai.app import make_app
from tests.unit.service.openai.http_door import MODEL, TellingBackend
from tests.unit.service.openai.test_server import connect
from tests.unit.service.test_auth import add

PATHS = ("/health", "/metrics", "/openapi.json", "/v1/models", "/dashboard", "/dashboard/api/state", "/nothing")


def client_of(
    backend: TellingBackend, host: str, keys: Path | None = None, anonymous: bool = False
) -> httpx.AsyncClient:
    ring = KeyRing(keys)
    ring.load()
    app = make_app(backend, Admission(backend, keys=ring, allow_anonymous=anonymous))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{host}")


async def exchange(address: str, request: bytes) -> tuple[bytes, bytes]:
    """The status line and the body of an answer."""
    reader, writer = await connect(address)
    writer.write(request)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    body = await asyncio.wait_for(reader.readexactly(int(lines[b"content-length"])), 60)
    writer.close()
    return head.partition(b"\r\n")[0], body


@pytest.mark.parametrize("host", [b"evil.example:8477", b"127.0.0.1.evil.example", b""])
async def test_a_page_whose_name_was_rebound_is_refused(address: str, backend: TellingBackend, host: bytes) -> None:
    data = json.dumps({"model": MODEL, "prompt": "a"}).encode()
    post = (
        b"POST /v1/completions HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
    )
    answers = [await exchange(address, post % (host, len(data), data))]
    answers += [
        await exchange(address, b"GET %b HTTP/1.1\r\nhost: %b\r\n\r\n" % (path.encode(), host)) for path in PATHS
    ]
    for status, body in answers:
        assert status == b"HTTP/1.1 403 Forbidden"
        error = json.loads(body)["error"]
        assert (error["type"], error["code"]) == ("permission_error", "permission_denied")
        assert "reached by localhost or an address" in error["message"]
        assert "server.keys_file" in error["message"]
    assert backend.requests == []


@pytest.mark.parametrize("host", ["127.0.0.1:8477", "localhost:8477", "[::1]:8477", "localhost", "10.1.2.3:8000"])
async def test_openais_client_calls_by_localhost_and_addresses(backend: TellingBackend, host: str) -> None:
    async with client_of(backend, host) as http:
        transport: Any = http
        client = openai.AsyncOpenAI(base_url=f"http://{host}/v1", api_key="none", max_retries=0, http_client=transport)
        assert (await client.completions.create(model=MODEL, prompt="a", max_tokens=2)).choices[0].text == "0 1 "


async def test_with_keys_or_where_everybody_may_call_any_name_will_do(backend: TellingBackend, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    headers = {"authorization": f"Bearer {add(keys)}"}
    async with client_of(backend, "moe.example.org", keys) as http:
        assert (await http.get("/v1/models", headers=headers)).status_code == 200
    async with client_of(backend, "moe.example.org", anonymous=True) as http:
        assert (await http.get("/v1/models")).status_code == 200
        assert (await http.get("/dashboard/api/state")).status_code == 403  # it would let a page drain hosts
