"""Steps of training as transactions over the hosts that train the experts.

All hosts are in the same attempt at the same step. Workers accumulate; `commit` adds up what replicas have, takes the
norm over everything, and has every host make the step, each once. After a step the state of every host can be copied
to its keeper. When a host is lost, or a commit does not go through everywhere, `recover` takes all hosts back to the
newest step of which every expert's state is somewhere, gives what was lost to those who have it, and the steps since
are made again. It keeps nothing that cannot be asked for, so a new coordinator goes on where one died. One per run;
runs without Ray. Called by `training/trainer.py`.
"""

from __future__ import annotations

import itertools
import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ray_moe.errors import (
    HostLost,
    InvalidCheckpoint,
    InvalidConfig,
    InvalidRequest,
    NotFound,
    RayMoEError,
    StepInterrupted,
    StepRefused,
)
from ray_moe.ops import norms
from ray_moe.ops.experts import unpack
from ray_moe.ops.lora import ExpertAdapters
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.ops.parts import ExpertParts
from ray_moe.ops.quantized_training import Compensation
from ray_moe.policy import ownership
from ray_moe.policy.parts import parts_of
from ray_moe.training.archive import DiskArchive, Saving
from ray_moe.training.checkpoints import folder_of
from ray_moe.training.control import Control, all_of
from ray_moe.training.origin import Origin
from ray_moe.training.rounding import check_rounding
from ray_moe.training.settings import StepSettings
from ray_moe.training.snapshots import States
from ray_moe.training.trainees import TraineeReport
from ray_moe.types import HostAddress, HostId, LayerPath, Placement, RoutingTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovery:
    """Where training goes on after a loss."""

    step: int
    """The last one that still counts."""
    undone: int
    """Steps that were made and have to be made again."""
    lost: tuple[HostId, ...]
    source: str
    """``memory``, ``checkpoint`` or ``model`` (from the beginning)."""


