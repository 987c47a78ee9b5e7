"""Starts the actors of a service and owns them.

Ray ends an actor when the process that created it ends. This actor does nothing else, so it outlives the controller
(which may be restarted) and ends with the driver: nothing of a service stays behind when the driver is gone, however
it went. When it is lost itself, all it had started is, too: Ray restarts it, the controller tells it what it must know
(`remember`) and has everything started anew. Only here are actor options made.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_moe.actors import logs, warm
from ray_moe.actors.expert import ExpertActor
from ray_moe.actors.router import Router
from ray_moe.actors.spec import NAMESPACE, TRAINER, ServiceSpec
from ray_moe.actors.trainer import TrainerActor
from ray_moe.config import RayConfig
from ray_moe.policy.versions import Versions
from ray_moe.types import HostId

NAME_TIMEOUT_S = 20.0
"""How long Ray may take to end what a lost launcher had started."""
NAME_POLL_S = 0.1


def worker_env(num_threads: int) -> dict[str, str]:
    """Environment of an actor that computes with `num_threads` threads."""
    return {
        "OMP_NUM_THREADS": str(num_threads),
        # By default glibc gives each thread an arena, up to eight for each core. What one has freed, threads of another
        # can't use: a router with 70 threads then grows for hours. The limit is read when a process starts.
        "MALLOC_ARENA_MAX": "2",
        # With grpcio's fork handlers children of a process with a live channel crash now and then.
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        # Progress is shown by the driver, from what the actors report.
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def runtime_env(settings: RayConfig, num_threads: int, num_gpus: float) -> dict[str, Any]:
    """Of a process that computes with `num_threads` threads: its environment, and whether it is forked."""
    made: dict[str, Any] = {"env_vars": worker_env(num_threads)}
    if settings.warm_start and not num_gpus and sys.platform == "linux":
        made["py_executable"] = warm.py_executable()
    return made


class Launcher:
    """Holds the handles that keep a service's actors alive; asking twice for an actor gives the same one."""

    def __init__(self, spec: ServiceSpec) -> None:
        logs.configure(spec.config.logs, "launcher")
        self._spec = spec
        self._started: dict[str, Any] = {}
        self._num_restarts = 0
        self._versions: Versions | None = None
        self._starting = asyncio.Lock()

    @ray.method(max_task_retries=0)
    async def until_lost(self) -> None:
        """Never returns, so that whoever waits for it hears at once when this process is gone."""
        await asyncio.Event().wait()

    async def remember(self, num_restarts: int, versions: Versions | None) -> None:
        """What the launcher knew that was lost: restarts of the controller, and the versions of the weights."""
        self._num_restarts = max(self._num_restarts, num_restarts)
        self._versions = self._versions or versions

    async def start_host(self, host_id: HostId, replace: bool = False) -> Any:
        """The handle of the expert actor `host_id`; with `replace`, of another one after it died for good."""
        experts = self._spec.config.experts
        return await self._start(
            host_id,
            replace,
            ExpertActor,
            (host_id, self._spec),
            num_cpus=experts.num_cpus,
            num_gpus=experts.num_gpus,
            resources=experts.resources or None,
            label_selector=experts.label_selector or None,
            scheduling_strategy="SPREAD",  # else Ray fills one node first, and the loss of it would be the loss of all
            max_restarts=experts.max_restarts,
            runtime_env=runtime_env(self._spec.config.ray, experts.num_threads, experts.num_gpus),
        )

    async def stop_host(self, host_id: HostId) -> None:
        """End the expert actor `host_id`, for good. Nothing happens when there is none."""
        handle = self._started.pop(host_id, None)
        if handle is not None:
            ray.kill(handle)

    async def hosts(self) -> list[HostId]:
        """The expert actors that were started and not stopped."""
        return [role for role in self._started if role not in (*self._spec.routers, TRAINER)]

    async def count_restart(self) -> int:
        """The controller has been restarted; how many times by now, which it cannot know itself."""
        self._num_restarts += 1
        return self._num_restarts

    async def keep_versions(self, versions: Versions) -> None:
        """Remember the versions of the weights, which the controller would forget when it dies."""
        self._versions = versions

    async def kept_versions(self) -> Versions | None:
        """What was last remembered; None for nothing."""
        return self._versions

    async def start_router(self, router_id: str, replace: bool = False) -> Any:
        """The handle of a router; with `replace`, of another one after it died for good."""
        router = self._spec.config.router
        where: Any = "SPREAD"
        if self._spec.config.server.is_local:  # clients are on this node
            where = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        return await self._start(
            router_id,
            replace,
            Router,
            (router_id, self._spec),
            num_cpus=router.num_cpus,
            num_gpus=router.num_gpus,
            scheduling_strategy=where,
            max_restarts=-1,
            runtime_env=runtime_env(self._spec.config.ray, router.num_threads, router.num_gpus),
        )

    async def start_trainer(self, replace: bool = False) -> Any:
        """The handle of the actor that trains; with `replace`, of another one after it died for good."""
        train = self._spec.config.train
        return await self._start(
            TRAINER,
            replace,
            TrainerActor,
            (self._spec,),
            num_cpus=train.num_cpus,
            num_gpus=train.num_gpus,
            max_restarts=-1,
            runtime_env=runtime_env(self._spec.config.ray, train.num_threads, train.num_gpus),
        )

    async def _start(
        self, role: str, replace: bool, actor_class: type, arguments: tuple[Any, ...], **options: Any
    ) -> Any:
        async with self._starting:
            if replace and role in self._started:
                ray.kill(self._started.pop(role))  # until then a dead actor keeps its name
            # Not by get_actor or get_if_exists: their handles are weak, and an actor without any other ends.
            if role not in self._started:
                name = self._spec.actor_name(role)
                made = ray.remote(actor_class).options(name=name, namespace=NAMESPACE, max_concurrency=1000, **options)
                self._started[role] = await _named(name, lambda: made.remote(*arguments))
            return self._started[role]

    async def end(self) -> None:
        """Kill every actor this one started."""
        for handle in self._started.values():
            ray.kill(handle)
        self._started.clear()


async def _named(name: str, start: Callable[[], Any]) -> Any:
    """What `start` gives, an actor of that name, once a lost launcher's actor of the same name is gone."""
    give_up_s = time.monotonic() + NAME_TIMEOUT_S
    while True:
        try:
            return start()
        except ValueError:
            if time.monotonic() > give_up_s or not ray.get_runtime_context().was_current_actor_reconstructed:
                raise
            with contextlib.suppress(ValueError):  # gone by now
                ray.kill(ray.get_actor(name, NAMESPACE))
            await asyncio.sleep(NAME_POLL_S)
