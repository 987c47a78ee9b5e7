"""`ray_moe.remote_trainer`: somebody's own network, in their own loop, with its experts on the actors of a service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ray_moe.actors.lines import make_transport
from ray_moe.actors.training import RayControl
from ray_moe.config import RayConfig
from ray_moe.ops.lora import ExpertAdapters
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.ops.quantized_training import Compensation
from ray_moe.service import cluster
from ray_moe.service.training import find_spec
from ray_moe.training.group import Group
from ray_moe.training.network import make_trainer
from ray_moe.training.settings import ExchangeSettings, StepSettings
from ray_moe.training.trainer import Loss, Trainer


def remote_trainer(  # noqa: PLR0913  (as many parts as there are)
    model: nn.Module,
    loss: Loss,
    *,
    service_name: str,
    address: str = "auto",
    run_id: str = "network",
    optimizer: OptimizerSettings | None = None,
    group: Group | None = None,
    settings: StepSettings | None = None,
    exchange: ExchangeSettings | None = None,
    schedule: Callable[[int], float] | None = None,
    checkpoints: str = "",
    adapters: ExpertAdapters | None = None,
    rounding: Compensation | None = None,
) -> Trainer:
    """Train `model` in this process and its experts on the expert actors of a service, beside what these serve.

    The experts leave `model`; `ray_moe.training.network.whole_state_dict` brings all weights together again. Then::

        trainer = ray_moe.remote_trainer(model, loss, service_name="ray-moe")
        trainer.start()
        while trainer.step < 1000:
            print(trainer.make_step(lambda step: [batch_of(step)]).loss)
        trainer.forget()
        trainer.close()

    The batches of a step are asked for again when an actor was lost meanwhile, so they depend on its number alone.

    Args:
        model: a `torch` network with `ray_moe.MoELayer`s, or a model of `transformers`; on the device to compute on.
        loss: (model, micro-batch) -> its mean loss.
        service_name: of a service that runs.
        address: of the Ray cluster; what this process is connected to already is used as it is.
        run_id: a trainer with the name of a run that is on the actors goes on with it.
        optimizer: AdamW with a rate of 1e-3 when not given.
        checkpoints: folder for `Trainer.save`, on a disk that all nodes share; empty for none.
        group, settings, exchange, schedule, adapters, rounding: as of `training.network.make_trainer`.

    Raises: `NotFound` for a service that does not run, `Unavailable` without the cluster, `InvalidConfig` for a model
        without experts in it.
    """
    cluster.join(RayConfig(address=address))
    spec = find_spec(service_name)
    device = "cuda" if any(parameter.is_cuda for parameter in model.parameters()) else "cpu"
    return make_trainer(
        model,
        loss,
        RayControl(spec),
        make_transport(spec, device, lambda address: None),
        run_id=run_id,
        optimizer=optimizer or OptimizerSettings(),
        group=group,
        settings=settings,
        exchange=exchange,
        schedule=schedule,
        checkpoints=Path(checkpoints) if checkpoints else None,
        adapters=adapters,
        rounding=rounding,
    )