class Coordinator:
    """The hosts of one run of training."""

    def __init__(  # noqa: PLR0913  (as many parts as it has)
        self,
        run_id: str,
        control: Control,
        num_experts: Mapping[LayerPath, int],
        optimizer: OptimizerSettings,
        settings: StepSettings | None = None,
        archive: DiskArchive | None = None,
        origin: Origin | None = None,
        adapters: ExpertAdapters | None = None,
        parts: ExpertParts | None = None,
        rounding: Compensation | None = None,
    ) -> None:
        """
        Args:
            run_id: names the run on the hosts.
            control: gives the orders.
            num_experts: of each layer that is trained; where they are cut, their parts.
            optimizer: of the experts.
            settings: how steps are made.
            archive: its checkpoints, also to fall back to.
            origin: what the experts are at first; None for those of the model that the hosts serve.
            adapters: what learns of the experts; None: all.
            parts: how they are cut; None: they are not.
            rounding: experts are trained in 8 bits, with this kept of what rounding takes away; None: in float.

        Raises: `InvalidConfig` for adapters of experts that are cut: each part would learn one of its own; as
            `check_rounding`.
        """
        self.run_id = run_id
        self.settings = settings or StepSettings()
        self._control = control
        self._num_experts = dict(num_experts)
        self._optimizer = optimizer
        self._archive = archive
        self._origin = origin
        self._adapters = adapters
        self._parts = parts or ExpertParts()
        if adapters is not None and self._parts.number > 1:
            raise InvalidConfig(
                f"experts in {self._parts.number} parts cannot have adapters: each part would learn one of its own; "
                "set experts.tensor to 1, or train.lora.experts to false"
            )
        if rounding is not None:
            check_rounding(optimizer, adapters, self._parts.number)
        self._rounding = rounding
        self._saving: Saving | None = None
        self._life = secrets.token_hex(6)
        """Of this coordinator: calls of an earlier one that are still under way belong to none of its attempts."""
        self._attempts = itertools.count(1)
        self._epoch = 0
        self.step = 0
        self.table = RoutingTable(0, Placement({}))

    # --- the beginning and the end -------------------------------------------------------------------------
    def start(self) -> Recovery:
        """Take the hosts into the run: from what they hold of it, else from a checkpoint, else from the model.

        Raises: `InsufficientResources` without hosts; what the hosts raise.
        """
        recovery = self._settle(self._alive())
        hosts = ", ".join(self.table.addresses)
        logger.info("run %s starts after step %d (%s) on %s", self.run_id, recovery.step, recovery.source, hosts)
        return recovery

    def forget(self) -> None:
        """Have all hosts forget the run."""
        self._everybody("close", self.run_id)

    def leave(self) -> None:
        """Finish what is being saved, and end. The hosts keep what they have."""
        self.finish_save()
        if self._archive is not None:
            self._archive.close()

    # --- a step --------------------------------------------------------------------------------------------
    def begin(self, step: int) -> str:
        """Have all hosts begin an attempt at a step; its name, which no other attempt ever has.

        Raises: `HostLost` and `StepInterrupted` when one cannot (call `recover`).
        """
        attempt = f"{step}.{self._life}.{next(self._attempts)}"
        all_of(self._everybody("begin", attempt))
        return attempt

    def commit(
        self,
        attempt: str,
        num_calls: Mapping[HostId, int],
        square_sum: float,
        lr: float,
        weight: float = 1.0,
        clip_norm: float | None = None,
    ) -> tuple[float, float]:
        """Make the step: once on every host, or on none that counts.

        Args:
            num_calls: backward calls that all workers together have had answered by each host.
            square_sum: of the backbone's gradients.
            lr: learning rate.
            weight: what the gradients that were accumulated are to be divided by.
            clip_norm: largest global norm of what comes of that; None is that of the settings.

        Returns: what the gradients are to be multiplied by, and the global norm before clipping.

        Raises: `StepRefused` for gradients that are not finite (nothing has changed), `HostLost` and `StepInterrupted`
            when it did not go through everywhere (call `recover`).
        """
        self._add_up(attempt)
        sums = all_of(self._everybody("sums", attempt))
        square_sums = [square_sum]
        for host_id, (num_counted, layers) in zip(self.table.addresses, sums, strict=True):
            num_made = num_calls.get(host_id, 0)
            if num_counted != num_made:
                raise StepInterrupted(f"{host_id} has counted {num_counted} backward calls, and {num_made} were made")
            _check_finite(layers)
            square_sums += [value for experts in layers.values() for value in experts.values()]
        if not math.isfinite(square_sum):
            raise StepRefused("the gradient of the backbone is not finite; the step was not made and nothing changed")
        norm = norms.norm(square_sums) / weight
        scale = norms.clip_coefficient(norm, self.settings.clip_norm if clip_norm is None else clip_norm) / weight
        all_of(self._everybody("apply", attempt, scale, lr))
        self.step = _step_of(attempt)
        self._tell_replicas()
        return scale, norm

    def _add_up(self, attempt: str) -> None:
        """Add the gradients of replicas where their experts are stepped, in the same order every time."""
        compression = self.settings.compression(_step_of(attempt))
        orders = []
        for owner, replica, experts in self._replicas():
            grads = self._control.order(replica, "gradients", attempt, experts, compression)
            orders.append(self._control.order(owner, "add_gradients", attempt, replica, grads))
        all_of(self._control.answers(orders))

    def _tell_replicas(self) -> None:
        orders = []
        for owner, replica, experts in self._replicas():
            weights = self._control.order(owner, "weights", experts, True)
            orders.append(self._control.order(replica, "set_weights", weights))
        all_of(self._control.answers(orders))

    def _replicas(self) -> list[tuple[HostId, HostId, dict[LayerPath, list[int]]]]:
        """Owner, replica, and the experts that they share; in the order of the hosts."""
        shared: dict[tuple[HostId, HostId], dict[LayerPath, list[int]]] = {}
        for layer, experts in self.table.placement.hosts_of.items():
            for expert, (owner, *others) in enumerate(experts):
                for other in others:
                    shared.setdefault((owner, other), {}).setdefault(layer, []).append(expert)
        return [(owner, other, shared[owner, other]) for owner, other in sorted(shared)]

    # --- snapshots -----------------------------------------------------------------------------------------
    def snapshot(self, blobs: Mapping[str, Any]) -> None:
        """Have every host remember its state, copied to its keeper, and keep `blobs`, what the workers are.

        Raises: `HostLost` (call `recover`).
        """
        keepers = ownership.keepers(self.table.addresses)
        made = {host: self._control.order(host, "snapshot", self.step) for host in self.table.addresses}
        orders = [self._control.order(keeper, "keep", self.step, made[host]) for host, keeper in keepers.items()]
        for name, blob in blobs.items():
            lent = self._control.lend(blob)
            orders += [self._control.order(host, "keep_blob", self.step, name, lent) for host in self.table.addresses]
        all_of(self._control.answers([*made.values(), *orders]))
        before = self.step - self.settings.snapshot_every
        all_of(self._everybody("forget_before", before))

    def worker(self, recovery: Recovery) -> Any:
        """What the workers were after the step that `recovery` goes on from. Raises: `NotFound`."""
        if recovery.source == "checkpoint" and self._archive is not None:
            return self._archive.worker(recovery.step)
        for answer in self._everybody("blob", recovery.step, "worker"):
            if not isinstance(answer, BaseException):
                return answer
        raise NotFound(f"no host keeps what the workers were after step {recovery.step}")

    def keep(self, blobs: Mapping[str, Any]) -> None:
        """Have every host keep `blobs` beside the state after the last step. Raises `HostLost` (call `recover`)."""
        orders = []
        for name, blob in blobs.items():
            lent = self._control.lend(blob)
            orders += [self._control.order(host, "keep_blob", self.step, name, lent) for host in self.table.addresses]
        all_of(self._control.answers(orders))

    def kept(self, prefix: str) -> dict[str, Any]:
        """What any host keeps beside the state after the last step, by names that begin with `prefix`, in their order.

        Raises: `HostLost`.
        """
        found: dict[str, Any] = {}
        for blobs in all_of(self._everybody("find_blobs", self.step, prefix)):
            found.update(blobs)
        return dict(sorted(found.items()))

    def drop(self, step: int, prefix: str) -> None:
        """Have every host keep these beside the state after `step` no longer. Raises `HostLost`."""
        all_of(self._everybody("drop_blobs", step, prefix))

    def weights(self, layer: LayerPath) -> dict[int, dict[str, torch.Tensor]]:
        """The weights of each expert of a layer after the last step, by name. Raises `HostLost` (call `recover`)."""
        orders = []
        for host in self.table.addresses:
            owned = self._owned(self.table.placement, host).get(layer)
            if owned:
                orders.append(self._control.order(host, "merged", {layer: owned}))
        found: dict[int, dict[str, torch.Tensor]] = {}
        for states in all_of(self._control.answers(orders)):
            found.update({part: unpack(arrays) for part, arrays in states[layer].items()})
        num_parts = self._parts.number
        num_experts = self._num_experts[layer] // num_parts
        return {
            expert: self._parts.join(layer, [found.pop(part) for part in parts_of(expert, num_experts, num_parts)])
            for expert in range(num_experts)
        }

    def layer(self, path: LayerPath) -> dict[str, torch.Tensor]:
        """[E, ...] the same, one expert above the other. Raises `HostLost` (call `recover`)."""
        rows = self.weights(path)
        return {name: torch.stack([rows[expert][name] for expert in sorted(rows)]) for name in rows[0]}

    # --- checkpoints ---------------------------------------------------------------------------------------
    def load(self, step: int) -> Recovery:
        """Take all hosts to the checkpoint of `step`; those of later steps are removed.

        Raises, and nothing has changed: `InvalidConfig` when the run has no archive, `NotFound`, `InvalidCheckpoint`
            (damaged, or of another run). `HostLost`, `StepInterrupted` (call `recover`).
        """
        if self._archive is None:
            raise InvalidConfig("there is nothing to load from: set train.checkpoints.folder")
        self.finish_save()
        self._archive.check(step)
        try:
            recovery = self._settle(self._alive(), step)
        except InvalidCheckpoint as error:  # it was sound a moment ago, and hosts may be there already
            raise StepInterrupted(str(error)) from error
        self._archive.drop_after(step)
        return recovery

    @property
    def saved_steps(self) -> list[int]:
        """Of which there are checkpoints, ascending."""
        return [] if self._archive is None else self._archive.steps()

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step is. Raises: `InvalidConfig` when the run has no archive."""
        if self._archive is None:
            raise InvalidConfig("there are no checkpoints: set train.checkpoints.folder")
        return folder_of(self._archive.root, step)

    def save(self, worker: Mapping[str, Any]) -> None:
        """Begin the checkpoint of the step just made; it is written while training goes on (see `finish_save`).

        Args: worker: `Trainer.state`.

        Raises: what went wrong with the one before; `InvalidConfig` when the run has no archive; `HostLost`.
        """
        self.finish_save()
        if self._archive is None:
            raise InvalidConfig("there is nowhere to save to: set train.checkpoints.folder")
        saving = self._archive.begin(self.step, worker, list(self.table.addresses))
        try:
            all_of(self._everybody("save", saving.draft.folder, saving.draft.stamp))
        except BaseException:
            self._give_up(saving)
            raise
        self._saving = saving

    def finish_save(self) -> Path | None:
        """Wait until the checkpoint that was begun is whole; its folder, None when none was begun.

        A host that was lost meanwhile takes its part with it: then there is no checkpoint of that step, and the one
        before stays.

        Raises: `InsufficientResources` (disk full), `InvalidConfig`: nothing is left of it.
        """
        saving, self._saving = self._saving, None
        if saving is None or self._archive is None:
            return None
        written = self._orders(dict.fromkeys(saving.hosts), "saved")
        try:
            shards = [shard for answer in all_of(written) for shard in answer]
            return self._archive.finish(saving, shards, {"step": saving.step})
        except (HostLost, InvalidRequest) as error:  # the latter where a new life of a host has written nothing
            self._give_up(saving)
            logger.warning("there is no checkpoint of step %d: %s", saving.step, error)
            return None
        except BaseException:
            self._give_up(saving)
            raise

    def _give_up(self, saving: Saving) -> None:
        """Leave nothing of a checkpoint. Those still writing it fail, which must not be taken for the next one's."""
        if self._archive is not None:
            self._archive.give_up(saving)
        self._orders(dict.fromkeys(saving.hosts), "saved")

    # --- losses --------------------------------------------------------------------------------------------
    def recover(self) -> Recovery:
        """Take all hosts that live to the newest step of which everything is left.

        Raises: `InsufficientResources` when none lives; `HostLost` when another one is lost meanwhile (call again);
            `StepRefused` when the hosts have been given to another run, or another coordinator: that one goes on.
        """
        self._control.examine()  # the lines to one that hangs are broken, and its orders would only be late
        before, addresses = self.step, self._alive()
        lost = tuple(sorted(self.table.addresses.keys() - addresses.keys()))
        self._refuse_others()
        recovery = self._settle(addresses)
        recovery = Recovery(recovery.step, max(0, before - recovery.step), lost, recovery.source)
        logger.warning(
            "training goes on after step %d (%s); %d steps are made again; lost: %s",
            recovery.step,
            recovery.source,
            recovery.undone,
            ", ".join(lost) or "nobody",
        )
        return recovery

    def rebalance(self) -> bool:
        """Let hosts that have come share the work, from the step just made on; whether there were any.

        Raises: `HostLost` (call `recover`); `StepRefused` as that.
        """
        if self._control.hosts() == self.table.addresses:  # after every step: the hosts need not be asked
            return False
        addresses = self._alive()
        if addresses == self.table.addresses:
            return False
        self._refuse_others()
        self._settle(addresses)
        return True

    def _refuse_others(self) -> None:
        """Raises `StepRefused` when another coordinator has taken a host since: the one that came last goes on."""
        for host, report in self._reports.items():
            if report.run_id and (report.run_id, report.life) != (self.run_id, self._life):
                raise StepRefused(
                    f"{host} has been given to the run {report.run_id!r} since; this one ({self.run_id!r}) ends after "
                    f"step {self.step}"
                )

    def _alive(self) -> dict[HostId, HostAddress]:
        """Hosts that answer, in the order of their names."""
        hosts = dict(sorted(self._control.hosts().items()))
        promises = [self._control.order(host, "report") for host in hosts]
        self._reports: dict[HostId, TraineeReport] = {}
        for host, answer in zip(hosts, self._control.answers(promises), strict=True):
            if isinstance(answer, TraineeReport):
                self._reports[host] = answer
            elif not isinstance(answer, HostLost):
                raise answer
        return {host: hosts[host] for host in self._reports}

    def _settle(self, addresses: Mapping[HostId, HostAddress], saved: int | None = None) -> Recovery:
        """Find the newest whole step, deal the experts to the hosts that live, and take everybody there.

        Args: addresses: of the hosts that have just reported; saved: take the checkpoint of this step instead.

        Raises: `InvalidConfig` when they have the run in another number of parts.
        """
        reports = {h: r for h, r in self._reports.items() if r.run_id == self.run_id}
        self._refuse_other_parts(reports)
        step, source, holders = self._newest(reports) if saved is None else (saved, "checkpoint", {})
        placement = ownership.assign(
            self._num_experts, list(addresses), self._owners(reports), holders, self.settings.num_replicas
        )
        how = (self._optimizer, step, self._adapters, self._parts.number, self._rounding)
        all_of(self._orders(addresses, "open", self.run_id, self._life, *how))
        if self._origin is not None:
            all_of(self._orders(addresses, "describe", self._control.lend(self._origin.modules)))
        if source == "model":
            self._load(addresses, placement)
        else:
            self._restore(addresses, placement, step, holders)
        self._epoch += 1
        self.step = step
        self.table = RoutingTable(self._epoch, placement, addresses)
        self._fill_replicas()
        return Recovery(step, 0, (), source)

    def _refuse_other_parts(self, reports: Mapping[HostId, TraineeReport]) -> None:
        """Raises `InvalidConfig` when hosts have the run with experts in another number of parts."""
        for host, report in reports.items():
            if report.num_parts != self._parts.number:
                raise InvalidConfig(
                    f"the run {self.run_id!r} is on {host} with each expert in {report.num_parts} parts, and now it is "
                    f"to be in {self._parts.number}; go on as it was begun, or have it forgotten first: checkpoints of "
                    "it go on with any number"
                )

    def _owners(self, reports: Mapping[HostId, TraineeReport]) -> Placement:
        """Who steps what at this moment, by what the hosts say."""
        owners: dict[LayerPath, list[tuple[HostId, ...]]] = {
            layer: [()] * count for layer, count in self._num_experts.items()
        }
        for host, report in reports.items():
            for layer, experts in report.owned.items():
                for expert in experts:
                    owners[layer][expert] = (host,)
        return Placement({layer: tuple(hosts) for layer, hosts in owners.items()})

    def _newest(self, reports: Mapping[HostId, TraineeReport]) -> tuple[int, str, ownership.Holders]:
        """The newest step of which the state of every expert is known, from where, and who has it."""
        on_disk = [] if self._archive is None else sorted(self._archive.steps())
        last = on_disk[-1] if on_disk else 0
        steps = sorted({step for report in reports.values() for step in report.snapshots}, reverse=True)
        for step in steps:
            holders: dict[LayerPath, dict[int, list[HostId]]] = {}
            for host, report in reports.items():
                for layer, experts in report.snapshots.get(step, {}).items():
                    for expert in experts:
                        holders.setdefault(layer, {}).setdefault(expert, []).append(host)
            whole = all(len(holders.get(layer, {})) == count for layer, count in self._num_experts.items())
            kept = any("worker" in report.blobs.get(step, ()) for report in reports.values())
            if whole and kept and step >= last:
                return step, "memory", holders
        return (last, "checkpoint", {}) if on_disk else (0, "model", {})

    def _load(self, addresses: Mapping[HostId, Any], placement: Placement) -> None:
        """Every owner reads its experts from the model, or is given them."""
        orders = []
        for host in addresses:
            owned = self._owned(placement, host)
            orders.append(self._control.order(host, "restore", 0, {}))
            if self._origin is None:
                orders.append(self._control.order(host, "load", owned))
            else:
                orders.append(self._control.order(host, "hold", self._origin.states(owned)))
        all_of(self._control.answers(orders))

    def _restore(
        self, addresses: Mapping[HostId, Any], placement: Placement, step: int, holders: ownership.Holders
    ) -> None:
        """Every owner takes its experts from itself, from who has them, or from the archive."""
        orders = []
        for host in addresses:
            owned = self._owned(placement, host)
            wanted: dict[HostId, dict[LayerPath, list[int]]] = {}
            for layer, experts in owned.items():
                for expert in experts:
                    having = holders.get(layer, {}).get(expert, ())
                    if host not in having:
                        source = next(iter(having), "")
                        wanted.setdefault(source, {}).setdefault(layer, []).append(expert)
            states = [
                self._control.order(source, "find_all", step, experts) if source else self._read(step, experts)
                for source, experts in sorted(wanted.items())
            ]
            orders.append((host, owned, states))
        done = [self._control.order(host, "restore", step, owned, *states) for host, owned, states in orders]
        all_of(self._control.answers(done))

    def _read(self, step: int, experts: Mapping[LayerPath, Sequence[int]]) -> States:
        if self._archive is None:
            raise RayMoEError("there is no archive to read from")
        return self._archive.states(step, experts)

    def _fill_replicas(self) -> None:
        orders = []
        for owner, replica, experts in self._replicas():
            orders.append(self._control.order(replica, "replicate", self._control.order(owner, "weights", experts)))
        all_of(self._control.answers(orders))

    @staticmethod
    def _owned(placement: Placement, host: HostId) -> dict[LayerPath, list[int]]:
        owned = {
            layer: [expert for expert, hosts in enumerate(experts) if hosts[0] == host]
            for layer, experts in placement.hosts_of.items()
        }
        return {layer: experts for layer, experts in owned.items() if experts}

    def _everybody(self, method: str, *arguments: Any) -> list[Any]:
        return self._orders(self.table.addresses, method, *arguments)

    def _orders(self, hosts: Mapping[HostId, Any], method: str, *arguments: Any) -> list[Any]:
        return self._control.answers([self._control.order(host, method, *arguments) for host in hosts])


def _step_of(attempt: str) -> int:
    return int(attempt.partition(".")[0])


def _check_finite(layers: Mapping[LayerPath, Mapping[int, float]]) -> None:
    for layer, experts in layers.items():
        for expert, value in experts.items():
            if not math.isfinite(value):
                raise StepRefused(
                    f"the gradient of expert {expert} of {layer} is not finite; the step was not made, nothing changed"
                )
