"""A backend without a model, and a front door over it in the running event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_moe.errors import InvalidRequest
from ray_moe.runtime.measures import Measures
from ray_moe.runtime.vitals import Vitals
from ray_moe.service.admission import Admission
from ray_moe.service.backend import FloatArray
from ray_moe.service.grpc.server import FrontDoor
from ray_moe.types import (
    CanaryRequest,
    ChaosReport,
    ChaosRequest,
    ClusterEvent,
    GenerateChunk,
    GenerateRequest,
    HostAddress,
    HostId,
    HostStatus,
    LayerPath,
    LayerSpec,
    Placement,
    PlannedMove,
    PlanSummary,
    RouterAddress,
    RouterStatus,
    RoutingTable,
    ServiceStatus,
    VersionStatus,
)
from ray_moe.wire.status import ERROR_KEY
from tests.unit.service.fake_training import FakeTraining

WIDTH = 4
NUM_EXPERTS = 3
LAYERS = tuple(f"model.layers.{number}.mlp.experts" for number in range(3))
LAYER = LAYERS[0]
GATELESS = LAYERS[2]

VERSIONS = (VersionStatus(0, "/models/tiny", "kept"), VersionStatus(2, "/models/better", "current"))

STATUS = ServiceStatus(
    model="/models/tiny",
    model_type="mixtral",
    version="0.1.0",
    state="degraded",
    uptime_s=12.5,
    epoch=7,
    router=RouterStatus(11, 2**40, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0.5, 0.25),
    hosts=(HostStatus("expert-0", "ready", "node", 12, 1, 2, 3, 4, 5, 6, 7, 0.75, 9), HostStatus("expert-1", "lost")),
    tokens_per_expert={LAYERS[1]: (1, 0, 2**40), LAYERS[0]: (3, 4, 5)},
    changing="resize: 2 to 3 hosts",
    events=(ClusterEvent(1.5, "lost", "expert-1"), ClusterEvent(2.5, "repaired", "expert-0")),
    p_lossless=0.125,
    versions=VERSIONS,
)
PLAN = PlanSummary(
    moves=(PlannedMove(LAYERS[0], 2, ("expert-0",), ()), PlannedMove(LAYERS[1], 0, (), ("expert-0", "expert-1"))),
    copied_bytes=2**33,
    num_steps=2,
    balancedness_before=0.5,
    balancedness_after=0.875,
    pause_s=0.0,
    duration_s=1.5,
)
REPORT = ChaosReport("kill", ("expert-0", "expert-1"), 0.25, 1, -1.0, 0.5, 0.75, 4, 5, 6)
TABLE = RoutingTable(
    epoch=7,
    placement=Placement({LAYERS[1]: (("expert-0",), ("expert-1", "expert-0"), ()), LAYERS[0]: ()}),
    addresses={"expert-0": HostAddress("expert-0", "life", "node", 12, "127.0.0.1:1", "x")},
)


class FakeBackend:
    """Experts multiply by their number + 1, the layers' own blocks by -1; generation counts up."""

    def __init__(self) -> None:
        self.ready = True
        self.layers = {path: LayerSpec(path, NUM_EXPERTS, WIDTH, WIDTH, "float32", 100) for path in LAYERS}
        self.layers_with_gate = frozenset(LAYERS) - {GATELESS}
        self.vocab_size = 100
        self.max_positions: int | None = 50
        self.model_name = "tiny"
        self.has_tokenizer = True
        self.calls: list[tuple[LayerPath, NDArray[Any], tuple[NDArray[Any], NDArray[Any]] | None]] = []
        self.requests: list[GenerateRequest] = []
        self.wishes: list[tuple[Any, ...]] = []
        self.addresses: tuple[RouterAddress, ...] = ()
        """Where the routers of the service are said to be."""
        self.training = FakeTraining()
        self.vitals = Vitals()
        self.weights: list[int] = []
        """Version that computes each generation, in the order of their coming; 0 beyond."""
        self.num_open = 0
        self.failure: BaseException | None = None
        self.hold_after: int | None = None
        """Pieces after which a generation waits for `released`; forwards wait if it is 0."""
        self.reached = asyncio.Event()
        self.released = asyncio.Event()
        self.closed = asyncio.Event()
        self.both_open = asyncio.Event()
        """Two generations are open at once."""

    async def tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(1 + ord(letter) % 90 for letter in text)

    async def tokenize_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        if any(message["role"] == "nobody" for message in messages):
            raise InvalidRequest("the checkpoint's chat template refuses these messages: nobody speaks")
        return await self.tokenize("".join(str(message["content"]) for message in messages))

    def token_text(self, token_id: int) -> str:
        return f"<{token_id}>"

    async def forward(
        self, layer: LayerPath, hidden: FloatArray, routing: tuple[NDArray[np.int64], FloatArray] | None
    ) -> FloatArray:
        self.calls.append((layer, hidden, routing))
        if self.failure is not None:
            raise self.failure
        try:
            await self._hold(0)
        finally:
            self.closed.set()
        if routing is None:
            return -hidden.astype(np.float32)
        index, weight = routing
        factor = np.append(np.arange(1, NUM_EXPERTS + 1), 0)[index] * weight
        return np.asarray(hidden * factor.sum(axis=1, keepdims=True), np.float32)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        version = self.weights[len(self.requests)] if len(self.requests) < len(self.weights) else 0
        self.requests.append(request)
        self.num_open += 1
        if self.num_open == 2:
            self.both_open.set()
        try:
            for number in range(request.max_new_tokens):
                await self._hold(number)
                if self.failure is not None:
                    raise self.failure
                reason = "length" if number == request.max_new_tokens - 1 else ""
                yield GenerateChunk((number,), f"{number} ", reason, len(request.token_ids or "x"), version=version)
                await asyncio.sleep(0)
        finally:
            self.num_open -= 1
            self.closed.set()

    async def _hold(self, number: int) -> None:
        if number == self.hold_after:
            self.reached.set()
            await self.released.wait()

    async def routers(self) -> tuple[RouterAddress, ...]:
        return self.addresses

    async def status(self) -> ServiceStatus:
        return STATUS

    def measures(self) -> Measures:
        tokens = {layer: np.array(counts) for layer, counts in STATUS.tokens_per_expert.items()}
        return Measures(STATUS.router, tokens, TABLE, self.vitals, 2, 2**20, 2**30, 2)

    async def placement(self) -> RoutingTable:
        return TABLE

    async def plan(self, dry_run: bool) -> PlanSummary:
        self.wishes.append(("plan", dry_run))
        if self.failure is not None:
            raise self.failure
        return PLAN

    async def resize(self, num_actors: int) -> None:
        self.wishes.append(("resize", num_actors))
        if self.failure is not None:
            raise self.failure

    async def drain(self, target: str, replace: bool) -> tuple[HostId, ...]:
        self.wishes.append(("drain", target, replace))
        if self.failure is not None:
            raise self.failure
        return (target, "expert-9")

    async def publish(self, model: str) -> VersionStatus:
        self.wishes.append(("publish", model))
        if self.failure is not None:
            raise self.failure
        return VersionStatus(3, model, "current")

    async def roll_back(self, to: int | None) -> VersionStatus:
        self.wishes.append(("roll back", to))
        if self.failure is not None:
            raise self.failure
        return VERSIONS[0 if to is None else to]

    async def begin_canary(self, request: CanaryRequest) -> VersionStatus:
        self.wishes.append(("canary", request))
        if self.failure is not None:
            raise self.failure
        return VersionStatus(3, request.model, "canary", 0.25, 7)

    async def end_canary(self, promote: bool) -> VersionStatus:
        self.wishes.append(("end canary", promote))
        if self.failure is not None:
            raise self.failure
        return VERSIONS[1]

    async def versions(self) -> tuple[VersionStatus, ...]:
        if self.failure is not None:
            raise self.failure
        return VERSIONS

    async def chaos(self, request: ChaosRequest) -> ChaosReport:
        self.wishes.append(("chaos", request))
        if self.failure is not None:
            raise self.failure
        return REPORT


@asynccontextmanager
async def front_door(
    backend: FakeBackend,
    port: int = 0,
    max_concurrent_requests: int = 512,
    max_in_flight_bytes: int = 2**30,
    host: Any = "127.0.0.1",
    **options: Any,
) -> AsyncIterator[str]:
    """A server on the loopback; yields its target."""
    admission = Admission(backend, max_concurrent_requests, max_in_flight_bytes)
    door = FrontDoor(backend, host, port, admission=admission, **options)
    bound = await door.start()
    try:
        yield f"{host}:{bound}"
    finally:
        await door.stop(0)


def error_class(failure: Any) -> str:
    """Name of the class that a failed call carries, empty if none."""
    return str(failure.trailing_metadata().get(ERROR_KEY, ""))
