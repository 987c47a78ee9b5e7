"""A backend without a model, and a front door over it in the running event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_moe.service.backend import FloatArray
from ray_moe.service.grpc.server import FrontDoor
from ray_moe.types import (
    GenerateChunk,
    GenerateRequest,
    HostAddress,
    HostStatus,
    LayerPath,
    LayerSpec,
    Placement,
    RouterStatus,
    RoutingTable,
    ServiceStatus,
)
from ray_moe.wire.status import ERROR_KEY

WIDTH = 4
NUM_EXPERTS = 3
LAYERS = tuple(f"model.layers.{number}.mlp.experts" for number in range(3))
LAYER = LAYERS[0]
GATELESS = LAYERS[2]

STATUS = ServiceStatus(
    model="/models/tiny",
    model_type="mixtral",
    version="0.1.0",
    state="degraded",
    uptime_s=12.5,
    epoch=7,
    router=RouterStatus(11, 2**40, 3, 4, 5, 6, 7),
    hosts=(HostStatus("expert-0", "ready", "node", 12, 1, 2, 3, 4, 5, 6, 7), HostStatus("expert-1", "lost")),
    tokens_per_expert={LAYERS[1]: (1, 0, 2**40), LAYERS[0]: (3, 4, 5)},
)
TABLE = RoutingTable(
    epoch=7,
    placement=Placement({LAYERS[1]: (("expert-0",), ("expert-1", "expert-0"), ()), LAYERS[0]: ()}),
    addresses={"expert-0": HostAddress("expert-0", "life", "node", 12, "127.0.0.1:1", "unix-abstract:x")},
)


class FakeBackend:
    """Experts multiply by their number + 1, the layers' own blocks by -1; generation counts up."""

    def __init__(self) -> None:
        self.ready = True
        self.layers = {path: LayerSpec(path, NUM_EXPERTS, WIDTH, WIDTH, "float32", 100) for path in LAYERS}
        self.layers_with_gate = frozenset(LAYERS) - {GATELESS}
        self.vocab_size = 100
        self.max_positions: int | None = 50
        self.has_tokenizer = True
        self.calls: list[tuple[LayerPath, NDArray[Any], tuple[NDArray[Any], NDArray[Any]] | None]] = []
        self.requests: list[GenerateRequest] = []
        self.num_open = 0
        self.failure: BaseException | None = None
        self.hold_after: int | None = None
        """Pieces after which a generation waits for `released`; forwards wait if it is 0."""
        self.reached = asyncio.Event()
        self.released = asyncio.Event()
        self.closed = asyncio.Event()
        self.both_open = asyncio.Event()
        """Two generations are open at once."""

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
                yield GenerateChunk((number,), f"{number} ", reason, len(request.token_ids or "x"))
                await asyncio.sleep(0)
        finally:
            self.num_open -= 1
            self.closed.set()

    async def _hold(self, number: int) -> None:
        if number == self.hold_after:
            self.reached.set()
            await self.released.wait()

    async def status(self) -> ServiceStatus:
        return STATUS

    async def placement(self) -> RoutingTable:
        return TABLE


@asynccontextmanager
async def front_door(backend: FakeBackend, port: int = 0, **limits: Any) -> AsyncIterator[str]:
    """A server on the loopback; yields its target."""
    door = FrontDoor(backend, port=port, **limits)
    bound = await door.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await door.stop(0)


def error_class(failure: Any) -> str:
    """Name of the class that a failed call carries, empty if none."""
    return str(failure.trailing_metadata().get(ERROR_KEY, ""))
