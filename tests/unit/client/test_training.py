"""Training through both clients, a real front door, and no trainer behind it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from ray_moe.errors import InvalidRequest, StepRefused, Unavailable
from ray_moe.service.metering import MeteredBackend
from ray_moe.types import GenerateRequest, SavedState, StepOptions, VersionStatus
from tests.unit.client.conftest import Connect
from tests.unit.service.fake_backend import FakeBackend, front_door
from tests.unit.service.fake_training import LOADS, RESULT, STATE

IDS = np.array([[5, 6, 7], [8, 9, 5]])


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def asked(backend: FakeBackend) -> list[tuple[Any, ...]]:
    return backend.training.asked


@pytest.fixture
async def training(backend: FakeBackend, connect: Connect) -> AsyncIterator[Any]:
    metered: Any = MeteredBackend(backend)
    async with front_door(metered) as target:
        yield connect(target, timeout_s=20.0, max_attempts=4).training


async def test_a_micro_batch_arrives_as_it_was_given(training: Any, asked: list[tuple[Any, ...]]) -> None:
    labels = np.where(IDS == 5, -100, IDS).astype(np.int32)
    report = await training.forward_backward({"input_ids": IDS.tolist(), "labels": labels}, weight=0.5, micro_id="a.1")
    ((_, micro),) = asked
    assert (micro.micro_id, micro.weight, micro.input_ids.dtype, micro.labels.dtype) == ("a.1", 0.5, np.int64, np.int64)
    np.testing.assert_array_equal(micro.input_ids, IDS)
    np.testing.assert_array_equal(micro.labels, labels)
    assert (report.micro_id, report.step, report.loss, report.num_tokens) == ("a.1", 8, 2.25, 6)
    assert report.tokens_per_expert == LOADS
    assert report.balancedness == dict(zip(LOADS, (pytest.approx(4 / 9), 1.0), strict=True))


async def test_labels_and_ids_need_not_be_given(training: Any, asked: list[tuple[Any, ...]]) -> None:
    for _ in range(2):
        await training.forward_backward({"input_ids": IDS})
    (_, one), (_, two) = asked
    np.testing.assert_array_equal(one.labels, IDS)
    assert one.weight == 1.0
    assert one.micro_id != two.micro_id


async def test_steps_are_made_as_they_are_asked_for(training: Any, asked: list[tuple[Any, ...]]) -> None:
    assert await training.optim_step(step=7, lr=0.0, clip_norm=math.inf, op_id="x") == RESULT
    assert asked.pop() == ("optim_step", StepOptions("x", 7, 0.0, math.inf))
    assert await training.train_step([{"input_ids": IDS}, {"input_ids": IDS + 1}], lr=0.1) == RESULT
    _, micros, options = asked.pop()
    assert (len({micro.micro_id for micro in micros}), options.lr, options.step, options.clip_norm) == (
        2,
        0.1,
        None,
        None,
    )
    assert await training.train_step({"input_ids": IDS}) == RESULT
    assert await training.discard(["a", "b"]) == ("a",)
    assert await training.discard() == ()
    assert asked[-2:] == [("discard", ("a", "b")), ("discard", ())]


async def test_what_was_learned_is_looked_at_kept_and_published(training: Any, asked: list[tuple[Any, ...]]) -> None:
    generation = await training.sample(token_ids=[5, 6], max_new_tokens=2, temperature=0.5, seed=3)
    assert (generation.token_ids, generation.finish_reason) == ((4, 2), "length")
    request = GenerateRequest(token_ids=(5, 6), max_new_tokens=2, temperature=0.5, seed=3)
    assert asked.pop() == ("sample", request)
    await training.sample("ab", max_new_tokens=2)
    assert asked.pop()[1].token_ids == (1 + ord("a") % 90, 1 + ord("b") % 90)
    assert await training.save_state() == SavedState(7, "/saved/step-00000007")
    assert await training.load_state() == SavedState(5, "/saved/step-00000005")
    assert await training.load_state(5) == SavedState(5, "/saved/step-00000005")
    assert await training.state() == STATE
    assert await training.publish() == VersionStatus(3, "/saved/published", "current")
    assert asked == [("save_state",), ("load_state", None), ("load_state", 5), ("state",), ("publish",)]


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"input_ids": [[1.5, 2.0]]}, "input_ids has dtype float64"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids is not an array"),
        ({"input_ids": np.ones((1, 2), np.uint64)}, "input_ids has dtype uint64"),
        ({"labels": [[1, 2]]}, r"the batch is \['labels'\]; expected input_ids"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, "attention_mask"),
        ([[1, 2]], "the batch is list"),
        ({"input_ids": np.ones((1, 51), np.int64)}, "the sequences have 51 tokens; the model has 50 positions"),
        ({"input_ids": [[1, 200]]}, r"input_ids\[0, 1\] is 200"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2, 3]]}, r"labels has shape \[1, 3\]"),
    ],
)
async def test_bad_batches_are_told_what_is_wrong(
    training: Any, asked: list[tuple[Any, ...]], batch: Any, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        await training.forward_backward(batch)
    with pytest.raises(InvalidRequest, match=says):
        await training.train_step([batch])
    assert not asked


async def test_bad_options_are_told_what_is_wrong(training: Any, asked: list[tuple[Any, ...]]) -> None:
    for options, says in (
        ({"step": "x"}, "is no number"),
        ({"lr": "x"}, "is no number"),
        ({"op_id": "a b"}, "id is 'a b'"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            await training.optim_step(**options)
    for call in (
        training.discard([1]),
        training.load_state("x"),
        training.forward_backward({"input_ids": IDS}, weight="x"),
    ):
        with pytest.raises(InvalidRequest):
            await call
    assert not asked


async def test_a_call_that_is_made_again_has_the_same_id(
    training: Any, backend: FakeBackend, asked: list[tuple[Any, ...]]
) -> None:
    backend.training.failure = Unavailable("the trainer does not answer")
    for call in (training.forward_backward({"input_ids": IDS}), training.optim_step()):
        with pytest.raises(Unavailable, match="the trainer does not answer"):
            await call
    micros, steps = asked[:4], asked[4:]
    assert len(steps) == 4
    assert len({micro.micro_id for _, micro in micros}) == len({options.op_id for _, options in steps}) == 1
    asked.clear()
    with pytest.raises(Unavailable):
        await training.publish()
    assert len(asked) == 1


async def test_a_refused_step_arrives_as_one(training: Any, backend: FakeBackend) -> None:
    backend.training.failure = StepRefused("the gradient of expert 3 is not finite")
    with pytest.raises(StepRefused, match="expert 3"):
        await training.optim_step()
