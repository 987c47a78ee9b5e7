"""Sequences in several threads do not change each other's rotary frequencies."""

import threading

import pytest
import torch

from ray_moe.models.rope import ThreadLocalRope
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


def embed(model, length):
    hidden = torch.zeros(1, length, 32)
    with torch.no_grad():
        return model.model.rotary_emb(hidden, torch.arange(length)[None])[0]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_threads_do_not_disturb_each_other(kind):
    def fresh():
        return build("qwen3_moe", rope_parameters=KINDS[kind], max_position_embeddings=64)

    lengths = (8, 200)
    expected = {length: embed(fresh(), length) for length in lengths}
    assert not torch.equal(expected[8], expected[200][:, :8])  # the kind does change with the length
    model = fresh()
    rope = ThreadLocalRope(model)
    wrong = []

    def run(length):
        for _ in range(150):
            rope.forget()
            if not torch.equal(embed(model, length), expected[length]):
                wrong.append(length)

    threads = [threading.Thread(target=run, args=(length,)) for length in lengths * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_other_kinds_are_left_alone():
    model = build("qwen3_moe")
    ThreadLocalRope(model)
    assert "forward" not in model.model.rotary_emb.__dict__
