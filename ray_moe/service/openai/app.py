"""The OpenAI-compatible front door as an ASGI application over a `Backend`.

Routes, their description for `/openapi.json`, and errors in OpenAI's shape; the dashboard is beside them. It does not
know where it is served.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ray_moe import __version__
from ray_moe.errors import RayMoEError
from ray_moe.service.admission import Admission
from ray_moe.service.backend import Backend
from ray_moe.service.dashboard import routes as dashboard
from ray_moe.service.openai.errors import BadRequest, refusal
from ray_moe.service.openai.framing import StrictFraming
from ray_moe.service.openai.jobs import RequestLimits, check_model
from ray_moe.service.openai.origin import OwnHost
from ray_moe.service.openai.requests import RequestMiddleware
from ray_moe.service.openai.schemas import request_schemas
from ray_moe.service.openai.schemas_answers import (
    ChatCompletion,
    Completion,
    ErrorReply,
    Health,
    ModelCard,
    ModelList,
    chunk_schemas,
)
from ray_moe.service.openai.serving import ChatEndpoint, CompletionEndpoint, Exchange

if TYPE_CHECKING:
    from ray_moe.service.metrics import Metrics

Responses = dict[int | str, dict[str, Any]]

_ERRORS: Responses = {
    400: {"description": "The request is wrong: change it."},
    404: {"description": "There is no such model."},
    413: {"description": "The body is too large."},
    415: {"description": "The body is not said to be JSON."},
    429: {"description": "Too much work is queued: retry after the seconds in `Retry-After`."},
    503: {"description": "Starting or stopping: retry after the seconds in `Retry-After`."},
    504: {"description": "No answer in time."},
    "4XX": {"description": "The request is wrong."},
    "5XX": {"description": "The service failed."},
}


def make_app(
    backend: Backend, admission: Admission, limits: RequestLimits | None = None, max_metric_experts: int = 32
) -> FastAPI:
    """The application; it starts nothing and needs no lifespan events.

    Args:
        backend: what does the work.
        admission: shared by all requests, and how they are ended.
        limits: what one request may be.
        max_metric_experts: experts that have a metric of their own.
    """
    limits = limits or RequestLimits()
    app = FastAPI(
        title="ray_moe",
        version=__version__,
        description="Completions and chat completions in the manner of OpenAI's API.",
        redirect_slashes=False,
        docs_url=None,  # FastAPI's pages load their scripts from a CDN, into the origin of the service
        redoc_url=None,
    )
    _add_information(app, backend, admission)
    _add_metrics(app, backend, admission, max_metric_experts)
    _add_generation(app, backend, admission, limits)
    app.router.routes.extend(dashboard.routes(backend, admission))
    _add_errors(app)
    if admission.local_only:
        app.add_middleware(OwnHost, refusals=admission.refusals)
    app.add_middleware(StrictFraming)
    app.add_middleware(RequestMiddleware, tracer=admission.tracer, paths=frozenset(_paths(app)))
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schemas = describe()["components"]["schemas"]
            schemas |= {
                name: schema for name, schema in (request_schemas() | chunk_schemas()).items() if name not in schemas
            }
        return describe()

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _add_information(app: FastAPI, backend: Backend, admission: Admission) -> None:
    created = int(time.time())

    def card() -> ModelCard:
        return ModelCard(id=backend.model_name, created=created, max_model_len=backend.max_positions)

    @app.get("/health", responses=_errors(503), tags=["service"])
    async def health() -> Health:
        """Whether requests are answered."""
        admission.check()
        return Health()

    @app.get("/v1/models", responses=_errors(503), tags=["models"])
    async def list_models(request: Request) -> ModelList:
        """The model that is served."""
        admission.caller(request.headers)
        admission.check()
        return ModelList(data=[card()])

    @app.get("/v1/models/{name:path}", responses=_errors(404, 503), tags=["models"])
    async def retrieve_model(name: str, request: Request) -> ModelCard:
        """One model, by its name."""
        admission.caller(request.headers)
        admission.check()
        check_model(backend, name)
        return card()


def _add_metrics(app: FastAPI, backend: Backend, admission: Admission, max_experts: int) -> None:
    made: list[Metrics] = []

    def metrics_of_router() -> Metrics:
        if not made:  # the library is loaded by the first scrape, in routers that have one
            from ray_moe.service.metrics import Metrics

            made.append(Metrics(backend, admission.refusals, max_experts))
        return made[0]

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses={200: {"content": {"application/openmetrics-text": {}}}, **_errors()},
        tags=["service"],
    )
    async def metrics(request: Request) -> Response:
        """What Prometheus scrapes: of this router, and of the cluster as the controller sees it."""
        admission.caller(request.headers, "metrics")
        body, content_type = await metrics_of_router().scrape(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})


def _add_generation(app: FastAPI, backend: Backend, admission: Admission, limits: RequestLimits) -> None:
    completion = CompletionEndpoint(backend, admission, limits)
    chat = ChatEndpoint(backend, admission, limits)
    errors = _errors(*_ERRORS)

    @app.post(
        "/v1/completions",
        responses={200: _answer(Completion, "Completion"), **errors},
        openapi_extra=_body("CompletionRequest"),
        tags=["generation"],
    )
    async def create_completion() -> Response:
        """Continue a prompt, or several."""
        return Exchange(completion)

    @app.post(
        "/v1/chat/completions",
        responses={200: _answer(ChatCompletion, "ChatChunk"), **errors},
        openapi_extra=_body("ChatRequest"),
        tags=["generation"],
    )
    async def create_chat_completion() -> Response:
        """Continue a conversation."""
        return Exchange(chat)


def _add_errors(app: FastAPI) -> None:
    async def refuse(request: Request, error: Exception) -> Response:
        refused = refusal(error)
        return Response(refused.body, refused.status, dict(refused.headers), "application/json")

    async def refuse_route(request: Request, error: Exception) -> Response:
        """No such path, or not with this method."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = (error.headers if isinstance(error, HTTPException) else None) or {}
        asked = f"{request.method} {request.url.path[:200]}"
        message = f"{asked} is not served here; GET /openapi.json tells what is"
        if status == 405:
            message = f"{asked} is not served here; this path takes {headers.get('Allow', 'another method')}"
        code = {404: "not_found", 405: "method_not_allowed"}.get(status)
        return await refuse(request, BadRequest(message, code=code, status=status, headers=headers))

    app.add_exception_handler(RayMoEError, refuse)
    app.add_exception_handler(HTTPException, refuse_route)


def _paths(app: FastAPI) -> Iterator[str]:
    return (route.path for route in app.routes if isinstance(route, Route))


def _errors(*statuses: int | str) -> Responses:
    return {status: {**_ERRORS[status], "model": ErrorReply} for status in (*statuses, *({"4XX", "5XX"} - {*statuses}))}


def _answer(model: type, piece: str) -> dict[str, Any]:
    pieces = {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in (piece, "ErrorReply")]}
    told = {"contentMediaType": "application/json", "contentSchema": pieces}
    event = {"type": "object", "properties": {"data": {"type": "string", "anyOf": [{"const": "[DONE]"}, told]}}}
    return {
        "model": model,
        "description": "The answer; with `stream`, events with a piece each, and at last `[DONE]` or an error.",
        "content": {"text/event-stream": {"itemSchema": event}},
    }


def _body(name: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
