"""Checkpoints of training: a folder for each step, whole or not there, readable on any number of hosts.

``step-00000120/`` holds the experts' shards (``experts/*.safetensors``: master weights and optimizer state), files of
the backbone, and ``manifest.json``, which names them all with their hashes. The coordinator begins a `Draft`, every
host writes its part into the draft's folder (`shards.AsyncWriter`), and the draft is committed with what they wrote:
then, and not before, the folder has its name. `restoring.py` reads it. Nothing is pickled.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.models.writing import PARTIAL, NewFolder, refusal, remove_abandoned, write_file
from ray_moe.ops.gates.registry import GateChoice
from ray_moe.ops.parts import ExpertParts
from ray_moe.training.manifest import Manifest, Shard, Stamp
from ray_moe.types import LayerPath

MANIFEST = "manifest.json"
BACKBONE = "backbone.safetensors"
"""The backbone's weights, under the names of its state."""
BACKBONE_OPTIMIZER = "backbone_optimizer.safetensors"

_STEP = re.compile(r"step-(\d{8,})")

log = logging.getLogger(__name__)


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is among those in `root`."""
    return root / f"step-{step:08d}"


def saved(root: Path) -> dict[int, Path]:
    """The checkpoints in `root` by their step, latest first."""
    steps = {}
    for folder in root.glob("step-*"):
        match = _STEP.fullmatch(folder.name)
        if match and (folder / MANIFEST).is_file():
            steps[int(match[1])] = folder
    return dict(sorted(steps.items(), reverse=True))


def latest(root: Path) -> Path | None:
    """The checkpoint of the latest step in `root`; None when there is none."""
    return next(iter(saved(root).values()), None)


def drop_after(root: Path, step: int) -> None:
    """Remove the checkpoints of later steps than `step`: the run has gone back to it."""
    for other, folder in saved(root).items():
        if other > step:
            _remove(folder)


class Draft:
    """A checkpoint that is being written. The coordinator's; hosts are told its `folder` and its `stamp`."""

    def __init__(
        self,
        root: Path,
        stamp: Stamp,
        layers: Mapping[LayerPath, int],
        fingerprint: str,
        keep: int | None = None,
        parts: ExpertParts | None = None,
        gate: GateChoice | None = None,
    ) -> None:
        """Begin the checkpoint of `stamp.step` in `root`. One of the same step that is there is replaced in the end.

        Args:
            root: where the checkpoints of a run are, on a disk that all hosts share; made if need be.
            stamp: what each of its files will carry.
            layers: how many experts there are in each layer; all of them have to be written.
            fingerprint: of the model's configuration (`manifest.fingerprint`).
            keep: how many checkpoints are to be there after this one is committed; older ones go. None: all.
            parts: how experts are cut, each part of which has to be written then.
            gate: in the place of the model's routers.

        Raises:
            InvalidConfig: there are checkpoints of later steps, or `root` cannot be written.
            InsufficientResources: the disk is full.
        """
        if keep is not None and keep < 1:
            raise InvalidConfig(f"{keep} checkpoints are to be kept; expected at least 1")
        self.stamp = stamp
        self._root = root
        self._layers = dict(layers)
        self._fingerprint = fingerprint
        self._keep = keep
        self._parts = parts or ExpertParts()
        self._gate = gate
        last = next(iter(saved(root)), stamp.step)
        if last > stamp.step:
            raise InvalidConfig(
                f"step {stamp.step} is to be saved in {root}, where step {last} is already. Go on from that one, save "
                "elsewhere, or remove it."
            )
        with refusal(root):
            root.mkdir(parents=True, exist_ok=True)
        remove_abandoned(root, "step-*")
        self._new = NewFolder(folder_of(root, stamp.step))

    @property
    def folder(self) -> Path:
        """Where hosts write."""
        return self._new.path

    def commit(
        self, shards: Iterable[Shard], position: Any = None, rng: Mapping[str, torch.Tensor] | None = None
    ) -> Path:
        """Finish it with what all hosts have written; returns its folder. Older checkpoints may go now.

        After an error nothing is left of it.

        Args:
            shards: what the hosts' `AsyncWriter.save` gave.
            position: where the data goes on, as anything that JSON can say.
            rng: states of random number generators, by name.

        Raises:
            InvalidRequest: experts are missing or were written twice, a file is not there as it was written, or
                `position` is nothing that JSON can say.
            InvalidConfig, InsufficientResources: it cannot be written.
        """
        ordered = tuple(sorted(shards, key=lambda shard: shard.file))
        with self._new as partial:
            _check_complete(ordered, {path: n * self._parts.number for path, n in self._layers.items()})
            for shard in ordered:
                path = partial / shard.file
                if not path.is_file() or path.stat().st_size != shard.num_bytes:
                    raise InvalidRequest(f"{path} is not there as it was written; expected {shard.num_bytes} bytes")
            manifest = Manifest(
                self.stamp, self._fingerprint, self._layers, ordered, position, rng or {}, self._parts, self._gate
            )
            write_file(partial / MANIFEST, manifest.to_json())
        for folder in list(saved(self._root).values())[self._keep :] if self._keep else []:
            _remove(folder)
        return folder_of(self._root, self.stamp.step)

    def abort(self) -> None:
        """Leave nothing of it. Hosts that are still writing will fail. Harmless when it is finished."""
        self._new.abort()


def _check_complete(shards: Sequence[Shard], layers: Mapping[LayerPath, int]) -> None:
    """Raises: `InvalidRequest` unless every expert is in exactly one shard."""
    expected = {(path, expert) for path, number in layers.items() for expert in range(number)}
    written = Counter((path, expert) for shard in shards for path, ids in shard.experts.items() for expert in ids)
    faults = {
        "are missing": expected - written.keys(),
        "are unknown": written.keys() - expected,
        "were written more than once": {key for key, times in written.items() if times > 1},
    }
    for what, keys in faults.items():
        if keys:
            few = _few([f"{path}/{expert}" for path, expert in sorted(keys)])
            raise InvalidRequest(f"{len(keys)} experts {what}: {few}; expected each expert once, from its owner")


def _remove(folder: Path) -> None:
    """Remove a checkpoint; nobody ever finds half of it."""
    gone = folder.with_name(f".{folder.name}{PARTIAL}removed")
    try:
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        log.warning("the checkpoint %s could not be removed: %s", folder, error)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
