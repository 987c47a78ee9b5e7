"""API keys over gRPC: where they are looked for, and how refusals reach a client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from ray_moe.errors import Overloaded
from ray_moe.service.admission import Admission
from ray_moe.service.auth import KeyRing
from ray_moe.service.grpc.guard import Context, Guard
from ray_moe.service.keys import editing
from ray_moe.service.limits import Limits
from ray_moe.wire.status import RETRY_AFTER_KEY
from tests.unit.service.fake_backend import FakeBackend, error_class
from tests.unit.service.test_auth import add
from tests.unit.service.test_reloading import Clock


class Door:
    """A server with one method, Who, for those with the role infer."""

    def __init__(self, path: Path) -> None:
        self.clock = Clock()
        self.keys = KeyRing(path, clock=self.clock)
        self._guard = Guard(Admission(FakeBackend(), keys=self.keys))
        self._server = grpc.aio.server()
        handlers = {"Who": grpc.stream_stream_rpc_method_handler(self.who)}
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Door", handlers)])

    async def who(self, requests: AsyncIterator[bytes], context: Context) -> None:
        async with self._guard.request(context):
            async for _ in requests:
                await context.write(self._guard.caller(context, "infer").name.encode())

    async def start(self) -> str:
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def stop(self) -> None:
        await self._server.stop(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
async def door(path: Path) -> AsyncIterator[Door]:
    door = Door(path)
    yield door
    await door.stop()


@pytest.fixture
async def channel(door: Door) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(await door.start()) as channel:
        yield channel


async def answer(channel: grpc.aio.Channel, *metadata: tuple[str, str]) -> bytes:
    return bytes(await channel.unary_unary("/Door/Who", None, None)(b"", metadata=metadata))


async def test_both_headers_and_any_case_of_the_scheme(channel: grpc.aio.Channel, path: Path) -> None:
    key = add(path)
    for header, value in (("authorization", f"Bearer {key}"), ("authorization", f"bEARER {key}"), ("x-api-key", key)):
        assert await answer(channel, (header, value)) == b"alice"
    assert await answer(channel, ("x-api-key", "none"), ("authorization", f"Bearer {key}")) == b"alice"


async def test_refusals_have_their_own_codes(channel: grpc.aio.Channel, path: Path) -> None:
    admin = add(path, "bob", ("admin",))
    for metadata, code, name, said in (
        ((), grpc.StatusCode.UNAUTHENTICATED, "Unauthenticated", "needs an API key"),
        ((("x-api-key", "rm_x"),), grpc.StatusCode.UNAUTHENTICATED, "Unauthenticated", "not known"),
        ((("x-api-key", admin),), grpc.StatusCode.PERMISSION_DENIED, "PermissionDenied", "has admin"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=said) as refusal:
            await answer(channel, *metadata)
        assert (refusal.value.code(), error_class(refusal.value)) == (code, name)


async def test_any_key_will_do_where_no_role_is_asked_for(path: Path) -> None:
    key = add(path, "bob", ("train",))

    class Call:
        def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
            return (("trace-bin", b"\xff"), ("X-Api-Key", key))

    context: Any = Call()
    assert Guard(Admission(FakeBackend(), keys=KeyRing(path))).caller(context, None).name == "bob"


async def test_a_limit_says_when_to_retry(channel: grpc.aio.Channel, path: Path) -> None:
    key = add(path, limits=Limits(requests_per_minute=1))
    assert await answer(channel, ("x-api-key", key)) == b"alice"
    with pytest.raises(grpc.aio.AioRpcError, match="1 requests a minute") as refusal:
        await answer(channel, ("x-api-key", key))
    assert error_class(refusal.value) == Overloaded.__name__
    trailers: Any = refusal.value.trailing_metadata()
    assert trailers[RETRY_AFTER_KEY] == "60.000"


async def test_a_stream_ends_after_its_key_is_revoked(channel: grpc.aio.Channel, door: Door, path: Path) -> None:
    key = add(path)
    call = channel.stream_stream("/Door/Who", None, None)(None, metadata=(("x-api-key", key),))
    await call.write(b"")
    assert await call.read() == b"alice"
    with editing(path) as entries:
        entries.clear()
    door.clock.now_s += 1.0
    await call.write(b"")
    with pytest.raises(grpc.aio.AioRpcError, match="not known"):
        await call.read()
