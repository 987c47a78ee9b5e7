"""The actor around the backbone: it loads everything but the routed experts and answers clients.

A shell: generating is `runtime/engine.py`, dispatching `runtime/moe_layer.py`, listening a front door given from above.
It implements the `Backend` that front doors serve, follows the controller's routing tables, and reports to it: what its
tokens need, and hosts that it cannot reach, that are slow, or that answer nonsense.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from ray_moe.actors.chaos import run_chaos
from ray_moe.actors.process import made_to_stay, set_up
from ray_moe.actors.router_versions import POLL_TIMEOUT_S, VersionFollower
from ray_moe.actors.router_weights import RouterWeights
from ray_moe.actors.spec import (
    ClusterStatus,
    FrontDoor,
    Ports,
    RouterReport,
    ServiceSpec,
)
from ray_moe.actors.tracing import close_tracer, make_tracer
from ray_moe.actors.trainer import Trainings
from ray_moe.config import ServerConfig
from ray_moe.errors import InvalidConfig, RayMoEError, Unavailable
from ray_moe.policy.load import TokenCounts
from ray_moe.runtime.measures import Measures, measure, router_status
from ray_moe.types import (
    CanaryRequest,
    ChaosReport,
    ChaosRequest,
    GenerateChunk,
    GenerateRequest,
    HostAddress,
    HostId,
    LayerPath,
    LayerSpec,
    PlanSummary,
    RouterAddress,
    RouterStatus,
    RoutingTable,
    ServiceStatus,
    VersionStatus,
)

if TYPE_CHECKING:
    from ray_moe.runtime.engine import Engine
    from ray_moe.runtime.moe_layer import ExpertDispatcher
    from ray_moe.runtime.tracing import Tracer
    from ray_moe.transport.base import Transport
    from ray_moe.transport.partition import PartitionedTransport
    from ray_moe.transport.stream_transport import StreamTransport

logger = logging.getLogger(__name__)

PORT_EVERY_S = 0.1
"""How often it is looked whether the configured port has become free."""
ALONE_S = 180.0
"""A router of Ray Serve that has not reached a controller for so long is replaced. Until then its lifeboat computes,
while Serve notices that all experts are gone (10 s) and starts others."""
CONTROL_TIMEOUT_S = 60.0
"""How long the controller may take to answer a wish of somebody's: it may be restarting, or computing a plan."""

Array = npt.NDArray[Any]


