"""The experts that are being trained on one host: their parameters, gradients, optimizer and snapshots.

Forward and backward calls of a step only accumulate, each backward call once; `apply` changes the weights, once per
step. Everything belongs to an *attempt* at a step: what arrives for another one is refused. It takes no decision:
which experts are here, and when a step is applied, a `Coordinator` says. Called by `runtime/expert_host.py` (calls) and
by the actor around the host (everything else). Runs without Ray.

Shape legend: t tokens of a call, n rows (token, expert), D model width.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ray_moe.errors import (
    ExpertFailed,
    InvalidConfig,
    InvalidRequest,
    NotFound,
    RayMoEError,
    StaleRouting,
    StepInterrupted,
    StepRefused,
)
from ray_moe.ops import norms
from ray_moe.ops.compression import pack_rows, unpack_rows
from ray_moe.ops.experts import SeparateExperts, pack, unpack
from ray_moe.ops.lora import ExpertAdapters, is_adapter
from ray_moe.ops.optimizers import Optimizer, OptimizerSettings, blank, is_blank
from ray_moe.ops.quantized_training import Compensation, Rounded
from ray_moe.runtime.expert_host import Outcome
from ray_moe.training.archive import owned_states
from ray_moe.training.gradients import EXPERT_BITS, GradientCompressor, expand
from ray_moe.training.manifest import Shard, Stamp
from ray_moe.training.rounding import KEYS, learned, round_matrices, take_over, to_compute, to_train, values
from ray_moe.training.settings import GradientCompression
from ray_moe.training.shards import AsyncWriter
from ray_moe.training.shelf import shelf_for
from ray_moe.training.snapshots import Experts, Snapshots, States
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.types import HostId, LayerPath

REMEMBERED_BYTES = 256 * 2**20
"""Of answers to backward calls of this attempt, kept for calls that are sent again because a line broke."""


RESIDUALS = "residuals"
"""Name of what this host's replicas have not sent yet, among what is kept of a step."""


class _Kept(NamedTuple):
    """What a forward call left for its backward call."""

    tokens: torch.Tensor
    out: torch.Tensor
    experts: list[int]


