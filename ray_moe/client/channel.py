"""What both clients know about gRPC: targets, the options of a channel, and errors as ours.

Retries are the client's own (`attempts.py`): those of gRPC stay with one target, leave a stream that has begun, and do
not know our time to retry. Without a retryPolicy gRPC sends again only what no server has seen.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, cast

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read when grpc is loaded; its fork handlers crash children

import grpc

from ray_moe.errors import Cancelled, InvalidConfig, InvalidRequest, RayMoEError, Unavailable
from ray_moe.wire.status import ERROR_KEY, REQUEST_ID_KEY, RETRY_AFTER_KEY, from_status

DEFAULT_TARGET: Final = "127.0.0.1:8476"
DEFAULT_TIMEOUT_S: Final = 300.0
DEFAULT_MAX_ATTEMPTS: Final = 8

CONNECT_TIMEOUT_S: Final = 5.0
"""One attempt to connect; a host that does not even refuse is unavailable after it."""

# grpc.health.v1 by hand, so that the client needs no further package: field 1 of a HealthCheckRequest is the name of a
# service, and a response of SERVING is field 1 with value 1. Other servers than ours answer, too, but do not know it.
HEALTH_CHECK: Final = "/grpc.health.v1.Health/Check"
_SERVICE: Final = b"ray_moe.v1.Inference"
HEALTH_REQUEST: Final = b"\x0a" + bytes([len(_SERVICE)]) + _SERVICE
HEALTH_SERVING: Final = b"\x08\x01"
READY_POLL_S: Final = 0.1

OPTIONS: Final[list[tuple[str, int | str]]] = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_TIMEOUT_S * 1000)),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),  # http_proxy is not meant for a service inside the cluster
    # A server that vanished without a word is noticed within 40 s, also while a stream is silent.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # the one that is honoured
    ("grpc.http2.max_pings_without_data", 0),
]

_BROKEN: Final = (grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL)
"""Where the service names no error: a server that ends at once cancels its calls, and a stream that ends while grpc.aio
writes to it becomes an internal error there, whatever its end was."""


def targets_of(target: str | Sequence[str]) -> tuple[str, ...]:
    """The gRPC targets that a caller names: in a sequence, or in a text with commas, which some kinds of targets have.

    Raises:
        InvalidConfig: there is none.
    """
    if not isinstance(target, str):
        targets = tuple(target)
    elif re.match("(ipv4|ipv6|unix|unix-abstract):", target):
        targets = (target,)
    else:
        targets = tuple(part.strip() for part in target.split(","))
    if not targets or not all(targets):
        raise InvalidConfig(f"the target is {target!r}; expected HOST:PORT of a router, or several")
    return tuple(dict.fromkeys(targets))


@contextmanager
def errors(target: str, timeout_s: float | None) -> Iterator[None]:
    """Around the use of a call, also of an asyncio one: what gRPC raises becomes ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise to_error(error, target, timeout_s) from error
    except (ValueError, grpc.aio.UsageError) as error:  # what the two kinds of channels raise
        raise Cancelled(f"the client of {target} is closed: make another ({error})") from error


def to_error(error: grpc.RpcError, target: str, timeout_s: float | None) -> RayMoEError:
    """The error that a failed call raises: the service's own, or one of the way there, which names the target."""
    call = cast(grpc.Call, error)  # the stubs leave RpcError without what it has
    code, details = call.code(), call.details() or ""
    trailers = {key: str(value) for key, value in call.trailing_metadata() or ()}
    request_id = trailers.get(REQUEST_ID_KEY)
    if ERROR_KEY in trailers:
        return from_status(code, details, trailers[ERROR_KEY], trailers.get(RETRY_AFTER_KEY), request_id)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return InvalidRequest(f"{target} takes no message of this size ({details}): send fewer tokens at a time")
    if code in _BROKEN:
        return Unavailable(f"the service at {target} broke off the call: {details}")
    explain = {
        grpc.StatusCode.UNAVAILABLE: _why_unreachable(target, details),
        grpc.StatusCode.DEADLINE_EXCEEDED: f"no answer from {target} within {timeout_s} s; give it more (timeout_s)",
        grpc.StatusCode.NOT_FOUND: f"what listens at {target} is not a ray_moe service",
        grpc.StatusCode.UNIMPLEMENTED: f"what listens at {target} is not a ray_moe service of this version",
    }
    return from_status(code, f"{explain.get(code, f'the call to {target} failed')}: {details}", None, None, request_id)


def _why_unreachable(target: str, details: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in details or "Peer name" in details:
        return f"the certificate of {target} is not trusted, or is not for that name (ca_file names other roots)"
    if "WRONG_VERSION_NUMBER" in details:
        return f"what listens at {target} does not speak TLS; connect without, if you trust the way there"
    if "andshake failed" in details:
        return f"no TLS connection with the service at {target} (does it want a certificate of the client?)"
    return f"the service at {target} cannot be reached, or broke off (is it running there?)"


class ReadyPoll:
    """Until when to ask whether the service is ready; the clients do the asking and the sleeping."""

    def __init__(self, target: str, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s

    @property
    def remaining_s(self) -> float:
        return max(0.0, self._deadline_s - time.monotonic())

    def is_over(self, answer: bytes | grpc.RpcError) -> bool:
        """Whether `answer` to a health check says ready.

        Raises:
            Unavailable: it does not, and the time is over.
        """
        if answer == HEALTH_SERVING:
            return True
        if self.remaining_s > READY_POLL_S:
            return False
        why = to_error(answer, self._target, self._timeout_s) if isinstance(answer, grpc.RpcError) else "it is starting"
        raise Unavailable(f"{self._target} is not ready after {self._timeout_s} s: {why}")
