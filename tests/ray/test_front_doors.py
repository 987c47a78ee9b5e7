"""Clients that others wrote, against one running service: the `openai` and `tritonclient` packages, and plain HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tritonclient.grpc as triton

from ray_moe.client.sync import Client
from tests.ray.support import serving
from tests.tiny_models import save, save_tokenizer

PROMPT = "def f(x):"
NUM_TOKENS = 24
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save("qwen3_moe", folder, vocab_size=259)
    save_tokenizer(folder, chat_template=TEMPLATE)
    with serving(folder, server={"http_port": 0}, model_name="tiny") as running:
        yield running


@pytest.fixture(scope="module")
def expected(service):
    """What our own client gets."""
    with Client(service.address) as client:
        return client.generate(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True)


def options():
    return {"model": "tiny", "max_tokens": NUM_TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}


def test_the_openai_client_completes(service, expected):
    with openai.OpenAI(base_url=f"{service.http_address}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        answer = client.completions.create(prompt=PROMPT, **options())
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected.text, "length")
        assert answer.usage.completion_tokens == NUM_TOKENS
        pieces = list(client.completions.create(prompt=PROMPT, stream=True, **options()))
        assert "".join(piece.choices[0].text for piece in pieces) == expected.text
        with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist"):
            client.completions.create(model="other", prompt=PROMPT)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model="tiny", prompt=PROMPT, temperature=-1)


async def test_the_asynchronous_openai_client_chats_with_many_at_once(service):
    async with openai.AsyncOpenAI(base_url=f"{service.http_address}/v1", api_key="none") as client:

        async def talk(number: int) -> tuple[Any, str]:
            messages: Any = [{"role": "user", "content": f"say {number}"}]
            whole = await client.chat.completions.create(messages=messages, **options())
            stream: Any = await client.chat.completions.create(messages=messages, stream=True, **options())
            pieces = [piece.choices[0].delta.content or "" async for piece in stream if piece.choices]
            return whole.choices[0].message.content, "".join(pieces)

        answers = await asyncio.gather(*(talk(number) for number in range(8)))
    assert all(whole == streamed and whole for whole, streamed in answers)
    with Client(service.address) as ours:
        prompt = "<user>say 3\n<assistant>"
        assert ours.generate(prompt, max_new_tokens=NUM_TOKENS, ignore_eos=True).text == answers[3][0]


def test_tritonclient_generates_and_runs_a_layer(service, expected):
    with triton.InferenceServerClient(service.address) as client, Client(service.address) as ours:
        assert client.is_server_ready() and client.is_model_ready("tiny")
        text = triton.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([PROMPT.encode()], dtype=object))
        answer = client.infer("tiny", [text], parameters={"max_tokens": NUM_TOKENS, "ignore_eos": True})
        assert answer.as_numpy("token_ids").tolist() == list(expected.token_ids)
        assert answer.as_numpy("text_output")[0].decode() == expected.text
        layer = next(iter(ours.placement().placement.hosts_of))
        tokens = np.random.default_rng(0).standard_normal((5, 32), dtype=np.float32)
        hidden = triton.InferInput("hidden", [5, 32], "FP32")
        hidden.set_data_from_numpy(tokens)
        through = client.infer(f"tiny/{layer}", [hidden]).as_numpy("hidden")
        np.testing.assert_allclose(through, ours.forward(layer, tokens), rtol=1e-5, atol=1e-6)


def test_the_interface_is_described(service):
    assert httpx.get(f"{service.http_address}/health").status_code == 200
    paths = httpx.get(f"{service.http_address}/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions"} <= set(paths)
