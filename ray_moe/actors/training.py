"""Training on the expert actors of a service: a coordinator's orders as calls of actors, and a worker put together.

A shell: steps are `training/trainer.py` and `training/coordinator.py`. Called by `service/training.py` (workers of Ray
Train) and by `actors/trainer.py` (training as a service).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from torch import nn

from ray_moe.actors import logs
from ray_moe.actors.lines import make_transport
from ray_moe.actors.spec import ServiceSpec
from ray_moe.config import Config
from ray_moe.config_methods import OF_GATES
from ray_moe.config_train import TrainConfig, check_experts
from ray_moe.errors import HostLost, InvalidConfig, RayMoEError, StepInterrupted, Unavailable
from ray_moe.models.experts import install
from ray_moe.models.gate_trial import GateTrial
from ray_moe.models.huggingface import Checkpoint
from ray_moe.models.lora import add_adapters, whole_state
from ray_moe.ops.capacity import CapacitySettings
from ray_moe.ops.gates.registry import GateChoice
from ray_moe.ops.lora import ExpertAdapters
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.ops.schedules import ScheduleSettings, factor
from ray_moe.training.archive import LORA_SCALE, DiskArchive
from ray_moe.training.auxiliary import LossWithAuxiliary
from ray_moe.training.control import Promise
from ray_moe.training.coordinator import Coordinator
from ray_moe.training.data import open_data, windows_of
from ray_moe.training.dispatcher import TrainingDispatcher
from ray_moe.training.export import export_running
from ray_moe.training.gating import MethodSettings, check_gate, make_methods, place_gates
from ray_moe.training.group import Alone, Group, TorchGroup
from ray_moe.training.loop import LoopSettings, Progress, run
from ray_moe.training.manifest import fingerprint
from ray_moe.training.settings import ExchangeSettings, StepSettings
from ray_moe.training.trainer import Trainer, causal_lm_loss
from ray_moe.types import HostAddress, HostId

logger = logging.getLogger(__name__)

ORDER_TIMEOUT_S = 300.0
"""An actor that has not done what it was ordered by then is taken for lost: reading many experts takes its time."""


class RayControl:
    """Orders to the expert actors of a service.

    One that hangs is put down by the controller, which looks whether it does when an answer is late.
    """

    def __init__(self, spec: ServiceSpec) -> None:
        self._spec = spec
        self._late_s = spec.config.train.call_timeout_s
        self._addresses: Mapping[HostId, HostAddress] = {}
        self._handles: dict[HostId, Any] = {}

    def hosts(self) -> Mapping[HostId, HostAddress]:
        try:
            controller = self._spec.find("controller")
            addresses: Mapping[HostId, HostAddress] = ray.get(controller.addresses.remote(), timeout=ORDER_TIMEOUT_S)
        except (RayError, ValueError) as error:  # it is being restarted
            raise StepInterrupted(f"the controller does not answer ({type(error).__name__})") from error
        self._addresses = addresses
        return addresses

    def examine(self) -> None:
        with contextlib.suppress(RayError, ValueError):  # no controller: then there is nobody to put them down
            controller = self._spec.find("controller")
            for address in self._addresses.values():
                controller.host_slow.remote(address, self._late_s)

    def order(self, host_id: HostId, method: str, *arguments: Any) -> Promise:
        try:
            handle = self._handles.get(host_id) or self._spec.find(host_id)
        except ValueError:
            return HostLost(f"host {host_id} is gone")
        self._handles[host_id] = handle
        for argument in arguments:
            if isinstance(argument, BaseException):
                return argument
        return handle.training.remote(method, *arguments)

    def lend(self, value: Any) -> Promise:
        return ray.put(value)

    def answers(self, promises: Sequence[Promise]) -> list[Any]:
        return [self._answer(promise) for promise in promises]

    def _answer(self, promise: Promise) -> Any:
        if isinstance(promise, BaseException):
            return promise
        given_up_s = time.monotonic() + ORDER_TIMEOUT_S
        try:
            while not ray.wait([promise], timeout=self._late_s)[0] and time.monotonic() < given_up_s:
                self.examine()
            return ray.get(promise, timeout=self._late_s)
        except RayTaskError as error:
            if isinstance(error.cause, RayMoEError):
                return error.cause
            if isinstance(error.cause, RayError):  # what it was to be given is lost
                return HostLost(str(error.cause).splitlines()[0])
            raise
        except GetTimeoutError:
            return HostLost(f"an expert actor has not obeyed within {ORDER_TIMEOUT_S:g} s")
        except RayError as error:
            self._handles.clear()  # a handle of an actor that was replaced is of no use
            return HostLost(f"an expert actor has died: {type(error).__name__}")


# --- A worker ------------------------------------------------------------------------------------------------
def make_trainer(spec: ServiceSpec, group: Group, checkpoint: Checkpoint | None = None) -> Trainer:
    """A worker on this process: the backbone read from the service's checkpoint, and lines to its expert actors.

    Raises: `InvalidConfig` when nothing would be trained; as `check_parts`; as `Checkpoint.open`.
    """
    config, train = spec.config, spec.config.train
    check_parts(spec)
    device = "cuda" if train.num_gpus else "cpu"
    torch.set_num_threads(train.num_threads)
    checkpoint = checkpoint or Checkpoint.open(config.model)
    exchange = ExchangeSettings(
        # What the first of two forward passes would keep, nobody would ever fetch.
        # And with experts in 8 bits it would have their weights in float.
        recompute=train.recompute or train.gradient_checkpointing or train.quantization != "none",
        call_timeout_s=train.call_timeout_s,
        wire=train.wire,
        num_parts=config.experts.tensor,
    )
    transport = make_transport(spec, device, lambda address: None)
    dispatcher = TrainingDispatcher(transport, exchange, str(group.rank))
    optimizer = optimizer_settings(train)
    settings = step_settings(train)
    coordinator = None
    if group.rank == 0:
        num_experts = {layer.path: layer.num_experts for layer in spec.layers}
        archive = make_archive(config, checkpoint)
        lora = train.lora
        adapters = ExpertAdapters(lora.rank, lora.alpha, train.seed) if lora is not None and lora.experts else None
        control = RayControl(spec)
        parts = checkpoint.cut(config.experts.tensor).parts
        coordinator = Coordinator(
            train.run_id,
            control,
            num_experts,
            optimizer,
            settings,
            archive,
            adapters=adapters,
            parts=parts,
            rounding=None if train.quantization == "none" else train.compensation,
        )
    model, coefficients = make_backbone(checkpoint, train, dispatcher, device), train.auxiliary.coefficients
    methods = make_methods(model, method_settings(train))
    return Trainer(
        model,
        dispatcher,
        optimizer,
        coordinator=coordinator,
        group=group,
        settings=settings,
        loss=LossWithAuxiliary(model, coefficients) if coefficients else causal_lm_loss,
        schedule=schedule(train),
        prepare=methods.apply if methods is not None else lambda step: None,
    )


def check_parts(spec: ServiceSpec) -> None:
    """Raises: `InvalidConfig` where training is to have experts cut in another way than the service has them."""
    there, wanted = spec.config.experts.tensor, spec.config.train.parallel.tensor
    if wanted not in (None, there):
        raise InvalidConfig(
            f"train.parallel.tensor is {wanted}, and the service {spec.name!r} was started with experts.tensor "
            f"{there}; leave it out, set it to {there}, or start the service anew with experts.tensor {wanted}"
        )
    try:
        check_experts(spec.config.train, there)
    except ValueError as error:
        raise InvalidConfig(str(error)) from None


def make_backbone(checkpoint: Checkpoint, train: TrainConfig, dispatcher: TrainingDispatcher, device: str) -> nn.Module:
    """The model with remote experts, ready to be trained.

    Raises: `InvalidConfig` for a pattern that names nothing; as `check_gate`.
    """
    model: Any = checkpoint.load_backbone(device=device)
    install(model, dispatcher.forward)
    model.config.use_cache = False
    choice, gates = gate_choice(train), []
    if choice is not None:
        try_choice(checkpoint, train)
        gates = place_gates(model, choice, train.seed)
    if train.lora is not None:
        lora = train.lora
        add_adapters(model, lora.rank, lora.alpha, lora.dropout, lora.target_modules, train.seed)
    names = dict(model.named_parameters())
    for name, parameter in names.items():
        parameter.requires_grad_(
            parameter.is_floating_point()
            and not any(fnmatchcase(name, pattern) for pattern in train.freeze)
            and (train.lora is None or ".lora_" in name or name.startswith(tuple(f"{path}." for path in gates)))
        )
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    trained: nn.Module = model.train()
    return trained


def make_publisher(spec: ServiceSpec, trainer: Trainer, checkpoint: Checkpoint) -> Callable[[int], str]:
    """What publishes the weights after a step: exports them, and has the service take them up.

    Older ones that the service does not hold any more are removed. The first worker calls it.
    """
    coordinator = trainer.coordinator

    def publish(step: int) -> str:
        if coordinator is None:
            raise InvalidConfig("only the first worker can publish: it alone asks the hosts for their experts")
        controller = spec.find("controller")
        try:
            held = [version.model for version in ray.get(controller.versions.remote())]
            root, backbone = spec.config.train.publish_folder, whole_state(trainer.model)
            folder = export_running(checkpoint, root, step, backbone, coordinator.weights, held)
            status = ray.get(controller.publish.remote(str(folder)))
        except RayTaskError as error:
            if isinstance(error.cause, RayMoEError):
                raise error.cause from None
            raise
        return f"published step {step} as version {status.number}, from {folder}"

    return publish


def optimizer_settings(train: TrainConfig) -> OptimizerSettings:
    """Raises: `InvalidConfig`."""
    return OptimizerSettings(**train.optimizer.model_dump())


def step_settings(train: TrainConfig) -> StepSettings:
    warmup = train.compression_warmup_steps
    return StepSettings(
        clip_norm=train.clip_norm,
        snapshot_every=train.snapshot_every,
        num_replicas=train.parallel.replicas,
        in_flight=train.in_flight,
        gradient_compression=train.gradient_compression,
        compression_warmup_steps=train.steps // 5 if warmup is None else warmup,
        seed=train.seed,
    )


def schedule(train: TrainConfig) -> Any:
    """Learning rate of a step, which counts from 1. Raises: `InvalidConfig`."""
    ends = train.schedule.kind in ("linear", "cosine", "wsd")
    settings = ScheduleSettings(**train.schedule.model_dump(), total_steps=train.steps if ends else None)
    # The first step is made with the rate of step 1: with that of 0 it would change nothing.
    return lambda step: train.optimizer.lr * factor(settings, step if train.schedule.warmup_steps else step - 1)


def gate_choice(train: TrainConfig) -> GateChoice | None:
    """The gate in the place of the model's routers; None for these."""
    options = dict(train.gate)
    name = options.pop("name", None)
    return None if name is None else GateChoice(str(name), options)


