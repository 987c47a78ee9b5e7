"""API keys and TLS of both clients: what is sent, where it may go, and what is said when it may not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest

from ray_moe.client.access import KEY_VARIABLE, Access, stays_here
from ray_moe.client.aio import AsyncClient
from ray_moe.client.requests import Forward
from ray_moe.client.sync import Client
from ray_moe.errors import InvalidConfig, Unavailable
from ray_moe.types import ChaosRequest
from tests.unit.service.certificates import AUTHORITY, STRANGER_AUTHORITY, cert, files, grpc_server, key
from tests.unit.service.fake_backend import LAYER, STATUS, WIDTH

KEY = "rm_0123456789"
HIDDEN = np.ones((1, WIDTH), np.float32)
CLIENTS = pytest.mark.parametrize("kind", [Client, AsyncClient], ids=["sync", "aio"])


class Recorder(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # the real one takes none
    """What each call was, and the key that came with it."""

    def __init__(self) -> None:
        self.calls: dict[str, Any] = {}

    async def intercept_service(self, continuation: Callable[..., Awaitable[Any]], handler_call_details: Any) -> Any:
        headers = dict(handler_call_details.invocation_metadata)
        self.calls[handler_call_details.method.rpartition("/")[2]] = headers.get("authorization")
        return await continuation(handler_call_details)


@pytest.fixture(autouse=True)
def _no_key_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def use_all(client: Client) -> None:
    client.wait_ready(10)
    client.forward(LAYER, HIDDEN)
    assert len(list(client.forward_stream([Forward(LAYER, HIDDEN)]))) == 1
    client.generate("x", max_new_tokens=2)
    assert client.status() == STATUS
    client.placement()
    client.plan()
    client.resize(2)
    client.drain("expert-0")
    client.chaos(ChaosRequest("kill"))


async def use_all_async(client: AsyncClient) -> None:
    await client.wait_ready(10)
    await client.forward(LAYER, HIDDEN)
    assert len([result async for result in client.forward_stream([Forward(LAYER, HIDDEN)])]) == 1
    await client.generate("x", max_new_tokens=2)
    assert await client.status() == STATUS
    await client.placement()
    await client.plan()
    await client.resize(2)
    await client.drain("expert-0")
    await client.chaos(ChaosRequest("kill"))


async def use(kind: type[Client] | type[AsyncClient], target: str, **access: Any) -> None:
    """Every method once."""
    if issubclass(kind, AsyncClient):
        async with kind(target, 10, **access) as client:
            await use_all_async(client)
    else:
        with kind(target, 10, **access) as client:
            await asyncio.to_thread(use_all, client)


# --- keys ----------------------------------------------------------------------------------------------------
@CLIENTS
async def test_the_key_goes_with_every_call(kind: type[Client], monkeypatch: pytest.MonkeyPatch) -> None:
    async def seen(api_key: str | None) -> set[str | None]:
        recorder = Recorder()
        async with grpc_server(None, [recorder]) as port:
            await use(kind, f"127.0.0.1:{port}", api_key=api_key)
        assert len(recorder.calls) == 11  # and the question for the routers
        return set(recorder.calls.values())

    assert await seen(None) == {None}
    assert await seen(f" {KEY}\n") == {f"Bearer {KEY}"}
    monkeypatch.setenv(KEY_VARIABLE, "rm_environment\n")
    assert await seen(None) == {"Bearer rm_environment"}
    assert await seen(KEY) == {f"Bearer {KEY}"}
    assert await seen("") == {None}


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1:8476",
        "127.9.9.9",
        "localhost:8476",
        "LOCALHOST",
        "dns:localhost:1",
        "dns:///127.0.0.1:1",
        "[::1]:8476",
        "::1",
        "ipv4:127.0.0.1:1,127.0.0.2:1",
        "ipv6:[::1]:1",
        "unix:relative",
        "unix:///run/moe",
        "unix-abstract:moe",
    ],
)
def test_what_stays_on_this_machine(target: str) -> None:
    assert stays_here(target)


@pytest.mark.parametrize(
    "target",
    [
        "",
        ":8476",
        "moe.example.org:8476",
        "10.0.0.1:8476",
        "0.0.0.0:8476",
        "localhost.example.org:1",
        "127.0.0.1.example.org:1",
        "127.0.0.1@example.org",
        "dns://example.org/localhost:1",
        "dns:///example.org",
        "ipv4:127.0.0.1:1,10.0.0.1:1",
        "[2001:db8::1]:1",
        "xds:///localhost",
        "unixy.example.org:1",
        "127.0.0.1:1:2",
    ],
)
def test_what_may_leave_it(target: str) -> None:
    assert not stays_here(target)


@CLIENTS
def test_no_key_leaves_the_machine_unencrypted(kind: type[Client], monkeypatch: pytest.MonkeyPatch) -> None:
    target = "moe.example.org:8476"
    with pytest.raises(InvalidConfig, match=rf"\(api_key\) would travel unencrypted to {target}: use TLS") as refusal:
        kind(target, api_key=KEY)
    assert KEY not in refusal.value.message
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with pytest.raises(InvalidConfig, match=f"the environment variable {KEY_VARIABLE}"):
        kind(target)
    for access in ({"api_key": ""}, {"tls": True}, {"ca_file": AUTHORITY}, {"allow_plaintext_key": True}):
        assert kind(target, **access).target == target


@pytest.mark.parametrize("wrong", ["two words", "ü", "a\nb", "a\0b"])
def test_what_cannot_be_a_key_is_not_sent(wrong: str) -> None:
    with pytest.raises(InvalidConfig, match="api_key is no API key") as refusal:
        Access(wrong).metadata("localhost")
    assert wrong not in refusal.value.message


def test_a_key_is_not_shown_by_accident() -> None:
    assert KEY not in repr(Access(KEY))


# --- TLS -----------------------------------------------------------------------------------------------------
@CLIENTS
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_over_tls(kind: type[Client], host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    async with grpc_server(files(), [recorder]) as port:
        await use(kind, f"{host}:{port}", ca_file=AUTHORITY, api_key=KEY)
        assert set(recorder.calls.values()) == {f"Bearer {KEY}"}
        monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))
        await use(kind, f"{host}:{port}", tls=True)
        assert set(recorder.calls.values()) == {None}


@CLIENTS
async def test_a_service_that_asks_for_a_certificate(kind: type[Client]) -> None:
    async with grpc_server(files(client_ca=AUTHORITY)) as port:
        own = {"cert_file": cert("client"), "key_file": str(key("client"))}
        await use(kind, f"localhost:{port}", ca_file=AUTHORITY, **own)
        for access in ({}, {"cert_file": cert("stranger"), "key_file": key("stranger")}):
            assert await ask(f"127.0.0.1:{port}", ca_file=AUTHORITY, **access)


async def ask(target: str, **access: Any) -> str:
    """Why the service cannot be asked."""
    async with AsyncClient(target, 10, max_attempts=1, **access) as client:
        with pytest.raises(Unavailable) as failure:
            await client.status()
    return failure.value.message


async def test_no_key_reaches_a_server_that_cannot_prove_who_it_is() -> None:
    recorder = Recorder()
    async with grpc_server(files(), [recorder]) as port:
        target = f"127.0.0.1:{port}"
        for roots in ({"ca_file": STRANGER_AUTHORITY}, {"tls": True}):
            assert f"the certificate of {target} is not trusted" in await ask(target, api_key=KEY, **roots)
    async with grpc_server(files("stranger"), [recorder]) as port:
        assert "is not trusted" in await ask(f"127.0.0.1:{port}", api_key=KEY, ca_file=AUTHORITY)
    async with grpc_server(None, [recorder]) as port:
        target = f"127.0.0.1:{port}"
        assert f"what listens at {target} does not speak TLS" in await ask(target, api_key=KEY, ca_file=AUTHORITY)
    assert recorder.calls == {}


@CLIENTS
@pytest.mark.parametrize(
    ("access", "said"),
    [
        ({"ca_file": "none.pem"}, r"cannot read ca_file none\.pem: No such file"),
        ({"ca_file": key("client")}, r"ca_file .*client\.key has no BEGIN CERTIFICATE"),
        ({"cert_file": cert("client")}, "cert_file and key_file go together"),
        ({"key_file": key("client")}, "cert_file and key_file go together"),
        ({"cert_file": cert("client"), "key_file": cert("client")}, r"key_file .*client\.pem has no BEGIN PRIVATE KEY"),
        ({"cert_file": cert("client"), "key_file": key("server")}, "do not fit together"),
        ({"cert_file": cert("server"), "key_file": key("encrypted")}, "or the key is encrypted"),
    ],
)
def test_files_that_cannot_work_are_refused_at_once(kind: type[Client], access: Any, said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        kind("localhost:1", **access)