class Router:
    """One backbone and its front door."""

    def __init__(self, router_id: str, spec: ServiceSpec) -> None:
        # Here and below torch is imported late, so that the launcher can name this class without loading it.
        self.router_id = router_id
        self._spec = spec
        self._started_at = time.monotonic()
        self._starting = asyncio.Lock()
        self._door: FrontDoor | None = None
        self._address = RouterAddress(router_id, "")
        self._others: tuple[RouterAddress, ...] = ()
        self._engine: Engine | None = None
        """None while it does not answer."""
        self._dispatcher: ExpertDispatcher | None = None
        self._streams: StreamTransport | None = None
        self._partition: PartitionedTransport | None = None
        self._weights = RouterWeights(router_id, spec)
        self._versions = VersionFollower(router_id, self._weights, self._controller)
        self._table_arrived = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._incarnation = uuid.uuid4().hex[:12]
        self._is_following = False
        self._num_reports = 0
        self._controlled_s = time.monotonic()
        """When the controller was last there."""
        self._controller_handle: Any = None
        self._is_foreign = False
        """Whether it has versions of the weights that the controller there is now knows nothing of."""
        self.training = Trainings(spec, self.publish, self.versions)
        self._tracer: Tracer | None = None
        with made_to_stay():
            set_up(spec.config.logs, router_id, spec.config.router.num_threads)

    # --- life ------------------------------------------------------------------------------------------------
    async def start(self, before: RouterAddress | None = None) -> RouterAddress:
        """Listen, load the backbone, connect to the experts; returns where clients reach it. Idempotent.

        The front door listens from the beginning and says that it is not ready until all of that is done. `before` is
        where an earlier life of the router listened, so that clients find this one.
        """
        async with self._starting:
            if self._engine is not None:
                return self._address
            if self._tracer is None:
                config = self._spec.config
                self._tracer = make_tracer(config.tracing, config.service_name, self.router_id, begins=True)
            if self._door is None:
                await self._open_door(before)
            dispatcher = self._dispatcher or self._make_dispatcher()
            self._dispatcher = dispatcher
            if not self._is_following:
                self._is_following = True
                self._tasks += [
                    asyncio.create_task(self._follow(dispatcher)),
                    asyncio.create_task(self._tell(dispatcher)),
                ]
            versions = await self._versions.after(0)
            with made_to_stay():
                engine = await asyncio.to_thread(self._weights.load, dispatcher, versions)
            await self._table_arrived.wait()
            while (newest := await self._versions.after(0)).revision > versions.revision:  # loading takes its time
                versions = newest
                await asyncio.to_thread(self._weights.load_missing, engine, versions)
            self._versions.begin(engine, dispatcher, versions)
            self._engine = engine
            self._address = replace(self._address, ready=True)
            self._tasks.append(asyncio.create_task(self._versions.follow(engine, dispatcher)))
            return self._address

    async def _open_door(self, before: RouterAddress | None) -> None:
        server = self._spec.config.server
        ports = self._spec.ports_of(self.router_id) if before is None or not before.grpc_address else _ports_of(before)
        door = self._spec.open_door(self, server.model_copy(update=ports), self._tracer)
        opened = await door.start()
        self._door = door
        self._address = opened.address(self.router_id, server, ray.util.get_node_ip_address())
        if not self._spec.routers and server.port:
            self._tasks.append(asyncio.create_task(self._take_port(door, server)))

    async def _take_port(self, door: FrontDoor, server: ServerConfig) -> None:
        """Where Ray Serve puts and replaces routers as it likes, one on each node has the configured port, too.

        That is its address from then on: whom clients reach as one that it does not name, they do not believe.
        """
        while True:
            if await door.take(server.port):
                break
            await asyncio.sleep(PORT_EVERY_S)
        taken = Ports(server.port).address(self.router_id, server, ray.util.get_node_ip_address())
        self._address = replace(self._address, grpc_address=taken.grpc_address)

    @property
    def door(self) -> FrontDoor:
        """Raises `Unavailable` before the start."""
        if self._door is None:
            raise Unavailable("the router has not been started; call start first")
        return self._door

    @property
    def num_requests(self) -> int:
        """Generations that are computed or wait."""
        return 0 if self._engine is None else self._engine.active_requests + self._engine.queued_requests

    async def check_controller(self) -> None:
        """Raises `Unavailable` when there has been no controller for so long that none will come, or it has others."""
        if self._is_foreign or time.monotonic() - self._controlled_s > ALONE_S:
            raise Unavailable("the controller of the experts is gone")

    def _controller(self) -> Any:
        if self._controller_handle is None:
            self._controller_handle = self._spec.find("controller")
        return self._controller_handle

    def _make_transport(self) -> Transport:
        from ray_moe.actors.lines import make_streams, make_transport
        from ray_moe.transport.partition import PartitionedTransport

        device = self._weights.device
        self._streams = make_streams(self._spec, device, self._line_lost)
        chosen = make_transport(self._spec, device, self._line_lost, self._streams)
        if not self._spec.config.chaos.enabled:
            return chosen
        self._partition = PartitionedTransport(chosen)
        return self._partition

    def _make_dispatcher(self) -> ExpertDispatcher:
        from ray_moe.runtime.moe_layer import ExpertDispatcher
        from ray_moe.runtime.settings import DispatchSettings

        config = self._spec.config
        settings = DispatchSettings(
            combine=config.dispatch.combine,
            call_timeout_s=config.router.expert_call_timeout_s,
            recovery_timeout_s=config.router.recovery_timeout_s,
            hedge=config.dispatch.hedge,
            hedge_factor=config.dispatch.hedge_factor,
            hedge_min_s=config.dispatch.hedge_min_s,
            num_parts=config.experts.tensor,
            check_finite=config.dispatch.check_finite,
        )
        loop = asyncio.get_running_loop()

        def tell(what: str) -> Any:
            return lambda address, *_: loop.call_soon_threadsafe(self._report, what, address)

        return ExpertDispatcher(
            self._make_transport(),
            settings,
            on_lost=tell("lost"),
            on_slow=tell("slow"),
            on_corrupt=tell("corrupt"),
            own=self._weights.make_own_experts(),
        )

    def _line_lost(self, address: HostAddress) -> None:
        """A line broke while nothing was in flight: the controller should know before the next request does."""
        if self._dispatcher is not None:
            self._dispatcher.report_lost(address)

    def _report(self, what: str, address: HostAddress) -> None:
        """Tell the controller that a host is lost, slow or corrupt."""
        logger.warning("host %s (%s) is %s", address.host_id, address.incarnation, what)
        try:
            getattr(self._controller(), f"host_{what}").remote(address)
        except ValueError:
            logger.warning("the controller is not there to hear of it; Ray restarts it")

    async def _follow(self, dispatcher: ExpertDispatcher) -> None:
        """Use every routing table the controller publishes."""
        while True:
            try:
                table = await self._controller().table_after.remote(dispatcher.table.epoch, POLL_TIMEOUT_S)
            except (RayError, ValueError) as error:  # it is being restarted, or failed: go on with what we have
                logger.warning("no routing table from the controller: %s", error)
                if isinstance(error, ActorDiedError):
                    await self._join_successor()
                await asyncio.sleep(0.1)
                continue
            await asyncio.to_thread(dispatcher.update, table)  # it closes lines, which may take a moment
            if table.is_complete:
                self._table_arrived.set()

    async def _join_successor(self) -> None:
        """The controller will not come back, but Ray Serve starts another one for this version of the application, with
        experts of its own: the router is theirs from then on. Unless versions of the weights were published, which they
        do not have: then it is to be replaced.
        """
        with contextlib.suppress(RayError, ValueError, asyncio.TimeoutError):  # not there yet
            controller = self._spec.find("controller")
            spec = await asyncio.wait_for(controller.spec.remote(), POLL_TIMEOUT_S)
            versions = await asyncio.wait_for(controller.versions_after.remote(0, 0.0), POLL_TIMEOUT_S)
            has = self._versions.has()
            self._is_foreign = has is not None and has.revision != versions.revision
            if self._streams is not None and not self._is_foreign:
                self._streams.renew(spec.token, spec.certificate)
                self._controller_handle = controller
                logger.warning("the experts are others now, and so is their controller")

    async def _tell(self, dispatcher: ExpertDispatcher) -> None:
        """Report counts and feelings to the controller, and keep the cache of experts up with the load."""
        every_s = self._spec.config.balance.every_s
        while True:
            await asyncio.sleep(every_s)
            vitals = None if self._engine is None else self._engine.vitals
            self._num_reports += 1
            tokens = {layer: tuple(counts.tolist()) for layer, counts in dispatcher.tokens_per_part.items()}
            report = RouterReport(
                router=self._address,
                counts=TokenCounts(self.router_id, self._incarnation, self._num_reports, tokens),
                epoch=dispatcher.table.epoch,
                queue_age_s=0.0 if vitals is None else vitals.queue_age_s,
                idle_s=0.0 if vitals is None else vitals.idle_s,
                versions=self._versions.has(),
            )
            try:
                self._others = await asyncio.wait_for(self._controller().report.remote(report), POLL_TIMEOUT_S)
            except (RayError, ValueError, asyncio.TimeoutError) as error:
                logger.warning("the controller does not take reports now: %s", error)
            else:
                self._controlled_s = time.monotonic()
            version = 0 if self._engine is None else self._engine.version
            await asyncio.to_thread(dispatcher.rebalance_cache, time.monotonic(), version)

    async def until_lost(self) -> None:
        """Never returns while the process lives."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """Refuse what is new, give what runs the configured grace, and free everything."""
        grace_s = self._spec.config.server.grace_s
        engine, self._engine = self._engine, None
        self._address = replace(self._address, ready=False)
        if engine is not None:
            await engine.close(grace_s)
        if self._door is not None:
            await self._door.stop(grace_s)
        for task in self._tasks:
            task.cancel()
        if not self._spec.routers:  # nobody else would tell
            with contextlib.suppress(RayError, ValueError, asyncio.TimeoutError):
                await asyncio.wait_for(self._controller().router_left.remote(self.router_id), 1.0)
        if self._dispatcher is not None:
            await asyncio.to_thread(self._dispatcher.close)
        await close_tracer(self._tracer)

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
        return self._weights.checkpoint.vocab_size

    @property
    def max_positions(self) -> int | None:
        return self._weights.checkpoint.max_positions

    @property
    def model_name(self) -> str:
        return self._spec.config.served_name

    @property
    def has_tokenizer(self) -> bool:
        return self._ready_engine().has_tokenizer

    async def tokenize(self, text: str) -> tuple[int, ...]:
        return await self._ready_engine().texts.tokenize(text)

    async def tokenize_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        return await self._ready_engine().texts.tokenize_chat(messages)

    def token_text(self, token_id: int) -> str:
        return self._ready_engine().texts.token_text(token_id)

    async def forward(self, layer: LayerPath, hidden: Array, routing: tuple[Array, Array] | None) -> Array:
        return await self._ready_engine().forward(layer, hidden, routing)

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        return self._ready_engine().generate(request)

    async def placement(self) -> RoutingTable:
        if self._dispatcher is None:
            raise Unavailable("the service is starting; retry later")
        return self._dispatcher.table

    async def routers(self) -> tuple[RouterAddress, ...]:
        """This one, and the others as the controller last told; not one that has ended and left this one its port."""
        mine = self._address
        others = (o for o in self._others if mine.router_id != o.router_id and mine.grpc_address != o.grpc_address)
        return (mine, *others)

    def measures(self) -> Measures:
        wanted = self._spec.config.balance.replicas_wanted
        return measure(self._router_status(), self._engine, self._dispatcher, wanted)

    async def status(self) -> ServiceStatus:
        try:
            cluster: ClusterStatus = await asyncio.wait_for(self._controller().status.remote(), 5.0)
        except (RayError, ValueError, asyncio.TimeoutError):
            cluster = ClusterStatus("degraded", 0, ())
        dispatcher = self._dispatcher
        return ServiceStatus(
            model=self._spec.config.model,
            model_type=self._spec.model_type,
            version=self._spec.version,
            state=cluster.state,
            uptime_s=time.monotonic() - self._started_at,
            epoch=0 if dispatcher is None else dispatcher.table.epoch,
            router=self._router_status(),
            hosts=cluster.hosts,
            tokens_per_expert={}
            if dispatcher is None
            else {layer: tuple(counts.tolist()) for layer, counts in dispatcher.tokens_per_expert.items()},
            changing=cluster.changing,
            events=cluster.events,
            p_lossless=cluster.p_lossless,
            routers=await self.routers(),
            versions=cluster.versions,
        )

    def _router_status(self) -> RouterStatus:
        return router_status(self.router_id, self._weights.backbone_bytes, self._engine, self._dispatcher)

    # --- wishes of people, which the controller carries out --------------------------------------------------
    async def plan(self, dry_run: bool) -> PlanSummary:
        summary: PlanSummary = await self._ask(lambda controller: controller.plan.remote(dry_run))
        return summary

    async def resize(self, num_actors: int) -> None:
        await self._ask(lambda controller: controller.resize.remote(num_actors))

    async def drain(self, target: str, replace: bool) -> tuple[HostId, ...]:
        host_ids: tuple[HostId, ...] = await self._ask(lambda controller: controller.drain.remote(target, replace))
        return host_ids

    async def publish(self, model: str) -> VersionStatus:
        await asyncio.to_thread(self._weights.check, model, is_whole=True)
        timeout_s = self._spec.config.versions.load_timeout_s + CONTROL_TIMEOUT_S
        version: VersionStatus = await self._ask(lambda controller: controller.publish.remote(model), timeout_s)
        return version

    async def begin_canary(self, request: CanaryRequest) -> VersionStatus:
        await asyncio.to_thread(self._weights.check, request.model, is_whole=False)
        timeout_s = self._spec.config.versions.load_timeout_s + CONTROL_TIMEOUT_S
        version: VersionStatus = await self._ask(lambda controller: controller.begin_canary.remote(request), timeout_s)
        return version

    async def end_canary(self, promote: bool) -> VersionStatus:
        version: VersionStatus = await self._ask(lambda controller: controller.end_canary.remote(promote))
        return version

    async def roll_back(self, to: int | None) -> VersionStatus:
        version: VersionStatus = await self._ask(lambda controller: controller.roll_back.remote(to))
        return version

    async def versions(self) -> tuple[VersionStatus, ...]:
        versions: tuple[VersionStatus, ...] = await self._ask(lambda controller: controller.versions.remote())
        return versions

    async def chaos(self, request: ChaosRequest) -> ChaosReport:
        if not self._spec.config.chaos.enabled:
            raise InvalidConfig("this service may not be hurt: start it with chaos.enabled=true to allow it")
        if self._partition is None:
            raise Unavailable("the service is starting; retry later")
        return await run_chaos(request, self, self._partition, self._ready_engine().vitals, self._ask)

    async def _ask(self, ask: Callable[[Any], Awaitable[Any]], timeout_s: float = CONTROL_TIMEOUT_S) -> Any:
        """What the controller answers. Raises its own errors, and `Unavailable` when it does not answer."""
        try:
            return await asyncio.wait_for(ask(self._controller()), timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, RayMoEError):
                raise error.cause from None
            raise
        except (RayError, ValueError, asyncio.TimeoutError) as error:
            raise Unavailable(f"the controller does not answer ({type(error).__name__}); retry") from error


def _ports_of(address: RouterAddress) -> dict[str, int | None]:
    """As the configuration of a server has them."""
    grpc, http = (int(at.rpartition(":")[2]) if at else None for at in (address.grpc_address, address.http_address))
    return {"port": grpc, "http_port": http}
