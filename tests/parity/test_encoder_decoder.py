"""Switch Transformers in an engine, its experts on hosts, against `transformers` generating for one after the other.

Capacity is 1 in some cases: then most tokens of a prompt are dropped, and which ones depends on whose they are.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from ray_moe.runtime.engine import EngineLimits
from ray_moe.runtime.settings import DispatchSettings
from ray_moe.types import GenerateRequest
from tests.parity.test_batching import generated, requests
from tests.parity.test_engine import Cluster
from tests.tiny_encoder_decoder import save


def expected(model: Any, wanted: list[GenerateRequest]) -> list[list[int]]:
    return [alone(model, request).sequences[0, 1:].tolist() for request in wanted]


def alone(model: Any, request: GenerateRequest, **settings: Any) -> Any:
    return model.generate(
        torch.tensor([request.token_ids]),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        eos_token_id=[],
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("capacity", [64, 1])
async def test_what_is_computed_together_is_what_is_computed_alone(tmp_path: Path, capacity: int, tied: bool) -> None:
    torch.set_num_threads(1)
    model = save(tmp_path, capacity, tie_word_embeddings=tied)
    cluster = Cluster(tmp_path, 2, limits=EngineLimits(max_step_tokens=60, max_concurrent_requests=8))
    wanted = requests(16, 40)
    assert await generated(cluster.engine, wanted) == expected(model, wanted)
    cluster.close()


async def test_experts_may_be_in_parts(tmp_path: Path) -> None:
    model = save(tmp_path, tie_word_embeddings=False)
    cluster = Cluster(tmp_path, 3, DispatchSettings(num_parts=2))
    wanted = requests(8, 40)
    assert await generated(cluster.engine, wanted) == expected(model, wanted)
    cluster.close()


async def test_half_precision_is_as_near_as_it_can_be(tmp_path: Path) -> None:
    save(tmp_path, dtype="bfloat16")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    cluster = Cluster(tmp_path, 2)
    assert model.dtype is cluster.model.dtype is torch.bfloat16
    for wanted in requests(8, 40):
        request = replace(wanted, max_new_tokens=1, logprobs=1)
        (chunk,) = [chunk async for chunk in cluster.engine.generate(request)]
        theirs = alone(model, request).logits[0][0].float().log_softmax(-1)
        assert chunk.logprobs[0].logprob == pytest.approx(theirs[chunk.token_ids[0]].item(), abs=0.05)
        assert theirs.max() - theirs[chunk.token_ids[0]] < 0.05
    cluster.close()


async def test_log_probabilities_are_those_of_transformers_far_beyond_the_nearest_positions(tmp_path: Path) -> None:
    model = save(tmp_path, relative_attention_num_buckets=8, relative_attention_max_distance=24)
    cluster = Cluster(tmp_path, 2)
    request = GenerateRequest(token_ids=tuple(range(3, 63)), max_new_tokens=60, ignore_eos=True, logprobs=2)
    logits = torch.stack(alone(model, request).logits)[:, 0]
    told = [chunk.logprobs[0] async for chunk in cluster.engine.generate(request)]
    theirs = logits.log_softmax(-1).topk(2)
    torch.testing.assert_close(torch.tensor([[t.logprob for t in each.top] for each in told]), theirs.values)
    assert [[t.token_id for t in each.top] for each in told] == theirs.indices.tolist()
    cluster.close()


async def test_a_repetition_penalty_counts_what_the_decoder_has_and_not_the_prompt(tmp_path: Path) -> None:
    model = save(tmp_path, tie_word_embeddings=False)
    cluster = Cluster(tmp_path, 2)
    request = GenerateRequest(token_ids=tuple(range(3, 90)), max_new_tokens=24, ignore_eos=True, repetition_penalty=1.8)
    theirs = alone(model, request, repetition_penalty=1.8).sequences[0, 1:].tolist()
    assert await generated(cluster.engine, [request]) == [theirs] != expected(model, [request])
    cluster.close()


@pytest.mark.parametrize("max_step_tokens", [50, 512])
async def test_sequences_that_lose_their_room_go_on_where_they_were(tmp_path: Path, max_step_tokens: int) -> None:
    """Their prompts are read again, and what was generated is computed again, at once or in chunks."""
    model = save(tmp_path, capacity=1, tie_word_embeddings=False)
    limits = EngineLimits(kv_cache_bytes=2**18, max_step_tokens=max_step_tokens)  # of 512 bytes a token
    cluster = Cluster(tmp_path, 2, limits=limits)
    put_back, lost = cluster.engine._scheduler.put_back, list[int]()
    cluster.engine._scheduler.put_back = lambda one: (lost.append(one.num_generated), put_back(one))  # type: ignore
    rng = random.Random(2)
    wanted = [
        GenerateRequest(token_ids=tuple(rng.randrange(3, 90) for _ in range(40)), max_new_tokens=120, ignore_eos=True)
        for _ in range(6)
    ]
    assert await generated(cluster.engine, wanted) == expected(model, wanted)
    assert max(lost) > 50
    cluster.close()
