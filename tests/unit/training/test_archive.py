"""Checkpoints of a run: saved beside the training, gone back to, and gone on from with other hosts and workers."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_moe.errors import InvalidCheckpoint, InvalidConfig
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.training import shards
from ray_moe.training.archive import DiskArchive
from ray_moe.training.checkpoints import Draft
from ray_moe.training.settings import StepSettings
from tests.tiny_models import build
from tests.training_cluster import Cluster
from tests.unit.training.test_recovery import batches

LAST = 8


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral")


def cluster(model: Any, root: Path | None, num_hosts: int = 2, run_id: str = "run", **changes: Any) -> Cluster:
    archive = None
    if root is not None:
        layers = {"model.layers.0.mlp.experts": 6, "model.layers.1.mlp.experts": 6}
        archive = DiskArchive(root, run_id, "mixtral", "fingerprint", layers)
    made = Cluster(
        model,
        num_hosts,
        changes.pop("num_workers", 1),
        optimizer=OptimizerSettings(lr=3e-3, weight_decay=0.01),
        archive=archive,
        **changes,
    )
    made.start()
    return made


@pytest.fixture(scope="module")
def curve(model: Any) -> list[float]:
    return [report.loss for report in cluster(model, None).train(LAST, batches)]


@pytest.fixture
def root(model: Any, tmp_path: Path) -> Path:
    """Checkpoints of steps 2 and 4, and training that went on to 5."""
    made = cluster(model, tmp_path)
    for step in (2, 4):
        made.train(step, batches)
        made.together(lambda trainer: trainer.save())
    made.train(5, batches)
    assert made.together(lambda trainer: trainer.finish_save())[0] == tmp_path / "step-00000004"
    return tmp_path


@pytest.mark.parametrize("num_hosts", [1, 3])
def test_another_layout_goes_on_from_a_checkpoint(model: Any, curve: list[float], root: Path, num_hosts: int) -> None:
    made = cluster(model, root, num_hosts)
    assert made.trainers[0].step == 4
    assert [report.loss for report in made.train(LAST, batches)] == pytest.approx(curve[4:], rel=1e-6)


def test_two_workers_go_on_from_the_checkpoint_of_one(model: Any, root: Path) -> None:
    one, two = cluster(model, root), cluster(model, root, num_workers=2)
    assert [trainer.step for trainer in two.trainers] == [4, 4]
    for name, parameter in one.trainers[0].model.named_parameters():
        torch.testing.assert_close(two.trainers[1].model.get_parameter(name), parameter)


def test_what_no_host_has_any_more_comes_from_the_checkpoint(model: Any, curve: list[float], root: Path) -> None:
    made = cluster(model, root, settings=StepSettings(snapshot_every=0))
    made.train(6, batches)
    made.kill("expert-0")
    reports = made.train(LAST, batches)
    recovery = reports[0].recovery
    assert recovery is not None
    assert (recovery.source, recovery.step, recovery.undone) == ("checkpoint", 4, 2)
    assert [report.loss for report in reports[1:]] == pytest.approx(curve[4:], rel=1e-6)


def test_a_host_that_dies_while_it_writes_leaves_the_checkpoint_before(model: Any, root: Path) -> None:
    made = cluster(model, root)
    made.train(6, batches)
    made.together(lambda trainer: trainer.save())
    made.kill("expert-1")
    assert made.together(lambda trainer: trainer.finish_save()) == [None]
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("when", ["before", "while"])
def test_the_next_checkpoint_is_written_after_one_that_was_given_up(
    model: Any, root: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """What still writes when a host is lost, here and on the others, finds the folder gone."""
    gone = threading.Event()
    write = shards.write_tensors

    def slowly(folder: Path, *arguments: Any) -> Any:
        if folder.name.startswith(".step-00000006"):
            gone.wait(10)
        return write(folder, *arguments)

    monkeypatch.setattr(shards, "write_tensors", slowly)
    original = Draft.abort

    def abort(draft: Draft) -> None:
        original(draft)
        gone.set()

    monkeypatch.setattr(Draft, "abort", abort)
    made = cluster(model, root, 3)
    made.train(6, batches)
    if when == "before":
        made.kill("expert-1")
    made.together(lambda trainer: trainer.save())
    if when == "while":
        made.kill("expert-1")
        threading.Timer(0.2, gone.set).start()  # whoever is waited for has to end
    assert made.together(lambda trainer: trainer.finish_save()) == [None]
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000004"]
    made.train(7, batches)
    made.together(lambda trainer: trainer.save())
    assert made.together(lambda trainer: trainer.finish_save()) == [root / "step-00000007"]


def test_a_checkpoint_of_another_run_is_refused(model: Any, root: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="is of the run 'run'"):
        cluster(model, root, run_id="another")


def test_a_run_without_a_folder_says_where_to_name_one(model: Any) -> None:
    made = cluster(model, None)
    with pytest.raises(InvalidConfig, match=r"train\.checkpoints\.folder"):
        made.together(lambda trainer: trainer.save())
