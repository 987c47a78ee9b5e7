"""One layer of experts that is trained on hosts in this process, without a backbone."""

from __future__ import annotations

import torch

from ray_moe.ops.experts import unpack
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.policy import ownership
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.training.dispatcher import TrainingDispatcher
from ray_moe.training.settings import ExchangeSettings
from ray_moe.training.trainees import Trainees
from ray_moe.transport.local import FaultPlan, LocalTransport
from ray_moe.types import HostId, RoutingTable
from tests.toy import LAYER, ToyExperts

LIFE, ATTEMPT = "life", "1.life.1"


class Toy:
    """Hosts that train the experts of `module`, in the middle of an attempt, and a dispatcher to them."""

    def __init__(
        self,
        module: ToyExperts,
        num_hosts: int,
        num_replicas: int = 1,
        exchange: ExchangeSettings | None = None,
        faults: FaultPlan | None = None,
    ) -> None:
        names = [f"expert-{number}" for number in range(num_hosts)]
        self.trainees: dict[HostId, Trainees] = {name: Trainees(name) for name in names}
        self.transport = LocalTransport({n: ExpertHost(n, t) for n, t in self.trainees.items()}, faults)
        self.placement = ownership.assign({LAYER: len(module.down_proj)}, names, num_replicas=num_replicas)
        for name, trainees in self.trainees.items():
            trainees.open("run", LIFE, OptimizerSettings(kind="sgd", lr=0.1), 0)
            for expert, hosts in enumerate(self.placement.hosts_of[LAYER]):
                if name in hosts:
                    row = {n: p.detach()[expert].clone() for n, p in module.named_parameters()}
                    trainees.hold(LAYER, module, {expert: row}, owned=[expert] if hosts[0] == name else [])
            trainees.begin(ATTEMPT)
        self.dispatcher = TrainingDispatcher(self.transport, exchange)
        addresses = {name: self.transport.address(name) for name in names}
        self.dispatcher.update(RoutingTable(1, self.placement, addresses))
        self.dispatcher.begin(ATTEMPT)

    def gradients(self, module: ToyExperts) -> dict[str, torch.Tensor]:
        """By name, [E, ...]: what all replicas together have accumulated."""
        sums = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
        for name, trainees in self.trainees.items():
            held = self.placement.experts_on(name)
            for expert, arrays in trainees.gradients(ATTEMPT, held)[LAYER].items():
                for parameter, grad in unpack(arrays).items():
                    sums[parameter][expert] += grad
        return sums
