"""Errors as OpenAI's clients know them: ``{"error": {"message", "type", "param", "code"}}`` and an HTTP code.

The HTTP code comes from the one table in `wire/status.py`. What is no error of ours is a fault of the service: its
traceback goes to the log under an id, and the client gets the id and nothing else.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from ray_moe.errors import InvalidRequest, RayMoEError
from ray_moe.service.requests import failed
from ray_moe.wire.status import to_http, to_http_headers

RETRY_AFTER_S = 1
"""What a client that came at a bad time is told to wait."""

_RETRY = (429, 503)
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    401: "invalid_api_key",
    403: "permission_denied",
    404: "not_found",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "service_unavailable",
    504: "timeout",
}

_PARAM = re.compile(r"(?P<field>[a-z][a-z_]*)(\[\d+\])? (is|has) ")
_ABOUT_MANY = ((re.compile(r"\d+ stops "), "stop"), (re.compile(r"\d+ stop tokens"), "stop_token_ids"))


class BadRequest(InvalidRequest):
    """A request that this door refuses by itself, with what OpenAI's error object has beside the message."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error, ready to be sent."""

    status: int
    body: str
    """The error object, in JSON."""
    headers: Mapping[str, str] = field(default_factory=dict)


def refusal(error: Exception, names: Mapping[str, str] | None = None, prompt: str = "prompt") -> Refusal:
    """What the client is told of `error`.

    Args:
        names: how this endpoint calls the fields that `service/validation.py` and the backend speak of.
        prompt: the field that holds the prompt.
    """
    failed(error)
    if not isinstance(error, RayMoEError):
        fault = secrets.token_hex(4)
        logging.getLogger(__name__).error("fault %s of the service", fault, exc_info=error)
        error = RayMoEError(f"fault {fault} of the service: its log has more under that id")
    if isinstance(error, BadRequest):
        return _refusal(error.status, error.message, error.param, error.code, error.headers)
    status = to_http(error)
    message, param = error.message, None
    if isinstance(error, InvalidRequest):
        message, param = _in_their_words(message, names or {}, prompt)
    headers = {name.lower(): value for name, value in to_http_headers(error).items()}
    if status in _RETRY:
        headers.setdefault("retry-after", str(RETRY_AFTER_S))
    return _refusal(status, message, param, _CODES.get(status), headers)


def _refusal(status: int, message: str, param: str | None, code: str | None, headers: Mapping[str, str]) -> Refusal:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return Refusal(status, json.dumps(body), headers)


def _in_their_words(message: str, names: Mapping[str, str], prompt: str) -> tuple[str, str | None]:
    """The message with the endpoint's names of fields, and the field that it is about if it begins with one."""
    for ours, theirs in names.items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
    for pattern, param in _ABOUT_MANY:
        if pattern.match(message):
            return message, param
    found = _PARAM.match(message)
    if found:
        return message, found["field"]
    return message, prompt if message.startswith("the prompt ") else None
