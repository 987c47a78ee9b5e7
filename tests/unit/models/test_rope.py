"""Sequences that take turns, also in several threads, do not change each other's rotary frequencies."""

import threading
from typing import Any

import pytest
import torch

from ray_moe.models.rope import ChangingRope, has_changing_rope
from tests.tiny_models import build

KINDS = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32,
    },
}
LENGTHS = (8, 200)


def embed(model, length):
    hidden = torch.zeros(1, length, 32)
    with torch.no_grad():
        return model.model.rotary_emb(hidden, torch.arange(length)[None])[0]


def fresh(kind):
    return build("qwen3_moe", rope_parameters=KINDS[kind], max_position_embeddings=64)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_sequences_that_take_turns_do_not_disturb_each_other(kind):
    expected = {length: embed(fresh(kind), length) for length in LENGTHS}
    assert not torch.equal(expected[8], expected[200][:, :8])  # the kind does change with the length
    model = fresh(kind)
    rope = ChangingRope(model)
    wrong = []

    def run():
        sequences: dict[int, dict[str, Any]] = {length: {} for length in LENGTHS}
        for _ in range(50):
            for length, copies in sequences.items():
                with rope.of(copies):
                    if not torch.equal(embed(model, length), expected[length]):
                        wrong.append(length)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.equal(embed(model, 8), expected[8])  # outside of any sequence: as it was loaded


def test_other_kinds_are_left_alone():
    model = build("qwen3_moe")
    ChangingRope(model)
    assert not any(has_changing_rope(module) for module in model.modules())
    assert "forward" not in model.model.rotary_emb.__dict__