@dataclass(slots=True)
class _Layer:
    module: nn.Module
    """How its experts compute."""
    experts: dict[int, dict[str, nn.Parameter]] = field(default_factory=dict)
    owned: set[int] = field(default_factory=set)
    """Those that are stepped here; the others are replicas of experts that are stepped elsewhere."""
    rounded: dict[int, dict[str, Rounded]] = field(default_factory=dict)
    """The matrices of those that are trained in 8 bits, whose parameters have no weights."""

    def run(self, rows: torch.Tensor, call: ExpertCall, adapters: ExpertAdapters | None) -> torch.Tensor:
        experts: list[Mapping[str, torch.Tensor]] = [self.experts[expert] for expert in call.experts]
        if adapters is not None:
            experts = [adapters.merged(expert, self.is_transposed) for expert in experts]
        if self.rounded:
            experts = [
                {name: learned(p, small[name]) if name in small else p for name, p in self.experts[number].items()}
                for number, small in ((number, self.rounded[number]) for number in call.experts)
            ]
        return SeparateExperts(self.module, experts).run(rows, call.counts)

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        for small in (each for expert in self.rounded.values() for each in expert.values()):
            return small.dtype
        dtypes = [parameter.dtype for expert in self.experts.values() for parameter in expert.values()]
        return dtypes[0] if dtypes else torch.float32

    @property
    def is_transposed(self) -> bool:
        """Whether matrices are [in, out]."""
        transposed: Any = self.module.is_transposed
        return bool(transposed)


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

    def _clear(self, run_id: str, settings: OptimizerSettings) -> None:
        shelf = shelf_for(settings)
        self._run_id, self._life = run_id, ""
        self._settings = settings
        self._adapters: ExpertAdapters | None = None
        self._rounding: Compensation | None = None
        self._num_parts = 1
        self._optimizer = Optimizer(settings, shelf=shelf)
        self._layers: dict[LayerPath, _Layer] = {}
        self.described: Mapping[LayerPath, nn.Module] = {}
        """How experts compute that are not of the service's model."""
        self._step = 0
        self._compressor = GradientCompressor(EXPERT_BITS)
        self.snapshots = Snapshots(self.host_id, shelf)
        self._begin("")

    def _begin(self, attempt: str) -> None:
        self._attempt = attempt
        self.snapshots.let_go()
        self._compressor.restore()
        self._kept: dict[str, _Kept] = {}
        self._counted: set[str] = set()
        self._added: set[str] = set()
        self._replies: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._reply_bytes = 0
        for layer in self._layers.values():
            for parameters in layer.experts.values():
                for parameter in parameters.values():
                    parameter.grad = None

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
                self._clear(run_id, settings)
            elif adapters != self._adapters:
                raise InvalidConfig(
                    f"the run {run_id!r} was begun with adapters of experts {self._adapters}, and now has {adapters}; "
                    "go on with those, or give this run another name"
                )
            elif rounding != self._rounding:
                raise InvalidConfig(
                    f"the run {run_id!r} was begun with experts in {_bits(self._rounding)}, and now has them in "
                    f"{_bits(rounding)}; go on with those, or have it forgotten first: checkpoints go on with either"
                )
            self._adapters, self._num_parts, self._rounding = adapters, num_parts, rounding
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
            here = self._layers.setdefault(layer, _Layer(module))
            for expert, tensors in experts.items():
                self._release(layer, expert)
                small: dict[str, Rounded] = {}
                if self._rounding is not None:
                    small = here.rounded[expert] = round_matrices(
                        tensors, -2 if here.is_transposed else -1, self._rounding, self._device
                    )
                weights = {
                    name: t.to(self._device) for name, t in tensors.items() if "." not in name and name not in small
                }
                weights |= {name: blank(each.shape, self._device) for name, each in small.items()}
                if self._adapters is not None:
                    weights = self._adapters.added(weights, here.is_transposed, f"{layer}/{expert}")
                elif any(map(is_adapter, weights)):
                    raise InvalidConfig(f"expert {expert} of {layer} has an adapter, and the run is to train it whole")
                here.experts[expert] = {
                    name: nn.Parameter(tensor.detach(), requires_grad=self._adapters is None or is_adapter(name))
                    for name, tensor in weights.items()
                }
                if expert in owned:
                    self._own(layer, expert, tensors)

    def _own(self, layer: LayerPath, expert: int, tensors: Mapping[str, torch.Tensor]) -> None:
        here = self._layers[layer]
        here.owned.add(expert)
        for name, parameter in here.experts[expert].items():
            if not parameter.requires_grad:
                continue
            full, store = _full_name(layer, expert, name), here.rounded.get(expert, {}).get(name)
            self._optimizer.add(full, parameter, store)
            known = {key: tensor for key, tensor in tensors.items() if not key.startswith(KEYS)}
            state = {key.partition(".")[0]: t for key, t in known.items() if key.partition(".")[2] == name}
            if store is not None:
                state.pop("master", None)
            if state:
                self._optimizer.load_state(full, state)

    def _release(self, layer: LayerPath, expert: int) -> None:
        here = self._layers[layer]
        for name, parameter in here.experts.pop(expert, {}).items():
            if expert in here.owned and parameter.requires_grad:
                self._optimizer.remove(_full_name(layer, expert, name))
        here.rounded.pop(expert, None)
        here.owned.discard(expert)

    def drop(self, experts: Experts) -> None:
        """Train `experts` here no more; those that are not here are passed over."""
        with self._lock:
            for layer, numbers in experts.items():
                if layer in self._layers:
                    for expert in numbers:
                        self._release(layer, expert)
                    if not self._layers[layer].experts:
                        del self._layers[layer]

    def report(self) -> TraineeReport:
        with self._lock:
            return TraineeReport(
                run_id=self._run_id,
                life=self._life,
                step=self._step,
                owned={layer: tuple(sorted(here.owned)) for layer, here in self._layers.items()},
                held={layer: tuple(sorted(here.experts)) for layer, here in self._layers.items()},
                snapshots=self.snapshots.experts,
                blobs=self.snapshots.blobs,
                num_bytes=self._num_bytes() + self.snapshots.num_bytes,
                num_parts=self._num_parts,
            )

    def _num_bytes(self) -> int:
        parameters = [p for here in self._layers.values() for each in here.experts.values() for p in each.values()]
        rounded = [each for here in self._layers.values() for small in here.rounded.values() for each in small.values()]
        tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        for name in self._optimizer.names:
            tensors += self._optimizer.in_memory(name)
        tensors += self._compressor.residuals.values()
        plain = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if not is_blank(tensor)}.values())
        return plain + sum(each.nbytes for each in rounded)

    # --- calls ---------------------------------------------------------------------------------------------
    def flops(self, call: ExpertCall) -> int:
        """Floating-point operations of `call`; 0 if it cannot be computed here."""
        here = self._layers.get(call.layer)
        if here is None or not here.experts:
            return 0
        one = next(iter(here.experts.values()))
        per_row = 2 * sum(parameter.numel() for parameter in one.values() if parameter.ndim == 2)
        return per_row * call.num_rows * (1 if call.grad is None else 2 if call.kept else 3)

    def run(self, call: ExpertCall) -> Outcome:
        """Compute `call`: its rows [n, D], or going backward the gradient of each of its tokens [t, D].

        Outcomes that are errors: `StepInterrupted` for another attempt than the present one, `StaleRouting` for an
        expert that is not here, `ExpertFailed` when the computation raised.
        """
        with self._lock:
            try:
                self._check(call)
                if call.grad is None:
                    return self._forward(call)
                with torch.enable_grad():
                    return self._backward(call, call.grad)
            except RayMoEError as error:
                return error
            except Exception as error:
                return ExpertFailed(f"host {self.host_id}, layer {call.layer}: {type(error).__name__}: {error}")

    def _check(self, call: ExpertCall) -> None:
        attempt = call.call_id.partition("/")[0]
        if not attempt or attempt != self._attempt:
            raise StepInterrupted(f"host {self.host_id} is at attempt {self._attempt!r}, and the call of {attempt!r}")
        here = self._layers.get(call.layer)
        missing = [expert for expert in call.experts if here is None or expert not in here.experts]
        if missing:
            raise StaleRouting(f"host {self.host_id} does not train experts {missing} of layer {call.layer!r}")

    def _forward(self, call: ExpertCall) -> ExpertReply:
        layer = self._layers[call.layer]
        if not call.keep:
            with torch.no_grad():
                return _reply(call, self._compute(layer, call, self._tokens(layer, call)))
        with torch.enable_grad():
            tokens = self._tokens(layer, call).requires_grad_(True)
            out = self._compute(layer, call, tokens)
        self._kept[call.call_id] = _Kept(tokens, out, list(call.experts))
        return _reply(call, out.detach())

    def _tokens(self, layer: _Layer, call: ExpertCall) -> torch.Tensor:
        """[t, D], in memory that nobody else writes to while it is kept."""
        tokens = call.tokens().detach().to(self._device)
        if tokens.dtype == torch.uint8:
            return unpack_rows(tokens, layer.dtype)
        return tokens.clone() if call.keep and tokens.data_ptr() == call.hidden.data_ptr() else tokens

    def _compute(self, layer: _Layer, call: ExpertCall, tokens: torch.Tensor) -> torch.Tensor:
        if not call.experts:
            return tokens
        # Autograd keeps the index, and the memory that it came in is used again.
        rows = tokens if call.token is None else tokens.index_select(0, call.token.to(tokens.device, copy=call.keep))
        return layer.run(rows, call, self._adapters).to(call.hidden.device)

    def _backward(self, call: ExpertCall, grad: torch.Tensor) -> ExpertReply:
        if call.call_id in self._counted and call.call_id in self._replies:
            return _reply(call, self._replies[call.call_id])
        layer = self._layers[call.layer]
        if call.kept:
            kept = self._kept.pop(call.call_id, None)
            if kept is None or kept.experts != call.experts:
                raise StepInterrupted(f"host {self.host_id} has not kept the call {call.call_id[:80]!r}")
        else:
            tokens = self._tokens(layer, call).requires_grad_(True)
            kept = _Kept(tokens, self._compute(layer, call, tokens), call.experts)
        parameters = [p for expert in call.experts for p in layer.experts[expert].values() if p.requires_grad]
        grad = grad.to(kept.out.device)
        grad = unpack_rows(grad, kept.out.dtype) if grad.dtype == torch.uint8 else grad.to(kept.out.dtype)
        grad_tokens, *grads = torch.autograd.grad(kept.out, [kept.tokens, *parameters], grad, allow_unused=True)
        if call.call_id not in self._counted:
            self._counted.add(call.call_id)
            for parameter, each in zip(parameters, grads, strict=True):
                if each is not None:
                    parameter.grad = each if parameter.grad is None else parameter.grad.add_(each)
        reply = (torch.zeros_like(kept.tokens) if grad_tokens is None else grad_tokens).to(call.hidden.device)
        self._remember(call.call_id, reply)
        return _reply(call, reply)

    def _remember(self, call_id: str, reply: torch.Tensor) -> None:
        self._replies[call_id] = reply
        self._reply_bytes += reply.nbytes
        while self._reply_bytes > REMEMBERED_BYTES and len(self._replies) > 1:
            _, oldest = self._replies.popitem(last=False)
            self._reply_bytes -= oldest.nbytes

    # --- a step --------------------------------------------------------------------------------------------
    def begin(self, attempt: str) -> None:
        """Begin the attempt `attempt` at a step: whatever was accumulated for another one is forgotten.

        Args: attempt: ``STEP.LIFE.NUMBER``.

        Raises: `StepInterrupted` when the host is another coordinator's.
        """
        with self._lock:
            if attempt.split(".")[1] != self._life:
                raise StepInterrupted(f"host {self.host_id} is another coordinator's now, of the run {self._run_id!r}")
            if attempt != self._attempt:
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
                    grads = _gradients(self._parameters(layer, expert))
                    if compression == "1bit":
                        grads = self._compressor.compress(grads, _full_name(layer, expert, ""))
                    states[layer][expert] = pack(grads)
            return states

    def add_gradients(self, attempt: str, source: str, states: States) -> None:
        """Add what the replicas at `source` have accumulated; the same source again adds nothing."""
        with self._lock:
            self._expect(attempt)
            if source in self._added:
                return
            for layer, experts in states.items():
                for expert, arrays in experts.items():
                    parameters = self._parameters(layer, expert)
                    for name, grad in expand(unpack(arrays), parameters, EXPERT_BITS).items():
                        parameter = parameters[name]
                        parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
            self._added.add(source)

    def sums(self, attempt: str) -> tuple[int, dict[LayerPath, dict[int, float]]]:
        """How many backward calls were counted, and the sum of the squared gradients of each owned expert.

        Raises: `InsufficientResources` when the disk has no room for the step: now, when no host has made it yet.
        """
        with self._lock:
            self._expect(attempt)
            self._optimizer.prepare(missing_as_zero=True)
            return len(self._counted), {
                layer: {
                    expert: math.fsum(norms.squares(_gradients(here.experts[expert]).values()))
                    for expert in sorted(here.owned)
                }
                for layer, here in self._layers.items()
            }

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
            self._optimizer.step(lr, grads_scale=scale, missing_as_zero=True)  # as rows of one stack are stepped
            self._step = step
            self._compressor.keep(self._replicas())
            self._begin("")

    def _replicas(self) -> list[str]:
        """Full names of the parameters that are stepped elsewhere."""
        return [
            _full_name(layer, expert, name)
            for layer, here in self._layers.items()
            for expert, parameters in here.experts.items()
            if expert not in here.owned
            for name in parameters
        ]

    def _expect(self, attempt: str) -> None:
        if attempt != self._attempt:
            raise StepInterrupted(f"host {self.host_id} is at attempt {self._attempt!r}, not at {attempt!r}")

    def weights(self, experts: Experts, learned: bool = False) -> States:
        """The weights of `experts` alone, for their replicas; those that can change if `learned`.

        Raises: `NotFound` for an expert that is not here.
        """
        with self._lock:
            return {
                layer: {expert: pack(self._weights(layer, expert, learned)) for expert in numbers}
                for layer, numbers in experts.items()
            }

    def _weights(self, layer: LayerPath, expert: int, learned: bool) -> dict[str, torch.Tensor]:
        parameters, small = self._parameters(layer, expert), self._rounded(layer, expert)
        plain = {name: p for name, p in parameters.items() if name not in small and (p.requires_grad or not learned)}
        return {**plain, **to_compute(small)}

    @torch.no_grad()
    def merged(self, experts: Experts) -> States:
        """The weights of `experts` as they are without adapters, to serve from. Raises: as `weights`."""
        with self._lock:
            adapters = self._adapters
            return {
                layer: {
                    expert: pack(
                        {**self._parameters(layer, expert), **values(self._rounded(layer, expert))}
                        if adapters is None
                        else adapters.merged(self._parameters(layer, expert), self._layers[layer].is_transposed)
                    )
                    for expert in numbers
                }
                for layer, numbers in experts.items()
            }

    def set_weights(self, states: States) -> None:
        """Take over the weights of experts that are replicas here."""
        with self._lock, torch.no_grad():
            for layer, experts in states.items():
                for expert, arrays in experts.items():
                    parameters, tensors = self._parameters(layer, expert), unpack(arrays)
                    take_over(self._rounded(layer, expert), tensors, self._device)
                    for name, tensor in tensors.items():
                        if not name.startswith(KEYS):
                            parameters[name].copy_(tensor)

    def _parameters(self, layer: LayerPath, expert: int) -> dict[str, nn.Parameter]:
        here = self._layers.get(layer)
        if here is None or expert not in here.experts:
            raise NotFound(f"host {self.host_id} does not train expert {expert} of {layer!r}")
        return here.experts[expert]

    def _rounded(self, layer: LayerPath, expert: int) -> Mapping[str, Rounded]:
        """The matrices of an expert that is here, where it is trained in 8 bits."""
        return self._layers[layer].rounded.get(expert, {})

    # --- checkpoints ---------------------------------------------------------------------------------------
    def save(self, folder: Path, stamp: Stamp) -> None:
        """Begin to write the owned experts into the unfinished checkpoint at `folder`; returns when they are copied.

        Raises: `StepRefused` when another step was the last; what went wrong with the checkpoint before.
        """
        with self._lock:
            if stamp.step != self._step:
                raise StepRefused(f"host {self.host_id} is at step {self._step}: it cannot save step {stamp.step}")
            owned = {layer: sorted(here.owned) for layer, here in self._layers.items()}
            self._writer.save(folder, stamp, owned_states(owned, self._saved_tensors))

    def _saved_tensors(self, layer: LayerPath, expert: int) -> dict[str, torch.Tensor]:
        """What an expert is, with weights that anybody can read."""
        tensors = self.expert_tensors(layer, expert)
        return {**values(self._rounded(layer, expert)), **tensors}

    def saved(self) -> tuple[Shard, ...]:
        """What it has written, once it is on the disk. Raises: what went wrong."""
        return self._writer.wait()

    # --- going back ----------------------------------------------------------------------------------------
    def state(self, experts: Experts | None = None) -> States:
        """Copies of all that `experts` (None: the owned ones) are: a host that holds them goes on as this one would."""
        with self._lock:
            wanted = {layer: here.owned for layer, here in self._layers.items()} if experts is None else experts
            return {
                layer: {expert: pack(self.expert_tensors(layer, expert)) for expert in sorted(numbers)}
                for layer, numbers in wanted.items()
            }

    def expert_tensors(self, layer: LayerPath, expert: int) -> dict[str, torch.Tensor]:
        """What an owned expert is: weights by name, and the optimizer's ``exp_avg.NAME``, ``master.NAME`` ... What can
        change is copied.

        Raises: `NotFound` for an expert that is not here.
        """
        parameters, small = self._parameters(layer, expert), self._rounded(layer, expert)
        tensors = to_train(small)
        for name, parameter in parameters.items():
            if not parameter.requires_grad:  # never changes
                tensors[name] = parameter.detach()
                continue
            if name not in small:
                tensors[name] = parameter.detach().clone()
            full = _full_name(layer, expert, name)
            for key, value in self._optimizer.state_of(full).items():
                if value.data_ptr() != parameter.data_ptr():  # the weights may be their own master
                    tensors[f"{key}.{name}"] = value.clone()
            self._optimizer.let_go(full)
        return tensors

    def snapshot(self, step: int) -> States:
        """Remember the state of the owned experts after `step`, and answer it for the host that keeps a copy.

        Raises: `StepRefused` when another step was the last.
        """
        with self._lock:
            if step != self._step:
                raise StepRefused(f"host {self.host_id} is at step {self._step}: there is no state of step {step}")
            if self._compressor.residuals:
                self.snapshots.keep_blob(step, RESIDUALS, self._compressor.residuals)
            owned = {layer: sorted(here.owned) for layer, here in self._layers.items()}
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
            known = {layer: here.module for layer, here in self._layers.items()} | dict(modules)
            if missing := chosen.keys() - known.keys():
                raise InvalidRequest(f"host {self.host_id} does not know how {sorted(missing)} compute")
            before = self._layers, self._optimizer
            self._layers, self._optimizer = {}, Optimizer(self._settings, shelf=shelf_for(self._settings))
            try:
                for layer, experts in chosen.items():
                    self.hold(layer, known[layer], experts, experts.keys())
            except BaseException:
                self._layers, self._optimizer = before
                raise
            self.snapshots.forget_after(step)  # these steps are made anew
            is_kept = RESIDUALS in self.snapshots.blobs.get(step, ())
            self._compressor.restore(self.snapshots.blob(step, RESIDUALS) if is_kept else {})
            self._step = step
            self._begin("")


def _reply(call: ExpertCall, rows: torch.Tensor) -> ExpertReply:
    """Rows are answered as they came. Raises: `StepRefused` for numbers that cannot be."""
    if call.hidden.dtype != torch.uint8:
        return ExpertReply(rows)
    try:
        return ExpertReply(pack_rows(rows))
    except InvalidRequest as error:
        raise StepRefused(f"coming from {call.layer}: {error}; the step was not made and nothing changed") from None


def _full_name(layer: LayerPath, expert: int, name: str) -> str:
    return f"{layer}/{expert}/{name}"


def _bits(rounding: Compensation | None) -> str:
    return "float" if rounding is None else f"8 bits (compensation: {rounding})"


def _gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
