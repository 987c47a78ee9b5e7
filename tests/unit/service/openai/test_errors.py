"""Everything that is refused: the HTTP code, the error object, and the exception that OpenAI's client makes of it."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import openai
import pytest

from ray_moe import errors
from ray_moe.service.openai.jobs import RequestLimits
from ray_moe.types import GenerateRequest
from ray_moe.wire.status import CODES
from tests.unit.service.openai.http_door import (
    HELLO,
    MODEL,
    TellingBackend,
    async_client,
    http_door,
    until,
    without_server,
)

JSON = {"content-type": "application/json"}
LONG = "messages" * 10
TEXT_ONLY = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error object, which is all there is and has all four members."""
    body = reply.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    assert reply.headers["content-type"] == "application/json"
    return dict(body["error"])


async def refused(http: httpx.AsyncClient, body: Any, path: str = "/v1/completions") -> dict[str, Any]:
    reply = await http.post(path, json=body)
    assert reply.status_code == 400, reply.text
    error = error_of(reply)
    assert error["type"] == "invalid_request_error"
    return error


# --- what a request says -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": -1}, "temperature", "temperature is -1"),
        ({"temperature": 1e-9}, "temperature", "expected 0"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"temperature": 10**400}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "0 < top_p <= 1"),
        ({"top_k": -2}, "top_k", "at least 0"),
        ({"min_p": 1.5}, "min_p", "0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "expected 0.01 to 100"),
        ({"presence_penalty": 1000}, "presence_penalty", "-100 to 100"),
        ({"frequency_penalty": -1000}, "frequency_penalty", "-100 to 100"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "128"),
        ({"n": 1.5}, "n", "integer"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 50}, "prompt", "maximum context length of 50"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"stop": [""]}, "stop", "0 characters"),
        ({"stop": ["a"] * 17}, "stop", "17 stops"),
        ({"stop": 3}, "stop", "a text or a list of texts"),
        ({"stop_token_ids": [100]}, "stop_token_ids", "0..99"),
        ({"stop_token_ids": [1] * 1001}, "stop_token_ids", "1001 stop tokens"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
        ({"echo": True, "logprobs": 0}, "echo", "together with logprobs"),
        ({"echo": True, "prompt": [1]}, "echo", "a text"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"best_of": True}, "best_of", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"guided_json": {}}, "guided_json", "not supported"),
        ({"prompt": ""}, "prompt", "expected a text"),
        ({"prompt": []}, "prompt", "expected a text"),
        ({"prompt": ["a", 1]}, "prompt", "expected a text"),
        ({"prompt": [[1], []]}, "prompt", "expected a text"),
        ({"prompt": [True]}, "prompt", "expected a text"),
        ({"prompt": [1, 100]}, "prompt", "prompt[1] is 100"),
        ({"prompt": [-1]}, "prompt", "prompt[0] is -1"),
        ({"prompt": [2**70, -1]}, "prompt", f"prompt[0] is {2**70}"),
        ({"prompt": ["a"] * 65, "n": 2}, "n", "more than 128 answers"),
        ({"model": 3}, "model", "string"),
    ],
)
async def test_a_wrong_field_is_named(
    direct: httpx.AsyncClient, backend: TellingBackend, fields: dict[str, Any], param: str, words: str
) -> None:
    error = await refused(direct, {"model": MODEL, "prompt": "hello"} | fields)
    assert error["param"] == param
    assert words in error["message"]
    assert backend.requests == []


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [*HELLO, TEXT_ONLY]}, "messages[1].content[0].type", "'text'"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls", "at most 0"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", "no tokens"),
        ({"messages": [{"role": "nobody", "content": "hello"}]}, "messages", "template refuses these messages"),
        ({"messages": [{"role": "user", "content": LONG}]}, "messages", "maximum context length of 50"),
        ({"messages": [{"role": "user", "content": "\u00e9" * 60}]}, "messages", "120 bytes"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
        ({"max_tokens": 46}, "messages", "together more"),
        ({"max_completion_tokens": 46, "max_tokens": 1}, "messages", "together more"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"logprobs": 1}, "logprobs", "boolean"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"top_p": 2}, "top_p", "0 < top_p <= 1"),
    ],
)
async def test_a_wrong_field_of_a_chat_is_named(
    backend: TellingBackend, fields: dict[str, Any], param: str, words: str
) -> None:
    async with without_server(backend, RequestLimits(max_prompt_bytes=100)) as direct:
        error = await refused(direct, {"model": MODEL, "messages": HELLO} | fields, "/v1/chat/completions")
    assert error["param"] == param
    assert words in error["message"]
    assert backend.requests == []


