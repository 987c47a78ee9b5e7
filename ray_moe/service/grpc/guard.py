"""What every call of the gRPC front door goes through: admission, and errors to statuses.

An error of ours ends the call with its status; any other exception is a fault of the service: its traceback goes to the
log under an id, and the client gets the id. Used by the servicers.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import grpc

from ray_moe.errors import Overloaded, RayMoEError, Unavailable
from ray_moe.service.auth import Caller, KeyRing
from ray_moe.service.backend import Backend
from ray_moe.service.grpc.authentication import authenticate
from ray_moe.service.keys import Role
from ray_moe.service.metering import calling
from ray_moe.wire.status import to_status

Context = grpc.aio.ServicerContext[bytes, bytes]

logger = logging.getLogger(__name__)


class Guard:
    """The state that the calls of one server share."""

    def __init__(
        self, backend: Backend, max_concurrent_requests: int, max_in_flight_bytes: int, keys: KeyRing | None = None
    ) -> None:
        """Args: keys: who may call; None: everybody."""
        self.stopping = False
        self._keys = keys or KeyRing(None)
        self._backend = backend
        self._max_concurrent_requests = max_concurrent_requests
        self._max_in_flight_bytes = max_in_flight_bytes
        self._num_active = 0
        self._num_bytes = 0

    @property
    def serving(self) -> bool:
        """Whether a request would be admitted, load apart."""
        return self._backend.ready and not self.stopping

    @asynccontextmanager
    async def request(self, context: Context) -> AsyncIterator[None]:
        """Around a call that makes the model work: admits it, counts it, maps its errors."""
        async with self.errors(context):
            caller = self.caller(context, "infer")
            if self.stopping:
                raise Unavailable("the service is stopping: retry later or elsewhere")
            if not self._backend.ready:
                raise Unavailable("the service is not ready: retry, or wait until its health is SERVING")
            if self._num_active >= self._max_concurrent_requests:
                raise Overloaded(
                    f"{self._num_active} requests are being served, which is the limit: retry later, or raise the limit"
                )
            self._num_active += 1
            try:
                with calling(caller):
                    yield
            finally:
                self._num_active -= 1

    def caller(self, context: Context, role: Role | None) -> Caller:
        """Who calls. Raises: `Unauthenticated`; `PermissionDenied` without `role`, None being any."""
        return authenticate(self._keys, context, role)

    @asynccontextmanager
    async def known(self, context: Context, role: Role | None = None) -> AsyncIterator[None]:
        """Around a call that asks something, or changes the cluster: by whoever has a key, of that role if named."""
        async with self.errors(context):
            self.caller(context, role)
            yield

    @contextmanager
    def payload(self, num_bytes: int) -> Iterator[None]:
        """While `num_bytes` of a request are held. Refuses what is too much beside others; one alone may be any size.

        Raises: `Overloaded`.
        """
        if self._num_bytes and self._num_bytes + num_bytes > self._max_in_flight_bytes:
            raise Overloaded(
                f"this request has {num_bytes:,} bytes, and of the {self._max_in_flight_bytes:,} that may be in flight "
                f"{self._num_bytes:,} are taken: retry later, or raise server.max_in_flight_bytes"
            )
        self._num_bytes += num_bytes
        try:
            yield
        finally:
            self._num_bytes -= num_bytes

    @asynccontextmanager
    async def errors(self, context: Context) -> AsyncIterator[None]:
        """Around any call: maps its errors. A cancelled call stays cancelled."""
        try:
            yield
        except RayMoEError as error:
            await _abort(context, error)
        except Exception as error:
            fault = secrets.token_hex(4)
            logger.exception("fault %s of the service", fault)
            name = type(error).__name__
            await _abort(context, RayMoEError(f"fault {fault} of the service ({name}): its log has more under that id"))


async def _abort(context: Context, error: RayMoEError) -> None:
    status = to_status(error)
    await context.abort(status.code, status.details, status.trailing_metadata)
