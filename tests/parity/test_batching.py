"""Many requests computed together, against `transformers` generating for one after the other.

Prompts of mixed lengths come and go while others run; the tokens of each must be those that it gets alone, in float32.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch

from ray_moe.runtime.engine import Engine, EngineLimits
from ray_moe.types import GenerateRequest
from tests.parity.test_engine import Cluster
from tests.tiny_models import TINY, save

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 32,
}
SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "a window shorter than the sequences": ("mixtral", {"sliding_window": 7}),
    "full and windowed layers, and sinks": ("gpt_oss", {"sliding_window": 7}),
    "keys and values shared between layers": (
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "sliding_window": 7,
        },
    ),
    "rope that grows": ("qwen3_moe", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
    "rope that switches": ("qwen3_moe", {"rope_parameters": LONGROPE, "max_position_embeddings": 128}),
}


def requests(number: int, longest: int, vocab_size: int = 90) -> list[GenerateRequest]:
    rng = random.Random(0)
    beginning = [rng.randrange(3, vocab_size) for _ in range(20)]
    made = []
    for which in range(number):
        own = [rng.randrange(3, vocab_size) for _ in range(rng.randint(1, longest))]
        tokens = (*beginning, *own) if which % 3 == 0 else tuple(own)
        made.append(GenerateRequest(token_ids=tokens, max_new_tokens=rng.randint(1, 24), ignore_eos=True))
    return made


def expected(model, wanted: list[GenerateRequest]) -> list[list[int]]:
    return [
        model.generate(
            torch.tensor([request.token_ids]),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=[],
            pad_token_id=0,
        )[0, len(request.token_ids or ()) :].tolist()
        for request in wanted
    ]


async def generated(engine: Engine, wanted: list[GenerateRequest]) -> list[list[int]]:
    rng = random.Random(1)

    async def one(request: GenerateRequest) -> list[int]:
        await asyncio.sleep(rng.random() * 0.3)
        return [token async for chunk in engine.generate(request) for token in chunk.token_ids]

    return await asyncio.gather(*(one(request) for request in wanted))


def open_cluster(tmp_path, name: str, limits: EngineLimits, **config) -> tuple[torch.nn.Module, Cluster]:
    model = save(name, tmp_path, **config)
    return model, Cluster(tmp_path, 2, limits=limits)


@pytest.mark.parametrize("name", sorted(TINY))
async def test_every_family_computes_together_what_it_computes_alone(tmp_path, name):
    torch.set_num_threads(1)
    model, wanted = save(name, tmp_path), requests(12, 60)
    alone = expected(model, wanted)
    for overlap_min_tokens in (None, 2):
        limits = EngineLimits(max_step_tokens=24, max_concurrent_requests=8, overlap_min_tokens=overlap_min_tokens)
        cluster = Cluster(tmp_path, 2, limits=limits)
        assert await generated(cluster.engine, wanted) == alone
        cluster.close()


@pytest.mark.parametrize("case", sorted(SPECIAL))
async def test_what_depends_on_the_length_of_a_sequence_depends_on_its_own(tmp_path, case):
    name, config = SPECIAL[case]
    model, cluster = open_cluster(tmp_path, name, EngineLimits(max_step_tokens=24), **config)
    wanted = requests(16, 40)
    assert await generated(cluster.engine, wanted) == expected(model, wanted)
    cluster.close()


async def test_sixty_four_streams_at_once(tmp_path):
    model, cluster = open_cluster(tmp_path, "mixtral", EngineLimits())
    wanted = requests(64, 60)
    assert await generated(cluster.engine, wanted) == expected(model, wanted)
    cluster.close()


async def test_sequences_that_lose_their_room_go_on_where_they_were(tmp_path):
    limits = EngineLimits(kv_cache_bytes=2**17)
    model, cluster = open_cluster(tmp_path, "mixtral", limits)
    rng = random.Random(2)
    wanted = [
        GenerateRequest(token_ids=tuple(rng.randrange(3, 90) for _ in range(60)), max_new_tokens=60, ignore_eos=True)
        for _ in range(12)
    ]
    assert await generated(cluster.engine, wanted) == expected(model, wanted)
    cluster.close()


async def test_a_beginning_is_computed_once(tmp_path):
    model, cluster = open_cluster(tmp_path, "mixtral", EngineLimits())
    beginning = tuple(range(10, 50))
    wanted = [
        GenerateRequest(token_ids=(*beginning, *tail), max_new_tokens=8, ignore_eos=True)
        for tail in ((3,), (4, 5, 6), (7,))
    ]
    for request, tokens, num_cached in zip(wanted, expected(model, wanted), (0, 40, 40), strict=True):
        chunks = [chunk async for chunk in cluster.engine.generate(request)]
        assert {chunk.num_cached_tokens for chunk in chunks} == {num_cached}
        assert [token for chunk in chunks for token in chunk.token_ids] == tokens
    cluster.close()
