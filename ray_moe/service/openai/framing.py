"""Refuses requests of which others may think that they end elsewhere, so that none can be hidden in another."""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ray_moe.service.openai.errors import BadRequest, refusal


class StrictFraming:
    """Around the application: a transfer-encoding is for HTTP/1.1, and for requests without a content-length (RFC 9112,
    section 6.1). The connection of others is closed after the answer: what follows on it may be anything."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = {name for name, _ in scope.get("headers", ())}
        if b"transfer-encoding" not in names or (b"content-length" not in names and scope["http_version"] != "1.0"):
            await self._app(scope, receive, send)
            return
        refused = refusal(
            BadRequest(
                "transfer-encoding is given with content-length, or in HTTP/1.0: where the request ends is not clear; "
                "send one of the two headers",
                code="ambiguous_length",
            )
        )
        headers = {**refused.headers, "connection": "close"}
        await Response(refused.body, refused.status, headers, "application/json")(scope, receive, send)
