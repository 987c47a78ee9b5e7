"""Methods that take one request as handlers that answer whatever comes.

`grpc.aio` leaves a call without an answer, for ever, whose client ends its side before it has sent the one request of
the method; here it gets an error. Used by the services.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from ray_moe.errors import WireError
from ray_moe.service.grpc.guard import Context, abort


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
