"""The actor around an expert host: a process that listens, loads and drops what it is told to, and reports.

A shell: computing is `runtime/expert_host.py`, listening `transport/`, loading `models/`. It decides nothing; the
controller tells it what to hold. Ray calls carry control, weights (from one host to another, through the object store)
and, as a transport of its own, tokens; the hot path is the stream of messages into `HostServer`.
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
from ray_moe.errors import InsufficientResources, InvalidRequest, RayMoEError
from ray_moe.policy.events import Experts
from ray_moe.policy.versions import Live, Source, Weights, by_source, distinct
from ray_moe.types import HostAddress, HostId, LayerPath

if TYPE_CHECKING:
    from torch import nn

    from ray_moe.models.huggingface import Checkpoint
    from ray_moe.ops.experts import StackedExperts
    from ray_moe.ops.quantization import QuantizedExperts
    from ray_moe.runtime.offload import OffloadedExperts
    from ray_moe.transport.host_server import HostServer

logger = logging.getLogger(__name__)

COPY_TIMEOUT_S = 60.0
"""A donor that has not handed over its copies by then is passed over: the checkpoint has them too."""

RESERVE_BYTES = 256 * 2**20
"""What a load must leave free on the node: the system kills somebody when nothing is left."""

SLOW_S = 0.001
"""A slow host takes this long times the factor on top, so that it is slow also where computing takes no time."""

Lists = dict[int, dict[LayerPath, list[int]]]
"""Experts by version of the weights and layer."""

Copies = Mapping[HostId, tuple[Experts, Sequence[Any]]]
"""From which host which experts come, with the object (in a list, so that Ray does not fetch it beforehand)."""


class ExpertActor:
    """One process of expert replicas."""

    def __init__(self, host_id: HostId, spec: ServiceSpec) -> None:
        # Imported here and below, so that the launcher can name this class without loading torch.
        with made_to_stay():
            from ray_moe.runtime.expert_host import ExpertHost
            from ray_moe.runtime.host_loop import INLINE_FLOPS, HostLoop
            from ray_moe.runtime.offload import Residents
            from ray_moe.training.trainees import Trainees

            set_up(spec.config.logs, host_id, spec.config.experts.num_threads)
        self._spec = spec
        self._quantization = spec.config.experts.quantization
        self._device = "cuda" if spec.config.experts.num_gpus else "cpu"
        self._offload = spec.config.experts.offload
        self._residents = Residents(spec.config.experts.resident_bytes)
        self._home = "cpu" if self._offload == "cpu" else self._device
        """Where experts are loaded to."""
        self._trainees = Trainees(host_id, self._device)
        self._host = ExpertHost(host_id, self._trainees)
        self._obeying = asyncio.Lock()
        self._trained: dict[LayerPath, nn.Module] = {}
        """How the experts of a layer compute that are trained here."""
        # Reading a file may take long: never in the event loop.
        self._loop = HostLoop(self._host, 0 if self._offload == "disk" else INLINE_FLOPS)
        self._incarnation = uuid.uuid4().hex[:12]
        self._address: HostAddress | None = None
        self._server: HostServer | None = None
        self._versions: dict[int, Weights] = {}
        """What each version is that it has heard of and holds, or is to hold."""
        self._checkpoints: dict[Source, Checkpoint] = {}
        self._reading_bytes = 0
        self._changing = asyncio.Lock()

    # --- life ------------------------------------------------------------------------------------------------
    async def start(self, versions: Live) -> HostReport:
        """Open the checkpoints of the live versions of the weights and listen, holding nothing yet. Idempotent.

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
                    for source in sorted({source for weights in versions.values() for source in weights.sources}):
                        await asyncio.to_thread(self._open, source)
                self._address = await self._listen()
        return await self.describe()

    async def describe(self) -> HostReport:
        """What this life of the actor holds and has done."""
        context = ray.get_runtime_context()
        held = {version: self._host.held(version) for version in self._host.versions}
        return HostReport(
            incarnation=self._incarnation,
            node_id=context.get_node_id(),
            domain=_label(context.get_node_labels(), self._spec.config.balance.domain_label),
            pid=os.getpid(),
            rss_bytes=psutil.Process().memory_info().rss,
            loaded_bytes=self._held_bytes(held) + self._reading_bytes,
            num_calls=self._host.num_calls,
            num_rows=self._host.num_rows,
            busy_s=self._loop.busy_s,
            busy_fraction=self._loop.busy_fraction,
            flops_per_s=self._loop.flops_per_s,
            queued_rows=self._loop.queued_rows,
            held={
                version: {layer: tuple(experts) for layer, experts in layers.items()}
                for version, layers in held.items()
            },
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
        from ray_moe.transport.host_server import HostServer

        self._server = HostServer(
            self._loop.accept,
            self._spec.token,
            incarnation=self._incarnation,
            settings=transport_settings(self._spec.config.transport, self._device),
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
    async def load(self, experts: Experts, copies: Copies, versions: Live) -> None:
        """Hold `experts` as well, in all of `versions`: from the `copies` that arrive, and for the rest from the
        versions' checkpoints.

        What is held already is left as it is, so that the same order twice is the same as once. Compute goes on.

        Raises: `NotFound`, `InvalidCheckpoint`, `UnsupportedModel`, `InvalidRequest` (a version is of another
        architecture), `InsufficientResources`.
        """
        async with self._changing:
            for weights in versions.values():
                for source in weights.sources:
                    await asyncio.to_thread(self._open, source)
            self._versions.update(versions)
            self._share(experts, versions)
            for donor, (offered, box) in copies.items():
                wanted = self._missing(offered, versions)
                if wanted and self._offload != "disk":
                    await self._copy(donor, wanted, box[0])
                    self._share(offered, versions)
            rest = self._missing(experts, versions)
            if rest:
                await asyncio.to_thread(self._read, rest)
                self._share(experts, versions)

    async def drop(self, experts: Experts) -> None:
        """Hold `experts` no longer, in whatever version, and give their memory back."""
        async with self._changing:
            for layer, indices in experts.items():
                await asyncio.to_thread(self._host.drop, layer, list(indices), self._host.versions)

    async def forget(self, version: int) -> None:
        """Hold nothing of a version any more."""
        from ray_moe.models.loading import return_free_memory

        async with self._changing:
            await asyncio.to_thread(self._host.forget, version)
            self._versions.pop(version, None)
            needed = {source for weights in self._versions.values() for source in weights.sources}
            self._checkpoints = {source: each for source, each in self._checkpoints.items() if source in needed}
            await asyncio.to_thread(return_free_memory)

    async def check_room(self, num_bytes: int) -> None:
        """Raises `InsufficientResources` unless `num_bytes` more fit in the memory of this node."""
        self._check_memory(num_bytes)

    async def export(self, experts: Experts, versions: Live) -> dict[int, dict[LayerPath, Any]]:
        """The weights of `experts` in `versions`, for another host, those in common once. Compute goes on.

        Raises: `NotFound` when one of them is not held (any more).
        """
        return {
            version: {
                layer: await asyncio.to_thread(self._host.export, layer, ids, version) for layer, ids in layers.items()
            }
            for version, layers in distinct(versions, experts).items()
        }

    def _missing(self, experts: Experts, versions: Live) -> Lists:
        """What is to be loaded; what versions have in common once."""
        missing: Lists = {}
        coming: set[tuple[LayerPath, int, Source]] = set()
        for version, weights in versions.items():
            held = self._host.held(version)
            for layer, ids in experts.items():
                for expert in sorted(set(ids) - set(held.get(layer, ()))):
                    one = (layer, expert, weights.source(layer, expert))
                    if one not in coming:
                        coming.add(one)
                        missing.setdefault(version, {}).setdefault(layer, []).append(expert)
        return missing

    def _share(self, experts: Experts, versions: Live) -> None:
        """Hold in each of `versions` what is held in another one and the same."""
        for version, weights in versions.items():
            for other, theirs in self._versions.items():
                mine, held = self._host.held(version), self._host.held(other)
                for layer, ids in experts.items():
                    absent = set(ids).intersection(held.get(layer, ())).difference(mine.get(layer, ()))
                    same = {one for one in absent if weights.source(layer, one) == theirs.source(layer, one)}
                    if same:
                        self._host.share(layer, same, version, of=other)

    def _held_bytes(self, held: Mapping[int, Mapping[LayerPath, Sequence[int]]]) -> int:
        if len(held) == 1:
            return self._spec.bytes_of(next(iter(held.values())))
        expert_bytes = {layer.path: layer.expert_bytes for layer in self._spec.layers}
        sources = {
            (layer, expert, self._versions[version].source(layer, expert))
            for version, layers in held.items()
            for layer, experts in layers.items()
            for expert in experts
        }
        return sum(expert_bytes[layer] for layer, _, _ in sources)

    async def _copy(self, donor: HostId, experts: Lists, reference: Any) -> None:
        try:
            weights = await asyncio.wait_for(asyncio.wrap_future(reference.future()), COPY_TIMEOUT_S)
            await asyncio.to_thread(self._hold_copies, experts, weights)
        except (RayError, RayMoEError, asyncio.TimeoutError) as error:
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            logger.warning("no copies from %s (%s): the checkpoint has them too", donor, reason[0])

    def _hold_copies(self, experts: Lists, weights: dict[int, dict[LayerPath, Any]]) -> None:
        self._check_memory(self._bytes_of(experts))
        for version, layers in experts.items():
            checkpoint = self._open(self._versions[version].base)
            for layer, ids in layers.items():
                arrays = weights[version][layer]
                if self._quantization != "none":
                    group = checkpoint.quantized_experts_from(layer, ids, arrays, self._quantization, self._home)
                    self._hold_group(layer, ids, group, version)
                else:
                    module = checkpoint.experts_from(layer, ids, arrays, device=self._home)
                    self._hold(layer, ids, module, version)

    def _read(self, experts: Lists) -> None:
        self._check_memory(self._bytes_of(experts))
        for version, layers in experts.items():
            for layer, ids in layers.items():  # layer by layer: what is loaded serves, and the peak stays one layer
                for source, part in by_source(self._versions[version], layer, ids).items():
                    checkpoint = self._open(source)
                    if self._offload == "disk":
                        self._hold_files(layer, part, checkpoint, version)
                        continue
                    # For a moment they are here as they are on the disk.
                    if self._quantization != "none" or checkpoint.parts.number > 1:
                        self._check_memory(checkpoint.peak_bytes({layer: part}))
                    modules = checkpoint.load_experts({layer: part}, device=self._home, on_progress=self._progress)
                    self._hold(layer, part, modules[layer], version)
                    self._reading_bytes = 0

    def _hold_files(self, layer: LayerPath, experts: list[int], checkpoint: Checkpoint, version: int) -> None:
        """Hold experts that are read when they are needed."""
        from ray_moe.ops.quantization import make_group
        from ray_moe.runtime.offload import offload_to_files

        def read(expert: int) -> StackedExperts | QuantizedExperts:
            module = checkpoint.load_experts({layer: [expert]}, device=self._device)[layer]
            return make_group(module, self._quantization)

        group = offload_to_files(read, experts, self._spec.bytes_of({layer: [0]}), self._residents)
        self._serve(layer, experts, group, version)

    def _hold(self, layer: LayerPath, experts: list[int], module: nn.Module, version: int) -> None:
        from ray_moe.ops.quantization import make_group

        self._hold_group(layer, experts, make_group(module, self._quantization), version)

    def _hold_group(
        self, layer: LayerPath, experts: list[int], group: StackedExperts | QuantizedExperts, version: int
    ) -> None:
        if self._offload == "cpu":
            from ray_moe.runtime.offload import offload_to_cpu

            expert_bytes = self._spec.bytes_of({layer: [0]})
            offloaded = offload_to_cpu(group, len(experts), expert_bytes, self._residents, self._device)
            self._serve(layer, experts, offloaded, version)
        else:
            self._serve(layer, experts, group, version)

    def _serve(
        self,
        layer: LayerPath,
        experts: list[int],
        group: StackedExperts | QuantizedExperts | OffloadedExperts,
        version: int,
    ) -> None:
        if self._device != "cpu":
            group.warm_up()
        self._host.hold(layer, experts, group, version)

    def _bytes_of(self, experts: Lists) -> int:
        return sum(map(self._spec.bytes_of, experts.values()))

    def _check_memory(self, num_bytes: int) -> None:
        from ray_moe.runtime.memory import available_bytes

        if self._device != "cpu" and self._offload != "cpu":
            return
        if self._offload == "disk":
            num_bytes = min(num_bytes, max(0, self._residents.max_bytes - self._residents.num_bytes))
        needed, there = num_bytes + RESERVE_BYTES, available_bytes()
        if needed > there:
            raise InsufficientResources(
                f"{self._host.host_id} would need {needed:,} bytes of memory for its experts and a reserve, and "
                f"{there:,} are available on its node; lower experts.spare_slots, experts.max_bytes or versions.keep, "
                "set experts.offload, or add nodes"
            )

    def _open(self, source: Source) -> Checkpoint:
        import torch

        from ray_moe.models.huggingface import Checkpoint

        if self._device == "cuda" and not torch.cuda.is_available():
            raise InsufficientResources(
                "experts.num_gpus asks for a GPU, but torch sees none in the expert actor's process; install a torch "
                "built for this GPU on every node, or set experts.num_gpus=0"
            )
        checkpoint = self._checkpoints.get(source)
        if checkpoint is None:
            checkpoint = Checkpoint.open(source.model, encoder_decoder=True).cut(self._spec.config.experts.tensor)
            if checkpoint.layers_as(self._quantization) != self._spec.layers:
                raise InvalidRequest(f"{source.model} is not of the architecture that is served: its experts differ")
            self._checkpoints[source] = checkpoint
        return checkpoint

    def _progress(self, num_bytes: int) -> None:
        self._reading_bytes += num_bytes

    # --- training --------------------------------------------------------------------------------------------
    async def training(self, method: str, *arguments: Any) -> Any:
        """Do what a coordinator of training orders (`training/control.py`), one order after the other."""
        from ray_moe.training.control import obey

        async with self._obeying:
            return await asyncio.to_thread(
                obey, self._trainees, self._trained_module, self._load_trainees, method, arguments
            )

    def _trained_module(self, layer: LayerPath) -> nn.Module:
        if layer not in self._trained:
            checkpoint = self._open(Source(0, self._spec.config.model))
            self._trained[layer] = checkpoint.load_experts({layer: [0]}, device=self._device)[layer]
        return self._trained[layer]

    def _load_trainees(self, experts: Mapping[LayerPath, Sequence[int]]) -> None:
        from ray_moe.models.experts import expert_rows

        checkpoint = self._open(Source(0, self._spec.config.model))
        self._check_memory(checkpoint.peak_bytes(experts))
        for layer, ids in experts.items():
            stacks = checkpoint.load_experts({layer: ids}, device=self._device)[layer]
            rows = {expert: expert_rows(stacks, row) for row, expert in enumerate(sorted(ids))}
            self._trainees.hold(layer, self._trained_module(layer), rows, ids)

    # --- calls -----------------------------------------------------------------------------------------------
    async def exchange(self, header: bytes, *arrays: Any) -> Any:
        """A call that came through the object store instead of the stream."""
        from ray_moe.transport.object_store import serve_exchange

        return await serve_exchange(self._loop.submit, header, arrays, self._incarnation)

    # --- faults on purpose -----------------------------------------------------------------------------------
    async def kill(self, whole_node: bool = False) -> None:
        """End this process at once, as a crash would; or the raylet, and with it every process of Ray on the node."""
        os.kill(int(os.environ["RAY_RAYLET_PID"]) if whole_node else os.getpid(), signal.SIGKILL)

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
