"""Calls that Ray Serve's gRPC proxy brings, answered by the services of our own front door.

The proxy reads messages with the stubs it was told of and hands them to methods of a deployment. Here they are bytes
again, and the call goes the way of all calls: request id, key, admission, the error's code. The proxy keeps clients'
deadlines itself. Used by `service/deployment.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from ray.serve.grpc_util import RayServegRPCContext

from ray_moe.service.kserve.servicer import KServeService
from ray_moe.wire.kserve import grpc_service_pb2
from ray_moe.wire.v1 import inference_pb2

Find = Callable[[str, Any], Awaitable[Any]]
"""`FrontDoor.find`."""


class _Ended(Exception):
    """The call has been given its status."""


class _Context:
    """What handlers use of a `grpc.aio.ServicerContext`."""

    def __init__(self, requests: AsyncIterator[Message], proxied: RayServegRPCContext) -> None:
        self._requests = requests
        self._proxied = proxied
        self.answers: asyncio.Queue[bytes | None] = asyncio.Queue()
        """And None at the end."""

    def invocation_metadata(self) -> Any:
        return self._proxied.invocation_metadata()

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple(self._proxied.trailing_metadata())

    def set_trailing_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self._proxied.set_trailing_metadata(list(metadata))

    def time_remaining(self) -> float | None:
        return None

    def __aiter__(self) -> _Context:
        return self

    async def __anext__(self) -> bytes:
        return (await anext(self._requests)).SerializeToString()

    async def read(self) -> Any:
        try:
            return await anext(self)
        except StopAsyncIteration:
            return grpc.aio.EOF  # type: ignore[attr-defined]

    async def write(self, answer: bytes) -> None:
        self.answers.put_nowait(answer)
        await self.answers.join()  # until it is taken

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any = ()) -> None:
        self._proxied.set_code(code)
        self._proxied.set_details(details)
        self.set_trailing_metadata(trailing_metadata)
        raise _Ended


async def answers(
    find: Find, method: str, requests: AsyncIterator[Message], proxied: RayServegRPCContext
) -> AsyncGenerator[bytes, None]:
    """What the service says to a call of `/service/method`. After an error it says nothing more; see the context."""
    context = _Context(requests, proxied)
    handler = await find(method, proxied.invocation_metadata())
    behaviour: Any = handler.stream_stream or handler.stream_unary

    async def work() -> None:
        try:
            answer = await behaviour(context, context)
            if answer is not None:
                context.answers.put_nowait(answer)
        except _Ended:
            pass
        finally:
            context.answers.put_nowait(None)

    working = asyncio.create_task(work())
    try:
        while (answer := await context.answers.get()) is not None:
            yield answer
            context.answers.task_done()
        await working
    finally:
        working.cancel()


def methods(find_of: Callable[[Any], Find]) -> Mapping[str, Callable[..., Any]]:
    """Methods for a deployment, by name, as the proxy calls them: `find_of` tells a replica's `FrontDoor.find`."""
    services = (
        grpc_service_pb2.DESCRIPTOR.services_by_name[KServeService.NAME.rpartition(".")[2]],
        inference_pb2.DESCRIPTOR.services_by_name["Inference"],
    )
    return {method.name: _method(method, find_of) for service in services for method in service.methods}


def _method(method: MethodDescriptor, find_of: Callable[[Any], Find]) -> Callable[..., Any]:
    path = f"/{method.containing_service.full_name}/{method.name}"
    response = GetMessageClass(method.output_type)

    async def one(replica: Any, request: Message, grpc_context: RayServegRPCContext) -> Message:
        async for answer in answers(find_of(replica), path, _once(request), grpc_context):
            return response.FromString(answer)
        return response()

    async def many(replica: Any, request: Any, grpc_context: RayServegRPCContext) -> AsyncGenerator[Message, None]:
        requests = request if method.client_streaming else _once(request)
        async for answer in answers(find_of(replica), path, requests, grpc_context):
            yield response.FromString(answer)

    return many if method.server_streaming else one


async def _once(message: Message) -> AsyncIterator[Message]:
    yield message
