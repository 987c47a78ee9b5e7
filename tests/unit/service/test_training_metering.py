"""Tokens of micro-batches and samples count for whoever brings them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ray_moe.errors import Overloaded
from ray_moe.service.auth import Caller
from ray_moe.service.limits import Limits, Meter
from ray_moe.service.metering import MeteredBackend, calling
from ray_moe.types import GenerateRequest, MicroBatch, StepOptions
from tests.unit.service.fake_backend import FakeBackend

IDS = np.ones((2, 3), np.int64)
MICRO = MicroBatch("a", IDS, IDS)
SIX_TOKENS = {
    "forward_backward": lambda training: training.forward_backward(MICRO),
    "train_step": lambda training: training.train_step([MICRO], StepOptions("a")),
    "sample": lambda training: training.sample(GenerateRequest(token_ids=(1, 2, 3, 4))),
}


@pytest.mark.parametrize("method", SIX_TOKENS)
async def test_tokens_of_training_count(method: str) -> None:
    fake = FakeBackend()
    caller = Caller("ana", frozenset({"train"}), Limits(tokens_per_minute=12), Meter(lambda: 0.0))
    training: Any = MeteredBackend(fake).training
    for call in (SIX_TOKENS[method], lambda training: training.optim_step(StepOptions("a")), SIX_TOKENS[method]):
        with calling(caller):
            await call(training)
    with pytest.raises(Overloaded, match="12 tokens a minute"), calling(caller):
        await SIX_TOKENS[method](training)
    assert [asked[0] for asked in fake.training.asked] == [method, "optim_step", method]
