"""The client: a served model from Python, numpy in and out, with neither Ray nor torch.

    with Client("127.0.0.1:8476") as client:
        print(client.generate("def main(", max_new_tokens=32).text)

All errors are of `ray_moe.errors`. `ray_moe.client.aio` is the same for asyncio.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import grpc
from numpy.typing import ArrayLike, NDArray

from ray_moe.client import channel
from ray_moe.client.access import Access
from ray_moe.client.channel import DEFAULT_MAX_ATTEMPTS, DEFAULT_TARGET, DEFAULT_TIMEOUT_S
from ray_moe.client.continuation import Continuation
from ray_moe.client.outbox import Outbox
from ray_moe.client.requests import (
    Forward,
    ForwardCodec,
    GenerateOptions,
    Generation,
    canary_request,
    generate_request,
    resize_request,
    rollback_request,
)
from ray_moe.client.sync_routers import SyncLine, SyncRouters
from ray_moe.client.training import Training
from ray_moe.types import (
    ChaosReport,
    ChaosRequest,
    GenerateChunk,
    HostId,
    LayerPath,
    PlanSummary,
    RoutingTable,
    ServiceStatus,
    VersionStatus,
)
from ray_moe.wire import messages
from ray_moe.wire.v1 import admin_pb2, inference_pb2

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Client:
    """A service, by one connection to each of its routers, kept open and shared by all calls. Thread-safe.

    A call goes to the router that has the fewest of this client's. After `Unavailable`, and after `Overloaded` with a
    time to retry, it is made again: at once with another router, else with back-off. A stream of tokens that broke off
    goes on without loss or repetition where they are determined, by temperature 0 or by `seed`; otherwise it raises
    `Unavailable`. `drain`, `publish`, `rollback`, `canary`, `end_canary`, `chaos` and ``plan(dry_run=False)`` are made
    once, because what is lost may be the answer.
    """

    def __init__(  # noqa: PLR0913  (as many settings as there are)
        self,
        target: str | Sequence[str] = DEFAULT_TARGET,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        *,
        discover: bool = True,
        max_attempts: int = DEFAULT_MAX_ATTEMPTS,
        api_key: str | None = None,
        tls: bool = False,
        ca_file: str | os.PathLike[str] | None = None,
        cert_file: str | os.PathLike[str] | None = None,
        key_file: str | os.PathLike[str] | None = None,
        allow_plaintext_key: bool = False,
    ) -> None:
        """Does not connect yet.

        Args:
            target: ``host:port`` of a router, or any other gRPC target; several in a sequence, or separated by commas.
            timeout_s: seconds for a whole call, a stream and all attempts included, unless the call says otherwise.
                None: no limit.
            discover: ask the service for all its routers, now and then, beside the calls, and spread calls over those
                that can be reached. `target` is used where that is refused or leads nowhere.
            max_attempts: of one call, in all; 1 retries nothing.
            api_key: sent with each call; None takes that of the environment variable RAY_MOE_API_KEY, "" none.
            tls: encrypt, and check the service's certificate against the system's roots. Any of the next three turns
                it on too.
            ca_file: roots in PEM to check against instead.
            cert_file: the client's own certificate in PEM, for a service that asks for one.
            key_file: its private key, in PEM and not encrypted.
            allow_plaintext_key: send the API key unencrypted, also to another machine.

        Raises:
            InvalidConfig: there is no target or no attempt, a file cannot be used, or the API key would travel
                unencrypted to another machine.
        """
        self.target = target if isinstance(target, str) else ",".join(target)
        self.timeout_s = timeout_s
        access = Access(api_key, tls, ca_file, cert_file, key_file, allow_plaintext_key)
        self._routers = SyncRouters(target, access, discover=discover, max_attempts=max_attempts)
        self.training = Training(self._routers, self._timeout)
        """Training of the model that is served."""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight are `Cancelled`. Idempotent."""
        self._routers.close()

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
        codec = ForwardCodec()
        message = codec.encode(Forward(layer, hidden, index, weight))
        return codec.decode(self._routers.call(lambda line: line.inference.Forward, message, self._timeout(timeout_s)))

    def forward_stream(
        self, requests: Iterable[Forward], *, timeout_s: float | None = None
    ) -> Generator[NDArray[Any], None, None]:
        """Many batches over one call: results in order, one for each, while later requests are under way.

        The first request that fails ends the stream with its error, after the results before it. If the stream breaks
        off, what is not answered is asked again. `requests` is read in another thread. Closing the generator cancels
        the call.
        """
        attempts = self._routers.attempts(self._timeout(timeout_s), unit="results")
        outbox = Outbox(requests)
        while not attempts.is_over:
            with self._routers.attempt(attempts) as line:
                stream = line.inference.ForwardStream(
                    outbox.messages(), timeout=attempts.left_s, metadata=line.metadata
                )
                try:
                    for response in stream:
                        result = outbox.codec.decode(response)
                        outbox.answered()
                        self._routers.look_around()
                        attempts.num_received += 1
                        yield result
                finally:
                    stream.cancel()  # type: ignore[no-untyped-call]
                attempts.is_over = True
        outbox.check()

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
        attempts = self._routers.attempts(timeout_s, unit="tokens")
        continuation = Continuation(message, attempts)
        while not attempts.is_over:
            continuation.restart()
            with self._routers.attempt(attempts) as line:
                stream = line.inference.Generate(message, timeout=attempts.left_s, metadata=line.metadata)
                try:
                    for response in stream:
                        self._routers.look_around()
                        chunk = continuation.add(messages.chunk_from_proto(response))
                        if chunk is not None:
                            yield chunk
                finally:
                    stream.cancel()  # type: ignore[no-untyped-call]
                attempts.is_over = True

    def status(self, *, timeout_s: float | None = None) -> ServiceStatus:
        """How the service, its router and its hosts are; also while it is starting."""
        message = admin_pb2.StatusRequest()
        response = self._routers.call(lambda line: line.admin.Status, message, self._timeout(timeout_s))
        return messages.status_from_proto(response)

    def placement(self, *, timeout_s: float | None = None) -> RoutingTable:
        """Which host holds which experts."""
        message = admin_pb2.PlacementRequest()
        response = self._routers.call(lambda line: line.admin.Placement, message, self._timeout(timeout_s))
        return messages.table_from_proto(response)

    def plan(self, *, dry_run: bool = True, timeout_s: float | None = None) -> PlanSummary:
        """A better placement for the present load; with ``dry_run=False`` it is also carried out."""
        message = admin_pb2.PlanRequest(dry_run=dry_run)
        response = self._routers.call(
            lambda line: line.admin.Plan, message, self._timeout(timeout_s), repeatable=dry_run
        )
        return messages.plan_from_proto(response)

    def resize(self, num_actors: int, *, timeout_s: float | None = None) -> None:
        """Begin to change the number of expert actors, beside the requests; `status().changing` tells how long."""
        self._routers.call(lambda line: line.admin.Resize, resize_request(num_actors), self._timeout(timeout_s))

    def drain(self, target: str, *, replace: bool = False, timeout_s: float | None = None) -> tuple[HostId, ...]:
        """Begin to empty and end an expert actor, or all on a node (by id); returns their names.

        With `replace`, as many others start in their place.
        """
        message = admin_pb2.DrainRequest(target=target, replace=replace)
        response = self._routers.call(
            lambda line: line.admin.Drain, message, self._timeout(timeout_s), repeatable=False
        )
        return tuple(response.host_ids)

    def publish(self, model: str, *, timeout_s: float | None = None) -> VersionStatus:
        """Make a checkpoint of the same architecture the version that new requests use; returns when it is.

        Requests under way stay with the version they began with. If an actor or router cannot load it, nothing changes.

        Args:
            model: a directory that all of the service's nodes can read, as they name it, or a name on the hub. It must
                stay while the version is held.
        """
        message = admin_pb2.PublishRequest(model=model)
        response = self._routers.call(
            lambda line: line.admin.Publish, message, self._timeout(timeout_s), repeatable=False
        )
        return messages.version_from_proto(response.version)

    def rollback(self, to: int | None = None, *, timeout_s: float | None = None) -> VersionStatus:
        """Make an older version current that is still held: `to`, or the newest before the current one."""
        message = rollback_request(to)
        response = self._routers.call(
            lambda line: line.admin.Rollback, message, self._timeout(timeout_s), repeatable=to is not None
        )
        return messages.version_from_proto(response.version)

    def canary(
        self,
        layer: LayerPath | int,
        expert: int,
        model: str,
        *,
        share: float = 0.1,
        mode: str = "shadow",
        max_drift: float = 0.1,
        timeout_s: float | None = None,
    ) -> VersionStatus:
        """Try out another version of one expert beside the current one; returns when that has begun.

        `versions` tells how far its rows are from the current one's; above `max_drift` it is cancelled by itself.

        Args:
            layer: path of the layer's experts, or its number among the MoE layers.
            expert: its number.
            model: the checkpoint that has it, as of `publish`.
            share: of the requests in ``traffic``, of the expert's rows in ``shadow``.
            mode: ``shadow``: its rows are computed beside the others, and only compared. ``traffic``: requests are
                answered by it, each from its beginning to its end.
            max_drift: root of the sum of squared differences over that of the current one's squared rows.
        """
        message = canary_request(layer, expert, model, share, mode, max_drift)
        response = self._routers.call(
            lambda line: line.admin.BeginCanary, message, self._timeout(timeout_s), repeatable=False
        )
        return messages.version_from_proto(response.version)

    def end_canary(self, *, promote: bool, timeout_s: float | None = None) -> VersionStatus:
        """Make what is tried out the current version, or let it go; returns the version that is current then."""
        message = admin_pb2.EndCanaryRequest(promote=promote)
        response = self._routers.call(
            lambda line: line.admin.EndCanary, message, self._timeout(timeout_s), repeatable=False
        )
        return messages.version_from_proto(response.version)

    def versions(self, *, timeout_s: float | None = None) -> tuple[VersionStatus, ...]:
        """The versions of the weights that the service has, the oldest first."""
        message = admin_pb2.ListVersionsRequest()
        response = self._routers.call(lambda line: line.admin.ListVersions, message, self._timeout(timeout_s))
        return tuple(map(messages.version_from_proto, response.versions))

    def chaos(self, request: ChaosRequest, *, timeout_s: float | None = None) -> ChaosReport:
        """Hurt the service as `request` says, wait until it is whole again, and tell what clients felt."""
        message = messages.chaos_request_to_proto(request)
        response = self._routers.call(
            lambda line: line.admin.Chaos, message, self._timeout(timeout_s), repeatable=False
        )
        return messages.chaos_report_from_proto(response)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the service answers requests; `Unavailable`, with the reason, when it does not in time."""
        poll = channel.ReadyPoll(self.target, timeout_s)
        # A synchronous channel connects only while somebody watches it or waits for an answer: checks that fail at once
        # leave it to gRPC's look every 5 s, by which time the attempt to connect has timed out.
        lines = [self._routers.line(target) for target in self._routers.given]
        for line in lines:
            line.channel.subscribe(_ignore)
        try:
            while not any(poll.is_over(_check_health(line, poll.remaining_s)) for line in lines):
                time.sleep(channel.READY_POLL_S)
        finally:
            for line in lines:
                line.channel.unsubscribe(_ignore)

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self.timeout_s if timeout_s is None else timeout_s


def _ignore(state: grpc.ChannelConnectivity) -> None:
    """Takes note of nothing: that the state is watched is what counts."""


def _check_health(line: SyncLine, timeout_s: float) -> bytes | grpc.RpcError:
    check = line.channel.unary_unary(channel.HEALTH_CHECK, None, None)
    try:
        return bytes(check(channel.HEALTH_REQUEST, timeout=timeout_s, metadata=line.metadata))
    except grpc.RpcError as error:
        return error
