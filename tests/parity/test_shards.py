"""A checkpoint taken apart (backbone, and experts in three interleaved shards) computes what `transformers` computes.

Shape legend: T tokens, D model width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ray_moe.models.experts import experts_modules, install
from ray_moe.models.families import adapt
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.experts import JoinedExperts, StackedExperts
from ray_moe.ops.routed_experts import Handler
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.types import LayerPath
from tests import tiny_models

NUM_SHARDS = 3


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shards_of(checkpoint: Checkpoint) -> list[dict[LayerPath, nn.Module]]:
    """Every expert once; shard s has the experts s, s + 3, s + 6 ... of each layer."""
    return [
        checkpoint.load_experts({p: range(s, spec.num_experts, NUM_SHARDS) for p, spec in checkpoint.layers.items()})
        for s in range(NUM_SHARDS)
    ]


def answer_from(shards: list[dict[LayerPath, nn.Module]]) -> Handler:
    """What a router does: unweighted rows from the shards, weighted and summed in `transformers`' own order."""

    def handler(
        path: LayerPath, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        expert_N = index_TK.flatten()
        rows_ND = hidden_TD.repeat_interleave(index_TK.shape[1], 0)
        out_ND = torch.full_like(rows_ND, torch.nan)
        for number, shard in enumerate(shards):
            mine = (expert_N % NUM_SHARDS == number).nonzero().squeeze(1)
            if len(mine):
                local_N1 = (expert_N[mine] // NUM_SHARDS)[:, None]
                out_ND[mine] = shard[path](rows_ND[mine], local_N1, torch.ones_like(local_N1, dtype=rows_ND.dtype))
        return (out_ND.view(*index_TK.shape, -1) * weight_TK[..., None]).sum(1).to(hidden_TD.dtype)

    return handler


def apart_and_whole(folder: Path) -> tuple[Any, Any]:
    """The model taken apart, and the same from `from_pretrained`."""
    checkpoint = Checkpoint.open(str(folder))
    backbone = checkpoint.load_backbone()
    assert all(not list(experts.parameters()) for experts in experts_modules(backbone).values())
    install(backbone, answer_from(shards_of(checkpoint)))
    return backbone, AutoModelForCausalLM.from_pretrained(folder)


PROMPTS = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("family", tiny_models.TINY)
@torch.no_grad()
def test_fp32_logits_and_greedy_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    tiny_models.save(family, tmp_path)
    apart, whole = apart_and_whole(tmp_path)

    torch.testing.assert_close(apart(PROMPTS).logits, whole(PROMPTS).logits, atol=1e-5, rtol=0)
    greedy = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    assert torch.equal(apart.generate(PROMPTS, **greedy), whole.generate(PROMPTS, **greedy))


@pytest.mark.parametrize("family", tiny_models.TINY)
@torch.no_grad()
def test_bf16_logits_are_bit_equal_under_the_same_formula(family: str, tmp_path: Path) -> None:
    tiny_models.save(family, tmp_path, torch.bfloat16)
    apart, whole = apart_and_whole(tmp_path)
    # Families off the experts interface have a formula of their own: bring the reference onto the interface too.
    adapt(whole)

    assert torch.equal(apart(PROMPTS).logits, whole(PROMPTS).logits)


@pytest.mark.parametrize("family", tiny_models.TINY)
@torch.no_grad()
def test_groups_of_one_layer_answer_together_what_each_would_alone(family: str, tmp_path: Path) -> None:
    tiny_models.save(family, tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    for path, spec in checkpoint.layers.items():
        host, groups = ExpertHost("any"), {}
        for expert in reversed(range(spec.num_experts)):  # one by one, as copies and those of a cache come
            groups[expert] = StackedExperts(checkpoint.load_experts({path: [expert]})[path])
            host.hold(path, [expert], groups[expert])
        experts = list(range(0, spec.num_experts, 2)) or [0]
        counts = [1 + expert % 3 for expert in experts]
        assert JoinedExperts.of({expert: (groups[expert], 0) for expert in experts}) is not None
        rows = torch.randn(sum(counts), spec.hidden_size)
        (reply,) = host.run([ExpertCall(path, 0, rows, None, None, experts, counts)])
        assert isinstance(reply, ExpertReply), reply
        each = [groups[e].run(part, [0], [len(part)]) for e, part in zip(experts, rows.split(counts), strict=True)]
        assert torch.equal(reply.rows, torch.cat(each))
