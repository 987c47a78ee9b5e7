"""The models of a comparison: their sizes, what is made of the times, and what their experts compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ray_moe.errors import InvalidConfig
from ray_moe.models.compare import CompareSettings, Comparison, Measured, Spread, compare, expert_sizes

TINY = CompareSettings(
    hidden_size=32, num_layers=1, dense_width=512, batch=2, window=16, steps=2, answers=2, prompt=8, new_tokens=3
)


@pytest.mark.parametrize(
    ("settings", "layers", "hidden"),
    [
        (CompareSettings(), 4, 512),  # as 32 layers of 4096 are beside 40 of 5120
        (CompareSettings(active=0.3, total=8.0, top_k=4, num_layers=4, dense_width=4096), 3, 512),
        (CompareSettings(shape=1.0, dense_width=8192), 5, 640),
    ],
)
def test_sizes_are_those_that_were_asked_for(settings: CompareSettings, layers: int, hidden: int) -> None:
    def weights(layers: int, hidden: int, width: int) -> int:
        return layers * (4 * hidden**2 + 3 * hidden * width) + 2 * 257 * hidden  # and both ends

    width, number = expert_sizes(settings)
    dense = weights(settings.num_layers, settings.hidden_size, settings.dense_width)
    assert weights(layers, hidden, width * settings.top_k) / dense == pytest.approx(settings.active, rel=0.02)
    assert weights(layers, hidden, width * number) / dense == pytest.approx(settings.total, rel=0.05)


def test_sizes_that_no_experts_have() -> None:
    with pytest.raises(InvalidConfig, match=r"active is 0.1, but what is no networks is"):
        expert_sizes(CompareSettings(hidden_size=256, dense_width=1024, active=0.1))
    with pytest.raises(InvalidConfig, match=r"total is 0.2, less than"):
        expert_sizes(CompareSettings(total=0.2))


def test_all_models_are_trained_on_the_same_and_asked() -> None:
    torch.set_num_threads(1)
    told: list[tuple[str, int, int]] = []
    made = compare(TINY, lambda *turn: told.append(turn))
    assert told == [(what, done, 3) for what in ("training", "asking") for done in (1, 2, 3)]
    assert made.moe.active / made.dense.active == pytest.approx(0.54, abs=0.05)
    assert made.small.total == made.small.active == pytest.approx(made.moe.active, rel=0.05)  # but for the gate
    assert made.moe.total / made.dense.total == pytest.approx(4.3, abs=0.2)
    for each in made.models:
        for taken_s in (each.gradient_s, each.update_s, each.prompt_s, each.token_s):
            assert len(taken_s) == 2
            assert all(0 < turn_s < 5 for turn_s in taken_s)
        assert len(each.losses) == 2
        assert 4 < each.losses[0] < 6  # near the logarithm of 257, which is 5.5
    assert compare(TINY).moe.losses == made.moe.losses


def test_either_half_can_be_left_out() -> None:
    torch.set_num_threads(1)
    asked = compare(replace(TINY, steps=0))
    assert (asked.speedup(asked.moe), asked.moe.losses) == (None, [])
    assert asked.latency(asked.moe) is not None
    trained = compare(replace(TINY, answers=0))
    assert (trained.latency(trained.moe), trained.first_token(trained.moe)) == (None, None)
    assert trained.speedup(trained.moe) is not None


def test_ratios_are_taken_turn_by_turn() -> None:
    dense = Measured("dense", 100, 100, gradient_s=[2.0, 4.0, 3.0], update_s=[1.0, 1.0, 1.0], token_s=[0.4, 0.8])
    moe = Measured("moe", 430, 54, gradient_s=[1.0, 1.0, 1.0], update_s=[1.0, 1.0, 3.0], token_s=[0.1, 0.4])
    made = Comparison(dense, dense, moe)
    assert made.speedup(moe) == Spread(1.5, 1.0, 2.5)
    assert made.speedup(moe, with_update=False) == Spread(3.0, 2.0, 4.0)
    assert made.latency(moe) == Spread(0.375, 0.25, 0.5)
    assert str(made.latency(moe)) == "0.38 (0.25-0.50)"


def test_losses_after_the_same_time() -> None:
    def model(step_s: float, num_steps: int) -> Measured:
        losses = [float(step) for step in range(num_steps)]
        return Measured("", 1, 1, gradient_s=[step_s] * num_steps, update_s=[0.0] * num_steps, losses=losses)

    made = Comparison(model(2.0, 100), model(0.5, 100), model(1.0, 100))
    # When the second has done 100 steps, the others have done 25 and 50; the mean of the 10 before.
    assert made.losses_after_the_same_time() == (19.5, 94.5, 44.5)
    assert Comparison(*(model(1.0, 99) for _ in range(3))).losses_after_the_same_time() is None
