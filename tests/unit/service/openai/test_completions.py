"""Completions as OpenAI's own client sees them, and what the backend is asked for."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from ray_moe.service.offload import INLINE_BYTES
from ray_moe.types import GenerateRequest
from tests.unit.service.openai.http_door import MODEL, TellingBackend


async def test_a_text_is_continued_with_openais_defaults(client: openai.AsyncOpenAI, backend: TellingBackend) -> None:
    done = await client.completions.create(model=MODEL, prompt="hello")
    assert done.object == "text_completion"
    assert done.model == MODEL
    assert done.id.startswith("cmpl-")
    assert done.choices[0].text == "".join(f"{number} " for number in range(16))
    assert done.choices[0].finish_reason == "length"
    assert done.choices[0].logprobs is None
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (5, 16, 21)
    tokens = await backend.tokenize("hello")
    assert backend.requests == [GenerateRequest(token_ids=tokens, max_new_tokens=16, temperature=1.0)]


async def test_every_field_reaches_the_backend(client: openai.AsyncOpenAI, backend: TellingBackend) -> None:
    await client.completions.create(
        model=MODEL,
        prompt=[1, 2, 3],
        max_tokens=4,
        temperature=0.5,
        top_p=0.25,
        seed=7,
        stop=["a", "b"],
        logprobs=2,
        presence_penalty=-1,
        frequency_penalty=1.5,
        user="somebody",
        extra_body={
            "top_k": 9,
            "min_p": 0.125,
            "repetition_penalty": 1.25,
            "stop_token_ids": [5, 6],
            "ignore_eos": True,
            "an unknown field": {"of": "another server"},
        },
    )
    assert backend.requests == [
        GenerateRequest(
            token_ids=(1, 2, 3),
            max_new_tokens=4,
            temperature=0.5,
            top_p=0.25,
            seed=7,
            ignore_eos=True,
            top_k=9,
            min_p=0.125,
            repetition_penalty=1.25,
            presence_penalty=-1.0,
            frequency_penalty=1.5,
            stop=("a", "b"),
            stop_token_ids=(5, 6),
            logprobs=2,
        )
    ]


async def test_fields_that_ask_for_nothing_are_taken(client: openai.AsyncOpenAI, backend: TellingBackend) -> None:
    nothing: dict[str, Any] = dict.fromkeys(("n", "seed", "stop", "logprobs", "stream", "stream_options", "max_tokens"))
    extra = {**nothing, "logit_bias": {}, "best_of": 1, "suffix": "", "top_k": -1, "response_format": {"type": "text"}}
    await client.completions.create(model=MODEL, prompt=[1], stop="end", extra_body=extra | {"stop": "end"})
    assert backend.requests == [GenerateRequest(token_ids=(1,), max_new_tokens=16, temperature=1.0, stop=("end",))]


@pytest.mark.parametrize(
    ("prompt", "num_tokens"), [("ab", [2]), (["a", "bcd"], [1, 3]), ([1, 2], [2]), ([[1], [2, 3, 4]], [1, 3])]
)
async def test_prompts_come_in_four_forms(
    client: openai.AsyncOpenAI, backend: TellingBackend, prompt: Any, num_tokens: list[int]
) -> None:
    done = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    assert [len(request.token_ids or ()) for request in backend.requests] == num_tokens
    assert [choice.index for choice in done.choices] == list(range(len(num_tokens)))
    assert done.usage is not None
    assert done.usage.prompt_tokens == sum(num_tokens)


async def test_a_large_request_is_read_apart_from_the_loop(client: openai.AsyncOpenAI, backend: TellingBackend) -> None:
    done = await client.completions.create(model=MODEL, prompt=[1, 2], max_tokens=1, user="x" * INLINE_BYTES)
    assert done.choices[0].text == "0 "
    with pytest.raises(openai.BadRequestError, match=r"prompt\[0\] is 100"):
        await client.completions.create(model=MODEL, prompt=[100], user="x" * INLINE_BYTES)
    assert len(backend.requests) == 1


async def test_several_answers_have_successive_seeds_and_their_prompts_count_once(
    client: openai.AsyncOpenAI, backend: TellingBackend
) -> None:
    backend.num_cached = [2, 1, 0, 3]  # of one prompt, then of the other
    done = await client.completions.create(model=MODEL, prompt=[[1, 2, 3], [4, 5, 6, 7]], n=2, seed=-1, max_tokens=3)
    assert sorted(choice.index for choice in done.choices) == [0, 1, 2, 3]
    asked = [(request.token_ids, request.seed) for request in backend.requests]
    assert asked == [((1, 2, 3), 2**64 - 1), ((1, 2, 3), 0), ((4, 5, 6, 7), 2**64 - 1), ((4, 5, 6, 7), 0)]
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (7, 12)
    assert done.usage.prompt_tokens_details is not None
    assert done.usage.prompt_tokens_details.cached_tokens == 1


async def test_several_answers_are_generated_at_the_same_time(
    client: openai.AsyncOpenAI, backend: TellingBackend
) -> None:
    backend.hold_after = 1
    asking = asyncio.create_task(client.completions.create(model=MODEL, prompt="a", n=2))
    await backend.both_open.wait()
    backend.released.set()
    assert len((await asking).choices) == 2


async def test_echo_begins_with_the_prompt(client: openai.AsyncOpenAI) -> None:
    done = await client.completions.create(model=MODEL, prompt=["hello ", "bye "], echo=True, max_tokens=2)
    assert [choice.text for choice in done.choices] == ["hello 0 1 ", "bye 0 1 "]
    pieces = await client.completions.create(model=MODEL, prompt="hello ", echo=True, max_tokens=2, stream=True)
    assert [piece.choices[0].text async for piece in pieces] == ["hello ", "0 ", "1 "]


async def test_logprobs_tell_tokens_alternatives_and_where_they_begin(client: openai.AsyncOpenAI) -> None:
    done = await client.completions.create(model=MODEL, prompt="a", max_tokens=3, logprobs=2)
    told = done.choices[0].logprobs
    assert told is not None
    assert told.tokens == ["<0>", "<1>", "<2>"]
    assert told.token_logprobs == [-0.5] * 3
    assert told.text_offset == [0, 2, 4]
    assert told.top_logprobs is not None
    assert told.top_logprobs[1] == {"<50>": 0.0, "<51>": -9999.0, "<1>": -0.5}
    pieces = await client.completions.create(model=MODEL, prompt="a", max_tokens=3, logprobs=0, stream=True)
    streamed = [piece.choices[0].logprobs async for piece in pieces]
    assert [one and (one.tokens, one.text_offset) for one in streamed] == [
        (["<0>"], [0]),
        (["<1>"], [2]),
        (["<2>"], [4]),
    ]


async def test_a_stream_tells_piece_by_piece_and_the_usage_last(client: openai.AsyncOpenAI) -> None:
    pieces = await client.completions.create(
        model=MODEL, prompt=["a", "bc"], max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    texts, reasons, usages = ["", ""], [], []
    async for piece in pieces:
        for choice in piece.choices:
            texts[choice.index] += choice.text
            reasons.append(choice.finish_reason)
        usages.append(piece.usage)
    assert texts == ["0 1 2 ", "0 1 2 "]
    assert reasons.count("length") == 2
    assert usages[:-1] == [None] * 6
    assert usages[-1] is not None
    assert (usages[-1].prompt_tokens, usages[-1].completion_tokens) == (3, 6)


async def test_the_synchronous_client_works_too(address: str) -> None:
    def ask() -> tuple[str, str, list[str]]:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            whole = client.completions.create(model=MODEL, prompt="a", max_tokens=2)
            pieces = client.completions.create(model=MODEL, prompt="a", max_tokens=2, stream=True)
            names = [model.id for model in client.models.list()]
            return whole.choices[0].text, "".join(piece.choices[0].text for piece in pieces), names

    assert await asyncio.to_thread(ask) == ("0 1 ", "0 1 ", [MODEL])


async def test_answers_tell_the_versions_of_the_weights(client: openai.AsyncOpenAI, backend: TellingBackend) -> None:
    backend.weights = [2, 3, 2, 4, 5]
    done = await client.completions.create(model=MODEL, prompt="hello", n=2)
    assert done.system_fingerprint == "weights-2+3"
    chat = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}])
    assert chat.system_fingerprint == "weights-2"
    pieces = [p async for p in await client.completions.create(model=MODEL, prompt="hello", stream=True)]
    assert {piece.system_fingerprint for piece in pieces} == {"weights-4"}
    chunks = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], stream=True
    )
    assert {chunk.system_fingerprint async for chunk in chunks} == {"weights-5"}
