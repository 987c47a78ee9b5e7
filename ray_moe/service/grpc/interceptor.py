"""Every call of the gRPC front door as a request (`service/requests.py`): its id comes and goes back with it."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc

from ray_moe.runtime.tracing import Tracer
from ray_moe.service.requests import handling
from ray_moe.wire.status import REQUEST_ID_KEY

PROBES = frozenset({"ServerLive", "ServerReady", "ModelReady"})


class RequestInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Around the methods of some services. They are coroutines, which write to their context if they stream."""

    def __init__(self, doors: Mapping[str, str], tracer: Tracer | None) -> None:
        """Args:
        doors: service -> what the log calls it; others are passed through.
        tracer: see `handling`.
        """
        self._doors = doors
        self._tracer = tracer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler: grpc.RpcMethodHandler[Any, Any] | None = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.lstrip("/").rpartition("/")
        door = self._doors.get(service)
        if handler is None or door is None:
            return handler  # type: ignore[return-value]  # none is for an unknown method
        headers = headers_of(handler_call_details.invocation_metadata)

        async def answer(asked: Any, context: Any) -> Any:
            is_probe = method in PROBES
            with handling(door, method, headers, self._tracer, span_name=f"{service}/{method}", is_probe=is_probe) as r:
                context.set_trailing_metadata(((REQUEST_ID_KEY, r.id),))
                try:
                    return await behaviour(asked, context)
                except BaseException as error:
                    let_go(error)
                    raise

        behaviour: Any = handler.stream_unary or handler.stream_stream  # one request is a stream, too: `handlers.py`
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(answer)
        return grpc.stream_stream_rpc_method_handler(answer)


def let_go(error: BaseException) -> None:
    """Free what the frames hold that a failed call went through.

    gRPC keeps the call, its error and so these frames in a cycle: a refused message of megabytes, and what was made of
    it, would stay until Python next looks for cycles, which few large objects do not make it do.
    """
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__context__


def headers_of(metadata: Any) -> dict[str, str]:
    """By names in lower case; of a name that comes several times the first counts."""
    headers: dict[str, str] = {}
    for name, value in metadata or ():
        headers.setdefault(name.lower(), value if isinstance(value, str) else value.decode("latin-1"))
    return headers
