"""The actor around an expert host: a process that loads what it is told to hold, listens, and reports.

A shell: computing is `runtime/expert_host.py`, listening `transport/`, loading `models/`. It decides nothing; the
controller tells it what to hold, again after every restart. Ray calls carry control (and, as a transport of its own,
tokens); the hot path is the gRPC stream into `HostServer`.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from typing import TYPE_CHECKING, Any

import psutil
import ray

from ray_moe.actors.spec import HostReport, Plan, ServiceSpec, transport_settings
from ray_moe.errors import InsufficientResources
from ray_moe.types import HostAddress, HostId

if TYPE_CHECKING:
    from ray_moe.models.huggingface import Checkpoint
    from ray_moe.transport.grpc_server import HostServer


class ExpertActor:
    """One process of expert replicas."""

    def __init__(self, host_id: HostId, spec: ServiceSpec) -> None:
        # Imported here and below, so that the launcher can name this class without loading torch.
        import torch

        from ray_moe.runtime.expert_host import ExpertHost
        from ray_moe.runtime.host_loop import HostLoop
        from ray_moe.transport.allocator import tune_malloc

        self._spec = spec
        self._host = ExpertHost(host_id)
        self._loop = HostLoop(self._host)
        self._incarnation = uuid.uuid4().hex[:12]
        self._address: HostAddress | None = None
        self._server: HostServer | None = None
        self._checkpoint: Checkpoint | None = None
        self._loaded_bytes = 0
        self._loading = asyncio.Lock()
        tune_malloc()
        torch.set_num_threads(spec.config.experts.num_threads)
        self._device = "cuda" if spec.config.experts.num_gpus else "cpu"

    async def describe(self) -> HostReport:
        """What this life of the actor holds and has done."""
        return HostReport(
            incarnation=self._incarnation,
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            rss_bytes=psutil.Process().memory_info().rss,
            loaded_bytes=self._loaded_bytes,
            num_calls=self._host.num_calls,
            num_rows=self._host.num_rows,
            busy_s=self._loop.busy_s,
            held=dict(self._host.held),
            address=self._address,
        )

    async def prepare(self) -> None:
        """Read the checkpoint's index, so that a later `load` reads weights at once."""
        async with self._loading:
            await asyncio.to_thread(self._open)

    async def load(self, plan: Plan) -> HostAddress:
        """Hold the experts of `plan` and listen. Layers whose experts are all held already are left as they are.

        Raises: `InvalidCheckpoint`, `InsufficientResources`.
        """
        async with self._loading:
            held = self._host.held
            missing = {path: ids for path, ids in plan.items() if not set(ids) <= set(held.get(path, []))}
            if missing:
                await asyncio.to_thread(self._load, missing)
            if self._address is None:
                self._address = await self._listen()
            return self._address

    def _open(self) -> Checkpoint:
        from ray_moe.models.huggingface import Checkpoint

        if self._checkpoint is None:
            self._checkpoint = Checkpoint.open(self._spec.config.model)
        return self._checkpoint

    def _load(self, plan: Plan) -> None:
        import torch

        from ray_moe.ops.experts import StackedExperts

        if self._device == "cuda" and not torch.cuda.is_available():
            raise InsufficientResources(
                "experts.num_gpus asks for a GPU, but torch sees none in the expert actor's process; install a torch "
                "built for this GPU on every node, or set experts.num_gpus=0"
            )
        checkpoint = self._open()
        for path, ids in plan.items():  # layer by layer: what is loaded serves, and the peak stays one layer
            modules = checkpoint.load_experts({path: ids}, device=self._device, on_progress=self._progress)
            self._host.hold(path, ids, StackedExperts(modules[path]))

    def _progress(self, num_bytes: int) -> None:
        self._loaded_bytes += num_bytes

    async def _listen(self) -> HostAddress:
        from ray_moe.transport.grpc_server import HostServer

        self._server = HostServer(
            self._loop.submit,
            self._spec.token,
            incarnation=self._incarnation,
            settings=transport_settings(self._spec.config.transport),
        )
        tcp, unix = await self._server.start(ray.util.get_node_ip_address())
        return HostAddress(
            host_id=self._host.host_id,
            incarnation=self._incarnation,
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            tcp=tcp,
            unix=unix,
        )

    async def exchange(self, header: bytes, *arrays: Any) -> Any:
        """A call that came through the object store instead of the stream."""
        from ray_moe.transport.object_store import serve_exchange

        return await serve_exchange(self._loop.submit, header, arrays, self._incarnation)

    async def until_lost(self) -> None:
        """Never returns while the process lives: whoever awaits it learns of its end."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """Stop listening and finish what was accepted; the launcher ends the process."""
        if self._server is not None:
            await self._server.stop()
        await self._loop.close()
