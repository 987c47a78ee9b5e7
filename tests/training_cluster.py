"""A run of training in one process: hosts over the local transport, workers as threads. No Ray, no sockets."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ray_moe.models.experts import drop_parameters, expert_rows, experts_modules, install
from ray_moe.ops.lora import ExpertAdapters
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.ops.parts import ExpertParts, axes_of
from ray_moe.ops.quantized_training import Compensation
from ray_moe.policy.parts import parts_of, whole_of
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.training.archive import DiskArchive
from ray_moe.training.control import LocalControl, LocalHost
from ray_moe.training.coordinator import Coordinator
from ray_moe.training.dispatcher import TrainingDispatcher
from ray_moe.training.reports import StepReport
from ray_moe.training.settings import ExchangeSettings, StepSettings
from ray_moe.training.trainees import Trainees
from ray_moe.training.trainer import Batch, Trainer
from ray_moe.transport.local import FaultPlan, LocalTransport
from ray_moe.types import HostId, LayerPath


class ThreadGroup:
    """Workers that are threads of this process."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._values: list[Any] = [None] * size
        self.members = [_Member(self, rank, size) for rank in range(size)]

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait(60)
        values = list(self._values)
        self._barrier.wait(60)
        return values


class _Member:
    def __init__(self, group: ThreadGroup, rank: int, size: int) -> None:
        self._group, self.rank, self.size = group, rank, size

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        every = self._group.exchange(self.rank, [tensor.clone() for tensor in tensors])
        for tensor, parts in zip(tensors, zip(*every, strict=True), strict=True):
            tensor.copy_(sum(parts[1:], start=parts[0]))

    def gather(self, value: Any) -> list[Any]:
        return self._group.exchange(self.rank, value)

    def share(self, value: Any) -> Any:
        return self._group.exchange(self.rank, value)[0]


def together(workers: Sequence[Any], do: Callable[[Any], Any], timeout_s: float = 120) -> list[Any]:
    """What comes of doing it with every worker, each in a thread of its own. Raises what the first of them raises, and
    `TimeoutError` where one has not ended in time."""
    results: list[Any] = [None] * len(workers)

    def run(number: int) -> None:
        try:
            results[number] = do(workers[number])
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(workers))]
    ends_s = time.monotonic() + timeout_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, ends_s - time.monotonic()))
    for result in results:
        if isinstance(result, BaseException):
            raise result
    if late := [number for number, thread in enumerate(threads) if thread.is_alive()]:
        raise TimeoutError(f"workers {late} of {len(workers)} have not ended after {timeout_s} s")
    return results


