"""What the actors that train make of the user's settings."""

from __future__ import annotations

import pytest

from ray_moe.actors.training import step_settings
from ray_moe.config_train import TrainConfig


@pytest.mark.parametrize(("given", "first_small"), [({}, 21), ({"compression_warmup_steps": 7}, 8)])
def test_gradients_are_compressed_after_a_fifth_of_the_steps_or_as_many_as_one_says(
    given: dict[str, int], first_small: int
) -> None:
    config = TrainConfig.model_validate({"steps": 100, "gradient_compression": "1bit", **given})
    settings = step_settings(config)
    assert [settings.compression(step) for step in (1, first_small - 1, first_small)] == ["none", "none", "1bit"]


def test_gradients_travel_whole_unless_one_says_otherwise() -> None:
    settings = step_settings(TrainConfig(steps=100))
    assert {settings.compression(step) for step in range(1, 101)} == {"none"}