def try_choice(checkpoint: Checkpoint, train: TrainConfig) -> GateTrial | None:
    """What that gate is in this model; None for the model's own. Raises: as `check_gate`; `InvalidConfig`."""
    choice = gate_choice(train)
    losses = [name for name in OF_GATES if name in train.auxiliary.coefficients]
    if choice is None:
        return None
    trial = check_gate(checkpoint, choice, losses)
    if trial.takes_ids and train.gradient_checkpointing:
        raise InvalidConfig(
            f"the gate {choice.name!r} goes by the tokens' ids, which it would not hear when activations are computed "
            "again: set train.gradient_checkpointing to false"
        )
    return trial


def method_settings(train: TrainConfig) -> MethodSettings:
    """Raises: `InvalidConfig`."""
    methods = train.methods
    active, limited = methods.active_experts, methods.capacity
    return MethodSettings(
        first_active=active.first,
        active_steps=active.steps,
        active_begin=active.begin,
        active_shape=active.shape,
        learns_from=methods.freeze_gate.before,
        learns_until=methods.freeze_gate.after,
        random_steps=methods.random_routing,
        expert_dropout=methods.expert_dropout,
        capacity=None if limited.factor is None else CapacitySettings(**limited.model_dump()),
        seed=train.seed,
    )


def make_archive(config: Config, checkpoint: Checkpoint) -> DiskArchive | None:
    train = config.train
    if not train.checkpoints.folder:
        return None
    return DiskArchive(
        Path(train.checkpoints.folder),
        train.run_id,
        config.model,
        fingerprint(checkpoint.files.config),
        {path: layer.num_experts for path, layer in checkpoint.layers.items()},
        checkpoint.dtype,
        train.checkpoints.keep,
        {} if train.lora is None else {LORA_SCALE: torch.tensor(train.lora.alpha / train.lora.rank)},
        checkpoint.cut(config.experts.tensor).parts,
        gate_choice(train),
    )


