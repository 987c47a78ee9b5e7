"""The client for asyncio: what `ray_moe.client.sync` is, with the same methods, for one event loop.

async with AsyncClient("127.0.0.1:8476") as client:
    async for chunk in client.stream("def main(", max_new_tokens=32):
        print(chunk.text, end="")
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import grpc
from numpy.typing import ArrayLike, NDArray

from ray_moe.client import channel
from ray_moe.client.access import Access
from ray_moe.client.channel import DEFAULT_TARGET, DEFAULT_TIMEOUT_S
from ray_moe.client.requests import Forward, ForwardCodec, GenerateOptions, Generation, generate_request, resize_request
from ray_moe.types import (
    ChaosReport,
    ChaosRequest,
    GenerateChunk,
    HostId,
    LayerPath,
    PlanSummary,
    RoutingTable,
    ServiceStatus,
)
from ray_moe.wire import messages
from ray_moe.wire.v1 import admin_pb2, inference_pb2
from ray_moe.wire.v1.admin_pb2_grpc import AdminStub
from ray_moe.wire.v1.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ray_moe.wire.v1.admin_pb2_grpc import AdminAsyncStub
    from ray_moe.wire.v1.inference_pb2_grpc import InferenceAsyncStub


class AsyncClient:
    """One connection to a service, kept open and shared by all calls of one event loop."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        *,
        api_key: str | None = None,
        tls: bool = False,
        ca_file: str | os.PathLike[str] | None = None,
        cert_file: str | os.PathLike[str] | None = None,
        key_file: str | os.PathLike[str] | None = None,
        allow_plaintext_key: bool = False,
    ) -> None:
        """Does not connect yet; may be made outside the event loop.

        Args:
            target: ``host:port`` of the service, or any other gRPC target.
            timeout_s: seconds for a whole call, a stream included, unless the call says otherwise. None: no limit.
            api_key: sent with each call; None takes that of the environment variable RAY_MOE_API_KEY, "" none.
            tls: encrypt, and check the service's certificate against the system's roots. Any of the next three turns
                it on too.
            ca_file: roots in PEM to check against instead.
            cert_file: the client's own certificate in PEM, for a service that asks for one.
            key_file: its private key, in PEM and not encrypted.
            allow_plaintext_key: send the API key unencrypted, also to another machine.

        Raises:
            InvalidConfig: a file cannot be used, or the API key would travel unencrypted to another machine.
        """
        self.target = target
        self.timeout_s = timeout_s
        access = Access(api_key, tls, ca_file, cert_file, key_file, allow_plaintext_key)
        self._metadata = access.metadata(target)
        self._credentials = access.credentials()

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        """Belongs to the event loop that runs when it is first used."""
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.target, channel.OPTIONS)
        return grpc.aio.secure_channel(self.target, self._credentials, channel.OPTIONS)

    @cached_property
    def _inference(self) -> InferenceAsyncStub:
        return InferenceStub(self._channel)

    @cached_property
    def _admin(self) -> AdminAsyncStub:
        return AdminStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in flight are `Cancelled`. Idempotent."""
        await self._channel.close(None)

    async def forward(
        self,
        layer: LayerPath | int,
        hidden: ArrayLike,
        index: ArrayLike | None = None,
        weight: ArrayLike | None = None,
        *,
        timeout_s: float | None = None,
    ) -> NDArray[Any]:
        """One batch of tokens through one MoE layer; see `Forward` for the arguments.

        Returns: [T, D] in the dtype of `hidden`. The layer computes in its own dtype.
        """
        timeout_s = self._timeout(timeout_s)
        codec = ForwardCodec()
        message = codec.encode(Forward(layer, hidden, index, weight))
        with channel.errors(self.target, timeout_s):
            return codec.decode(await self._inference.Forward(message, timeout=timeout_s, metadata=self._metadata))

    async def forward_stream(
        self, requests: Iterable[Forward] | AsyncIterable[Forward], *, timeout_s: float | None = None
    ) -> AsyncGenerator[NDArray[Any], None]:
        """Many batches over one call: results in order, one for each, while later requests are under way.

        The first request that fails ends the stream with its error, after the results before it. Closing the generator
        cancels the call.
        """
        timeout_s = self._timeout(timeout_s)
        codec = ForwardCodec()
        failures: list[Exception] = []

        async def encoded() -> AsyncIterator[inference_pb2.ForwardRequest]:
            try:
                if isinstance(requests, AsyncIterable):
                    async for request in requests:
                        yield codec.encode(request)
                else:
                    for request in requests:
                        yield codec.encode(request)
            except Exception as error:  # raised below, to the caller
                failures.append(error)

        with channel.errors(self.target, timeout_s):
            call = self._inference.ForwardStream(encoded(), timeout=timeout_s, metadata=self._metadata)
            try:
                async for response in call:
                    yield codec.decode(response)
            finally:
                call.cancel()
        if failures:
            raise failures[0]

    async def generate(
        self, prompt: str | None = None, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Continue a prompt (text, or `token_ids`) and return the whole continuation."""
        return Generation.of([chunk async for chunk in self.stream(prompt, timeout_s=timeout_s, **options)])

    def stream(
        self, prompt: str | None = None, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Continue a prompt piece by piece, from the first `anext` on. Closing the generator cancels the work."""
        message = generate_request(prompt, options)
        return self._chunks(message, self._timeout(timeout_s))

    async def _chunks(
        self, message: inference_pb2.GenerateRequest, timeout_s: float | None
    ) -> AsyncGenerator[GenerateChunk, None]:
        with channel.errors(self.target, timeout_s):
            call = self._inference.Generate(message, timeout=timeout_s, metadata=self._metadata)
            try:
                async for response in call:
                    yield messages.chunk_from_proto(response)
            finally:
                call.cancel()

    async def status(self, *, timeout_s: float | None = None) -> ServiceStatus:
        """How the service, its router and its hosts are; also while it is starting."""
        timeout_s = self._timeout(timeout_s)
        with channel.errors(self.target, timeout_s):
            return messages.status_from_proto(
                await self._admin.Status(admin_pb2.StatusRequest(), timeout=timeout_s, metadata=self._metadata)
            )

    async def placement(self, *, timeout_s: float | None = None) -> RoutingTable:
        """Which host holds which experts."""
        timeout_s = self._timeout(timeout_s)
        with channel.errors(self.target, timeout_s):
            response = await self._admin.Placement(
                admin_pb2.PlacementRequest(), timeout=timeout_s, metadata=self._metadata
            )
            return messages.table_from_proto(response)

    async def plan(self, *, dry_run: bool = True, timeout_s: float | None = None) -> PlanSummary:
        """A better placement for the present load; with ``dry_run=False`` it is also carried out."""
        timeout_s = self._timeout(timeout_s)
        with channel.errors(self.target, timeout_s):
            response = await self._admin.Plan(
                admin_pb2.PlanRequest(dry_run=dry_run), timeout=timeout_s, metadata=self._metadata
            )
            return messages.plan_from_proto(response)

    async def resize(self, num_actors: int, *, timeout_s: float | None = None) -> None:
        """Begin to change the number of expert actors, beside the requests; `status().changing` tells how long."""
        timeout_s = self._timeout(timeout_s)
        message = resize_request(num_actors)
        with channel.errors(self.target, timeout_s):
            await self._admin.Resize(message, timeout=timeout_s, metadata=self._metadata)

    async def drain(self, target: str, *, replace: bool = False, timeout_s: float | None = None) -> tuple[HostId, ...]:
        """Begin to empty and end an expert actor, or all on a node (by id); returns their names.

        With `replace`, as many others start in their place.
        """
        timeout_s = self._timeout(timeout_s)
        message = admin_pb2.DrainRequest(target=target, replace=replace)
        with channel.errors(self.target, timeout_s):
            return tuple((await self._admin.Drain(message, timeout=timeout_s, metadata=self._metadata)).host_ids)

    async def chaos(self, request: ChaosRequest, *, timeout_s: float | None = None) -> ChaosReport:
        """Hurt the service as `request` says, wait until it is whole again, and tell what clients felt."""
        timeout_s = self._timeout(timeout_s)
        message = messages.chaos_request_to_proto(request)
        with channel.errors(self.target, timeout_s):
            return messages.chaos_report_from_proto(
                await self._admin.Chaos(message, timeout=timeout_s, metadata=self._metadata)
            )

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the service answers requests; `Unavailable`, with the reason, when it does not in time."""
        poll = channel.ReadyPoll(self.target, timeout_s)
        while True:
            if poll.is_over(await self._check_health(poll.remaining_s)):
                return
            await asyncio.sleep(channel.READY_POLL_S)

    async def _check_health(self, timeout_s: float) -> bytes | grpc.RpcError:
        check = self._channel.unary_unary(channel.HEALTH_CHECK, None, None)
        try:
            return bytes(await check(channel.HEALTH_REQUEST, timeout=timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            return error

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self.timeout_s if timeout_s is None else timeout_s
