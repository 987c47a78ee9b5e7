"""Clients of released versions, made from nothing but their frozen descriptors, at the front door of today."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass

from tests.unit.service.fake_backend import LAYER, PLAN, STATUS, WIDTH, FakeBackend, error_class, front_door

RELEASES = sorted((Path(__file__).parents[2] / "compat").glob("*.binpb"))


class OldClient:
    """Knows what was released then, in a descriptor pool of its own."""

    def __init__(self, release: Path, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._pool = DescriptorPool()
        for file in FileDescriptorSet.FromString(release.read_bytes()).file:
            self._pool.Add(file)
        self.services = [
            self._pool.FindServiceByName(f"ray_moe.v1.{name}") for name in ("Inference", "Admin", "Training")
        ]

    def methods(self) -> Iterator[Any]:
        return (method for service in self.services for method in service.methods)

    def message(self, name: str, **fields: Any) -> Any:
        return GetMessageClass(self._pool.FindMessageTypeByName(f"ray_moe.v1.{name}"))(**fields)

    async def call(self, name: str, request: Any = None) -> list[Any]:
        """All answers to a method that is called with one request; an empty one if none is given."""
        method = next(each for each in self.methods() if each.name == name)
        request = GetMessageClass(method.input_type)() if request is None else request
        streams = ("stream" if method.client_streaming else "unary", "stream" if method.server_streaming else "unary")
        multi: Any = getattr(self._channel, "_".join(streams))
        invoke = multi(
            f"/{method.containing_service.full_name}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        call = invoke(iter([request]) if method.client_streaming else request, timeout=10)
        return [each async for each in call] if method.server_streaming else [await call]


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(params=RELEASES, ids=lambda path: path.stem)
async def client(request: Any, backend: FakeBackend) -> AsyncIterator[OldClient]:
    async with front_door(backend) as target, grpc.aio.insecure_channel(target) as channel:
        yield OldClient(request.param, channel)


async def test_every_released_method_is_there(client: OldClient) -> None:
    """An empty request is answered, or refused in the service's own words; never as a method that nobody knows."""
    answered = 0
    for method in client.methods():
        try:
            answered += bool(await client.call(method.name))
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, method.name
            assert error_class(error) in {"InvalidRequest", "WireError"}, method.name
    assert answered >= 10


async def test_a_generation_comes_as_it_did(client: OldClient) -> None:
    request = client.message("GenerateRequest", prompt="hello", max_new_tokens=3, temperature=0.5, top_k=7)
    pieces = await client.call("Generate", request)
    assert [list(piece.token_ids) for piece in pieces] == [[0], [1], [2]]
    assert [piece.finish_reason for piece in pieces] == ["", "", "length"]


async def test_a_layer_is_computed(client: OldClient) -> None:
    rows = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    hidden = client.message("Tensor", dtype=2, shape=rows.shape, data=rows.tobytes())
    request = client.message("ForwardRequest", layer_path=LAYER, hidden=hidden, request_id="mine")
    for name in ("Forward", "ForwardStream"):
        (answer,) = await client.call(name, request)
        assert answer.request_id == "mine"
        np.testing.assert_array_equal(np.frombuffer(answer.hidden.data, np.float32).reshape(2, WIDTH), -rows)


async def test_the_state_and_changes_of_the_cluster_are_told(client: OldClient, backend: FakeBackend) -> None:
    (status,) = await client.call("Status")
    assert (status.model, status.state, status.epoch) == (STATUS.model, STATUS.state, STATUS.epoch)
    assert [(host.host_id, host.state) for host in status.hosts] == [("expert-0", "ready"), ("expert-1", "lost")]
    assert status.router.generated_tokens == STATUS.router.generated_tokens
    (plan,) = await client.call("Plan", client.message("PlanRequest", dry_run=True))
    assert (len(plan.moves), plan.copied_bytes) == (len(PLAN.moves), PLAN.copied_bytes)
    await client.call("Resize", client.message("ResizeRequest", num_actors=5))
    assert backend.wishes == [("plan", True), ("resize", 5)]


async def test_training_goes_on(client: OldClient, backend: FakeBackend) -> None:
    ids = client.message("Tensor", dtype=5, shape=[1, 3], data=np.arange(3).tobytes())
    batch = client.message("MicroBatch", id="a", input_ids=ids, labels=ids, weight=1.0)
    (report,) = await client.call("ForwardBackward", client.message("ForwardBackwardRequest", batch=batch))
    assert (report.id, report.step, report.loss, report.num_tokens) == ("a", 8, 2.25, 3)
    (state,) = await client.call("GetState")
    assert MessageToDict(state)["step"] == "7"


async def test_fields_of_a_later_version_are_passed_over(client: OldClient) -> None:
    """A client may be newer than the service: what the service does not know changes nothing."""
    request = client.message("ResizeRequest", num_actors=5)
    later = type(request).FromString(request.SerializeToString() + b"\xfa\x3f\x03new")  # field 1023
    assert later.SerializeToString() != request.SerializeToString()
    assert len(await client.call("Resize", later)) == 1
