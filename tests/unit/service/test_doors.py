"""Both doors of a router together: who may call, for whom it is counted, and encrypted."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest

from ray_moe.client.aio import AsyncClient
from ray_moe.config import ServerConfig
from ray_moe.errors import InvalidConfig, Overloaded, PermissionDenied, Unauthenticated
from ray_moe.service.doors import Doors
from ray_moe.service.keys import ApiKey, Role, digest_of, editing, new_key
from ray_moe.service.limits import UNLIMITED, Limits
from ray_moe.wire.v1.inference_pb2 import ListRoutersRequest
from ray_moe.wire.v1.inference_pb2_grpc import InferenceStub
from tests.unit.service.certificates import AUTHORITY, cert, key
from tests.unit.service.fake_backend import FakeBackend

TLS = {"tls_cert_file": str(cert("server")), "tls_key_file": str(key("server"))}


@asynccontextmanager
async def doors(backend: FakeBackend, **settings: Any) -> AsyncIterator[tuple[str, str]]:
    """Targets of gRPC and HTTP."""
    opened = Doors(backend, ServerConfig(port=0, http_port=0, **settings))
    ports = await opened.start()
    try:
        yield f"localhost:{ports.grpc}", f"localhost:{ports.http}"
    finally:
        await opened.stop(0.0)


def add_key(file: Path, name: str, *roles: Role, limits: Limits = UNLIMITED) -> str:
    secret = new_key()
    with editing(file) as entries:
        entries.append(ApiKey(name, digest_of(secret), frozenset(roles), limits=limits))
    return secret


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


async def test_grpc_asks_for_a_key_and_for_its_role(keys_file):
    ana, chief = add_key(keys_file, "ana", "infer"), add_key(keys_file, "chief", "admin")
    backend = FakeBackend()
    async with doors(backend, keys_file=str(keys_file)) as (target, _):
        async with AsyncClient(target) as nobody:
            await nobody.wait_ready(5)  # health is for everybody
            with pytest.raises(Unauthenticated, match="needs an API key"):
                await nobody.generate("hi", max_new_tokens=1)
            with pytest.raises(Unauthenticated):
                await nobody.status()
        for secret, refusal in (("rm_no", "UNAUTHENTICATED"), (chief, "PERMISSION_DENIED"), (ana, None)):
            assert await why_no_routers(target, secret) == refusal
        async with AsyncClient(target, api_key=ana) as client:
            assert (await client.generate("hi", max_new_tokens=2)).token_ids == (0, 1)
            await client.status()
            with pytest.raises(PermissionDenied, match="role admin"):
                await client.resize(3)
        async with AsyncClient(target, api_key=chief) as client:
            await client.resize(3)
            with pytest.raises(PermissionDenied, match="role infer"):
                await client.generate("hi", max_new_tokens=1)
    assert [request.caller for request in backend.requests] == ["ana"]
    assert backend.wishes == [("resize", 3)]


async def why_no_routers(target: str, secret: str) -> str | None:
    """Code of the refusal to tell of the routers."""
    async with grpc.aio.insecure_channel(target) as channel:
        try:
            await InferenceStub(channel).ListRouters(
                ListRoutersRequest(), metadata=(("authorization", f"Bearer {secret}"),)
            )
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
    return None


async def test_http_asks_for_the_same_keys(keys_file):
    ana = add_key(keys_file, "ana", "infer")
    backend = FakeBackend()
    async with doors(backend, keys_file=str(keys_file)) as (_, target):
        base_url = f"http://{target}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key=ana, max_retries=0) as client:
            answer = await client.completions.create(model="tiny", prompt="hi", max_tokens=2)
            assert answer.choices[0].text == "0 1 "
            assert [model.id async for model in client.models.list()] == ["tiny"]
        async with openai.AsyncOpenAI(base_url=base_url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="not known"):
                await client.completions.create(model="tiny", prompt="hi")
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with httpx.AsyncClient() as raw:
            assert (await raw.get(f"http://{target}/health")).status_code == 200
            refused = await raw.post(f"{base_url}/completions", json={"model": "tiny", "prompt": "hi"})
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert [request.caller for request in backend.requests] == ["ana"]


async def test_tokens_and_requests_are_counted_over_both_doors(keys_file):
    ana = add_key(keys_file, "ana", "infer", limits=Limits(tokens_per_minute=5))
    async with doors(FakeBackend(), keys_file=str(keys_file)) as (grpc_target, http_target):
        async with AsyncClient(grpc_target, api_key=ana, max_attempts=1) as client:
            await client.generate("hi", max_new_tokens=10)
            with pytest.raises(Overloaded) as refused:
                await client.generate("hi", max_new_tokens=1)
            assert refused.value.retry_after_s is not None
        async with openai.AsyncOpenAI(base_url=f"http://{http_target}/v1", api_key=ana, max_retries=0) as client:
            with pytest.raises(openai.RateLimitError) as limited:
                await client.completions.create(model="tiny", prompt="hi")
            assert int(limited.value.response.headers["retry-after"]) >= 1


async def test_one_request_at_a_time(keys_file):
    ana = add_key(keys_file, "ana", "infer", limits=Limits(max_concurrent=1))
    backend = FakeBackend()
    backend.hold_after = 1
    async with doors(backend, keys_file=str(keys_file)) as (target, _), AsyncClient(target, api_key=ana) as client:
        first = asyncio.create_task(client.generate("hi", max_new_tokens=3))
        await asyncio.wait_for(backend.reached.wait(), 5)
        with pytest.raises(Overloaded):
            await client.generate("hi", max_new_tokens=1)
        backend.released.set()
        assert len((await first).token_ids) == 3


async def test_both_doors_are_encrypted():
    async with doors(FakeBackend(), **TLS) as (grpc_target, http_target):
        async with AsyncClient(grpc_target, ca_file=AUTHORITY) as client:
            assert (await client.generate("hi", max_new_tokens=2)).token_ids == (0, 1)
        async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=str(AUTHORITY))) as client:
            assert (await client.get(f"https://{http_target}/health")).status_code == 200


def test_settings_that_do_not_go_together_are_refused(keys_file):
    with pytest.raises(ValueError, match="go together"):
        ServerConfig(tls_cert_file="a")
    with pytest.raises(ValueError, match="needs tls_cert_file"):
        ServerConfig(tls_client_ca_file="a")
    with pytest.raises(ValueError, match="unencrypted"):
        ServerConfig(host="0.0.0.0", keys_file="keys.json")
    for tls in ({}, TLS):
        with pytest.raises(ValueError, match=r"without keys everybody who reaches 0\.0\.0\.0 could do everything: set"):
            ServerConfig.model_validate({"host": "0.0.0.0", **tls})
    for host in ("127.0.0.1", "::1", "localhost"):
        assert ServerConfig(host=host).is_local
    ServerConfig(host="0.0.0.0", allow_anonymous=True)
    ServerConfig.model_validate({"host": "0.0.0.0", "keys_file": "keys.json", **TLS})


async def test_a_missing_file_of_keys_is_told_before_anything_listens(tmp_path):
    with pytest.raises(InvalidConfig, match=r"keys\.json"):
        await Doors(FakeBackend(), ServerConfig(port=0, keys_file=str(tmp_path / "keys.json"))).start()


@pytest.mark.parametrize(("anonymous", "status"), [(False, 403), (True, 200)])
async def test_by_which_names_http_is_called_follows_the_configuration(anonymous, status):
    doors = Doors(FakeBackend(), ServerConfig(allow_anonymous=anonymous))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(doors.http_app), base_url="http://moe.example") as http:
        assert (await http.get("/health")).status_code == status
