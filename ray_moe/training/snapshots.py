"""What a host could go back to: states of its experts after certain steps, and copies that it keeps for other hosts.

In memory, or in files that end with the process; what outlives it is `training/checkpoints.py`. Called by
`training/trainees.py` and for a coordinator.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import Any

import numpy.typing as npt
import torch

from ray_moe.errors import NotFound
from ray_moe.ops.experts import ExpertArrays
from ray_moe.training.shelf import DiskShelf
from ray_moe.types import HostId, LayerPath

Experts = Mapping[LayerPath, Collection[int]]

States = dict[LayerPath, dict[int, ExpertArrays]]
"""What some experts are, by layer and expert: weights, and where they are stepped the optimizer's state."""


class Snapshots:
    """The snapshots on one host, by step. Thread-safe."""

    def __init__(self, host_id: HostId, shelf: DiskShelf | None = None) -> None:
        """Args: shelf: where states are kept; None: in memory."""
        self._host_id = host_id
        self._shelf = shelf
        self._lock = threading.Lock()
        self._states: dict[int, States] = {}
        self._blobs: dict[int, dict[str, Any]] = {}

    def add(self, step: int, states: States) -> States:
        """Remember states after `step`, the host's own or another one's; answers them, as they are kept.

        Raises: `InsufficientResources` when they are kept on a disk that is full.
        """
        if self._shelf is not None:
            shelf = self._shelf
            states = {layer: {e: shelf.put(arrays) for e, arrays in each.items()} for layer, each in states.items()}
        with self._lock:
            mine = self._states.setdefault(step, {})
            for layer, experts in states.items():
                mine.setdefault(layer, {}).update(experts)
        return states

    def let_go(self) -> None:
        """Have memory hold nothing of what is in files, which whoever asked for it may have brought back."""
        if self._shelf is not None:
            arrays = [array for array in self._arrays() if self._shelf.takes(array.nbytes)]
            self._shelf.let_go(map(torch.from_numpy, arrays))

    def _arrays(self) -> list[npt.NDArray[Any]]:
        with self._lock:
            kept = [
                arrays for states in self._states.values() for experts in states.values() for arrays in experts.values()
            ]
        return [array for arrays in kept for _, array in arrays.values()]

    def keep(self, step: int, states: States) -> None:
        """Keep states of another host's experts after `step`."""
        self.add(step, states)

    def keep_blob(self, step: int, name: str, content: Any) -> None:
        """Keep something else of `step`: what the workers are."""
        with self._lock:
            self._blobs.setdefault(step, {})[name] = content

    def blob(self, step: int, name: str) -> Any:
        """Raises: `NotFound`."""
        with self._lock:
            content = self._blobs.get(step, {}).get(name)
        if content is None:
            raise NotFound(f"host {self._host_id} keeps no {name!r} of step {step}")
        return content

    def find_blobs(self, step: int, prefix: str) -> dict[str, Any]:
        """What else is kept of `step` under names that begin with `prefix`."""
        with self._lock:
            return {name: blob for name, blob in self._blobs.get(step, {}).items() if name.startswith(prefix)}

    def drop_blobs(self, step: int, prefix: str) -> None:
        """Let go of what `find_blobs` finds."""
        with self._lock:
            kept = self._blobs.get(step, {})
            for name in [name for name in kept if name.startswith(prefix)]:
                del kept[name]

    def find(self, step: int, layer: LayerPath, expert: int) -> ExpertArrays:
        """The state of an expert after `step`. Raises: `NotFound`."""
        with self._lock:
            arrays = self._states.get(step, {}).get(layer, {}).get(expert)
        if arrays is None:
            raise NotFound(f"host {self._host_id} has no state of expert {expert} of {layer!r} after step {step}")
        return arrays

    def find_all(self, step: int, experts: Experts) -> States:
        """The states of `experts` after `step`. Raises: `NotFound`."""
        return {
            layer: {expert: self.find(step, layer, expert) for expert in numbers} for layer, numbers in experts.items()
        }

    def forget_before(self, step: int) -> None:
        """Let go of what is older than `step`."""
        self._forget(lambda other: other < step)

    def forget_after(self, step: int) -> None:
        """Let go of what is newer than `step`."""
        self._forget(lambda other: other > step)

    def _forget(self, is_over: Any) -> None:
        with self._lock:
            self._states = {step: states for step, states in self._states.items() if not is_over(step)}
            self._blobs = {step: blobs for step, blobs in self._blobs.items() if not is_over(step)}

    @property
    def experts(self) -> dict[int, dict[LayerPath, tuple[int, ...]]]:
        """By step and layer, ascending: the experts whose state is here."""
        with self._lock:
            return {
                step: {layer: tuple(sorted(experts)) for layer, experts in states.items()}
                for step, states in sorted(self._states.items())
            }

    @property
    def blobs(self) -> dict[int, tuple[str, ...]]:
        """By step: names of what else is kept."""
        with self._lock:
            return {step: tuple(sorted(blobs)) for step, blobs in sorted(self._blobs.items())}

    @property
    def num_bytes(self) -> int:
        """Of the states, as far as they are in memory."""
        shelf = self._shelf
        return sum(array.nbytes for array in self._arrays() if shelf is None or not shelf.takes(array.nbytes))
