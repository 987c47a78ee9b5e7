"""Steps of two rows at once: one is with the experts while the backbone computes the other; nothing else differs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import Unavailable
from ray_moe.models.experts import install
from ray_moe.models.huggingface import Checkpoint
from ray_moe.runtime import turns
from ray_moe.runtime.decoder_only import DecoderStepper, cut
from ray_moe.runtime.kv_cache import KVPool
from ray_moe.runtime.scheduler import Sequence, Work
from tests.tiny_models import save

LENGTHS = (5, 1, 9, 3)
TIMEOUT_S = 10.0


class Setting:
    """A backbone whose experts are here, and sequences on their way through it."""

    def __init__(self, folder: Path, overlap_min_tokens: int | None) -> None:
        checkpoint = Checkpoint.open(str(folder))
        every = {path: range(layer.num_experts) for path, layer in checkpoint.layers.items()}
        self._experts = checkpoint.load_experts(every)
        self.num_layers = len(every)
        self.before: Callable[[torch.Tensor], None] = lambda hidden: None
        """Called when experts are asked, with the [T, D] tokens, in the thread of their row."""
        model: Any = checkpoint.load_backbone()
        install(model, self._ask)
        self.num_at_attention = self.most_at_attention = 0
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(lambda *_: self._at_attention(1))
            layer.self_attn.register_forward_hook(lambda *_: self._at_attention(-1))
        self._stepper = DecoderStepper(model, overlap_min_tokens)
        self._pool = KVPool(2**20)
        self.sequences = [
            Sequence([7 * position % 90 + row for position in range(n)], 64) for row, n in enumerate(LENGTHS)
        ]
        for one in self.sequences:
            one.cache = self._pool.begin(one.tokens, one.max_tokens)

    def _ask(self, path: str, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        turn = turns.current.get()
        if turn is not None:
            turn.give()
        try:
            self.before(hidden)
            out: torch.Tensor = self._experts[path](hidden, index, weight)
            return out
        finally:
            if turn is not None:
                turn.take()

    def _at_attention(self, change: int) -> None:
        self.num_at_attention += change
        self.most_at_attention = max(self.most_at_attention, self.num_at_attention)
        time.sleep(0.001)  # time for another thread to come here, too

    def step(self) -> torch.Tensor:
        """Compute all that is new, and generate a token of each sequence; the logits."""
        work: Work = [(one, one.num_new) for one in self.sequences]
        logits = self._stepper.compute(work, self._pool)
        for one, token in zip(self.sequences, logits.argmax(-1).tolist(), strict=True):
            one.tokens.append(token)
        return logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("model")
    save("qwen3_moe", path)
    return path


def test_both_rows_are_with_the_experts_at_once_and_the_logits_are_the_same(folder: Path) -> None:
    alone, both = Setting(folder, None), Setting(folder, 2)
    meeting = threading.Barrier(2)
    rows: list[tuple[str, int]] = []

    def meet(hidden: torch.Tensor) -> None:
        rows.append((threading.current_thread().name, len(hidden)))
        meeting.wait(TIMEOUT_S)  # each waits for the other: one after the other they would wait in vain

    both.before = meet
    for _ in range(6):
        torch.testing.assert_close(both.step(), alone.step(), rtol=1e-5, atol=1e-5)
    assert [one.tokens for one in both.sequences] == [one.tokens for one in alone.sequences]
    assert len(rows) == 6 * 2 * both.num_layers
    first = rows[: 2 * both.num_layers]
    assert sorted(number for _, number in first) == sorted([6, 12] * both.num_layers)  # 5 + 1 and 9 + 3 tokens
    assert {number for name, number in rows[2 * both.num_layers :]} == {2}
    assert len({name for name, _ in rows}) == 2
    assert (both.num_at_attention, both.most_at_attention) == (0, 1)  # at the backbone they take turns


def test_a_step_of_few_tokens_or_of_one_sequence_is_one_row(folder: Path) -> None:
    setting = Setting(folder, 5)
    threads: list[str] = []
    setting.before = lambda hidden: threads.append(threading.current_thread().name)
    setting.step()
    assert len(set(threads)) == 2
    threads.clear()
    setting.step()  # four tokens
    del setting.sequences[1:]
    setting.sequences[0].tokens += range(3, 12)  # as if a prompt had ten more
    setting.step()
    assert set(threads) == {threading.current_thread().name}


@pytest.mark.parametrize("fails", [0, 1], ids=["the first row", "the other row"])
def test_a_row_that_fails_leaves_all_sequences_to_be_done_again(folder: Path, fails: int) -> None:
    alone, both = Setting(folder, None), Setting(folder, 2)
    both.step(), alone.step()
    own, running = threading.current_thread(), threading.Event()

    def fail(hidden: Any) -> None:
        if (threading.current_thread() is own) == (fails == 0):
            assert running.wait(TIMEOUT_S)
            raise Unavailable("no host")
        running.set()

    both.before = fail
    before = [one.num_computed for one in both.sequences]
    with pytest.raises(Unavailable, match="no host"):
        both.step()
    assert [one.num_computed for one in both.sequences] == before == [one.room.length for one in both.sequences]
    both.before = lambda hidden: None
    torch.testing.assert_close(both.step(), alone.step(), rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_rows_are_of_about_as_many_tokens(numbers: list[int]) -> None:
    work = [(Sequence([0] * number, 64), number) for number in numbers]
    at = cut(work, 1)
    if len(numbers) == 1:
        assert at == 0
        return
    uneven = [abs(sum(numbers[:at]) - sum(numbers[at:])) for at in range(1, len(numbers))]
    assert 1 <= at < len(numbers)
    assert uneven[at - 1] == min(uneven)
    assert cut(work, sum(numbers) + 1) == cut(work, None) == 0
