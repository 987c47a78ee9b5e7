"""The dashboard: a page at `/dashboard`, what it shows at `/dashboard/api/state`, and the few things it can do.

The page is the same for everybody and tells nothing. Whatever is told or done needs the role `admin` where keys are
asked for, and is not counted against the limit of concurrent requests, since one wants it most when that is reached.
Where no keys are asked for, `openai/origin.py` keeps other pages out. The routes are no part of `/openapi.json`. Added
by `service/openai/app.py`.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from ray_moe.service.admission import Admission
from ray_moe.service.auth import Caller
from ray_moe.service.backend import Backend
from ray_moe.service.dashboard.actions import Actions
from ray_moe.service.dashboard.files import Files, compressed
from ray_moe.service.dashboard.picture import Pictures
from ray_moe.service.openai import origin
from ray_moe.service.openai.exchange import read_body, until_ending

MAX_BODY_BYTES = 2**14
"""Of what somebody wants done: a name and a few numbers."""

Handler = Callable[[Request], Awaitable[Response]]


def routes(backend: Backend, admission: Admission) -> list[Route]:
    """All of them."""
    files, pictures, actions = Files(), Pictures(backend), Actions(backend)

    def caller(request: Request) -> Caller:
        if not admission.keys_required:
            with admission.refusals.counted("page"):
                origin.check_host(request.headers)
                if request.method != "GET":
                    origin.check_page(request.headers)
        return admission.caller(request.headers, "admin")

    async def page(request: Request) -> Response:
        return await files.answer("index.html", request.headers)

    async def with_slash(request: Request) -> Response:
        return RedirectResponse("../dashboard", 308)  # from where the page names its files; a proxy may add to the path

    async def file(request: Request) -> Response:
        return await files.answer(request.path_params["name"], request.headers)

    async def state(request: Request) -> Response:
        name = caller(request).name
        epoch = request.query_params.get("epoch", "")
        picture = await pictures.take(int(epoch) if epoch.isdecimal() and len(epoch) < 20 else None)
        told = {**picture, "caller": name if admission.keys_required else None}
        return await _json(told, request)

    def action(do: Callable[[bytes], Coroutine[Any, Any, dict[str, Any]]]) -> Handler:
        async def handle(request: Request) -> Response:
            who = caller(request)
            with admission.payload() as payload, who.request():
                body = await read_body(request, MAX_BODY_BYTES, payload)
                # Not cancelled when the page is left: what was begun is carried out either way.
                return await _json(await until_ending(admission.ending, do(body)), request)

        return handle

    return [
        Route("/dashboard", page, methods=["GET"]),
        Route("/dashboard/", with_slash, methods=["GET"]),
        Route("/dashboard/static/{name}", file, methods=["GET"]),
        Route("/dashboard/api/state", state, methods=["GET"]),
        Route("/dashboard/api/plan", action(actions.plan), methods=["POST"]),
        Route("/dashboard/api/drain", action(actions.drain), methods=["POST"]),
        Route("/dashboard/api/chaos", action(actions.chaos), methods=["POST"]),
    ]


async def _json(told: dict[str, Any], request: Request) -> Response:
    """Made in a thread: a model with many experts is a hundred kilobytes, each second."""
    headers = {"cache-control": "no-store", "x-content-type-options": "nosniff", "vary": "accept-encoding"}

    def encode() -> bytes:
        return json.dumps(_finite(told), separators=(",", ":"), allow_nan=False).encode()

    body = await asyncio.to_thread(encode)
    if "gzip" in request.headers.get("accept-encoding", ""):
        body = await asyncio.to_thread(compressed, body, 1)
        headers["content-encoding"] = "gzip"
    return Response(body, headers=headers, media_type="application/json")


def _finite(value: Any) -> Any:
    """The same without infinities and NaN, which JSON does not have. Lists are of integers, and stay as they are."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
