"""What is refused before anything of a training is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ray_moe
from ray_moe.config import Config
from ray_moe.config_train import TrainConfig
from ray_moe.errors import InvalidConfig, NotFound
from ray_moe.service.training import check, of_workers
from tests.tiny_models import save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    save("mixtral", made)
    return made


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"data": []}, "nothing to learn from"),
        ({"data": ["/nowhere/at/all"]}, "/nowhere/at/all"),
        ({"data": "stdlib", "freeze": ["nothing.*"]}, "no parameter"),
        ({"data": "stdlib", "freeze": ["*.experts.*"]}, "no parameter"),
        ({"data": "stdlib", "publish_every": 1, "publish_folder": "/tmp"}, "publish_folder"),
        ({"data": "stdlib", "publish_every": 1, "serve": True}, "publish_folder"),
        ({"data": "stdlib", "freeze": ["*.noise_weight"]}, "no parameter"),
        ({"data": "stdlib", "gate": "topk", "freeze": ["*.noise_weight"]}, "no parameter"),
        ({"data": "stdlib", "gate": "modality"}, "this gate has to know the modality of each token"),
        (
            {"data": "stdlib", "gate": "hash", "gradient_checkpointing": True},
            "set train.gradient_checkpointing to false",
        ),
        ({"data": "stdlib", "gate": {"name": "topk", "top_k": 7}}, "with 6 experts it can be 1 to 6"),
        ({"data": "stdlib", "gate": "topk", "auxiliary": {"entropy": 0.1}}, "entropy is not a loss of the gate 'topk'"),
        (
            {"data": "stdlib", "gate": "switch", "publish_every": 1, "serve": True, "publish_folder": "/tmp"},
            r"routers of a mixtral model compute .* cannot be published or exported",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(folder: Path, train: Any, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        ray_moe.train(Config.model_validate({"model": str(folder), "train": train}))


def test_what_a_gate_can_be_taken_for_is_let_through(folder: Path) -> None:
    train = {"data": "stdlib", "gate": "noisy_topk", "publish_every": 1, "publish_folder": "/tmp", "serve": True}
    check(Config.model_validate({"model": str(folder), "train": {**train, "freeze": ["*.noise_weight"]}}), True)
    check(Config.model_validate({"model": str(folder), "train": {"data": "stdlib", "gate": "switch"}}), True)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        ray_moe.train(Config.model_validate({"model": str(tmp_path / "none"), "train": {"data": "stdlib"}}))


@pytest.mark.parametrize(
    ("rows", "named", "message"),
    [
        (["a text"], "stdlib", "leave one of them out"),
        ("texts/*.txt", (), "belongs in train.data"),
        ([], (), "no rows with anything in them"),
        ([0.5], (), "row 0 of the data is a float"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_refused_before_anything_starts(
    folder: Path, rows: Any, named: Any, message: str
) -> None:
    config = Config.model_validate({"model": str(folder), "train": {"data": named}})
    with pytest.raises(InvalidConfig, match=message):
        ray_moe.train(config, data=rows)


def test_room_is_kept_for_all_workers_or_else_for_as_many_as_there_may_be() -> None:
    train = TrainConfig.model_validate({"num_cpus": 2, "parallel": {"data": 3, "min_data": 2}})
    assert of_workers(train) == [{"CPU": 6, "GPU": 0}, {"CPU": 4, "GPU": 0}]
    assert of_workers(TrainConfig.model_validate({"parallel": {"data": 3}})) == [{"CPU": 3, "GPU": 0}]
