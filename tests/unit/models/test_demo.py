"""The demo's model: a training that learns, a cache that is whole or not used."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from ray_moe.errors import InsufficientResources, InvalidConfig
from ray_moe.models import demo
from ray_moe.models.byte_level import END
from ray_moe.models.demo import DemoSettings, cache_root, corpus, demo_model, reference_tokens

TINY = DemoSettings(
    train_seconds=0.3, hidden_size=16, num_layers=1, num_heads=2, num_experts=4, expert_width=16, window=32, batch=4
)


@pytest.fixture(scope="module", autouse=True)
def _small_corpus() -> object:
    """A part of the library, read once."""
    whole = {held_out: corpus(held_out) for held_out in (False, True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "corpus", lambda held_out=False: whole[held_out])
        yield


# --- Training ------------------------------------------------------------------------------------------------
def test_the_corpus_is_python_and_held_out_files_are_apart() -> None:
    train, held_out = corpus(), corpus(held_out=True)
    assert len(train) > 10 * len(held_out) > 0
    assert int(train.max()) == END
    assert b"import " in bytes(token for token in train[:100_000].tolist() if token < 256)
    assert torch.equal(train, corpus())


def test_a_python_without_its_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "os.py").write_text("import sys\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(InsufficientResources, match=r"0 bytes of sources and 1000000 are needed"):
        corpus()


def test_training_learns_reports_and_keeps_to_its_time(tmp_path: Path) -> None:
    seen: list[demo.TrainProgress] = []
    model = demo_model(replace(TINY, train_seconds=4.0), tmp_path, seen.append)  # however busy the machine is
    assert model.losses[-1] < model.losses[0] - 0.2
    assert 0 < model.held_out_loss < 5.55
    assert [progress.step for progress in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].elapsed_s < 60
    assert seen[-1].tokens_per_s > 0


# --- Cache ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> demo.DemoModel:
    return demo_model(TINY, tmp_path_factory.mktemp("cache"))


def test_it_is_a_checkpoint_of_hugging_face(cached: demo.DemoModel) -> None:
    assert AutoConfig.from_pretrained(cached.path).model_type == "qwen3_moe"
    assert AutoTokenizer.from_pretrained(cached.path)("é")["input_ids"] == [195, 169]
    (tokens,) = reference_tokens(cached.path, ["import"], 5)
    assert len(tokens) == 5
    assert [path.name for path in cached.path.parent.iterdir()] == [cached.path.name]


def test_the_second_time_it_is_there(cached: demo.DemoModel) -> None:
    again = demo_model(TINY, cached.path.parent, lambda progress: pytest.fail("trained again"))
    assert again == replace(cached, reused=True)


def test_other_settings_are_another_model(cached: demo.DemoModel) -> None:
    other = demo_model(replace(TINY, seed=1), cached.path.parent)
    assert other.path != cached.path
    assert not other.reused


@pytest.mark.parametrize("damage", ["short weights", "no weights", "no receipt", "bad receipt"])
def test_a_damaged_one_is_made_anew(cached: demo.DemoModel, damage: str) -> None:
    weights, receipt = cached.path / "model.safetensors", cached.path / "training.json"
    if damage == "short weights":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no receipt":
        receipt.unlink()
    else:
        receipt.write_text("{")
    assert not demo_model(TINY, cached.path.parent).reused
    assert demo_model(TINY, cached.path.parent).reused


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(progress: demo.TrainProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_model(TINY, tmp_path, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match="choose a --cache-dir"):
        demo_model(TINY, tmp_path / "file")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root(tmp_path) == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root() == Path("/x/ray_moe")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache_root() == Path("/h/.cache/ray_moe")


def test_the_receipt_tells_how_it_was_made(cached: demo.DemoModel) -> None:
    assert json.loads((cached.path / "training.json").read_text())["settings"] == asdict(TINY)
