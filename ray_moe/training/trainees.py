"""The training of one host: the experts it trains, the attempt at a step it is at, and what it could go back to.

`trained_experts.py` knows what the experts are, `attempt.py` what the calls of a step leave; here are the orders, under
one lock. Everything belongs to an *attempt* at a step: what arrives for another one is refused, and `apply` changes the
weights, once per step. It takes no decision: which experts are here, and when a step is applied, a `Coordinator` says.
Called by `runtime/expert_host.py` (calls) and by the actor around the host (everything else). Runs without Ray.

Shape legend: t tokens of a call, n rows (token, expert), D model width.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ray_moe.errors import (
    ExpertFailed,
    InvalidConfig,
    InvalidRequest,
    RayMoEError,
    StaleRouting,
    StepInterrupted,
    StepRefused,
)
from ray_moe.ops.experts import pack, unpack
from ray_moe.ops.lora import ExpertAdapters
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.ops.quantized_training import Compensation
from ray_moe.runtime.expert_host import Outcome
from ray_moe.training.archive import owned_states
from ray_moe.training.attempt import Attempt
from ray_moe.training.gradients import EXPERT_BITS, GradientCompressor, expand
from ray_moe.training.manifest import Shard, Stamp
from ray_moe.training.settings import GradientCompression
from ray_moe.training.shards import AsyncWriter
from ray_moe.training.shelf import DiskShelf, shelf_for
from ray_moe.training.snapshots import Experts, Snapshots, States
from ray_moe.training.trained_experts import TrainedExperts, TrainedLayer, full_name
from ray_moe.transport.base import ExpertCall
from ray_moe.types import HostId, LayerPath

RESIDUALS = "residuals"
"""Name of what this host's replicas have not sent yet, among what is kept of a step."""


@dataclass(frozen=True, slots=True)
class TraineeReport:
    """What a host trains, and what it could go back to."""

    run_id: str
    """Of the run; empty when it trains nothing."""
    life: str
    """Of the coordinator that opened it last."""
    step: int
    """The last one that was applied."""
    owned: dict[LayerPath, tuple[int, ...]]
    held: dict[LayerPath, tuple[int, ...]]
    """The owned ones and replicas."""
    snapshots: dict[int, dict[LayerPath, tuple[int, ...]]]
    """By step: the experts whose state it has, its own and those that it keeps for others."""
    blobs: dict[int, tuple[str, ...]]
    """By step: names of what else it keeps."""
    num_bytes: int
    """Memory that all of this takes."""
    num_parts: int = 1
    """Of each expert of the run: what is called an expert here is a part of one."""


