"""`ray_moe.v1.Admin` and the standard health service: what the service tells about itself, and changes of its cluster.

These calls are not counted against the limit of concurrent requests: one wants them most when it is reached.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from ray_moe.errors import InvalidRequest, NotFound
from ray_moe.service import validation
from ray_moe.service.backend import Backend
from ray_moe.service.grpc.guard import Context, Guard
from ray_moe.service.grpc.handlers import one_to_many, one_to_one
from ray_moe.wire import messages
from ray_moe.wire.v1 import admin_pb2 as pb

WATCH_INTERVAL_S = 0.2


class AdminService:
    """The handlers; one object per server."""

    NAME = pb.DESCRIPTOR.services_by_name["Admin"].full_name

    def __init__(self, backend: Backend, guard: Guard) -> None:
        self._backend = backend
        self._guard = guard

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        return grpc.method_handlers_generic_handler(
            self.NAME,
            {
                "Status": one_to_one(self.status),
                "Placement": one_to_one(self.placement),
                "Plan": one_to_one(self.plan),
                "Resize": one_to_one(self.resize),
                "Drain": one_to_one(self.drain),
                "Publish": one_to_one(self.publish),
                "Rollback": one_to_one(self.rollback),
                "BeginCanary": one_to_one(self.begin_canary),
                "EndCanary": one_to_one(self.end_canary),
                "ListVersions": one_to_one(self.list_versions),
                "Chaos": one_to_one(self.chaos),
            },
        )

    async def status(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context):
            messages.parse(pb.StatusRequest, data)
            return messages.status_to_proto(await self._backend.status()).SerializeToString()

    async def placement(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context):
            messages.parse(pb.PlacementRequest, data)
            return messages.table_to_proto(await self._backend.placement()).SerializeToString()

    async def plan(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context, "admin"):
            request = messages.parse(pb.PlanRequest, data)
            return messages.plan_to_proto(await self._backend.plan(request.dry_run)).SerializeToString()

    async def resize(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context, "admin"):
            request = messages.parse(pb.ResizeRequest, data)
            await self._backend.resize(validation.num_actors(request.num_actors))
            return pb.ResizeResponse().SerializeToString()

    async def drain(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context, "admin"):
            request = messages.parse(pb.DrainRequest, data)
            if not request.target:
                raise InvalidRequest("expected the name of an expert actor, or the id of a node, as the target")
            host_ids = await self._backend.drain(request.target, request.replace)
            return pb.DrainResponse(host_ids=host_ids).SerializeToString()

    async def publish(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context, "admin"):
            request = messages.parse(pb.PublishRequest, data)
            if not request.model:
                raise InvalidRequest("expected the directory of a checkpoint, or its name on the hub, as the model")
            version = messages.version_to_proto(await self._backend.publish(request.model))
            return pb.PublishResponse(version=version).SerializeToString()

    async def rollback(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context, "admin"):
            request = messages.parse(pb.RollbackRequest, data)
            to = request.version if request.HasField("version") else None
            version = messages.version_to_proto(await self._backend.roll_back(to))
            return pb.RollbackResponse(version=version).SerializeToString()

    async def begin_canary(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context, "admin"):
            message = messages.parse(pb.BeginCanaryRequest, data)
            named = message.WhichOneof("layer")
            layer = validation.find_layer(self._backend, None if named is None else getattr(message, named))
            request = validation.canary(messages.canary_request_from_proto(message, layer.path))
            version = messages.version_to_proto(await self._backend.begin_canary(request))
            return pb.BeginCanaryResponse(version=version).SerializeToString()

    async def end_canary(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context, "admin"):
            request = messages.parse(pb.EndCanaryRequest, data)
            version = messages.version_to_proto(await self._backend.end_canary(request.promote))
            return pb.EndCanaryResponse(version=version).SerializeToString()

    async def list_versions(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context):
            messages.parse(pb.ListVersionsRequest, data)
            versions = map(messages.version_to_proto, await self._backend.versions())
            return pb.ListVersionsResponse(versions=versions).SerializeToString()

    async def chaos(self, data: bytes, context: Context) -> bytes:
        async with self._guard.known(context, "admin"):
            request = messages.chaos_request_from_proto(messages.parse(pb.ChaosRequest, data))
            report = await self._backend.chaos(validation.chaos(request))
            return messages.chaos_report_to_proto(report).SerializeToString()


class HealthService:
    """grpc.health.v1: SERVING while requests are admitted.

    The servicer that grpcio-health-checking brings keeps a copy of the state, loses watchers when one of several for a
    service leaves, and has watches that only the end of the grace period ends. This one looks at the state itself.
    """

    NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

    def __init__(self, guard: Guard, services: frozenset[str]) -> None:
        self._guard = guard
        self._services = services | {""}

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        return grpc.method_handlers_generic_handler(
            self.NAME, {"Check": one_to_one(self.check), "Watch": one_to_many(self.watch)}
        )

    async def check(self, data: bytes, context: Context) -> bytes:
        async with self._guard.errors(context):
            status = self._status(messages.parse(HealthCheckRequest, data).service)
            if status == HealthCheckResponse.SERVICE_UNKNOWN:
                raise NotFound(f"expected one of {sorted(self._services)}")
            return bytes(HealthCheckResponse(status=status).SerializeToString())

    async def watch(self, data: bytes, context: Context) -> None:
        async with self._guard.errors(context):
            service, last = messages.parse(HealthCheckRequest, data).service, None
            while True:
                ends = self._guard.admission.stopping
                status = self._status(service)
                if status != last:
                    await context.write(HealthCheckResponse(status=status).SerializeToString())
                if ends:
                    return
                last = status
                await asyncio.sleep(WATCH_INTERVAL_S)

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return HealthCheckResponse.SERVICE_UNKNOWN
        return HealthCheckResponse.SERVING if self._guard.admission.serving else HealthCheckResponse.NOT_SERVING
