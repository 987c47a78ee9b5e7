"""Every HTTP exchange as a request (`service/requests.py`): its id comes with it and goes back with it."""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ray_moe.runtime.tracing import Tracer
from ray_moe.service.openai.errors import refusal
from ray_moe.service.requests import handling
from ray_moe.wire.status import REQUEST_ID_KEY

PROBES = frozenset({"/health", "/metrics", "/dashboard/api/state"})
"""What is asked again and again, by nobody in particular: logged at `debug`."""
MAX_PATH = 200
"""Characters of a path that a line of the log has."""

CLIENT_GONE = "499"
"""Status of what nobody waited for, as nginx has it."""


class RequestMiddleware:
    """Around the application. What it fails with unexpectedly becomes an answer here, while it is known for whom."""

    def __init__(self, app: ASGIApp, tracer: Tracer | None, paths: frozenset[str]) -> None:
        """Args:
        app: what answers.
        tracer: see `handling`.
        paths: those that are served, and so may be names of spans.
        """
        self._app = app
        self._tracer = tracer
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[str, str] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.decode("latin-1"), value.decode("latin-1"))
        path = scope["path"]
        name = f"{scope['method']} {path}" if path in self._paths else str(scope["method"])
        method = f"{scope['method']} {path[:MAX_PATH]}"
        is_probe = path in PROBES
        with handling("openai", method, headers, self._tracer, span_name=name, is_probe=is_probe) as request:

            async def answer(message: Message) -> None:
                if message["type"] == "http.response.start":
                    request.status = str(message["status"])
                    message["headers"] = [*message["headers"], (REQUEST_ID_KEY.encode(), request.id.encode())]
                await send(message)

            try:
                await self._app(scope, receive, answer)
            except Exception as error:
                if request.status:  # too late to tell
                    raise
                refused = refusal(error)
                await Response(refused.body, refused.status, dict(refused.headers), "application/json")(
                    scope, receive, answer
                )
            request.status = request.status or CLIENT_GONE