# --- A worker of Ray Train -----------------------------------------------------------------------------------
def work(settings: Mapping[str, Any]) -> None:
    """What each worker of Ray Train does: take its part in the run, from wherever the run is, to its end.

    Args: settings: as Ray Train passes them on; `spec` is the service's, `corpus` a reference to what to learn from
        (`training.documents.Corpus`), or None for what the settings name.
    """
    import ray.train

    spec: ServiceSpec = settings["spec"]
    context = ray.train.get_context()
    logs.configure(spec.config.logs, f"worker-{context.get_world_rank()}")
    group: Group = TorchGroup() if context.get_world_size() > 1 else Alone()
    teller = Teller(spec, is_first=group.rank == 0)
    try:
        _work(spec, group, teller, settings["corpus"])
    except Unavailable:
        raise  # Ray Train starts the workers again
    except RayMoEError as error:  # it would come again
        teller.tell(Progress(0, spec.config.train.steps, failure=error))
    finally:
        teller.close()


def _work(spec: ServiceSpec, group: Group, teller: Teller, corpus: Any) -> None:
    train = spec.config.train
    checkpoint = Checkpoint.open(spec.config.model)
    if corpus is None:
        data = open_data(train.data, vocab_size=checkpoint.vocab_size, tokenizer=checkpoint.load_tokenizer())
    else:
        data = windows_of(ray.get(corpus), checkpoint.vocab_size)
    trainer = make_trainer(spec, group, checkpoint)
    try:
        trainer.start()
        run(trainer, data, loop_settings(train), teller.tell, make_publisher(spec, trainer, checkpoint))
    finally:
        trainer.close()


def loop_settings(train: TrainConfig) -> LoopSettings:
    return LoopSettings(
        steps=train.steps,
        batch_size=train.batch_size,
        micro_batches=train.micro_batches * train.parallel.data,
        window=train.sequence_length,
        seed=train.seed,
        save_every=train.checkpoints.every if train.checkpoints.folder else 0,
        publish_every=train.publish_every,
        report_every=train.report_every,
        validation_every=train.validation_every,
        validation_batches=train.validation_batches * train.parallel.data,
    )


class Teller:
    """Tells how far a run is: the service's controller, Ray Train, and TensorBoard's files."""

    def __init__(self, spec: ServiceSpec, is_first: bool) -> None:
        self._controller = spec.find("controller") if is_first else None
        self._board: Any = None
        if spec.config.train.logs and is_first:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(os.path.join(spec.config.train.logs, spec.config.train.run_id))

    def tell(self, progress: Progress) -> None:
        import ray.train

        if self._controller is not None:
            ray.get(self._controller.training_told.remote(progress), timeout=ORDER_TIMEOUT_S)
        ray.train.report(progress.metrics())
        if self._board is not None:
            for name, value in progress.metrics().items():
                if name != "step":
                    self._board.add_scalar(f"train/{name}", value, progress.step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
