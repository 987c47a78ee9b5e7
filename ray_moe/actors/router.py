"""The actor around the backbone: it loads everything but the routed experts and answers clients.

A shell: generating is `runtime/engine.py`, dispatching `runtime/moe_layer.py`, listening a front door given from above.
It implements the `Backend` that front doors serve, follows the controller's routing tables, and reports hosts that it
cannot reach.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import psutil
import ray
from ray.exceptions import RayError

from ray_moe.actors.spec import ClusterStatus, FrontDoor, ServiceSpec, transport_settings
from ray_moe.errors import InsufficientResources, Unavailable
from ray_moe.types import (
    GenerateChunk,
    GenerateRequest,
    HostAddress,
    LayerPath,
    LayerSpec,
    RouterStatus,
    RoutingTable,
    ServiceStatus,
)

if TYPE_CHECKING:
    from ray_moe.models.huggingface import Checkpoint
    from ray_moe.runtime.engine import Engine
    from ray_moe.runtime.moe_layer import ExpertDispatcher
    from ray_moe.transport.base import Transport

logger = logging.getLogger(__name__)

POLL_TIMEOUT_S = 10.0
"""How long one question for the next routing table stays open."""

Array = npt.NDArray[Any]


class Router:
    """One backbone and its front door."""

    def __init__(self, spec: ServiceSpec) -> None:
        # Imported here and below, so that the launcher can name this class without loading torch.
        import torch

        from ray_moe.transport.allocator import tune_malloc

        self._spec = spec
        self._started_at = time.monotonic()
        self._starting = asyncio.Lock()
        self._door: FrontDoor | None = None
        self._port = 0
        self._engine: Engine | None = None
        self._dispatcher: ExpertDispatcher | None = None
        self._checkpoint: Checkpoint | None = None
        self._table_arrived = asyncio.Event()
        self._follower: asyncio.Task[None] | None = None
        self._controller_handle: Any = None
        tune_malloc()
        torch.set_num_threads(spec.config.router.num_threads)

    # --- life ------------------------------------------------------------------------------------------------
    async def start(self, port: int = 0) -> int:
        """Listen, load the backbone, connect to the experts; returns the port of the front door. Idempotent.

        The front door listens from the beginning and says that it is not ready until all of that is done. `port` is
        where an earlier life of the router listened, so that clients find this one; 0 is the configured port.
        """
        async with self._starting:
            if self._engine is not None:
                return self._port
            if self._door is None:
                server = self._spec.config.server
                door = self._spec.open_door(self, server.model_copy(update={"port": port or server.port}))
                self._port = await door.start()
                self._door = door
            dispatcher = self._dispatcher or self._make_dispatcher()
            self._dispatcher = dispatcher
            if self._follower is None:
                self._follower = asyncio.create_task(self._follow(dispatcher))
            engine = await asyncio.to_thread(self._load, dispatcher)
            await self._table_arrived.wait()
            self._engine = engine
            return self._port

    async def epoch(self) -> int:
        """Epoch of the routing table in use, for a controller that was restarted."""
        return 0 if self._dispatcher is None else self._dispatcher.table.epoch

    def _controller(self) -> Any:
        if self._controller_handle is None:
            self._controller_handle = ray.get_actor(self._spec.actor_name("controller"))
        return self._controller_handle

    def _make_transport(self) -> Transport:
        from ray_moe.transport.auto import AutoTransport
        from ray_moe.transport.grpc_client import GrpcTransport
        from ray_moe.transport.object_store import ObjectStoreTransport

        config = self._spec.config.transport
        settings = transport_settings(config)
        node_id = ray.get_runtime_context().get_node_id()
        grpc = GrpcTransport(self._spec.token, node_id=node_id, settings=settings, on_lost=self._line_lost)
        object_store = ObjectStoreTransport(
            lambda address: ray.get_actor(self._spec.actor_name(address.host_id)),
            settings=settings,
            on_lost=self._line_lost,
        )
        if config.kind == "grpc":
            return grpc
        return object_store if config.kind == "object_store" else AutoTransport(grpc, object_store)

    def _make_dispatcher(self) -> ExpertDispatcher:
        from ray_moe.runtime.moe_layer import DispatchSettings, ExpertDispatcher

        config = self._spec.config
        settings = DispatchSettings(
            combine=config.dispatch.combine,
            call_timeout_s=config.router.expert_call_timeout_s,
            recovery_timeout_s=config.router.recovery_timeout_s,
        )
        loop = asyncio.get_running_loop()

        def lost(address: HostAddress) -> None:
            loop.call_soon_threadsafe(lambda: self._report(address))

        return ExpertDispatcher(self._make_transport(), settings, on_lost=lost)

    def _line_lost(self, address: HostAddress) -> None:
        """A line broke while nothing was in flight: the controller should know before the next request does."""
        if self._dispatcher is not None:
            self._dispatcher.report_lost(address)

    def _report(self, address: HostAddress) -> None:
        logger.warning("host %s (%s) is lost", address.host_id, address.incarnation)
        try:
            self._controller().host_lost.remote(address)
        except ValueError:
            logger.warning("the controller is not there to hear of it; Ray restarts it")

    async def _follow(self, dispatcher: ExpertDispatcher) -> None:
        """Use every routing table the controller publishes."""
        while True:
            try:
                table = await self._controller().table_after.remote(dispatcher.table.epoch, POLL_TIMEOUT_S)
            except (RayError, ValueError) as error:  # it is being restarted, or failed: go on with what we have
                logger.warning("no routing table from the controller: %s", error)
                await asyncio.sleep(0.1)
                continue
            await asyncio.to_thread(dispatcher.update, table)  # it closes lines, which may take a moment
            if table.is_complete:
                self._table_arrived.set()

    def _load(self, dispatcher: ExpertDispatcher) -> Engine:
        import torch

        from ray_moe.models.huggingface import Checkpoint
        from ray_moe.runtime.engine import Engine

        config = self._spec.config.router
        device = config.device
        if device == "auto":
            device = "cuda" if config.num_gpus else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise InsufficientResources(
                f"router.device is {device}, but torch sees no GPU in the router's process; install a torch built for "
                "this GPU, or set router.device=cpu and router.num_gpus=0"
            )
        checkpoint = self._checkpoint = Checkpoint.open(self._spec.config.model)
        return Engine(
            checkpoint.load_backbone(device=device),
            checkpoint.load_tokenizer(),
            checkpoint.layers,
            dispatcher,
            max_positions=checkpoint.max_positions,
            max_concurrent_requests=config.max_concurrent_requests,
            max_queued_requests=config.max_queued_requests,
        )

    async def until_lost(self) -> None:
        """Never returns while the process lives."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """Refuse what is new, give what runs the configured grace, and free everything."""
        grace_s = self._spec.config.server.grace_s
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close(grace_s)
        if self._door is not None:
            await self._door.stop(grace_s)
        if self._follower is not None:
            self._follower.cancel()
        if self._dispatcher is not None:
            await asyncio.to_thread(self._dispatcher.close)

    # --- the backend of the front doors ----------------------------------------------------------------------
    @property
    def ready(self) -> bool:
        return self._engine is not None

    def _ready_engine(self) -> Engine:
        if self._engine is None:
            raise Unavailable("the service is starting or stopping; retry later")
        return self._engine

    @property
    def layers(self) -> Mapping[LayerPath, LayerSpec]:
        return self._ready_engine().layers

    @property
    def layers_with_gate(self) -> frozenset[LayerPath]:
        return self._ready_engine().layers_with_gate

    @property
    def vocab_size(self) -> int:
        return self._ready_checkpoint().vocab_size

    @property
    def max_positions(self) -> int | None:
        return self._ready_checkpoint().max_positions

    @property
    def has_tokenizer(self) -> bool:
        return self._ready_engine().has_tokenizer

    def _ready_checkpoint(self) -> Checkpoint:
        if self._checkpoint is None:
            raise Unavailable("the service is starting; retry later")
        return self._checkpoint

    async def forward(self, layer: LayerPath, hidden: Array, routing: tuple[Array, Array] | None) -> Array:
        return await self._ready_engine().forward(layer, hidden, routing)

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        return self._ready_engine().generate(request)

    async def placement(self) -> RoutingTable:
        if self._dispatcher is None:
            raise Unavailable("the service is starting; retry later")
        return self._dispatcher.table

    async def status(self) -> ServiceStatus:
        engine, dispatcher = self._engine, self._dispatcher
        try:
            cluster: ClusterStatus = await asyncio.wait_for(self._controller().status.remote(), 5.0)
        except (RayError, ValueError, asyncio.TimeoutError):
            cluster = ClusterStatus("degraded", 0, (), self._port)
        checkpoint = self._checkpoint
        return ServiceStatus(
            model=self._spec.config.model,
            model_type=self._spec.model_type,
            version=self._spec.version,
            state=cluster.state,
            uptime_s=time.monotonic() - self._started_at,
            epoch=0 if dispatcher is None else dispatcher.table.epoch,
            router=RouterStatus(
                pid=os.getpid(),
                rss_bytes=psutil.Process().memory_info().rss,
                backbone_bytes=0 if checkpoint is None else checkpoint.backbone_bytes,
                active_requests=0 if engine is None else engine.active_requests,
                queued_requests=0 if engine is None else engine.queued_requests,
                generated_tokens=0 if engine is None else engine.num_generated_tokens,
                retried_calls=0 if dispatcher is None else dispatcher.num_retried_calls,
            ),
            hosts=cluster.hosts,
            tokens_per_expert={}
            if dispatcher is None
            else {layer: tuple(counts.tolist()) for layer, counts in dispatcher.tokens_per_expert.items()},
        )
