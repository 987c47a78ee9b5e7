"""Which requests a router takes on, at all of its front doors together, and how they end when it stops.

Knows neither gRPC nor HTTP. Used by `service/grpc/guard.py` and `service/openai/`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray_moe.errors import Overloaded, Unavailable
from ray_moe.runtime.tracing import Tracer
from ray_moe.service.auth import Caller, KeyRing, presented_key
from ray_moe.service.backend import Backend
from ray_moe.service.keys import Role
from ray_moe.service.metering import calling
from ray_moe.service.refusals import Refusals
from ray_moe.service.requests import current


class Payload:
    """The bytes that one request holds."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Raises: `Overloaded` for what is too much beside others; one request alone may hold any size."""
        held, most = self._admission.num_bytes, self._admission.max_in_flight_bytes
        if held > self._num_bytes and held + num_bytes > most:
            all_of_it = self._num_bytes + num_bytes
            raise Overloaded(
                f"this request has {all_of_it:,} bytes, and of the {most:,} that may be in flight {held:,} are taken: "
                "retry later, or raise server.max_in_flight_bytes"
            )
        self._num_bytes += num_bytes
        self._admission.num_bytes += num_bytes

    def release(self) -> None:
        """They are held no more. Idempotent."""
        self._admission.num_bytes -= self._num_bytes
        self._num_bytes = 0


class Admission:
    """The state that the requests of one router share."""

    def __init__(
        self,
        backend: Backend,
        max_concurrent_requests: int = 512,
        max_in_flight_bytes: int = 4 * 2**30,
        keys: KeyRing | None = None,
        tracer: Tracer | None = None,
        *,
        allow_anonymous: bool = False,
    ) -> None:
        """Args:
        max_concurrent_requests: that make the model work; more are `Overloaded`.
        max_in_flight_bytes: of all requests together; more are `Overloaded`, but one alone never is.
        keys: who may call; None: everybody.
        tracer: what the doors record requests with; None: they do not.
        allow_anonymous: without keys, who is not on this machine may call, too.
        """
        self.tracer = tracer
        self._keys = keys or KeyRing(None)
        self._allow_anonymous = allow_anonymous
        self.refusals = Refusals()
        self.max_in_flight_bytes = max_in_flight_bytes
        self.num_bytes = 0
        """Held by all requests together."""
        self.stopping = False
        self.ending = asyncio.Event()
        """Set when the requests in flight are to end now."""
        self.idle = asyncio.Event()
        """No request is in flight."""
        self.idle.set()
        self._backend = backend
        self._max_concurrent_requests = max_concurrent_requests
        self._num_active = 0

    def caller(self, headers: Mapping[str, str], role: Role | None = None) -> Caller:
        """Who calls, by headers in lower case. Raises: `Unauthenticated`; `PermissionDenied`, see `Caller.require`.

        It is cheap enough for each message of a long stream, which then ends soon after its key is revoked.
        """
        presented = presented_key(headers.get("authorization"), headers.get("x-api-key"))
        caller = self._keys.identify(presented, self.refusals.count)
        request = current()
        if request is not None:
            request.from_caller(caller.name)
        with self.refusals.counted("role"):
            caller.require(role)
        return caller

    @property
    def keys_required(self) -> bool:
        """Whether requests need an API key."""
        return self._keys.required

    @property
    def local_only(self) -> bool:
        """Whether callers are trusted for being on this machine, and for nothing else."""
        return not self.keys_required and not self._allow_anonymous

    @property
    def serving(self) -> bool:
        """Whether a request would be admitted, load apart."""
        return self._backend.ready and not self.stopping

    def check(self) -> None:
        """Raise `Unavailable` unless a request would be admitted, load apart."""
        if self.stopping:
            raise Unavailable("the service is stopping: retry later or elsewhere")
        if not self._backend.ready:
            raise Unavailable("the service is not ready: retry, or wait until its health is SERVING")

    @contextmanager
    def request(self, caller: Caller) -> Iterator[None]:
        """Around a call that makes the model work, for `caller`. Raises: `Unavailable`, `Overloaded`."""
        self.check()
        if self._num_active >= self._max_concurrent_requests:
            raise Overloaded(
                f"{self._num_active} requests are being served, which is the limit: retry later, or raise the limit"
            )
        self._num_active += 1
        self.idle.clear()
        try:
            with calling(caller):
                yield
        finally:
            self._num_active -= 1
            if not self._num_active:
                self.idle.set()

    @contextmanager
    def payload(self, num_bytes: int = 0) -> Iterator[Payload]:
        """Around the reading of a request, of which `num_bytes` are there already."""
        payload = Payload(self)
        try:
            payload.add(num_bytes)
            yield payload
        finally:
            payload.release()
