"""The trainer of a service: what it does not write for others to load."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_moe.actors.trainer import TrainerActor
from ray_moe.config_train import TrainConfig
from ray_moe.errors import InvalidConfig
from ray_moe.models.huggingface import Checkpoint
from tests.tiny_models import save


def test_nothing_is_published_that_transformers_would_not_compute(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "model")
    actor: Any = TrainerActor.__new__(TrainerActor)
    actor._checkpoint = Checkpoint.open(tmp_path / "model")
    train = TrainConfig.model_validate({"gate": "switch", "checkpoints": {"folder": str(tmp_path / "saved")}})
    actor._spec = SimpleNamespace(config=SimpleNamespace(train=train))
    with pytest.raises(InvalidConfig, match="cannot be published or exported"):
        actor._export(None, [])
    assert not (tmp_path / "saved").exists()
