"""What every call of the gRPC front door goes through: admission, and errors to statuses.

An error of ours ends the call with its status; any other exception is a fault of the service: its traceback goes to the
log under an id, and the client gets the id. Used by the servicers.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager

import grpc

from ray_moe.errors import RayMoEError
from ray_moe.service.admission import Admission, Payload
from ray_moe.service.auth import Caller
from ray_moe.service.grpc.interceptor import headers_of
from ray_moe.service.keys import Role
from ray_moe.service.requests import failed
from ray_moe.wire.status import to_status

Context = grpc.aio.ServicerContext[bytes, bytes]

logger = logging.getLogger(__name__)


class Guard:
    """Admission in gRPC's terms."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission

    @asynccontextmanager
    async def request(self, context: Context, role: Role = "infer") -> AsyncIterator[None]:
        """Around a call that makes the model work, by who has `role`: admits it, counts it, maps its errors."""
        async with self.errors(context):
            with self.admission.request(self.caller(context, role)):
                yield

    @asynccontextmanager
    async def known(self, context: Context, role: Role | None = None) -> AsyncIterator[None]:
        """Around a call that asks something, or changes the cluster: by whoever `Caller.require` lets."""
        async with self.errors(context):
            self.caller(context, role)
            yield

    def caller(self, context: Context, role: Role | None) -> Caller:
        """Who calls, from `authorization: Bearer KEY` or `x-api-key: KEY`; see `Admission.caller`."""
        return self.admission.caller(headers_of(context.invocation_metadata()), role)

    def payload(self, num_bytes: int) -> AbstractContextManager[Payload]:
        """While `num_bytes` of a request are held. Raises: `Overloaded`."""
        return self.admission.payload(num_bytes)

    @asynccontextmanager
    async def errors(self, context: Context) -> AsyncIterator[None]:
        """Around any call: maps its errors. A cancelled call stays cancelled."""
        try:
            yield
        except RayMoEError as error:
            await abort(context, error)
        except grpc.aio.InternalError as error:
            raise asyncio.CancelledError from error  # nothing can be sent: the client hung up, a cancel is on its way
        except Exception as error:
            fault = secrets.token_hex(4)
            logger.exception("fault %s of the service", fault)
            failed(error)
            name = type(error).__name__
            await abort(context, RayMoEError(f"fault {fault} of the service ({name}): its log has more under that id"))


async def abort(context: Context, error: RayMoEError) -> None:
    """End a call with an error."""
    status = to_status(error)
    failed(error, status.code.name)
    await context.abort(status.code, status.details, (*context.trailing_metadata(), *status.trailing_metadata))
