"""The dense and the MoE model of a comparison: their sizes, and what is made of the times."""

from __future__ import annotations

import pytest
import torch

from ray_moe.errors import InvalidConfig
from ray_moe.models.compare import CompareSettings, Comparison, Measured, compare, expert_sizes

TINY = CompareSettings(hidden_size=32, num_layers=1, dense_width=512, batch=2, window=16, steps=2, new_tokens=3)


def test_sizes_are_those_that_were_asked_for() -> None:
    for settings in (CompareSettings(), CompareSettings(active=0.3, total=8.0, top_k=4, num_layers=2)):
        width, number = expert_sizes(settings)
        per_layer = settings.hidden_size * settings.hidden_size * 4
        rest = settings.num_layers * per_layer + 2 * 257 * settings.hidden_size  # and both ends
        ffn = settings.num_layers * 3 * settings.hidden_size
        dense = rest + ffn * settings.dense_width
        assert (rest + ffn * width * settings.top_k) / dense == pytest.approx(settings.active, rel=0.05)
        assert (rest + ffn * width * number) / dense == pytest.approx(settings.total, rel=0.05)


def test_sizes_that_no_experts_have() -> None:
    with pytest.raises(InvalidConfig, match=r"active is 0.1, but .* are no networks"):
        expert_sizes(CompareSettings(active=0.1))
    with pytest.raises(InvalidConfig, match=r"total is 0.2, less than"):
        expert_sizes(CompareSettings(total=0.2))


def test_both_models_are_trained_on_the_same_and_asked() -> None:
    torch.set_num_threads(1)
    told: list[tuple[int, int]] = []
    made = compare(TINY, lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert made.moe.active / made.dense.active == pytest.approx(0.54, abs=0.05)
    assert made.moe.total / made.dense.total == pytest.approx(4.3, abs=0.2)
    for each in (made.dense, made.moe):
        assert 0 < each.token_s < 5
        assert 0 < each.step_s < 5
        assert len(each.losses) == 2
        assert 3 < each.losses[0] < 7  # near the logarithm of 257, which is 5.5
    assert compare(TINY).moe.losses == made.moe.losses


def test_ratios_and_losses_after_the_same_time() -> None:
    dense = Measured("dense", 100, 100, 2.0, 0.4, (5.0, 4.0, 3.0, 2.0))
    moe = Measured("moe", 430, 54, 1.0, 0.1, (5.0, 4.5, 3.5, 2.5))
    made = Comparison(dense, moe)
    assert (made.speedup, made.latency) == (2.0, 0.25)
    assert made.losses_after_the_same_time() == (4.0, 2.5)  # two steps of one, four of the other
