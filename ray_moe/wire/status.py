"""Errors on the wire: one table from error class to gRPC code and HTTP code, and the way there and back.

The class itself travels as its name in the trailing metadata, and so does the time to retry, so that a client raises
what the service raised. Used by every front door and by the client; it decides nothing about retries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import grpc

from ray_moe import errors
from ray_moe.errors import RayMoEError

ERROR_KEY = "ray-moe-error"
"""Trailing metadata that names the class of an error."""

RETRY_AFTER_KEY = "ray-moe-retry-after-s"
"""Trailing metadata with the seconds after which a retry may succeed, where they are known."""

REQUEST_ID_KEY = "x-request-id"
"""Metadata, and HTTP header, with the id of a request: a client may send one, and gets the one that counts."""

MAX_DETAILS_BYTES = 2000
"""A longer message is cut: gRPC writes each byte as up to three and lets no more than 8 KiB of trailers through."""

_Code = grpc.StatusCode

CODES: MappingProxyType[type[RayMoEError], tuple[grpc.StatusCode, int]] = MappingProxyType(
    {
        RayMoEError: (_Code.INTERNAL, 500),
        errors.InvalidRequest: (_Code.INVALID_ARGUMENT, 400),
        errors.WireError: (_Code.INVALID_ARGUMENT, 400),
        errors.NotFound: (_Code.NOT_FOUND, 404),
        errors.InvalidConfig: (_Code.FAILED_PRECONDITION, 400),
        errors.Unauthenticated: (_Code.UNAUTHENTICATED, 401),
        errors.PermissionDenied: (_Code.PERMISSION_DENIED, 403),
        errors.InvalidCheckpoint: (_Code.DATA_LOSS, 500),
        errors.UnsupportedModel: (_Code.UNIMPLEMENTED, 501),
        errors.InsufficientResources: (_Code.RESOURCE_EXHAUSTED, 507),
        errors.Overloaded: (_Code.RESOURCE_EXHAUSTED, 429),
        errors.Unavailable: (_Code.UNAVAILABLE, 503),
        errors.DeadlineExceeded: (_Code.DEADLINE_EXCEEDED, 504),
        errors.Cancelled: (_Code.CANCELLED, 499),
        errors.StepRefused: (_Code.FAILED_PRECONDITION, 409),
        errors.StepInterrupted: (_Code.UNAVAILABLE, 503),
        errors.HostLost: (_Code.UNAVAILABLE, 503),
        errors.StaleRouting: (_Code.ABORTED, 409),
        errors.ExpertFailed: (_Code.INTERNAL, 500),
    }
)
"""Error class -> (gRPC code, HTTP code). Total over `ray_moe.errors`."""

_CLASSES = {cls.__name__: cls for cls in CODES}

# For a status that no service of ours made: gRPC itself, a proxy, or another server that listens there.
_FOREIGN: dict[grpc.StatusCode, type[RayMoEError]] = {
    _Code.INVALID_ARGUMENT: errors.InvalidRequest,
    _Code.OUT_OF_RANGE: errors.InvalidRequest,
    _Code.UNIMPLEMENTED: errors.InvalidRequest,
    _Code.NOT_FOUND: errors.NotFound,
    _Code.UNAUTHENTICATED: errors.Unauthenticated,
    _Code.PERMISSION_DENIED: errors.PermissionDenied,
    _Code.RESOURCE_EXHAUSTED: errors.Overloaded,
    _Code.UNAVAILABLE: errors.Unavailable,
    _Code.ABORTED: errors.Unavailable,
    _Code.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    _Code.CANCELLED: errors.Cancelled,
}


@dataclass(frozen=True, slots=True)
class Status:
    """An error in gRPC's terms: the arguments of `ServicerContext.abort`."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str], ...]


def _public_class(error: RayMoEError) -> type[RayMoEError]:
    """The nearest class of the table: a private subclass counts as its base."""
    return next(cls for cls in type(error).__mro__ if cls in CODES)


def to_status(error: RayMoEError) -> Status:
    """What a gRPC server ends the call with."""
    cls = _public_class(error)
    details = error.message.encode(errors="replace")[:MAX_DETAILS_BYTES].decode(errors="ignore")
    trailing_metadata = [(ERROR_KEY, cls.__name__)]
    if error.retry_after_s is not None:
        trailing_metadata.append((RETRY_AFTER_KEY, f"{error.retry_after_s:.3f}"))
    return Status(CODES[cls][0], details, tuple(trailing_metadata))


def to_http(error: RayMoEError) -> int:
    """The code that an HTTP server answers with."""
    return CODES[_public_class(error)][1]


def to_http_headers(error: RayMoEError) -> dict[str, str]:
    """The headers that belong to that code: how to authenticate, and when to retry (whole seconds, rounded up)."""
    headers = {}
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return headers


def from_status(
    code: grpc.StatusCode,
    details: str,
    name: str | None,
    retry_after_s: str | None = None,
    request_id: str | None = None,
) -> RayMoEError:
    """The error that a client raises.

    Args:
        code, details: of the status.
        name: the value under `ERROR_KEY`; None when the status has none.
        retry_after_s: the value under `RETRY_AFTER_KEY`, likewise. What is no time is passed over.
        request_id: the value under `REQUEST_ID_KEY`, likewise.
    """
    cls = _CLASSES.get(name) if name else None
    cls = cls or _FOREIGN.get(code, RayMoEError)
    return cls(details, retry_after_s=_seconds(retry_after_s), request_id=request_id or "")


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
