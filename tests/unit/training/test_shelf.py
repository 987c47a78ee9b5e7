"""Optimizer state on a disk: the same numbers, in memory only while one parameter is stepped, and gone with the run."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_moe.errors import InsufficientResources, InvalidConfig
from ray_moe.ops.optimizers import Optimizer, OptimizerSettings
from ray_moe.training import shelf
from ray_moe.training.archive import DiskArchive
from ray_moe.training.shelf import DiskShelf, shelf_for
from tests.tiny_models import build
from tests.training_cluster import Cluster
from tests.unit.ops.test_optimizers import KINDS, assert_equal, changed, parameters, set_gradients
from tests.unit.training.test_recovery import batches

LAST = 6


@pytest.fixture(autouse=True)
def _everything_is_worth_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "SMALLEST_BYTES", 16)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """While it is in force the disk is full."""
    with monkeypatch.context() as patch:

        def refuse(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "posix_fallocate", refuse)
        yield patch


def resident_bytes(folder: Path) -> int:
    """Of this process's mappings of files in the folder."""
    found, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            is_ours = str(folder) in line
        elif is_ours and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


# --- One optimizer ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [s for s in KINDS if s.offload == "none"], ids=changed)
def test_steps_are_bitwise_those_in_memory(settings: OptimizerSettings, dtype: torch.dtype, tmp_path: Path) -> None:
    on_disk, in_memory = parameters(dtype=dtype), parameters(dtype=dtype)
    disk_settings = replace(settings, offload="disk")
    optimizer = Optimizer(disk_settings, on_disk, DiskShelf(tmp_path))
    plain = Optimizer(settings, in_memory)
    late = [] if settings.fused else ["norm.weight"]  # torch's fused SGD wants all momenta to begin together
    for step in range(6):
        if step == 3:  # go on from its state elsewhere
            states = {name: {key: t.clone() for key, t in optimizer.state_of(name).items()} for name in on_disk}
            for name in on_disk:
                optimizer.let_go(name)
            optimizer = Optimizer(disk_settings, on_disk, DiskShelf(tmp_path))
            for name, state in states.items():
                optimizer.load_state(name, state)
        for params, each in ((on_disk, optimizer), (in_memory, plain)):
            set_gradients(params, step, without=late if step < 2 else [])
            each.step(0.01, grads_scale=0.37, missing_as_zero=step == 1)
        assert resident_bytes(tmp_path) == 0
    assert_equal(on_disk, in_memory)
    for name in on_disk:
        assert_equal(optimizer.state_of(name), plain.state_of(name))
        in_memory_still = [t for t in optimizer.in_memory(name) if t.data_ptr() != on_disk[name].data_ptr()]
        assert all(tensor.nbytes < 16 for tensor in in_memory_still)
    assert not list(tmp_path.iterdir())  # its files have no names


def test_what_is_removed_gives_the_disk_its_room_back(tmp_path: Path) -> None:
    params = parameters()
    optimizer = Optimizer(OptimizerSettings(offload="disk"), params, DiskShelf(tmp_path))
    set_gradients(params, 0)
    optimizer.step()

    def num_files() -> int:
        return sum(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())

    assert num_files() == 2 * len(params)
    optimizer.remove("up.weight")
    assert num_files() == 2 * len(params) - 2


def test_a_full_disk_is_told_before_anything_has_changed(tmp_path: Path, full: pytest.MonkeyPatch) -> None:
    params, plain = parameters(), parameters()
    optimizer = Optimizer(OptimizerSettings(offload="disk"), params, DiskShelf(tmp_path))
    set_gradients(params, 0)
    with pytest.raises(InsufficientResources, match=f"no room for {tmp_path}.*bytes are free"):
        optimizer.step()
    assert_equal(params, plain)
    full.undo()
    optimizer.step()  # with the gradients that are still there
    other = Optimizer(OptimizerSettings(), plain)
    set_gradients(plain, 0)
    other.step()
    assert_equal(params, plain)


def test_memory_is_no_disk() -> None:
    with pytest.raises(InvalidConfig, match=r"/dev/shm is a tmpfs, which is in memory itself.*offload_folder"):
        DiskShelf("/dev/shm")


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="cannot write /proc/elsewhere"):
        shelf_for(OptimizerSettings(offload="disk", offload_folder="/proc/elsewhere"))


def test_an_optimizer_on_a_disk_needs_one() -> None:
    with pytest.raises(InvalidConfig, match="a shelf is for offload: disk"):
        Optimizer(OptimizerSettings(offload="disk"))


# --- A run -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral")


def cluster(model: Any, folder: Path | None, archive: DiskArchive | None = None, num_hosts: int = 3) -> Cluster:
    settings = OptimizerSettings(lr=3e-3, weight_decay=0.01)
    if folder is not None:
        settings = replace(settings, offload="disk", offload_folder=str(folder))
    made = Cluster(model, num_hosts, optimizer=settings, archive=archive)
    made.start()
    return made


def everything(made: Cluster) -> dict[str, torch.Tensor]:
    """What the run is: backbone, experts, and the optimizer's state of each."""
    tensors = dict(made.trainers[0].state())
    for trainees in made.trainees.values():
        for layer, experts in trainees.report().owned.items():
            for expert in experts:
                state = trainees.expert_tensors(layer, expert)
                tensors |= {f"{layer}/{expert}/{name}": tensor for name, tensor in state.items()}
    return tensors


def test_a_run_whose_hosts_die_and_that_is_loaded_again_is_bitwise_the_one_in_memory(
    model: Any, tmp_path: Path
) -> None:
    runs = []
    for folder in (None, tmp_path / "spool"):
        layers = {"model.layers.0.mlp.experts": 6, "model.layers.1.mlp.experts": 6}
        archive = DiskArchive(tmp_path / f"checkpoints-{folder is None}", "run", "mixtral", "fingerprint", layers)
        made = cluster(model, folder, archive)
        made.train(2, batches)
        made.kill("expert-1")  # its keeper's snapshot is taken
        made.train(4, batches)
        made.together(lambda trainer: trainer.save())
        made.together(lambda trainer: trainer.finish_save())
        made.train(5, batches)
        made.together(lambda trainer: trainer.load(4))
        reports = made.train(LAST, batches)
        runs.append(([report.loss for report in reports], everything(made), made))
    (losses, plain, in_memory), (disk_losses, on_disk, spooled) = runs
    assert disk_losses == losses
    assert_equal(on_disk, plain)
    living = [(spooled.trainees[h].report(), in_memory.trainees[h].report()) for h in ("expert-0", "expert-2")]
    assert all(disk.num_bytes < 0.4 * memory.num_bytes for disk, memory in living)


def test_between_steps_nothing_of_the_state_and_its_snapshots_is_in_memory(model: Any, tmp_path: Path) -> None:
    made = cluster(model, tmp_path)
    made.train(2, batches)
    made.trainers[0].begin()
    assert resident_bytes(tmp_path) == 0
    assert sum(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines()) > 100


def test_a_step_that_finds_the_disk_full_is_made_nowhere(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, plain = cluster(model, tmp_path), cluster(model, None)
    before = everything(made)
    allocate, left = os.posix_fallocate, [40]  # room for the worker and a host, not for all

    def runs_out(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", runs_out)
        with pytest.raises(InsufficientResources, match="no room for"):
            made.train(1, batches)
    assert left[0] < 0
    assert_equal(everything(made), before)
    assert made.train(LAST, batches)[-1].loss == plain.train(LAST, batches)[-1].loss
    assert_equal(everything(made), everything(plain))