async def test_a_prompt_that_is_too_long_has_openais_code(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as failure:
        await client.completions.create(model=MODEL, prompt="a" * 40)
    assert (failure.value.code, failure.value.param) == ("context_length_exceeded", "prompt")


async def test_a_text_of_too_many_bytes_is_refused_before_it_is_split(backend: TellingBackend) -> None:
    async with (
        http_door(backend, limits=RequestLimits(max_prompt_bytes=10)) as address,
        async_client(address) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="at most 10 are taken") as failure:
            await client.completions.create(model=MODEL, prompt="a" * 11)
    assert failure.value.param == "prompt"


async def test_a_model_without_a_tokenizer_takes_tokens(client: openai.AsyncOpenAI, backend: TellingBackend) -> None:
    backend.has_tokenizer = False
    with pytest.raises(openai.BadRequestError, match="no tokenizer: send the prompt as a list of token ids"):
        await client.completions.create(model=MODEL, prompt="a")
    await client.completions.create(model=MODEL, prompt=[1], max_tokens=1)
    assert backend.requests == [GenerateRequest(token_ids=(1,), max_new_tokens=1, temperature=1.0)]


async def test_what_the_backend_says_of_a_request_is_said_in_openais_words(
    client: openai.AsyncOpenAI, backend: TellingBackend
) -> None:
    backend.failure = errors.InvalidRequest("the prompt has 5 tokens and max_new_tokens is 9; no room for token_ids")
    with pytest.raises(openai.BadRequestError, match="5 tokens and max_tokens is 9; no room for prompt") as failure:
        await client.completions.create(model=MODEL, prompt="hello")
    assert failure.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="5 tokens and max_tokens is 9") as failure:
        await client.chat.completions.create(model=MODEL, messages=HELLO)
    assert failure.value.param == "messages"


async def test_an_unknown_model_is_not_found(client: openai.AsyncOpenAI) -> None:
    ask: list[Any] = [
        client.completions.create(model="gpt", prompt="a"),
        client.chat.completions.create(model="gpt", messages=HELLO),
        client.models.retrieve("org/gpt"),
    ]
    for asking in ask:
        with pytest.raises(openai.NotFoundError, match="does not exist; this service has 'tiny'") as failure:
            await asking
        assert failure.value.code == "model_not_found"


# --- bytes and routes ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "\xff"}',
        b"\x00",
        b"[" * 100_000,
    ],
)
async def test_bytes_that_are_no_request_are_refused(direct: httpx.AsyncClient, data: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        reply = await direct.post(path, content=data, headers=JSON)
        assert reply.status_code == 400
        assert error_of(reply)["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/jsonx", "multipart/form-data; boundary=x"])
async def test_only_json_is_taken(direct: httpx.AsyncClient, kind: str | None) -> None:
    body = json.dumps({"model": MODEL, "prompt": "a"}).encode()
    reply = await direct.post("/v1/completions", content=body, headers={"content-type": kind} if kind else {})
    assert reply.status_code == 415
    assert "expected application/json" in error_of(reply)["message"]
    reply = await direct.post(
        "/v1/completions", content=body, headers={"content-type": "Application/JSON; charset=utf-8"}
    )
    assert reply.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/v1/completions", 405, "POST"),
        ("DELETE", "/v1/models/tiny", 405, "GET"),
        ("TRACE", "/health", 405, "GET"),
        ("GET", "/v1/nothing", 404, None),
        ("POST", "/v1/completions/", 404, None),
        ("GET", "/", 404, None),
    ],
)
async def test_routes_that_are_not_there(
    direct: httpx.AsyncClient, method: str, path: str, status: int, allow: str | None
) -> None:
    reply = await direct.request(method, path)
    assert reply.status_code == status
    assert reply.headers.get("allow") == allow
    assert error_of(reply)["message"].startswith(f"{method} {path} is not served here")


async def test_a_body_over_the_limit_is_refused_declared_or_not(backend: TellingBackend) -> None:
    body = json.dumps({"model": MODEL, "prompt": "a", "user": "x" * 5000}).encode()

    async def parts() -> Any:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    limits = RequestLimits(max_request_bytes=len(body) - 1)
    async with http_door(backend, limits=limits) as address, httpx.AsyncClient(base_url=address) as http:
        for content in (body, parts()):
            reply = await http.post("/v1/completions", content=content, headers=JSON)
            assert reply.status_code == 413
            assert error_of(reply)["code"] == "request_too_large"
    async with (
        http_door(backend, limits=RequestLimits(max_request_bytes=len(body))) as address,
        httpx.AsyncClient(base_url=address) as http,
    ):
        assert (await http.post("/v1/completions", content=parts(), headers=JSON)).status_code == 200


