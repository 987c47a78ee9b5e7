"""Experts of a host that are not all in the memory that computes: the hottest are, the others come for their calls.

They come from wherever their reader takes them: the checkpoint's files, or pinned memory of the CPU. One expert
computes at a time, so beyond the budget there is never more than the one that is at it. Which are hot, only uses
decide; knows nothing of versions, calls or Ray. Called by `actors/expert.py`, which makes the groups, and through them
by `runtime/expert_host.py`.

Shape legend: n rows (token, expert), D model width.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ray_moe.errors import ExpertFailed
from ray_moe.ops.experts import MovableGroup

HALF_LIFE_USES = 4096
"""After so many uses of any experts of the host, one use counts half."""


@dataclass(eq=False)
class OffloadedExpert:
    """One expert, wherever it is. When nobody holds it any more, its memory is free."""

    read: Callable[[], MovableGroup]
    """Brings it, as a group of it alone, into the memory that computes."""
    num_bytes: int
    group: MovableGroup | None = None
    """It, while it is resident."""
    heat: float = 0.0
    used: int = 0
    """Number of the use that `heat` is as of."""


class Residents:
    """The offloaded experts of a host that are in the memory that computes, within a budget. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_reads = 0
        """Experts that were brought."""
        self._lock = threading.RLock()
        self._experts: weakref.WeakSet[OffloadedExpert] = weakref.WeakSet()
        self._uses = 0

    @property
    def num_bytes(self) -> int:
        """Of those that are resident."""
        with self._lock:
            return sum(expert.num_bytes for expert in self._experts)

    def use(self, expert: OffloadedExpert) -> MovableGroup:
        """Have the expert in memory. It stays there if it has been hotter than what would have to leave for it.

        Judged by its uses before this one, so that experts which all are as hot do not drive each other out in turn.

        Raises: `ExpertFailed` when it cannot be had.
        """
        with self._lock:
            self._uses += 1
            heat = self._heat(expert)
            expert.heat, expert.used = heat + 1, self._uses
            if expert.group is not None:
                return expert.group
            stays = self._make_room(expert.num_bytes, heat)
            group = self._read(expert)
            if stays:
                self._keep(expert, group)
            return group

    def look_at(self, expert: OffloadedExpert) -> MovableGroup:
        """The same, and nothing changes. Raises: as `use`."""
        with self._lock:
            return expert.group or self._read(expert)

    def fill(self, experts: Iterable[OffloadedExpert]) -> None:
        """Bring those of `experts` for which there is room. Raises: as `use`."""
        for expert in experts:
            with self._lock:
                if expert.group is None and self.num_bytes + expert.num_bytes <= self.max_bytes:
                    self._keep(expert, self._read(expert))

    def _heat(self, expert: OffloadedExpert) -> float:
        return float(expert.heat * 0.5 ** ((self._uses - expert.used) / HALF_LIFE_USES))

    def _make_room(self, num_bytes: int, heat: float) -> bool:
        """Whether there is room for an expert so hot, once all that are cooler have left as far as need be."""
        free_bytes = self.max_bytes - self.num_bytes
        leaving = []
        for other in sorted(self._experts, key=self._heat):
            if free_bytes >= num_bytes:
                break
            if self._heat(other) >= heat:
                return False
            leaving.append(other)
            free_bytes += other.num_bytes
        if free_bytes < num_bytes:
            return False
        for other in leaving:
            other.group = None
            self._experts.discard(other)
        return True

    def _read(self, expert: OffloadedExpert) -> MovableGroup:
        try:
            group = expert.read()
        except Exception as error:  # whatever reading files or taking memory raises
            raise ExpertFailed(f"an offloaded expert could not be brought into memory: {error}") from error
        self.num_reads += 1
        return group

    def _keep(self, expert: OffloadedExpert, group: MovableGroup) -> None:
        expert.group = group
        self._experts.add(expert)


class OffloadedExperts:
    """A `SeparableGroup` of offloaded experts."""

    def __init__(
        self, experts: Sequence[OffloadedExpert], residents: Residents, flops_per_row: int, device: torch.device
    ) -> None:
        self.experts = experts
        self.residents = residents
        self.flops_per_row = flops_per_row
        self.device = device

    def run(self, rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """[n, D] -> [n, D], as every `ExpertGroup`. Raises: `ExpertFailed` when an expert cannot be had."""
        parts = zip(experts, rows.split(list(counts)), strict=True)
        outs = [self.residents.use(self.experts[expert]).run(part, [0], [len(part)]) for expert, part in parts]
        return torch.cat(outs) if outs else rows.clone()

    def warm_up(self) -> None:
        """As `StackedExperts.warm_up`. Raises: `ExpertFailed` when an expert cannot be had."""
        self.residents.look_at(self.experts[0]).warm_up()

    def select(self, experts: Sequence[int]) -> OffloadedExperts:
        """Shares what these experts are with this group: what is nobody's any more is freed, one by one."""
        chosen = [self.experts[expert] for expert in experts]
        return OffloadedExperts(chosen, self.residents, self.flops_per_row, self.device)

    def tensors(self, experts: Sequence[int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """As every `SeparableGroup`. Raises: `ExpertFailed` when an expert cannot be had."""
        own: dict[str, list[torch.Tensor]] = {}
        shared: dict[str, torch.Tensor] = {}
        for expert in experts:
            rows, common = self.residents.look_at(self.experts[expert]).tensors([0])
            shared.update(common)
            for name, tensor in rows.items():
                own.setdefault(name, []).append(tensor)
        return {name: torch.cat(tensors) for name, tensors in own.items()}, shared


def offload_to_files(
    read: Callable[[int], MovableGroup], experts: Sequence[int], expert_bytes: int, residents: Residents
) -> OffloadedExperts:
    """Some experts of a layer that are read when they are needed; those there is room for at once.

    Args:
        read: an expert by its global index, as a group of it alone.
        experts: global indices; the group's local number is the position in the list.
        expert_bytes: of each, as `read` gives it.

    Raises: `ExpertFailed` when they cannot be read.
    """
    return _offloaded([OffloadedExpert(partial(read, expert), expert_bytes) for expert in experts], residents)


def offload_to_cpu(
    group: MovableGroup, num_experts: int, expert_bytes: int, residents: Residents, device: str | torch.device
) -> OffloadedExperts:
    """The experts of a group that is on the CPU, to compute on `device`; what they are is copied into pinned memory."""
    target = torch.device(device)
    experts = []
    for local in range(num_experts):
        one = group.select([local])
        if target.type == "cuda":
            one = one.mapped(torch.Tensor.pin_memory)
        experts.append(OffloadedExpert(partial(_brought, one, target), expert_bytes))
    return _offloaded(experts, residents)


def _brought(group: MovableGroup, device: torch.device) -> MovableGroup:
    return group.mapped(lambda tensor: tensor.to(device, non_blocking=True, copy=True))


def _offloaded(experts: Sequence[OffloadedExpert], residents: Residents) -> OffloadedExperts:
    residents.fill(experts)
    sample = residents.look_at(experts[0])  # shows, too, that they can be had
    return OffloadedExperts(experts, residents, sample.flops_per_row, sample.device)
