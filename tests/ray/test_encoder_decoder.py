"""Switch Transformers behind a service: every door, both kinds of layers, and an expert actor that dies under it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
import tritonclient.grpc as triton

from ray_moe.client.sync import Client
from ray_moe.errors import InvalidRequest
from tests.ray.support import all_ready, await_status
from tests.tiny_encoder_decoder import LAYERS, save
from tests.tiny_models import save_tokenizer

PROMPT = "translate this"
NUM_TOKENS = 24


def test_an_encoder_decoder_is_served_as_any_other(serve: Any, tmp_path: Path) -> None:
    model = save(tmp_path, vocab_size=259, tie_word_embeddings=False)
    tokenizer = save_tokenizer(tmp_path)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=[])[0, 1:]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    service = serve(tmp_path, server={"http_port": 0}, model_name="tiny", router={"max_step_tokens": 64})
    with Client(service.address) as client:
        asked: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}
        whole = client.generate(PROMPT, **asked)
        assert (whole.token_ids, whole.text) == (tuple(tokens.tolist()), text)
        assert whole.num_prompt_tokens == len(PROMPT)
        assert "".join(chunk.text for chunk in client.stream(PROMPT, **asked)) == text
        with pytest.raises(InvalidRequest, match="the encoder reads a prompt at once"):
            client.generate("x" * 65)
        status = client.status()
        assert status.model_type == "switch_transformers"
        placed = client.placement().placement
        assert {path: len(hosts) for path, hosts in placed.hosts_of.items()} == dict.fromkeys(LAYERS, 5)
        hidden = np.random.default_rng(0).standard_normal((7, 32), dtype=np.float32)
        for layer in LAYERS:
            with torch.no_grad():
                theirs = model.get_submodule(layer.rpartition(".")[0])(torch.from_numpy(hidden)[None])[0]
            np.testing.assert_allclose(client.forward(layer, hidden), theirs, rtol=1e-5, atol=1e-5)
        through_doors(service, text)
        os.kill(status.hosts[0].pid, signal.SIGKILL)
        assert client.generate(PROMPT, **asked).text == text
        await_status(client, all_ready, what="back")


def through_doors(service: Any, text: str) -> None:
    """What others wrote: OpenAI's client, without a chat template, and that of the Open Inference Protocol."""
    options: Any = {"model": "tiny", "max_tokens": NUM_TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with openai.OpenAI(base_url=f"{service.http_address}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(prompt=PROMPT, **options)
        assert (answer.choices[0].text, answer.usage.prompt_tokens) == (text, len(PROMPT))
        pieces = list(client.completions.create(prompt=PROMPT, stream=True, **options))
        assert "".join(piece.choices[0].text for piece in pieces) == text
        with pytest.raises(openai.BadRequestError, match="no chat template; send a prompt to complete"):
            client.chat.completions.create(messages=[{"role": "user", "content": "hello"}], **options)
    with triton.InferenceServerClient(service.address) as client:
        asked = triton.InferInput("text_input", [1], "BYTES")
        asked.set_data_from_numpy(np.array([PROMPT.encode()], dtype=object))
        wishes = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
        result = client.infer("tiny", [asked], parameters=wishes)
        assert result.as_numpy("text_output")[0].decode() == text