# --- what the backend raises ---------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", sorted(CODES, key=str))
async def test_every_error_has_its_code_also_before_a_stream(
    direct: httpx.AsyncClient, backend: TellingBackend, kind: type[errors.RayMoEError]
) -> None:
    backend.failure = kind("what was wrong")
    for stream in (False, True):
        reply = await direct.post("/v1/completions", json={"model": MODEL, "prompt": "a", "stream": stream})
        status = CODES[kind][1]
        assert reply.status_code == status
        error = error_of(reply)
        assert error["message"] == "what was wrong"
        expected = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        assert error["type"] == expected.get(status, "invalid_request_error" if status < 500 else "server_error")
        assert reply.headers.get("retry-after") == ("1" if status in (429, 503) else None)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (errors.Overloaded("full"), openai.RateLimitError),
        (errors.Unavailable("starting"), openai.InternalServerError),
        (errors.DeadlineExceeded("late"), openai.InternalServerError),
        (errors.InvalidRequest("no"), openai.BadRequestError),
        (errors.Unauthenticated("who"), openai.AuthenticationError),
        (errors.NotFound("what"), openai.NotFoundError),
        (RuntimeError("secret"), openai.InternalServerError),
    ],
)
async def test_openais_client_raises_its_own_errors(
    client: openai.AsyncOpenAI, backend: TellingBackend, failure: Exception, kind: type[openai.APIStatusError]
) -> None:
    backend.failure = failure
    with pytest.raises(kind):
        await client.chat.completions.create(model=MODEL, messages=HELLO)
    assert backend.num_open == 0


async def test_openais_client_retries_what_it_should(address: str, backend: TellingBackend) -> None:
    backend.failure = errors.Overloaded("full")

    async def hook(response: httpx.Response) -> None:
        backend.failure = None

    http: Any = httpx.AsyncClient(event_hooks={"response": [hook]})
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=1, http_client=http) as client:
        done = await client.completions.create(model=MODEL, prompt="a", max_tokens=1)
    assert done.choices[0].text == "0 "
    assert len(backend.requests) == 2


async def test_openais_client_gives_up_in_its_own_time_and_the_work_ends(address: str, backend: TellingBackend) -> None:
    backend.hold_after = 0
    async with async_client(address, timeout=0.5) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.completions.create(model=MODEL, prompt="a")
    await until(lambda: backend.num_open == 0)


async def test_a_fault_tells_an_id_and_nothing_else(
    direct: httpx.AsyncClient, backend: TellingBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.failure = KeyError("secret")
    with caplog.at_level(logging.ERROR):
        reply = await direct.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
    assert reply.status_code == 500
    error = error_of(reply)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    fault = error["message"].split()[1]
    assert "secret" not in reply.text
    assert "KeyError" not in reply.text
    assert f"fault {fault}" in caplog.text
    assert "secret" in caplog.text


@pytest.mark.parametrize("failure", [errors.Unavailable("experts did not come back"), RuntimeError("secret")])
async def test_an_error_amid_a_stream_is_its_last_event(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, backend: TellingBackend, failure: Exception
) -> None:
    backend.late_failure = failure
    body: Any = {"model": MODEL, "messages": HELLO, "stream": True, "n": 2}
    pieces = await client.chat.completions.create(**body)
    text = ""
    with pytest.raises(openai.APIError, match=r"experts did not come back|fault \w+ of the service"):
        async for piece in pieces:
            text += piece.choices[0].delta.content or ""
    assert "1 " in text
    reply = await http.post("/v1/chat/completions", json=body)
    *_, event, rest = reply.text.split("\n\n")
    assert (reply.status_code, rest) == (200, "")
    assert json.loads(event.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "secret" not in reply.text
    assert backend.num_open == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_one_generation_that_fails_ends_the_others(
    direct: httpx.AsyncClient, backend: TellingBackend, stream: bool
) -> None:
    backend.late_failure, backend.failing_seed = errors.ExpertFailed("expert 3 raised"), 6
    body = {"model": MODEL, "prompt": "a", "n": 4, "seed": 5, "max_tokens": 40, "stream": stream}
    reply = await direct.post("/v1/completions", json=body)
    assert reply.status_code == (200 if stream else 500)
    assert "expert 3 raised" in reply.text
    assert "[DONE]" not in reply.text
    assert (len(backend.requests), backend.num_open) == (4, 0)