class Cluster:
    """`num_hosts` hosts and `num_workers` workers that train a copy of `model`."""

    def __init__(
        self,
        model: nn.Module,
        num_hosts: int = 2,
        num_workers: int = 1,
        *,
        optimizer: OptimizerSettings | None = None,
        settings: StepSettings | None = None,
        exchange: ExchangeSettings | None = None,
        faults: FaultPlan | None = None,
        archive: DiskArchive | None = None,
        adapters: ExpertAdapters | None = None,
        rounding: Compensation | None = None,
        **trainer: Any,
    ) -> None:
        self.adapters, self.rounding = adapters, rounding
        self.origin = copy.deepcopy(model)
        self.modules = experts_modules(self.origin)
        number = 1 if exchange is None else exchange.num_parts
        cut = self.modules if number > 1 else {}
        self.parts = ExpertParts(number, {path: axes_of(each, path, number) for path, each in cut.items()})
        self.trainees: dict[HostId, Trainees] = {}
        hosts = {f"expert-{number}": self._host(f"expert-{number}") for number in range(num_hosts)}
        self.transport = LocalTransport(hosts, faults)
        self.control = LocalControl({})
        for host_id in hosts:
            self._admit(host_id)
        self.transport.on_kill = self.control_loses
        self.settings = settings or StepSettings()
        self.optimizer = optimizer or OptimizerSettings(kind="sgd", lr=0.1)
        group = ThreadGroup(num_workers)
        self.trainers: list[Trainer] = []
        for member in group.members:
            dispatcher = TrainingDispatcher(self.transport, exchange, str(member.rank))
            backbone = copy.deepcopy(self.origin)
            drop_parameters(backbone)
            install(backbone, dispatcher.forward)
            self.trainers.append(
                Trainer(
                    backbone,
                    dispatcher,
                    self.optimizer,
                    coordinator=self.coordinator(archive) if member.rank == 0 else None,
                    group=member,
                    settings=self.settings,
                    **trainer,
                )
            )

    def coordinator(self, archive: DiskArchive | None = None) -> Coordinator:
        numbers = {path: number * self.parts.number for path, number in self.num_experts.items()}
        return Coordinator(
            "run",
            self.control,
            numbers,
            self.optimizer,
            self.settings,
            archive,
            adapters=self.adapters,
            parts=self.parts,
            rounding=self.rounding,
        )

    @property
    def num_experts(self) -> dict[LayerPath, int]:
        """Of each layer, not cut."""
        return {path: len(next(module.parameters())) for path, module in self.modules.items()}

    # --- hosts ---------------------------------------------------------------------------------------------
    def _host(self, host_id: HostId) -> ExpertHost:
        device = next((parameter.device for parameter in self.origin.parameters()), "cpu")
        self.trainees[host_id] = Trainees(host_id, device)
        return ExpertHost(host_id, self.trainees[host_id])

    def _admit(self, host_id: HostId) -> None:
        trainees = self.trainees[host_id]

        def load(experts: Mapping[LayerPath, Sequence[int]]) -> None:
            for layer, numbers in experts.items():
                places = {number: whole_of(number, self.num_experts[layer]) for number in numbers}
                rows = {
                    number: self.parts.cut(layer, expert_rows(self.modules[layer], expert), part)
                    for number, (expert, part) in places.items()
                }
                trainees.hold(layer, self.modules[layer], rows, numbers)

        self.control.local[host_id] = LocalHost(
            trainees, self.transport.address(host_id), self.modules.__getitem__, load
        )

    def control_loses(self, host_id: HostId) -> None:
        self.control.local.pop(host_id, None)

    def kill(self, host_id: HostId) -> None:
        self.transport.kill(host_id)

    def revive(self, host_id: HostId) -> None:
        """A new life of the host, which holds nothing."""
        self.transport.revive(host_id, self._host(host_id))
        self._admit(host_id)

    # --- training ------------------------------------------------------------------------------------------
    def start(self) -> None:
        self.together(lambda trainer: trainer.start())

    def train(self, last: int, batches: Callable[[int, int], Sequence[Batch]]) -> list[StepReport]:
        """Up to step `last`; what the first worker reports. Args: batches: by step and worker."""

        def loop(trainer: Trainer) -> list[StepReport]:
            reports = []
            rank = self.trainers.index(trainer)
            while trainer.step < last:
                reports.append(trainer.make_step(lambda step: batches(step, rank)))
                if reports[-1].outcome == "refused":
                    break
            return reports

        return self.together(loop)[0]

    def together(self, do: Callable[[Trainer], Any]) -> list[Any]:
        """What every worker answers, each in a thread of its own."""
        return together(self.trainers, do)

    # --- what came of it -----------------------------------------------------------------------------------
    def experts(self) -> dict[str, torch.Tensor]:
        """By the name that the parameter has in the model: [E, ...] what the owners of the experts have made of it."""
        stacks = {}
        for layer, module in self.modules.items():
            owners = {e: t for t in self.trainees.values() for e in t.report().owned.get(layer, ())}
            number = self.num_experts[layer]
            experts = [
                self.parts.join(
                    layer,
                    [owners[part].expert_tensors(layer, part) for part in parts_of(expert, number, self.parts.number)],
                )
                for expert in range(number)
            ]
            for name, _ in module.named_parameters():
                stacks[f"{layer}.{name}"] = torch.stack([expert[name] for expert in experts])
        return stacks
