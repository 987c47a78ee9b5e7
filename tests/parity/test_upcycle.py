"""Dense models that have become MoE models, with their experts on hosts: served and trained as any other checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ray_moe.models.merge import MergeSettings, merge
from ray_moe.models.upcycle import UpcycleSettings, upcycle
from tests import tiny_dense
from tests.parity.test_engine import PROMPT, Cluster
from tests.parity.test_training import compare_step

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"num_experts": 8, "parts": 4, "top_k": 4},
    "mistral": {"num_experts": 4, "top_k": 2},
    "qwen2": {"num_experts": 4, "top_k": 1, "layers": "every:2"},
    "qwen3": {"num_experts": 8, "parts": 2, "top_k": 4, "shared": True, "layers": "last:2"},
    "olmo2": {"num_experts": 4, "top_k": 1},
}


@pytest.mark.parametrize("family", SETTINGS)
async def test_hosts_give_the_dense_models_logits_and_greedy_tokens(family: str, tmp_path: Path) -> None:
    dense = tiny_dense.save(family, tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleSettings(**SETTINGS[family]))
    cluster = Cluster(tmp_path / "moe", 3)
    with torch.no_grad():
        expected = dense(torch.tensor([PROMPT])).logits
        tokens = dense.generate(
            torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False, eos_token_id=[], pad_token_id=0
        )[0, len(PROMPT) :].tolist()
    torch.testing.assert_close(cluster.logits(), expected, rtol=1e-5, atol=1e-5)
    assert await cluster.generate(max_new_tokens=16, ignore_eos=True) == tokens
    cluster.close()


async def test_merged_models_are_served(tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny_dense.save("mistral", tmp_path / str(seed), seed=seed)
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "moe", MergeSettings(gate_std=1.0, top_k=1))
    moe = tiny_dense.load(tmp_path / "moe")
    cluster = Cluster(tmp_path / "moe", 2)
    with torch.no_grad():
        torch.testing.assert_close(cluster.logits(), moe(torch.tensor([PROMPT])).logits, rtol=1e-5, atol=1e-5)
    assert all((counts > 0).all() for counts in cluster.dispatcher.tokens_per_expert.values())
    cluster.close()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_training_has_the_loss_and_every_gradient_of_one_process(family: str, tmp_path: Path) -> None:
    tiny_dense.save(family, tmp_path / "dense", tie_word_embeddings=False)
    # Drawn anew in part: of copies that all say the same, the gates have no gradient.
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleSettings(**SETTINGS[family], reinit=0.5, gate_std=0.3))
    compare_step(tiny_dense.load(tmp_path / "moe").double(), 1e-6, (2, 3, 2, False))
