"""Which requests the HTTP front door takes on, and how they end when it closes. It knows nothing of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray_moe.errors import Overloaded, Unavailable
from ray_moe.service.auth import Caller, KeyRing, presented_key
from ray_moe.service.backend import Backend


class Payload:
    """The bytes that one request holds."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Raises: `Overloaded` for what is too much beside others; one request alone may hold any size."""
        held, most = self._admission.num_bytes, self._admission.max_in_flight_bytes
        if held > self._num_bytes and held + num_bytes > most:
            raise Overloaded(
                f"this request has {num_bytes:,} bytes more, and of the {most:,} that may be in flight {held:,} are "
                "taken: retry later, or raise server.max_in_flight_bytes"
            )
        self._num_bytes += num_bytes
        self._admission.num_bytes += num_bytes

    def release(self) -> None:
        """They are held no more. Idempotent."""
        self._admission.num_bytes -= self._num_bytes
        self._num_bytes = 0


class Admission:
    """The state that the requests of one server share."""

    def __init__(
        self, backend: Backend, max_concurrent_requests: int, max_in_flight_bytes: int, keys: KeyRing | None = None
    ) -> None:
        """Args: keys: who may call; None: everybody."""
        self._keys = keys or KeyRing(None)
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

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Who calls, by headers in lower case. Raises: `Unauthenticated`."""
        return self._keys.identify(presented_key(headers.get("authorization"), headers.get("x-api-key")))

    def check(self) -> None:
        """Raise `Unavailable` unless a request would be admitted, load apart."""
        if self.stopping:
            raise Unavailable("the service is stopping: retry later or elsewhere")
        if not self._backend.ready:
            raise Unavailable("the service is not ready: retry, or wait until GET /health answers 200")

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a call that makes the model work. Raises: `Unavailable`, `Overloaded`."""
        self.check()
        if self._num_active >= self._max_concurrent_requests:
            raise Overloaded(
                f"{self._num_active} requests are being served, which is the limit: retry later, or raise the limit"
            )
        self._num_active += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._num_active -= 1
            if not self._num_active:
                self.idle.set()

    @contextmanager
    def payload(self) -> Iterator[Payload]:
        """Around the reading of a request."""
        payload = Payload(self)
        try:
            yield payload
        finally:
            payload.release()
