"""Chat completions as OpenAI's own client sees them, and what the chat template and the backend are given."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import openai
import pytest

from ray_moe.types import GenerateRequest
from tests.unit.service.openai.http_door import HELLO, MODEL, TellingBackend, async_client, http_door


async def test_an_answer_has_what_openais_has(client: openai.AsyncOpenAI, backend: TellingBackend) -> None:
    backend.num_cached = [3]
    done = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3)
    assert (done.object, done.model) == ("chat.completion", MODEL)
    assert done.id.startswith("chatcmpl-")
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].message.content == "0 1 2 "
    assert (done.choices[0].finish_reason, done.choices[0].logprobs) == ("length", None)
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (5, 3, 8)
    assert done.usage.prompt_tokens_details is not None
    assert done.usage.prompt_tokens_details.cached_tokens == 3
    tokens = await backend.tokenize("hello")
    assert backend.requests == [GenerateRequest(token_ids=tokens, max_new_tokens=3, temperature=1.0)]


async def test_a_streamed_answer_begins_with_the_role_and_ends_with_the_reason(client: openai.AsyncOpenAI) -> None:
    pieces = await client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_completion_tokens=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    *told, last = [piece async for piece in pieces]
    deltas = [(piece.choices[0].delta.role, piece.choices[0].delta.content) for piece in told]
    assert deltas == [("assistant", ""), (None, "0 "), (None, "1 "), (None, None)]
    assert [piece.choices[0].finish_reason for piece in told] == [None, None, None, "length"]
    assert {piece.id for piece in told} == {last.id}
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 7


async def test_events_are_framed_as_the_standard_says(http: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 1, "stream": True}
    reply = await http.post("/v1/chat/completions", json=body)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, rest = reply.text.split("\n\n")
    assert len(events) == 3
    assert all(event.startswith('data: {"id":"chatcmpl-') and "\n" not in event for event in events)
    assert (done, rest) == ("data: [DONE]", "")


async def test_the_clients_stream_helper_gathers_the_same_answer(
    client: openai.AsyncOpenAI, backend: TellingBackend
) -> None:
    backend.reason = "stop"
    async with client.chat.completions.stream(model=MODEL, messages=HELLO, max_tokens=3, n=2) as stream:
        done = await stream.get_final_completion()
    assert [choice.message.content for choice in done.choices] == ["0 1 2 ", "0 1 2 "]


async def test_line_ends_in_an_answer_break_no_event(backend: TellingBackend, client: openai.AsyncOpenAI) -> None:
    ends = "\n\r\x0b\x0c\x1c\x85\u2028\u2029 data: \N{GRINNING FACE}"
    backend.text = ends
    pieces = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1, stream=True)
    assert "".join([piece.choices[0].delta.content or "" async for piece in pieces]) == ends


async def test_logprobs_tell_bytes_and_alternatives(client: openai.AsyncOpenAI, backend: TellingBackend) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    done = await client.chat.completions.create(**ask)
    told = done.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert [one.token for one in told.content] == ["<0>", "<1>"]
    assert told.content[0].bytes == list(b"<0>")
    assert [(one.token, one.logprob) for one in told.content[1].top_logprobs] == [("<50>", 0.0), ("<51>", -9999.0)]
    pieces = await client.chat.completions.create(**ask, stream=True)
    streamed = [one for piece in pieces_with_logprobs([piece async for piece in pieces]) for one in piece]
    assert streamed == told.content
    await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1, logprobs=True)
    assert backend.requests[-1].logprobs == 0


def pieces_with_logprobs(pieces: list[Any]) -> list[Any]:
    return [piece.choices[0].logprobs.content for piece in pieces if piece.choices[0].logprobs]


async def test_the_template_is_given_plain_texts() -> None:
    seen: list[Mapping[str, Any]] = []

    class Listening(TellingBackend):
        async def tokenize_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
            seen.extend(messages)
            return await super().tokenize_chat(messages)

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages: list[Any] = [
        {"role": "developer", "content": "be brief", "name": None},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": []},
    ]
    async with http_door(Listening()) as address, async_client(address) as client:
        await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)
    assert seen == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one\ntwo", "name": "ann"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(("max_positions", "expected"), [(50, 45), (None, 2**14), (10**6, 2**14)])
async def test_an_answer_of_any_length_may_be_as_long_as_fits(
    client: openai.AsyncOpenAI, backend: TellingBackend, max_positions: int | None, expected: int
) -> None:
    backend.max_positions = max_positions
    pieces = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    await anext(pieces)
    await pieces.close()
    await asyncio.wait_for(backend.closed.wait(), 60)
    assert [request.max_new_tokens for request in backend.requests] == [expected]
