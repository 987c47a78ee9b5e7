"""Every expert behind an actor, through real Ray and real gRPC, against `transformers` in this process.

That nothing is computed locally instead is held by counting: the hosts report every (token, expert) row that the gates
chose, and the router holds no more bytes than the model has outside its routed experts.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from ray_moe.client.sync import Client
from tests.ray.support import PROMPT, await_status, greedy, has_actors, serving
from tests.tiny_models import TINY, save

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
NUM_TOKENS = 64


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, save(request.param, folder), folder


@pytest.fixture(scope="module")
def client(family):
    with (
        serving(family[2], experts={"num_actors": 1}, dispatch={"hedge": False}) as service,  # rows are counted
        Client(service.address) as client,
    ):
        yield client


@pytest.fixture(params=[1, 2], ids=lambda count: f"{count}-actors")
def served(request, family, client):
    """The same service with one actor and with two, and what it had done before."""
    name, reference, _ = family
    if len(client.status().hosts) != request.param:
        client.resize(request.param)
    await_status(client, has_actors(request.param), what=f"{request.param} actors")
    held = sum(
        len(hosts) * sum(p.nbytes for p in reference.get_submodule(path).parameters()) // len(experts)
        for path, experts in client.placement().placement.hosts_of.items()
        for hosts in experts
    )
    before = await_status(
        client, lambda status: sum(host.loaded_bytes for host in status.hosts) == held, what="only that is held"
    )
    assert all(host.loaded_bytes for host in before.hosts)
    return name, reference, client, before


def _top_k(name: str) -> int:
    count: int = TINY[name]["num_experts_per_tok"]
    return count


def _random_routing(rng: np.random.Generator, num_tokens: int, num_experts: int, top_k: int) -> Any:
    index = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)])
    return index, rng.random((num_tokens, top_k), dtype=np.float32)


def test_tokens_and_layers_equal_transformers(served):
    name, reference, client, before = served
    (expected,) = greedy(reference, [PROMPT], NUM_TOKENS)
    given = client.generate(token_ids=PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True)
    assert given.token_ids == expected
    assert (given.finish_reason, given.num_prompt_tokens) == ("length", len(PROMPT))

    status = client.status()
    num_rows = (len(PROMPT) + NUM_TOKENS - 1) * _top_k(name)  # the last token is not fed back
    for path, counts in status.tokens_per_expert.items():
        assert sum(counts) - sum(before.tokens_per_expert[path]) == num_rows
    computed = sum(host.num_rows for host in status.hosts) - sum(host.num_rows for host in before.hosts)
    assert computed == num_rows * len(status.tokens_per_expert)
    assert os.getpid() not in {status.router.pid, *(host.pid for host in status.hosts)}
    experts = {p for path in status.tokens_per_expert for p in reference.get_submodule(path).parameters()}
    everything = [*reference.parameters(), *reference.buffers()]
    assert status.router.backbone_bytes == sum(p.nbytes for p in everything if p not in experts)

    rng = np.random.default_rng(0)
    for path, counts in status.tokens_per_expert.items():
        hidden = rng.standard_normal((33, 32), dtype=np.float32)
        index, weight = _random_routing(rng, len(hidden), len(counts), _top_k(name))
        block = reference.get_submodule(path.rpartition(".")[0])
        with torch.inference_mode():
            rows = reference.get_submodule(path)(*map(torch.from_numpy, (hidden, index, weight)))
            whole = block(torch.from_numpy(hidden)[None])
        whole = whole[0] if isinstance(whole, tuple) else whole
        np.testing.assert_allclose(client.forward(path, hidden, index, weight), rows, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(client.forward(path, hidden), whole.reshape(len(hidden), -1), rtol=1e-5, atol=1e-5)


def test_a_bfloat16_layer_is_bit_equal(serve, tmp_path):
    reference = save("mixtral", tmp_path, torch.bfloat16)
    service = serve(tmp_path, experts={"num_actors": 2})
    rng = np.random.default_rng(1)
    with Client(service.address) as client:
        for path, counts in client.status().tokens_per_expert.items():
            hidden = torch.from_numpy(rng.standard_normal((50, 32), dtype=np.float32)).bfloat16()
            index, weight = _random_routing(rng, len(hidden), len(counts), 2)
            with torch.inference_mode():
                rows = reference.get_submodule(path)(hidden, torch.from_numpy(index), torch.from_numpy(weight))
            assert rows.dtype is torch.bfloat16
            given = client.forward(path, hidden.float().numpy(), index, weight)
            assert given.dtype == np.float32
            np.testing.assert_array_equal(given, rows.float().numpy())
