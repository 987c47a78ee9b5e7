"""Server reflection, v1alpha: which services and messages there are, for tools such as grpcurl. For everybody.

The servicer is grpcio-reflection's; here its messages are parsed, so that what is no message gets a proper error.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest

from ray_moe.service.grpc.guard import Context, Guard
from ray_moe.wire import messages


class ReflectionService:
    """The handler; one object per server."""

    NAME = reflection.SERVICE_NAME

    def __init__(self, guard: Guard, services: Iterable[str], pool: DescriptorPool) -> None:
        """Args:
        services: names of those that are told of, beside this one.
        pool: their descriptors.
        """
        self._guard = guard
        self._servicer = reflection.aio.ReflectionServicer([*services, self.NAME], pool)  # type: ignore[attr-defined]

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        info = grpc.stream_stream_rpc_method_handler(self.info)
        return grpc.method_handlers_generic_handler(self.NAME, {"ServerReflectionInfo": info})

    async def info(self, requests: AsyncIterator[bytes], context: Context) -> None:
        async def parsed() -> AsyncIterator[ServerReflectionRequest]:
            async for data in requests:
                yield messages.parse(ServerReflectionRequest, data)

        async with self._guard.errors(context):
            async for response in self._servicer.ServerReflectionInfo(parsed(), context):
                await context.write(response.SerializeToString())
