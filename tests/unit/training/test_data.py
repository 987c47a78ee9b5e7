"""Batches: the same however often they are asked for, every window once an epoch, and nothing a model cannot take."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.training.data import IGNORED, BatchRequest, WindowData, check_batch, open_data

REQUEST = BatchRequest(step=0, batch_size=2, window=8)


def row_of(num_tokens: int) -> WindowData:
    """Tokens that are their own positions, so that a window tells where it is from."""
    return WindowData({"train": np.arange(num_tokens, dtype=np.int32), "validation": np.arange(50, dtype=np.int32)})


def first_tokens(data: WindowData, request: BatchRequest, num_steps: int) -> list[int]:
    batches = [data.batch(replace(request, step=step))["input_ids"] for step in range(num_steps)]
    return torch.cat(batches)[:, 0].tolist()


@given(st.integers(8, 300), st.integers(1, 12), st.integers(0, 10**6), st.integers(0, 40))
def test_equal_requests_get_equal_windows_of_the_data(num_tokens, batch_size, seed, step) -> None:
    request = replace(REQUEST, batch_size=batch_size, seed=seed, step=step)
    batch, again = row_of(num_tokens).batch(request), row_of(num_tokens).batch(request)
    assert torch.equal(batch["input_ids"], again["input_ids"])
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["input_ids"].shape == (batch_size, 8)
    assert bool((batch["input_ids"].diff(dim=1) == 1).all())
    assert 0 <= int(batch["input_ids"].min()) <= int(batch["input_ids"].max()) < num_tokens


def test_an_epoch_has_every_window_once_and_the_next_is_cut_and_ordered_otherwise() -> None:
    data = row_of(200)
    assert data.num_windows(8) == 24
    starts = first_tokens(data, REQUEST, 24)
    one, two = starts[:24], starts[24:]
    for epoch in (one, two):
        assert len(set(epoch)) == 24
        assert len({start % 8 for start in epoch}) == 1
    assert one != sorted(one)
    assert one != two


def test_another_seed_is_another_order() -> None:
    data = row_of(400)
    assert first_tokens(data, REQUEST, 20) != first_tokens(data, replace(REQUEST, seed=1), 20)


@pytest.mark.parametrize(("workers", "micro_batches"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_a_step_has_the_same_windows_however_it_is_divided(workers, micro_batches) -> None:
    data, size = row_of(1000), 8 // (workers * micro_batches)
    whole = data.batch(replace(REQUEST, step=5, batch_size=8))["input_ids"]
    request = replace(
        REQUEST, step=5, batch_size=size, num_workers=workers, num_micro_batches=micro_batches, split="train"
    )
    parts = [
        data.batch(replace(request, worker=worker, micro_batch=micro))["input_ids"]
        for worker in range(workers)
        for micro in range(micro_batches)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("num_tokens", [8, 9, 15, 16])
def test_little_data_is_repeated(num_tokens) -> None:
    assert row_of(num_tokens).batch(replace(REQUEST, batch_size=5))["input_ids"].shape == (5, 8)


def test_too_little_is_refused_with_both_numbers() -> None:
    with pytest.raises(InvalidConfig, match="the train split has 7 tokens and a window takes 8"):
        row_of(7).batch(REQUEST)
    with pytest.raises(InvalidConfig, match=r"validation split has 50 .* or a larger share for validation"):
        row_of(100).batch(replace(REQUEST, window=60, split="validation"))


# --- Sources -------------------------------------------------------------------------------------------------
def test_texts_are_read_as_bytes_or_by_a_tokenizer(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 30)
    batch = open_data(str(tmp_path), vocab_size=257).batch(REQUEST)
    assert set(bytes(batch["input_ids"][0].tolist())) <= set(b"0123456789")
    with pytest.raises(InvalidRequest, match="the vocabulary has 0 to 47"):
        open_data([str(tmp_path)], vocab_size=48).batch(REQUEST)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(
        "import numpy as np\n"
        "asked = []\n"
        "nothing = 3\n"
        "def batches(request):\n"
        "    asked.append(request)\n"
        "    ids = np.full((request.batch_size, request.window), request.step)\n"
        "    return {'input_ids': ids, 'labels': np.where(ids == 0, -100, ids)}\n"
        "def wrong(request):\n"
        "    return {'tokens': [[1]]}\n"
        "def ragged(request):\n"
        "    return {'input_ids': [[1, 2], [3]], 'labels': [[1, 2], [3]]}\n"
        "def none(request):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield sys.modules
    sys.modules.pop("my_data", None)


def test_a_function_of_ones_own_gives_the_batches(own_module: Any) -> None:
    data = open_data("my_data:batches", vocab_size=10)
    request = replace(REQUEST, step=3, worker=1, num_workers=2)
    batch = data.batch(request)
    assert own_module["my_data"].asked == [request]
    assert batch["input_ids"].dtype is torch.int64
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[3] * 8] * 2
    assert data.batch(REQUEST)["labels"].unique().tolist() == [IGNORED]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_data:missing", "cannot be imported.*missing"),
        ("not_there:batches", "cannot be imported.*not_there.*PYTHONPATH"),
        ("my_data:nothing", "is a int; give a function"),
    ],
)
def test_a_function_that_is_not_there_is_named(own_module: Any, name, said) -> None:
    with pytest.raises(InvalidConfig, match=said):
        open_data(name, vocab_size=10)


@pytest.mark.parametrize(("name", "got"), [("wrong", r"got \['tokens'\]"), ("none", "got NoneType"), ("ragged", "two")])
def test_a_function_that_gives_something_else_is_told_what(own_module: Any, name, got) -> None:
    with pytest.raises(InvalidRequest, match=f"a batch must .*{got}"):
        open_data(f"my_data:{name}", vocab_size=10).batch(REQUEST)


# --- What a model can learn from -----------------------------------------------------------------------------
def batch_of(input_ids: Any, labels: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.as_tensor(input_ids), "labels": torch.as_tensor(labels)}


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (
            batch_of([[1, 2], [3, 4]], [[1, 2], [300, 4]]),
            r"labels\[1, 0\] is 300; the vocabulary has 0 to 256, or -100",
        ),
        (batch_of([[1, 257]], [[1, 2]]), r"input_ids\[0, 1\] is 257; the vocabulary has 0 to 256$"),
        (batch_of([[1, -100]], [[1, 2]]), r"input_ids\[0, 1\] is -100"),
        (batch_of([[1, 2]], [[1, -1]]), r"labels\[0, 1\] is -1"),
        (batch_of([1, 2], [1, 2]), r"the shape \[2\] .* must be \[B, S\]"),
        (batch_of([[1, 2]], [[1]]), r"\[1, 2\] and labels \[1, 1\]"),
        (batch_of(np.zeros((0, 4), int), np.zeros((0, 4), int)), "not empty"),
        (batch_of([[1.0]], [[1]]), "input_ids are float32; they must be integers"),
        (batch_of([[1]], [[True]]), "labels are bool"),
    ],
)
def test_what_a_model_could_not_learn_from_is_named(batch, said) -> None:
    with pytest.raises(InvalidRequest, match=said):
        check_batch(batch, 257)


def test_narrow_integers_become_int64_and_ignored_labels_stay() -> None:
    batch = check_batch(batch_of(np.array([[255, 1]], np.uint8), np.array([[-100, 7]], np.int16)), 257)
    assert batch["input_ids"].dtype is batch["labels"].dtype is torch.int64
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == ([[255, 1]], [[-100, 7]])
