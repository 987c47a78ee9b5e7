"""The front door as a server: listening, health, limits, faults, deadlines, cancellation, stopping."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ray_moe.errors import InsufficientResources, NotFound
from ray_moe.service.admission import Admission
from ray_moe.service.grpc.admin import AdminService
from ray_moe.service.grpc.guard import Guard
from ray_moe.service.grpc.inference import InferenceService
from ray_moe.service.grpc.server import FrontDoor
from ray_moe.service.grpc.training import TrainingService
from ray_moe.wire import messages
from ray_moe.wire.arrays import encode
from ray_moe.wire.v1 import admin_pb2, training_pb2
from ray_moe.wire.v1 import inference_pb2 as pb
from ray_moe.wire.v1.admin_pb2_grpc import AdminStub
from ray_moe.wire.v1.inference_pb2_grpc import InferenceStub
from tests.unit.service.fake_backend import LAYER, STATUS, TABLE, WIDTH, FakeBackend, error_class, front_door

C = grpc.StatusCode
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
FORWARD = pb.ForwardRequest(layer_path=LAYER, hidden=encode(np.ones((1, WIDTH), np.float32)))
GENERATE = pb.GenerateRequest(prompt="x", max_new_tokens=5)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def channel(backend: FakeBackend) -> AsyncIterator[grpc.aio.Channel]:
    async with front_door(backend, max_concurrent_requests=2) as target, grpc.aio.insecure_channel(target) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return InferenceStub(channel)


def test_every_method_of_the_protos_is_served() -> None:
    backend = FakeBackend()
    guard = Guard(Admission(backend, 1, 1))
    services: dict[Any, Any] = {
        pb.DESCRIPTOR.services_by_name["Inference"]: InferenceService(
            backend, guard, max_forward_tokens=1, max_prompt_bytes=1
        ),
        training_pb2.DESCRIPTOR.services_by_name["Training"]: TrainingService(
            backend, guard, max_tokens=1, max_prompt_bytes=1
        ),
        admin_pb2.DESCRIPTOR.services_by_name["Admin"]: AdminService(backend, guard),
    }
    for descriptor, service in services.items():
        for method in descriptor.methods:
            details: Any = SimpleNamespace(method=f"/{descriptor.full_name}/{method.name}")
            assert service.handler().service(details) is not None, method.full_name


async def test_status_and_placement(channel: grpc.aio.Channel) -> None:
    stub: Any = AdminStub(channel)
    assert messages.status_from_proto(await stub.Status(admin_pb2.StatusRequest())) == STATUS
    assert messages.table_from_proto(await stub.Placement(admin_pb2.PlacementRequest())) == TABLE


async def test_reflection_names_the_services(channel: grpc.aio.Channel) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="ray_moe.v1.Inference"),
    ]
    listed, file = [reply async for reply in stub.ServerReflectionInfo(iter(requests))]
    names = {service.name for service in listed.list_services_response.service}
    assert {"ray_moe.v1.Inference", "ray_moe.v1.Admin", "grpc.health.v1.Health"} <= names
    assert b"GenerateRequest" in file.file_descriptor_response.file_descriptor_proto[0]


# --- health --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("service", ["", "ray_moe.v1.Inference", "ray_moe.v1.Admin"])
async def test_health_follows_the_backend(channel: grpc.aio.Channel, backend: FakeBackend, service: str) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    watch = stub.Watch(request)
    for backend.ready, status in ((False, NOT_SERVING), (True, SERVING), (False, NOT_SERVING)):
        assert (await stub.Check(request)).status == status
        while (seen := await watch.read()).status != status:
            assert seen.status == SERVING  # what it was before the first turn of the loop
    watch.cancel()


async def test_health_of_what_is_not_there(channel: grpc.aio.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    with pytest.raises(grpc.aio.AioRpcError, match=r"ray_moe\.v1\.Inference") as failure:
        await stub.Check(health_pb2.HealthCheckRequest(service="nowhere"))
    assert failure.value.code() is C.NOT_FOUND


async def test_requests_before_the_backend_is_ready(channel: grpc.aio.Channel, backend: FakeBackend) -> None:
    backend.ready = False
    stub: Any = InferenceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError, match="not ready") as failure:
        await stub.Forward(FORWARD)
    assert failure.value.code() is C.UNAVAILABLE
    admin: Any = AdminStub(channel)
    await admin.Status(admin_pb2.StatusRequest())


# --- errors and limits ---------------------------------------------------------------------------------------
async def test_errors_of_the_backend_keep_their_class(stub: Any, backend: FakeBackend) -> None:
    backend.failure = NotFound("gone: ask elsewhere")
    for call in (stub.Forward(FORWARD), stub.Generate(GENERATE).read()):
        with pytest.raises(grpc.aio.AioRpcError, match="gone: ask elsewhere") as failure:
            await call
        assert failure.value.code() is C.NOT_FOUND
        assert error_class(failure.value) == "NotFound"


async def test_faults_are_logged_under_an_id(stub: Any, backend: FakeBackend, caplog: pytest.LogCaptureFixture) -> None:
    backend.failure = ZeroDivisionError("a secret")
    calls: list[Callable[[], Any]] = [
        lambda: stub.Forward(FORWARD),
        lambda: stub.ForwardStream(iter([FORWARD])).read(),
        lambda: stub.Generate(GENERATE).read(),
    ]
    for call in calls:
        caplog.clear()
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call()
        assert failure.value.code() is C.INTERNAL
        details = failure.value.details() or ""
        assert "secret" not in details
        fault = details.split()[1]
        assert f"fault {fault} " in caplog.text
        assert "a secret" in caplog.text
        assert "Traceback" in caplog.text
    backend.failure = None
    await stub.Forward(FORWARD)


async def test_more_requests_than_the_limit(stub: Any, channel: grpc.aio.Channel, backend: FakeBackend) -> None:
    backend.hold_after = 0
    first, second = stub.Generate(GENERATE), stub.Generate(GENERATE)
    await backend.both_open.wait()
    with pytest.raises(grpc.aio.AioRpcError, match="2 requests are being served, which is the limit") as failure:
        await stub.Forward(FORWARD)
    assert failure.value.code() is C.RESOURCE_EXHAUSTED
    assert error_class(failure.value) == "Overloaded"
    admin: Any = AdminStub(channel)
    await admin.Status(admin_pb2.StatusRequest())  # not counted
    backend.released.set()
    for call in (first, second):
        assert len([piece async for piece in call]) == 5
    await stub.Forward(FORWARD)


async def test_more_bytes_than_the_limit(backend: FakeBackend) -> None:
    backend.hold_after = 0
    large = pb.ForwardRequest(layer_path=LAYER, hidden=encode(np.ones((500, WIDTH), np.float32)))
    size = large.ByteSize()
    limits = {"max_in_flight_bytes": size + 100}
    async with front_door(backend, **limits) as target, grpc.aio.insecure_channel(target) as channel:
        stub: Any = InferenceStub(channel)
        first = stub.Forward(large)
        await backend.reached.wait()
        said = f"this request has {size:,} bytes, and of the {size + 100:,} that may be in flight {size:,} are taken"
        for call in (stub.Forward(large), stub.ForwardStream(iter([large])).read()):
            with pytest.raises(grpc.aio.AioRpcError, match=said) as failure:
                await call
            assert failure.value.code() is C.RESOURCE_EXHAUSTED
            assert error_class(failure.value) == "Overloaded"
        small = stub.Forward(FORWARD)
        backend.released.set()
        await asyncio.gather(first, small)
        await stub.Forward(large)  # given back


async def test_one_request_alone_may_be_larger_than_the_limit(backend: FakeBackend) -> None:
    async with front_door(backend, max_in_flight_bytes=1) as target, grpc.aio.insecure_channel(target) as channel:
        stub: Any = InferenceStub(channel)
        for _ in range(2):
            await stub.Forward(FORWARD)
            assert len([piece async for piece in stub.Generate(GENERATE)]) == 5


# --- clients that leave --------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_pieces", [0, 2])
async def test_a_cancelled_stream_ends_its_work(stub: Any, backend: FakeBackend, num_pieces: int) -> None:
    backend.hold_after = num_pieces
    call = stub.Generate(GENERATE)
    for _ in range(num_pieces):
        await call.read()
    await backend.reached.wait()
    call.cancel()
    await asyncio.wait_for(backend.closed.wait(), 5)
    assert backend.num_open == 0


async def test_a_client_that_vanishes_ends_its_work(backend: FakeBackend) -> None:
    backend.hold_after = 1
    async with front_door(backend) as target, Line(target) as line, grpc.aio.insecure_channel(line.target) as channel:
        stub: Any = InferenceStub(channel)
        call = stub.Generate(GENERATE)
        await call.read()
        await backend.reached.wait()
        line.cut()
        await asyncio.wait_for(backend.closed.wait(), 5)
        assert backend.num_open == 0
        call.cancel()


class Line:
    """A way to `target` that can be cut."""

    def __init__(self, target: str) -> None:
        self.host, _, self.port = target.rpartition(":")
        self.target = ""
        self.writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Line:
        self.server = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        self.target = f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(self.host, self.port)
        self.writers = [writer, there_writer]
        await asyncio.gather(self.copy(reader, there_writer), self.copy(there_reader, writer))

    async def copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)

    def cut(self) -> None:
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()


async def test_a_client_that_does_not_read_is_waited_for_and_then_let_go(stub: Any, backend: FakeBackend) -> None:
    """The work stops at the window of the stream, suspended in a write, and still ends with the call."""
    backend.max_positions = None
    call = stub.Generate(pb.GenerateRequest(prompt="x", max_new_tokens=2**20))
    await call.read()
    call.cancel()
    await asyncio.wait_for(backend.closed.wait(), 5)
    assert backend.num_open == 0


@pytest.mark.parametrize("method", ["Forward", "Generate"])
async def test_the_deadline_of_a_client_ends_its_work(stub: Any, backend: FakeBackend, method: str) -> None:
    backend.hold_after = 0
    call = stub.Forward(FORWARD, timeout=0.2) if method == "Forward" else stub.Generate(GENERATE, timeout=0.2).read()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    assert failure.value.code() is C.DEADLINE_EXCEEDED
    await asyncio.wait_for(backend.closed.wait(), 5)


# --- start and stop ------------------------------------------------------------------------------------------
async def test_a_port_in_use_is_named(backend: FakeBackend) -> None:
    async with front_door(backend) as target:
        port = int(target.rpartition(":")[2])
        with pytest.raises(InsufficientResources, match=f"127.0.0.1:{port}: address already in use; stop .* or choose"):
            await FrontDoor(backend, port=port).start()
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(InsufficientResources, match="already in use"):
        await FrontDoor(backend, port=other.getsockname()[1]).start()


async def test_an_address_that_is_not_of_this_machine(backend: FakeBackend) -> None:
    with pytest.raises(InsufficientResources, match="cannot assign requested address"):
        await FrontDoor(backend, "192.0.2.1", 0).start()


async def test_stop_lets_requests_in_flight_end(backend: FakeBackend) -> None:
    backend.hold_after = 1
    door = FrontDoor(backend, port=0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await door.start()}") as channel:
        stub: Any = InferenceStub(channel)
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        statuses = aiter(watch)
        assert (await anext(statuses)).status == SERVING
        pieces = aiter(stub.Generate(GENERATE))
        await anext(pieces)
        await backend.reached.wait()
        stopped = asyncio.create_task(door.stop(60))
        assert [reply.status async for reply in statuses] == [NOT_SERVING]  # and the watch ends by itself
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.Forward(FORWARD)
        assert failure.value.code() is C.UNAVAILABLE
        assert not stopped.done()
        backend.released.set()
        assert len([piece async for piece in pieces]) == 4
        await asyncio.wait_for(stopped, 5)
    await door.stop(0)  # again


async def test_stop_cancels_what_outlives_the_grace(backend: FakeBackend) -> None:
    backend.hold_after = 1
    door = FrontDoor(backend, port=0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await door.start()}") as channel:
        stub: Any = InferenceStub(channel)
        call = stub.Generate(GENERATE)
        await call.read()
        await backend.reached.wait()
        await asyncio.wait_for(door.stop(0.1), 5)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.read()
        assert failure.value.code() is C.UNAVAILABLE
    assert backend.num_open == 0


async def test_stop_before_start(backend: FakeBackend) -> None:
    await FrontDoor(backend).stop()
