"""A tiny model of transformers behind real front doors, in a process of its own, for the tests of hostile calls.

``python real_doors.py FOLDER KEYS_FILE``: the experts of the checkpoint in FOLDER are on two hosts in this process,
each of them on both, and the engine serves doors that let everybody in and doors that ask for a key. Prints one line of
JSON with the ports, and for each line of standard input another one about itself; ends, in order, when that closes, and
then prints how long it took.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ray_moe.config import ServerConfig
from ray_moe.errors import InvalidConfig, NotFound, Unavailable
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.experts import StackedExperts
from ray_moe.policy import events as ev
from ray_moe.policy.cluster_state import ClusterState
from ray_moe.policy.hosts import ClusterSettings
from ray_moe.policy.versions import Versions
from ray_moe.runtime.engine import Engine, EngineLimits
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.measures import Measures, measure
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.service.doors import Doors
from ray_moe.transport.local import LocalTransport
from ray_moe.types import (
    CanaryRequest,
    ChaosReport,
    ChaosRequest,
    GenerateChunk,
    GenerateRequest,
    HostAddress,
    Placement,
    PlanSummary,
    RouterAddress,
    RouterStatus,
    RoutingTable,
    ServiceStatus,
    VersionStatus,
)
from tests.unit.service.fake_training import FakeTraining

HOSTS = ("expert-0", "expert-1")
SETTINGS: dict[str, Any] = {
    "port": 0,
    "http_port": 0,
    "max_request_bytes": 16 * 2**20,
    "max_in_flight_bytes": 2**20,
    "max_forward_tokens": 1024,
    "max_prompt_bytes": 2**16,
    "read_timeout_s": 2.0,
}
"""Of the doors; small, so that what is too much is quickly sent."""


class RealBackend:
    """The engine, and the cluster's state for the wishes of people: what the router and the controller do with them."""

    ready = True
    model_name = "tiny"
    has_tokenizer = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        everything = {path: list(range(spec.num_experts)) for path, spec in checkpoint.layers.items()}
        hosts = {name: ExpertHost(name) for name in HOSTS}
        for host in hosts.values():
            for path, module in checkpoint.load_experts(everything).items():
                host.hold(path, everything[path], StackedExperts(module))
        self.transport = LocalTransport(hosts)
        self.accused: list[HostAddress] = []
        """Hosts that are said to be lost, slow or corrupt: none is."""
        self._dispatcher = ExpertDispatcher(self.transport, on_lost=self.accused.append, on_corrupt=self.accused.append)
        placement = Placement({path: (HOSTS,) * len(experts) for path, experts in everything.items()})
        addresses = {name: self.transport.address(name) for name in HOSTS}
        self._dispatcher.update(RoutingTable(1, placement, addresses))
        self.engine = Engine(
            checkpoint.load_backbone(),
            checkpoint.load_tokenizer(),
            checkpoint.layers,
            self._dispatcher,
            max_positions=checkpoint.max_positions,
            limits=EngineLimits(max_concurrent_requests=16, max_queued_requests=4096),
        )
        self.layers = self.engine.layers
        self.layers_with_gate = self.engine.layers_with_gate
        self.vocab_size = checkpoint.vocab_size
        self.max_positions = checkpoint.max_positions
        self.tokenize = self.engine.texts.tokenize
        self.tokenize_chat = self.engine.texts.tokenize_chat
        self.token_text = self.engine.texts.token_text
        self.forward = self.engine.forward
        self.training = FakeTraining()

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        return self.engine.generate(request)

    def _router(self) -> RouterStatus:
        engine = self.engine
        return RouterStatus(
            pid=os.getpid(),
            rss_bytes=0,
            backbone_bytes=self._checkpoint.backbone_bytes,
            active_requests=engine.active_requests,
            queued_requests=engine.queued_requests,
            generated_tokens=engine.num_generated_tokens,
            failed_requests=engine.vitals.num_failed,
        )

    async def status(self) -> ServiceStatus:
        return ServiceStatus("tiny", self._checkpoint.model_type, "0", "ready", 1.0, 1, self._router(), (), {})

    async def routers(self) -> tuple[RouterAddress, ...]:
        return ()

    def measures(self) -> Measures:
        return measure(self._router(), self.engine, self._dispatcher)

    async def placement(self) -> RoutingTable:
        return self._dispatcher.table

    async def plan(self, dry_run: bool) -> PlanSummary:
        return PlanSummary((), 0, 0, 1.0, 1.0, 0.0, 0.0)

    def _cluster(self) -> ClusterState:
        return ClusterState(ClusterSettings(layers=tuple(self.layers.values())), HOSTS)

    async def resize(self, num_actors: int) -> None:
        self._cluster().handle(ev.SizeRequested(num_actors), 0.0)

    async def drain(self, target: str, replace: bool) -> tuple[str, ...]:
        if target not in HOSTS:
            raise NotFound(f"no expert actor and no node {target!r}; the actors are {', '.join(HOSTS)}")
        self._cluster().handle(ev.DrainRequested((target,), replace=replace), 0.0)
        return (target,)

    async def publish(self, model: str) -> VersionStatus:
        self._checkpoint.check_same_architecture(await asyncio.to_thread(Checkpoint.open, model))
        raise Unavailable("there are no actors to load it")

    async def roll_back(self, to: int | None) -> VersionStatus:
        return Versions.first("tiny").roll_back(to).statuses()[0]

    async def begin_canary(self, request: CanaryRequest) -> VersionStatus:
        return await self.publish(request.model)

    async def end_canary(self, promote: bool) -> VersionStatus:
        versions = Versions.first("tiny")
        return (versions.promote(1) if promote else versions.cancel()).statuses()[0]

    async def versions(self) -> tuple[VersionStatus, ...]:
        return Versions.first("tiny").statuses()

    async def chaos(self, request: ChaosRequest) -> ChaosReport:
        raise InvalidConfig("this service may not be hurt: start it with chaos.enabled=true to allow it")


def facts(backend: RealBackend, tasks_of_its_own: int) -> Mapping[str, Any]:
    """What would show that something was left behind."""
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()) - tasks_of_its_own,
        "active": backend.engine.active_requests + backend.engine.queued_requests,
        "failed": backend.engine.vitals.num_failed,
        "accused": len(backend.accused),
        "rss_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
    }


def say(what: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def main(arguments: Sequence[str]) -> None:
    folder, keys_file = arguments
    torch.set_num_threads(1)
    backend = RealBackend(Checkpoint.open(folder))
    opened: list[Doors] = [Doors(backend, ServerConfig(**SETTINGS, keys_file=file)) for file in ("", keys_file)]
    ports = [await doors.start() for doors in opened]
    say({"ports": [[each.grpc, each.http] for each in ports], "pid": os.getpid()})
    while await asyncio.to_thread(sys.stdin.readline):
        say(facts(backend, 1))
    began_s = time.monotonic()
    await asyncio.gather(*(doors.stop(30.0) for doors in opened))
    await backend.engine.close()
    backend.transport.close()
    say({"stopped_s": time.monotonic() - began_s})


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
