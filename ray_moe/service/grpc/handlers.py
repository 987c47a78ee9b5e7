"""Methods that take one request, and services that others wrote, as handlers that answer whatever comes.

`grpc.aio` leaves a call without an answer, for ever, whose client ends its side before it has sent the one request of
the method; here it gets an error. What is no message of a foreign service gets a proper error likewise. Used by the
services; knows none of ours.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from ray_moe.errors import WireError
from ray_moe.service.grpc.guard import Context, abort

M = TypeVar("M", bound=Message)


def one_to_one(method: Callable[[bytes, Context], Awaitable[bytes]]) -> grpc.RpcMethodHandler[bytes, bytes]:
    """A handler of `method`, from the bytes of its request to those of its response."""

    async def answer(requests: object, context: Context) -> bytes:
        return await method(await _only_request(context), context)

    return grpc.stream_unary_rpc_method_handler(answer)


def one_to_many(method: Callable[[bytes, Context], Awaitable[None]]) -> grpc.RpcMethodHandler[bytes, bytes]:
    """The same for a method that writes its responses to the context."""

    async def answer(requests: object, context: Context) -> None:
        await method(await _only_request(context), context)

    return grpc.stream_stream_rpc_method_handler(answer)


async def _only_request(context: Context) -> bytes:
    data: Any = await context.read()
    if data is grpc.aio.EOF:  # type: ignore[attr-defined]
        await abort(context, WireError("the call ended before its request came; expected one message: send it"))
    return bytes(data)


def parse_foreign(kind: type[M], data: bytes) -> M:
    """A message of a service that is not ours. Raises: `WireError`."""
    try:
        return kind.FromString(data)
    except DecodeError as exc:
        raise WireError(
            f"these {len(data):,} bytes are not a {kind.DESCRIPTOR.full_name} ({exc}): send that message"
        ) from exc