class Trainees:
    """The experts that are being trained on one host. Thread-safe."""

    def __init__(self, host_id: HostId, device: torch.device | str = "cpu") -> None:
        """Args: device: where the experts are, wherever they come from."""
        self.host_id = host_id
        self._device = device
        self._lock = threading.RLock()
        self._writer = AsyncWriter(host_id)
        self._clear("", OptimizerSettings())

    def _clear(
        self,
        run_id: str,
        settings: OptimizerSettings,
        adapters: ExpertAdapters | None = None,
        rounding: Compensation | None = None,
    ) -> None:
        shelf = shelf_for(settings)
        self._run_id, self._life = run_id, ""
        self._settings = settings
        self._num_parts = 1
        self._experts = self._no_experts(shelf, adapters, rounding)
        self.described: Mapping[LayerPath, nn.Module] = {}
        """How experts compute that are not of the service's model."""
        self._step = 0
        self._compressor = GradientCompressor(EXPERT_BITS)
        self.snapshots = Snapshots(self.host_id, shelf)
        self._begin("")

    def _no_experts(
        self, shelf: DiskShelf | None, adapters: ExpertAdapters | None, rounding: Compensation | None
    ) -> TrainedExperts:
        """No experts yet, to be trained as the run has it."""
        return TrainedExperts(self.host_id, self._device, self._settings, shelf, adapters, rounding)

    def _begin(self, attempt: str) -> None:
        self.snapshots.let_go()
        self._compressor.restore()
        self._attempt = Attempt(attempt, self.host_id, self._device)
        self._experts.forget_gradients()

    # --- what is trained here ------------------------------------------------------------------------------
    def open(
        self,
        run_id: str,
        life: str,
        settings: OptimizerSettings,
        step: int,
        adapters: ExpertAdapters | None = None,
        num_parts: int = 1,
        rounding: Compensation | None = None,
    ) -> None:
        """Train for `run_id` from now on, which has made `step` steps; what was trained for another is forgotten.

        Args:
            life: of the run's coordinator, whose attempts alone are begun from now on.
            settings: of the optimizer; others than before count from the next `restore` on.
            adapters: what learns of the experts; None: all.
            num_parts: of each expert, for the report.
            rounding: experts are trained in 8 bits, with this kept of what rounding takes away; None: in float.

        Raises: `InvalidConfig` when the run was begun with other adapters or another rounding, or as `DiskShelf`.
        """
        with self._lock:
            if run_id != self._run_id:
                self._clear(run_id, settings, adapters, rounding)
            elif adapters != self._experts.adapters:
                raise InvalidConfig(
                    f"the run {run_id!r} was begun with adapters of experts {self._experts.adapters}, and now has "
                    f"{adapters}; go on with those, or give this run another name"
                )
            elif rounding != self._experts.rounding:
                raise InvalidConfig(
                    f"the run {run_id!r} was begun with experts in {_bits(self._experts.rounding)}, and now has them "
                    f"in {_bits(rounding)}; go on with those, or have it forgotten first: checkpoints go on with either"
                )
            self._num_parts = num_parts
            self._life, self._settings = life, settings
            self._step = step
            self._begin("")

    def close(self, run_id: str) -> None:
        """Forget everything of `run_id`."""
        with self._lock:
            if run_id == self._run_id:
                self._clear("", OptimizerSettings())

    def describe(self, modules: Mapping[LayerPath, nn.Module]) -> None:
        """Learn how the experts of some layers compute (`models.experts.without_experts`), until another run begins."""
        with self._lock:
            self.described = {layer: module.to(self._device) for layer, module in modules.items()}

    def hold(
        self,
        layer: LayerPath,
        module: nn.Module,
        experts: Mapping[int, Mapping[str, torch.Tensor]],
        owned: Collection[int],
    ) -> None:
        """Train `experts` of `layer` here; those that are here already are replaced.

        Args:
            module: of `transformers`' experts interface, for how they compute; its own stacks are not used.
            experts: what each is: its row of each stack (taken, not copied, where it is on the device already), or what
                `expert_tensors` says.
            owned: those that are stepped here. The others are replicas: their gradients are added up elsewhere.
        """
        with self._lock:
            self._experts.hold(layer, module, experts, owned)

    def drop(self, experts: Experts) -> None:
        """Train `experts` here no more; those that are not here are passed over."""
        with self._lock:
            self._experts.drop(experts)

    def report(self) -> TraineeReport:
        with self._lock:
            return TraineeReport(
                run_id=self._run_id,
                life=self._life,
                step=self._step,
                owned=self._experts.owned,
                held=self._experts.held,
                snapshots=self.snapshots.experts,
                blobs=self.snapshots.blobs,
                num_bytes=self._experts.num_bytes + self._compressor.num_bytes + self.snapshots.num_bytes,
                num_parts=self._num_parts,
            )

    # --- calls ---------------------------------------------------------------------------------------------
    def flops(self, call: ExpertCall) -> int:
        """Floating-point operations of `call`; 0 if it cannot be computed here."""
        here = self._experts.layers.get(call.layer)
        per_row = 0 if here is None else here.flops_per_row
        return per_row * call.num_rows * (1 if call.grad is None else 2 if call.kept else 3)

    def run(self, call: ExpertCall) -> Outcome:
        """Compute `call`: its rows [n, D], or going backward the gradient of each of its tokens [t, D].

        Outcomes that are errors: `StepInterrupted` for another attempt than the present one, `StaleRouting` for an
        expert that is not here, `ExpertFailed` when the computation raised.
        """
        with self._lock:
            try:
                return self._attempt.run(self._layer_of(call), call)
            except RayMoEError as error:
                return error
            except Exception as error:
                return ExpertFailed(f"host {self.host_id}, layer {call.layer}: {type(error).__name__}: {error}")

    def _layer_of(self, call: ExpertCall) -> TrainedLayer:
        if not self._attempt.has(call):
            name = call.call_id.partition("/")[0]
            raise StepInterrupted(f"host {self.host_id} is at attempt {self._attempt.name!r}, and the call of {name!r}")
        here = self._experts.layers.get(call.layer)
        missing = [expert for expert in call.experts if here is None or expert not in here.experts]
        if here is None or missing:
            raise StaleRouting(f"host {self.host_id} does not train experts {missing} of layer {call.layer!r}")
        return here

    # --- a step --------------------------------------------------------------------------------------------
    def begin(self, attempt: str) -> None:
        """Begin the attempt `attempt` at a step: whatever was accumulated for another one is forgotten.

        Args: attempt: ``STEP.LIFE.NUMBER``.

        Raises: `StepInterrupted` when the host is another coordinator's.
        """
        with self._lock:
            if attempt.split(".")[1] != self._life:
                raise StepInterrupted(f"host {self.host_id} is another coordinator's now, of the run {self._run_id!r}")
            if attempt != self._attempt.name:
                self._begin(attempt)

    def gradients(self, attempt: str, experts: Experts, compression: GradientCompression = "none") -> States:
        """The gradients of `experts`, replicas here, for the hosts that step them; nothing of those without any.

        Raises: `StepRefused` when one that is to be compressed is not finite.
        """
        with self._lock:
            self._expect(attempt)
            states: States = {}
            for layer, numbers in experts.items():
                states[layer] = {}
                for expert in numbers:
                    grads = self._experts.gradients(layer, expert)
                    if compression == "1bit":
                        grads = self._compressor.compress(grads, full_name(layer, expert, ""))
                    states[layer][expert] = pack(grads)
            return states

    def add_gradients(self, attempt: str, source: str, states: States) -> None:
        """Add what the replicas at `source` have accumulated; the same source again adds nothing."""
        with self._lock:
            self._expect(attempt)
            if source in self._attempt.added:
                return
            for layer, experts in states.items():
                for expert, arrays in experts.items():
                    parameters = self._experts.parameters(layer, expert)
                    for name, grad in expand(unpack(arrays), parameters, EXPERT_BITS).items():
                        parameter = parameters[name]
                        parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
            self._attempt.added.add(source)

    def sums(self, attempt: str) -> tuple[int, dict[LayerPath, dict[int, float]]]:
        """How many backward calls were counted, and the sum of the squared gradients of each owned expert.

        Raises: `InsufficientResources` when the disk has no room for the step: now, when no host has made it yet.
        """
        with self._lock:
            self._expect(attempt)
            self._experts.optimizer.prepare(missing_as_zero=True)
            return len(self._attempt.counted), self._experts.squares()

    def apply(self, attempt: str, scale: float, lr: float) -> None:
        """Make the step: gradients times `scale`, learning rate `lr`. A step that was made is not made again.

        Raises: `StepRefused` out of order.
        """
        with self._lock:
            step = int(attempt.partition(".")[0])
            if self._step == step:
                return
            self._expect(attempt)
            if self._step != step - 1:
                raise StepRefused(f"host {self.host_id} has made step {self._step} and is told to make step {step}")
            self._experts.optimizer.step(
                lr, grads_scale=scale, missing_as_zero=True
            )  # as rows of one stack are stepped
            self._step = step
            self._compressor.keep(self._experts.replicas())
            self._begin("")

    def _expect(self, attempt: str) -> None:
        if attempt != self._attempt.name:
            raise StepInterrupted(f"host {self.host_id} is at attempt {self._attempt.name!r}, not at {attempt!r}")

    def weights(self, experts: Experts, learned: bool = False) -> States:
        """The weights of `experts` alone, for their replicas; those that can change if `learned`.

        Raises: `NotFound` for an expert that is not here.
        """
        with self._lock:
            return {
                layer: {expert: pack(self._experts.weights(layer, expert, learned)) for expert in numbers}
                for layer, numbers in experts.items()
            }

    @torch.no_grad()
    def merged(self, experts: Experts) -> States:
        """The weights of `experts` as they are without adapters, to serve from. Raises: as `weights`."""
        with self._lock:
            return {
                layer: {expert: pack(self._experts.merged(layer, expert)) for expert in numbers}
                for layer, numbers in experts.items()
            }

    def set_weights(self, states: States) -> None:
        """Take over the weights of experts that are replicas here."""
        with self._lock, torch.no_grad():
            for layer, experts in states.items():
                for expert, arrays in experts.items():
                    self._experts.set_weights(layer, expert, unpack(arrays))

    # --- checkpoints ---------------------------------------------------------------------------------------
    def save(self, folder: Path, stamp: Stamp) -> None:
        """Begin to write the owned experts into the unfinished checkpoint at `folder`; returns when they are copied.

        Raises: `StepRefused` when another step was the last; what went wrong with the checkpoint before.
        """
        with self._lock:
            if stamp.step != self._step:
                raise StepRefused(f"host {self.host_id} is at step {self._step}: it cannot save step {stamp.step}")
            self._writer.save(folder, stamp, owned_states(self._experts.owned, self._experts.saved_tensors))

    def saved(self) -> tuple[Shard, ...]:
        """What it has written, once it is on the disk. Raises: what went wrong."""
        return self._writer.wait()

    # --- going back ----------------------------------------------------------------------------------------
    def state(self, experts: Experts | None = None) -> States:
        """Copies of all that `experts` (None: the owned ones) are: a host that holds them goes on as this one would."""
        with self._lock:
            return {
                layer: {expert: pack(self._experts.tensors(layer, expert)) for expert in sorted(numbers)}
                for layer, numbers in (self._experts.owned if experts is None else experts).items()
            }

    def expert_tensors(self, layer: LayerPath, expert: int) -> dict[str, torch.Tensor]:
        """What an owned expert is: weights by name, and the optimizer's ``exp_avg.NAME``, ``master.NAME`` ... What can
        change is copied.

        Raises: `NotFound` for an expert that is not here.
        """
        with self._lock:
            return self._experts.tensors(layer, expert)

    def snapshot(self, step: int) -> States:
        """Remember the state of the owned experts after `step`, and answer it for the host that keeps a copy.

        Raises: `StepRefused` when another step was the last.
        """
        with self._lock:
            if step != self._step:
                raise StepRefused(f"host {self.host_id} is at step {self._step}: there is no state of step {step}")
            if self._compressor.residuals:
                self.snapshots.keep_blob(step, RESIDUALS, self._compressor.residuals)
            owned = self._experts.owned
            self.snapshots.add(step, {layer: {} for layer in owned})
            for layer, expert in [(layer, expert) for layer, experts in owned.items() for expert in experts]:
                self.snapshots.add(step, self.state({layer: [expert]}))  # one by one: they may leave memory again
            return self.snapshots.find_all(step, owned)

    def restore(self, step: int, modules: Mapping[LayerPath, nn.Module], owned: Experts, states: States) -> None:
        """Be as after `step`, with the experts `owned` and no others.

        Args:
            modules: how the experts of each layer compute, for layers that are new here.
            states: what this host does not remember itself.

        Raises: `NotFound` for a state that is neither given nor remembered, `InvalidRequest` for a layer without
        module, `InvalidConfig` for a state of another optimizer; then nothing has changed.
        """
        with self._lock:
            chosen = {
                layer: {
                    expert: unpack(states.get(layer, {}).get(expert) or self.snapshots.find(step, layer, expert))
                    for expert in numbers
                }
                for layer, numbers in owned.items()
                if numbers
            }
            known = {layer: here.module for layer, here in self._experts.layers.items()} | dict(modules)
            if missing := chosen.keys() - known.keys():
                raise InvalidRequest(f"host {self.host_id} does not know how {sorted(missing)} compute")
            fresh = self._no_experts(shelf_for(self._settings), self._experts.adapters, self._experts.rounding)
            for layer, experts in chosen.items():
                fresh.hold(layer, known[layer], experts, experts.keys())
            self._experts = fresh
            self.snapshots.forget_after(step)  # these steps are made anew
            is_kept = RESIDUALS in self.snapshots.blobs.get(step, ())
            self._compressor.restore(self.snapshots.blob(step, RESIDUALS) if is_kept else {})
            self._step = step
            self._begin("")


def _bits(rounding: Compensation | None) -> str:
    return "float" if rounding is None else f"8 bits (compensation: {rounding})"
