"""The checkpoints of one run, as its coordinator writes them and falls back to them.

Weights are saved as they are stepped: an expert's ``gate_up_proj`` as ``master.gate_up_proj``, whether or not it has a
master of its own, so that a run can go on in another precision. Called by `training/coordinator.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ray_moe.errors import InvalidCheckpoint, NotFound, RayMoEError
from ray_moe.ops.experts import pack
from ray_moe.ops.gates.registry import GateChoice
from ray_moe.ops.parts import ExpertParts
from ray_moe.training.checkpoints import BACKBONE, BACKBONE_OPTIMIZER, Draft, drop_after, folder_of, saved
from ray_moe.training.manifest import Shard, Stamp
from ray_moe.training.restoring import TrainingCheckpoint
from ray_moe.training.shards import AsyncWriter
from ray_moe.training.snapshots import States
from ray_moe.types import HostId, LayerPath

logger = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]

LORA_SCALE = "lora_scale"
"""Among the backbone's weights, where these are adapters: what their products are multiplied by."""


def to_disk(tensors: Tensors) -> dict[str, torch.Tensor]:
    """What `Trainees.expert_tensors` says of an expert, as it is saved."""
    kept = {name: tensor for name, tensor in tensors.items() if "." in name}
    for name, tensor in tensors.items():
        if "." not in name:
            kept.setdefault(f"master.{name}", tensor)
    return kept


def from_disk(tensors: Tensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The opposite, with weights of `dtype`."""
    weights = {name.partition(".")[2]: t.to(dtype) for name, t in tensors.items() if name.startswith("master.")}
    return {**weights, **tensors}


@dataclass(slots=True)
class Saving:
    """A checkpoint on its way to the disk."""

    step: int
    draft: Draft
    hosts: Sequence[HostId]
    """Those that write a part of it."""


class DiskArchive:
    """The checkpoints of a run in one folder, on a disk that all hosts share. Not thread-safe."""

    def __init__(  # noqa: PLR0913  (as many as it has)
        self,
        root: Path,
        run_id: str,
        model: str,
        fingerprint: str,
        layers: Mapping[LayerPath, int],
        dtype: torch.dtype = torch.float32,
        keep: int | None = 2,
        constants: Tensors | None = None,
        parts: ExpertParts | None = None,
        gate: GateChoice | None = None,
    ) -> None:
        """
        Args:
            root: the folder.
            run_id: of this run; checkpoints of others are not gone back to.
            model: what the training began with.
            fingerprint: of its configuration.
            layers: how many experts each has, whether or not these are cut.
            dtype: of the weights in memory.
            keep: how many checkpoints stay; None: all.
            constants: saved with the backbone's weights.
            gate: in the place of the model's routers.
            parts: how experts are cut: parts are written and asked for; checkpoints may have them cut in any other way.
        """
        self.root = root
        self.dtype = dtype
        self._run_id, self._model, self._fingerprint = run_id, model, fingerprint
        self._layers = dict(layers)
        self._keep = keep
        self._constants = dict(constants or {})
        self._parts = parts or ExpertParts()
        self._gate = gate
        self._writer = AsyncWriter("worker")
        self._opened: dict[int, TrainingCheckpoint] = {}

    # --- reading -------------------------------------------------------------------------------------------
    def steps(self) -> list[int]:
        """Of the checkpoints that are whole, ascending."""
        return sorted(saved(self.root)) if self.root.is_dir() else []

    def check(self, step: int) -> None:
        """Raises: `NotFound`; `InvalidCheckpoint` for one that is damaged or of another run or model."""
        steps = self.steps()
        if step not in steps:
            there = f"there are those of the steps {', '.join(map(str, steps))}" if steps else "there is none"
            raise NotFound(f"{self.root} has no checkpoint of step {step}; {there}")
        self._opened = {}  # it may have changed since it was last looked at
        self._open(step)

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: the run has gone back to `step`."""
        drop_after(self.root, step)

    def states(self, step: int, experts: Mapping[LayerPath, Sequence[int]]) -> States:
        """Raises: `InvalidCheckpoint` for one that is damaged, of another run or model, or cannot be cut like this."""
        checkpoint = self._open(step)
        return {
            layer: {
                expert: pack(from_disk(tensors, self.dtype))
                for expert, tensors in checkpoint.read_parts(layer, numbers, self._parts)
            }
            for layer, numbers in experts.items()
        }

    def worker(self, step: int) -> dict[str, torch.Tensor]:
        """`Trainer.state` after `step`. Raises: `InvalidCheckpoint`."""
        checkpoint = self._open(step)
        weights = checkpoint.tensors(BACKBONE)
        masters = {f"master/{name}": tensor for name, tensor in weights.items()}
        return {**weights, **masters, **checkpoint.tensors(BACKBONE_OPTIMIZER)}

    def _open(self, step: int) -> TrainingCheckpoint:
        opened = self._opened.get(step)
        if opened is None:
            opened = TrainingCheckpoint.open(folder_of(self.root, step))
            stamp, fingerprint = opened.manifest.stamp, opened.manifest.fingerprint
            if stamp.run_id != self._run_id or fingerprint != self._fingerprint:
                raise InvalidCheckpoint(
                    f"{opened.folder} is of the run {stamp.run_id!r} of {stamp.model}, and this is {self._run_id!r} of "
                    f"{self._model}; give this run another folder, or that one its own name"
                )
            if stamp.step != step:
                raise InvalidCheckpoint(
                    f"{opened.folder} has the checkpoint of step {stamp.step}; give it its own name"
                )
            self._opened = {step: opened}
        return opened

    # --- writing -------------------------------------------------------------------------------------------
    def begin(self, step: int, worker: Tensors, hosts: Sequence[HostId]) -> Saving:
        """Begin the checkpoint of `step`: the backbone is copied and written from here, `hosts` are to write theirs.

        Raises: as `Draft`.
        """
        stamp = Stamp(self._run_id, step, self._model)
        draft = Draft(self.root, stamp, self._layers, self._fingerprint, self._keep, self._parts, self._gate)
        weights = self._constants | {name: tensor for name, tensor in worker.items() if "/" not in name}
        weights |= {name.partition("/")[2]: tensor for name, tensor in worker.items() if name.startswith("master/")}
        rest = {name: t for name, t in worker.items() if "/" in name and not name.startswith("master/")}
        self._writer.save(draft.folder, draft.stamp, (), {BACKBONE: weights, BACKBONE_OPTIMIZER: rest})
        return Saving(step, draft, tuple(hosts))

    def finish(self, saving: Saving, shards: Sequence[Shard], position: Any = None) -> Path:
        """Finish it with what the hosts have written. Raises: as `Draft.commit`, or what went wrong with the backbone
        (call `give_up`)."""
        return saving.draft.commit([*self._writer.wait(), *shards], position)

    def give_up(self, saving: Saving) -> None:
        """Leave nothing of it."""
        saving.draft.abort()
        try:
            self._writer.wait()
        except RayMoEError as error:
            logger.info("the checkpoint of step %d was given up while it was written: %s", saving.step, error)

    def close(self) -> None:
        self._writer.close()


def owned_states(
    layers: Mapping[LayerPath, Sequence[int]], tensors: Any
) -> Iterator[tuple[tuple[LayerPath, int], dict[str, torch.Tensor]]]:
    """What a host writes, one expert after the other. Args: tensors: (layer, expert) -> its tensors."""
    for layer, experts in layers.items():
        for expert in experts:
            yield (layer, expert), to_disk(tensors(layer, expert))
