"""Training somebody's own network with its experts on hosts: taking them out, and bringing them home.

Any `torch` network with `MoELayer`s will do, or a model of `transformers` in this process. Runs without Ray;
`ray_moe.remote_trainer` (`service/network.py`) does it with the expert actors of a service.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.models.experts import drop_parameters, install
from ray_moe.ops.lora import ExpertAdapters
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.ops.quantized_training import Compensation
from ray_moe.training.archive import DiskArchive
from ray_moe.training.control import Control
from ray_moe.training.coordinator import Coordinator
from ray_moe.training.dispatcher import TrainingDispatcher
from ray_moe.training.group import Alone, Group
from ray_moe.training.manifest import fingerprint
from ray_moe.training.origin import Origin
from ray_moe.training.settings import ExchangeSettings, StepSettings
from ray_moe.training.trainer import Loss, Trainer
from ray_moe.transport.base import Transport


def make_trainer(  # noqa: PLR0913  (as many parts as there are)
    model: nn.Module,
    loss: Loss,
    control: Control,
    transport: Transport,
    *,
    run_id: str,
    optimizer: OptimizerSettings,
    group: Group | None = None,
    settings: StepSettings | None = None,
    exchange: ExchangeSettings | None = None,
    schedule: Callable[[int], float] | None = None,
    checkpoints: Path | None = None,
    adapters: ExpertAdapters | None = None,
    rounding: Compensation | None = None,
) -> Trainer:
    """A worker that trains `model`, whose experts go to the hosts: afterwards they are no longer in it.

    Args:
        model: with its experts in it, on any device. All workers begin with the weights of the first one's.
        loss: (model, micro-batch) -> the mean loss of the micro-batch, a scalar.
        control: of the hosts.
        transport: lines to them, closed with the trainer.
        run_id: names the run on the hosts; a worker that comes back under the same name goes on where the run is.
        optimizer: of the experts and of all else in `model` that requires a gradient.
        group: all workers; None is this one alone.
        settings, exchange: how steps are made, and what travels.
        schedule: learning rate of a step (from 1); None is the optimizer's own.
        checkpoints: folder for `Trainer.save`, on a disk that all hosts share.
        adapters: low-rank adapters of the experts, which learn in place of their weights; None trains these.
        rounding: train experts in 8 bits and keep "int8", "bfloat16" or "none" of what rounding takes away
            (`ops/quantized_training.py`); None trains them in float.

    Raises: `InvalidConfig` for a model without experts in it, or whose experts are to be cut into parts
        (`exchange.num_parts`) and cannot be; as `check_rounding`.
    """
    group = group or Alone()
    exchange = exchange or ExchangeSettings()
    if rounding is not None:  # what is kept between forward and backward would have the weights in float
        exchange = replace(exchange, recompute=True)
    origin = Origin(model, exchange.num_parts)
    layers, parts = origin.num_experts, origin.parts
    dtype = next(iter(model.parameters())).dtype
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    dispatcher = TrainingDispatcher(transport, exchange, str(group.rank))
    drop_parameters(model)
    install(model, dispatcher.forward)
    if group.size > 1:
        model.load_state_dict(group.share(model.state_dict()))
    coordinator = None
    if group.rank == 0:
        archive = None
        if checkpoints is not None:
            name = type(model).__name__
            archive = DiskArchive(checkpoints, run_id, name, fingerprint(shapes), layers, dtype, parts=parts)
        numbers = {path: number * parts.number for path, number in layers.items()}
        coordinator = Coordinator(
            run_id, control, numbers, optimizer, settings, archive, origin, adapters, parts, rounding
        )
    return Trainer(
        model,
        dispatcher,
        optimizer,
        coordinator=coordinator,
        group=group,
        settings=settings,
        loss=loss,
        schedule=schedule,
    )


def whole_state_dict(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All weights as they are after the step just made, as the `state_dict` of a model that has its experts in it.

    Raises: `InvalidConfig` on any but the first worker; `HostLost`.
    """
    if trainer.coordinator is None:
        raise InvalidConfig("only the first worker can ask the hosts for their experts")
    weights = {name: tensor.detach().cpu().clone() for name, tensor in trainer.model.state_dict().items()}
    for path in trainer.coordinator.table.placement.hosts_of:
        weights |= {f"{path}.{name}": tensor for name, tensor in trainer.coordinator.layer(path).items()}
    return weights
