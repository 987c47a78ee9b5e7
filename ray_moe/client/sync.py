"""The client: a served model from Python, numpy in and out, with neither Ray nor torch.

    with Client("127.0.0.1:8476") as client:
        print(client.generate("def main(", max_new_tokens=32).text)

All errors are of `ray_moe.errors`. `ray_moe.client.aio` is the same for asyncio.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Iterator
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


class Client:
    """One connection to a service, kept open and shared by all calls. Thread-safe."""

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
        """Does not connect yet.

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
        credentials = access.credentials()
        if credentials is None:
            self._channel = grpc.insecure_channel(target, channel.OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, credentials, channel.OPTIONS)
        self._inference = InferenceStub(self._channel)
        self._admin = AdminStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight are `Cancelled`. Idempotent."""
        self._channel.close()

    def forward(
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
            return codec.decode(self._inference.Forward(message, timeout=timeout_s, metadata=self._metadata))

    def forward_stream(
        self, requests: Iterable[Forward], *, timeout_s: float | None = None
    ) -> Generator[NDArray[Any], None, None]:
        """Many batches over one call: results in order, one for each, while later requests are under way.

        The first request that fails ends the stream with its error, after the results before it. `requests` is read
        in another thread. Closing the generator cancels the call.
        """
        timeout_s = self._timeout(timeout_s)
        codec = ForwardCodec()
        failures: list[Exception] = []

        def encoded() -> Iterator[inference_pb2.ForwardRequest]:
            try:
                for request in requests:
                    yield codec.encode(request)
            except Exception as error:  # raised below, in the caller's thread
                failures.append(error)

        with channel.errors(self.target, timeout_s):
            call = self._inference.ForwardStream(encoded(), timeout=timeout_s, metadata=self._metadata)
            try:
                for response in call:
                    yield codec.decode(response)
            finally:
                call.cancel()  # type: ignore[no-untyped-call]
        if failures:
            raise failures[0]

    def generate(
        self, prompt: str | None = None, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Continue a prompt (text, or `token_ids`) and return the whole continuation."""
        return Generation.of(list(self.stream(prompt, timeout_s=timeout_s, **options)))

    def stream(
        self, prompt: str | None = None, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[GenerateChunk, None, None]:
        """Continue a prompt piece by piece, from the first `next` on. Closing the generator cancels the work."""
        message = generate_request(prompt, options)
        return self._chunks(message, self._timeout(timeout_s))

    def _chunks(
        self, message: inference_pb2.GenerateRequest, timeout_s: float | None
    ) -> Generator[GenerateChunk, None, None]:
        with channel.errors(self.target, timeout_s):
            call = self._inference.Generate(message, timeout=timeout_s, metadata=self._metadata)
            try:
                for response in call:
                    yield messages.chunk_from_proto(response)
            finally:
                call.cancel()  # type: ignore[no-untyped-call]

    def status(self, *, timeout_s: float | None = None) -> ServiceStatus:
        """How the service, its router and its hosts are; also while it is starting."""
        timeout_s = self._timeout(timeout_s)
        with channel.errors(self.target, timeout_s):
            return messages.status_from_proto(
                self._admin.Status(admin_pb2.StatusRequest(), timeout=timeout_s, metadata=self._metadata)
            )

    def placement(self, *, timeout_s: float | None = None) -> RoutingTable:
        """Which host holds which experts."""
        timeout_s = self._timeout(timeout_s)
        with channel.errors(self.target, timeout_s):
            return messages.table_from_proto(
                self._admin.Placement(admin_pb2.PlacementRequest(), timeout=timeout_s, metadata=self._metadata)
            )

    def plan(self, *, dry_run: bool = True, timeout_s: float | None = None) -> PlanSummary:
        """A better placement for the present load; with ``dry_run=False`` it is also carried out."""
        timeout_s = self._timeout(timeout_s)
        with channel.errors(self.target, timeout_s):
            return messages.plan_from_proto(
                self._admin.Plan(admin_pb2.PlanRequest(dry_run=dry_run), timeout=timeout_s, metadata=self._metadata)
            )

    def resize(self, num_actors: int, *, timeout_s: float | None = None) -> None:
        """Begin to change the number of expert actors, beside the requests; `status().changing` tells how long."""
        timeout_s = self._timeout(timeout_s)
        message = resize_request(num_actors)
        with channel.errors(self.target, timeout_s):
            self._admin.Resize(message, timeout=timeout_s, metadata=self._metadata)

    def drain(self, target: str, *, replace: bool = False, timeout_s: float | None = None) -> tuple[HostId, ...]:
        """Begin to empty and end an expert actor, or all on a node (by id); returns their names.

        With `replace`, as many others start in their place.
        """
        timeout_s = self._timeout(timeout_s)
        message = admin_pb2.DrainRequest(target=target, replace=replace)
        with channel.errors(self.target, timeout_s):
            return tuple(self._admin.Drain(message, timeout=timeout_s, metadata=self._metadata).host_ids)

    def chaos(self, request: ChaosRequest, *, timeout_s: float | None = None) -> ChaosReport:
        """Hurt the service as `request` says, wait until it is whole again, and tell what clients felt."""
        timeout_s = self._timeout(timeout_s)
        message = messages.chaos_request_to_proto(request)
        with channel.errors(self.target, timeout_s):
            return messages.chaos_report_from_proto(
                self._admin.Chaos(message, timeout=timeout_s, metadata=self._metadata)
            )

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the service answers requests; `Unavailable`, with the reason, when it does not in time."""
        poll = channel.ReadyPoll(self.target, timeout_s)
        # A synchronous channel connects only while somebody watches it or waits for an answer: checks that fail at once
        # leave it to gRPC's look every 5 s, by which time the attempt to connect has timed out.
        self._channel.subscribe(_ignore)
        try:
            while not poll.is_over(self._check_health(poll.remaining_s)):
                time.sleep(channel.READY_POLL_S)
        finally:
            self._channel.unsubscribe(_ignore)

    def _check_health(self, timeout_s: float) -> bytes | grpc.RpcError:
        check = self._channel.unary_unary(channel.HEALTH_CHECK, None, None)
        try:
            return bytes(check(channel.HEALTH_REQUEST, timeout=timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            return error

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self.timeout_s if timeout_s is None else timeout_s


def _ignore(state: grpc.ChannelConnectivity) -> None:
    """Takes note of nothing: that the state is watched is what counts."""
