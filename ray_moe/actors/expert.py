"""The actor around an expert host: a process that listens, loads and drops what it is told to, and reports.

A shell: computing is `runtime/expert_host.py`, listening `transport/`, loading `models/`. It decides nothing; the
controller tells it what to hold. Ray calls carry control, weights (from one host to another, through the object store)
and, as a transport of its own, tokens; the hot path is the gRPC stream into `HostServer`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.exceptions import RayError

from ray_moe.actors.process import made_to_stay, set_up
from ray_moe.actors.spec import HostReport, ServiceSpec, transport_settings
from ray_moe.actors.tracing import close_tracer, make_tracer
from ray_moe.errors import InsufficientResources, RayMoEError
from ray_moe.policy.events import Experts
from ray_moe.types import HostAddress, HostId, LayerPath

if TYPE_CHECKING:
    from ray_moe.models.huggingface import Checkpoint
    from ray_moe.transport.grpc_server import HostServer

logger = logging.getLogger(__name__)

COPY_TIMEOUT_S = 60.0
"""A donor that has not handed over its copies by then is passed over: the checkpoint has them too."""

RESERVE_BYTES = 256 * 2**20
"""What a load must leave free on the node: the system kills somebody when nothing is left."""

SLOW_S = 0.001
"""A slow host takes this long times the factor on top, so that it is slow also where computing takes no time."""

Copies = Mapping[HostId, tuple[Experts, Sequence[Any]]]
"""From which host which experts come, with the object (in a list, so that Ray does not fetch it beforehand)."""


class ExpertActor:
    """One process of expert replicas."""

    def __init__(self, host_id: HostId, spec: ServiceSpec) -> None:
        # Imported here and below, so that the launcher can name this class without loading torch.
        with made_to_stay():
            from ray_moe.runtime.expert_host import ExpertHost
            from ray_moe.runtime.host_loop import HostLoop

            set_up(spec.config.logs, host_id, spec.config.experts.num_threads)
        self._spec = spec
        self._host = ExpertHost(host_id)
        self._loop = HostLoop(self._host)
        self._incarnation = uuid.uuid4().hex[:12]
        self._address: HostAddress | None = None
        self._server: HostServer | None = None
        self._checkpoint: Checkpoint | None = None
        self._reading_bytes = 0
        self._changing = asyncio.Lock()
        self._device = "cuda" if spec.config.experts.num_gpus else "cpu"

    # --- life ------------------------------------------------------------------------------------------------
    async def start(self) -> HostReport:
        """Open the checkpoint and listen, holding nothing yet. Idempotent.

        Raises: `InvalidCheckpoint`, `InsufficientResources` (no GPU where one was asked for), `InvalidConfig` (no
        OpenTelemetry where traces were asked for).
        """
        async with self._changing:
            if self._address is None:
                config = self._spec.config
                if self._loop.tracer is None:
                    name = self._host.host_id
                    self._loop.tracer = make_tracer(config.tracing, config.service_name, name, begins=False)
                with made_to_stay():
                    await asyncio.to_thread(self._open)
                self._address = await self._listen()
        return await self.describe()

    async def describe(self) -> HostReport:
        """What this life of the actor holds and has done."""
        context = ray.get_runtime_context()
        held = self._host.held
        return HostReport(
            incarnation=self._incarnation,
            node_id=context.get_node_id(),
            domain=_label(context.get_node_labels(), self._spec.config.balance.domain_label),
            pid=os.getpid(),
            rss_bytes=psutil.Process().memory_info().rss,
            loaded_bytes=self._spec.bytes_of(held) + self._reading_bytes,
            num_calls=self._host.num_calls,
            num_rows=self._host.num_rows,
            busy_s=self._loop.busy_s,
            busy_fraction=self._loop.busy_fraction,
            flops_per_s=self._loop.flops_per_s,
            queued_rows=self._loop.queued_rows,
            held={layer: tuple(experts) for layer, experts in held.items()},
            address=self._address,
        )

    async def until_lost(self) -> None:
        """Never returns while the process lives: whoever awaits it learns of its end."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """Stop listening and finish what was accepted; the launcher ends the process."""
        if self._server is not None:
            await self._server.stop()
        await self._loop.close()
        await close_tracer(self._loop.tracer)

    async def _listen(self) -> HostAddress:
        from ray_moe.transport.grpc_server import HostServer

        self._server = HostServer(
            self._loop.submit,
            self._spec.token,
            incarnation=self._incarnation,
            settings=transport_settings(self._spec.config.transport),
            certificate=self._spec.certificate,
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

    # --- what it holds ---------------------------------------------------------------------------------------
    async def load(self, experts: Experts, copies: Copies) -> None:
        """Hold `experts` as well: from the `copies` that arrive, and for the rest from the checkpoint.

        What is held already is left as it is, so that the same order twice is the same as once. Compute goes on.

        Raises: `InvalidCheckpoint`, `InsufficientResources`.
        """
        async with self._changing:
            for donor, (offered, box) in copies.items():
                wanted = self._missing(offered)
                if wanted:
                    await self._copy(donor, wanted, box[0])
            rest = self._missing(experts)
            if rest:
                await asyncio.to_thread(self._read, rest)

    async def drop(self, experts: Experts) -> None:
        """Hold `experts` no longer, and give their memory back."""
        async with self._changing:
            for layer, indices in experts.items():
                await asyncio.to_thread(self._host.drop, layer, list(indices))

    async def export(self, experts: Experts) -> dict[LayerPath, Any]:
        """The weights of `experts`, for another host. Compute goes on.

        Raises: `StaleRouting` when one of them is not held (any more).
        """
        return {layer: await asyncio.to_thread(self._host.export, layer, list(e)) for layer, e in experts.items()}

    def _missing(self, experts: Experts) -> dict[LayerPath, list[int]]:
        held = self._host.held
        missing = {layer: sorted(set(ids) - set(held.get(layer, ()))) for layer, ids in experts.items()}
        return {layer: ids for layer, ids in missing.items() if ids}

    async def _copy(self, donor: HostId, experts: dict[LayerPath, list[int]], reference: Any) -> None:
        try:
            weights = await asyncio.wait_for(asyncio.wrap_future(reference.future()), COPY_TIMEOUT_S)
            await asyncio.to_thread(self._hold_copies, experts, weights)
        except (RayError, RayMoEError, asyncio.TimeoutError) as error:
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            logger.warning("no copies from %s (%s): the checkpoint has them too", donor, reason[0])

    def _hold_copies(self, experts: dict[LayerPath, list[int]], weights: dict[LayerPath, Any]) -> None:
        from ray_moe.ops.experts import StackedExperts

        self._check_memory(experts)
        checkpoint = self._open()
        for layer, ids in experts.items():
            module = checkpoint.experts_from(layer, ids, weights[layer], device=self._device)
            self._host.hold(layer, ids, StackedExperts(module))

    def _read(self, experts: dict[LayerPath, list[int]]) -> None:
        from ray_moe.ops.experts import StackedExperts

        self._check_memory(experts)
        checkpoint = self._open()
        for layer, ids in experts.items():  # layer by layer: what is loaded serves, and the peak stays one layer
            modules = checkpoint.load_experts({layer: ids}, device=self._device, on_progress=self._progress)
            self._host.hold(layer, ids, StackedExperts(modules[layer]))
            self._reading_bytes = 0

    def _check_memory(self, experts: dict[LayerPath, list[int]]) -> None:
        from ray_moe.runtime.memory import available_bytes

        if self._device != "cpu":
            return
        needed, there = self._spec.bytes_of(experts) + RESERVE_BYTES, available_bytes()
        if needed > there:
            raise InsufficientResources(
                f"{self._host.host_id} would need {needed:,} bytes of memory for its experts and a reserve, and "
                f"{there:,} are available on its node; lower experts.spare_slots or experts.max_bytes, or add nodes"
            )

    def _open(self) -> Checkpoint:
        import torch

        from ray_moe.models.huggingface import Checkpoint

        if self._device == "cuda" and not torch.cuda.is_available():
            raise InsufficientResources(
                "experts.num_gpus asks for a GPU, but torch sees none in the expert actor's process; install a torch "
                "built for this GPU on every node, or set experts.num_gpus=0"
            )
        if self._checkpoint is None:
            self._checkpoint = Checkpoint.open(self._spec.config.model)
        return self._checkpoint

    def _progress(self, num_bytes: int) -> None:
        self._reading_bytes += num_bytes

    # --- calls -----------------------------------------------------------------------------------------------
    async def exchange(self, header: bytes, *arrays: Any) -> Any:
        """A call that came through the object store instead of the stream."""
        from ray_moe.transport.object_store import serve_exchange

        return await serve_exchange(self._loop.submit, header, arrays, self._incarnation)

    # --- faults on purpose -----------------------------------------------------------------------------------
    async def kill(self, whole_node: bool = False) -> None:
        """End this process at once, as a crash would; or the raylet, and with it every process of Ray on the node."""
        os.kill(os.getppid() if whole_node else os.getpid(), signal.SIGKILL)

    async def disturb(self, kind: str, duration_s: float, factor: float, seed: int) -> None:
        """Compute more slowly, wrongly or not at all for a while: ``slow``, ``corrupt`` or ``hang``."""
        from ray_moe.runtime.host_loop import Disturbance

        self._loop.disturb(
            {
                "slow": Disturbance(slow_factor=factor, extra_s=SLOW_S * factor),
                "corrupt": Disturbance(corrupt_probability=1.0, seed=seed),
                "hang": Disturbance(hang_s=duration_s),
            }[kind]
        )
        asyncio.get_running_loop().call_later(duration_s, self._loop.disturb, None)


def _label(labels: Mapping[str, Any], name: str) -> str:
    value = labels.get(name, "") if name else ""
    return value if isinstance(value, str) else ",".join(value)
