"""The seam between a router and the hosts of experts: what is asked, what comes back, and how it travels.

A router holds one `Connection` per host and submits `ExpertCall`s to it; the host's side of a transport hands
each call to a `Submit` coroutine and sends its `ExpertReply` back. In training, forward and backward use the same call.
Nothing here decides where a token goes (that is `ops/dispatch.py` and the routing table) or retries (that is
`runtime/moe_layer.py`).

Shape legend: t tokens sent to this host, n rows (token, expert) computed there, D model width.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from ray_moe.transport.device_memory import DeviceArena, DeviceSlot
from ray_moe.types import HostAddress, LayerPath

TRAINING = -1
"""In place of a version: the weights that are being trained."""


@dataclass(slots=True)
class ExpertCall:
    """Rows of one layer for the experts of one host.

    Row r is token ``hidden[gather[token[r]]]``. Rows are grouped by expert, in the order of `experts`:
    the first ``counts[0]`` rows go to ``experts[0]``, and so on.
    """

    layer: LayerPath
    epoch: int
    hidden: torch.Tensor
    """[T, D] (any float dtype, any device); only the t rows that `gather` picks travel.

    In training also uint8 [T, D + 4], rows in 8 bits as `ops/compression.pack_rows` makes them; then `grad` and the
    reply are so too."""
    gather: torch.Tensor | None
    """int64 [t] into `hidden`, on the CPU; None when all of `hidden` travels (t = T)."""
    token: torch.Tensor | None
    """int32 [n] into the t tokens, on the CPU or where `hidden` is; None when row r is token r (n = t)."""
    experts: list[int]
    """Global indices of the experts touched, ascending."""
    counts: list[int]
    """Rows of each of them; ``sum(counts) == n``."""
    weight: torch.Tensor | None = None
    """[n] routing weights, on the CPU. When given, the host combines: the reply is [t, D] weighted partial sums."""
    grad: torch.Tensor | None = None
    """[n, D] gradient of the loss in each output row. When given this is a backward call of training: the host adds to
    its experts' gradients (once per `call_id`) and the reply is [t, D], the gradient in each token."""
    call_id: str = ""
    """``ATTEMPT/NAME`` in training: the attempt at a step that the call belongs to, and its name, the same forward and
    backward and whenever it is sent."""
    trace: str = ""
    """W3C `traceparent` of the span that the call belongs to; empty when nothing is recorded."""
    version: int = 0
    """Which weights compute it: a published version, or `TRAINING`."""
    keep: bool = False
    """Of a forward call in training: the host keeps what it needs to go backward, under `call_id`."""
    kept: bool = False
    """Of a backward call: the host has kept what it needs, so `hidden` and `token` do not travel."""
    place: DeviceSlot | None = None
    """Where a router has put the tensors, in memory of the GPU that it shares with hosts; None where that is not so."""
    room: torch.Tensor | None = None
    """On a host, the bytes of its GPU that the router reads the rows from; None where they travel."""

    @property
    def num_rows(self) -> int:
        return sum(self.counts)

    @property
    def num_tokens(self) -> int:
        tokens = self.hidden if self.gather is None else self.gather
        return tokens.shape[0]

    def tokens(self) -> torch.Tensor:
        """[t, D]: the tokens that travel; none of a call that the host has kept."""
        if self.kept:
            return self.hidden[:0]
        return self.hidden if self.gather is None else self.hidden.index_select(0, self.gather.to(self.hidden.device))


@dataclass(slots=True)
class ExpertReply:
    """What a host answers: [n, D] unweighted rows in the call's row order, or [t, D] when it combined.

    The host leaves them on the device where the call's tokens were; what the router gets may be on the CPU.
    `rows` may lie in memory that the transport reuses: copy out of it, then call `release` once.
    """

    rows: torch.Tensor
    release: Callable[[], None] = lambda: None


class Answer(Awaitable[ExpertReply]):
    """The reply to a call, once it is there. Used in one event loop.

    Who listens is told at once, where a future would tell in the next turn of the loop, and a task in the one after.
    """

    __slots__ = ("_hear", "_outcome", "call", "is_over")

    def __init__(self, call: ExpertCall) -> None:
        self.call = call
        self.is_over = False
        """Whether it is there, or nobody wants it any more."""
        self._outcome: ExpertReply | Exception | None = None
        self._hear: Callable[[ExpertReply | Exception], None] | None = None

    def listen(self, hear: Callable[[ExpertReply | Exception], None]) -> None:
        """Have `hear` told of the reply or error, now or later; it must not raise. At most one listens."""
        if self._outcome is not None:
            hear(self._outcome)
        else:
            self._hear = hear

    def set(self, outcome: ExpertReply | Exception) -> None:
        """What the answer is; what nobody wants is released."""
        if self.is_over:
            if isinstance(outcome, ExpertReply):
                outcome.release()
            return
        self.is_over, self._outcome = True, outcome
        hear, self._hear = self._hear, None
        if hear is not None:
            hear(outcome)

    def give_up(self) -> None:
        """Nobody wants it any more."""
        self.is_over, self._hear = True, None

    def __await__(self) -> Generator[Any, None, ExpertReply]:
        outcome = self._outcome
        if outcome is None:
            done: asyncio.Future[ExpertReply | Exception] = asyncio.get_running_loop().create_future()

            def hear(heard: ExpertReply | Exception) -> None:
                if not done.done():
                    done.set_result(heard)
                elif isinstance(heard, ExpertReply):
                    heard.release()

            self.listen(hear)
            try:
                outcome = yield from done
            except asyncio.CancelledError:
                self.give_up()
                raise
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


Submit = Callable[[ExpertCall], Awaitable[ExpertReply]]
"""The host's entry: queues the call, computes it with whatever else is waiting, and returns the reply.

An `Answer` is the quickest to send; anything else is awaited in a task."""


class Connection(Protocol):
    """A router's line to one life of one host. Thread-safe."""

    address: HostAddress

    def submit(self, call: ExpertCall) -> Future[ExpertReply]:
        """Send `call`; never blocks on the network.

        The future fails with `HostLost` when the line breaks (every call in flight fails at once), with
        `StaleRouting` when the host does not hold an expert, with `ExpertFailed` when the computation raised,
        or with `WireError`. Cancelling the future drops the reply.
        """
        ...

    def close(self) -> None:
        """Free the line and what belongs to it; calls in flight fail with `HostLost`. Idempotent."""
        ...


@runtime_checkable
class Attendable(Protocol):
    """A connection whose answers may be taken in by the thread that waits for them, which saves waking another first.

    Who submits a call with `is_attended` polls `fileno` and calls `take_in` until the future is done, or calls `leave`.
    """

    def submit(self, call: ExpertCall, is_attended: bool = False) -> Future[ExpertReply]: ...

    def fileno(self) -> int:
        """Readable when something has come; -1 where answers cannot be taken in (any more)."""
        ...

    def take_in(self) -> bool:
        """Complete the futures, anybody's, of what has come; never waits. False when the line is over: all are done."""
        ...

    def leave(self) -> None:
        """Nobody may be waiting for what is in flight: from now on the connection sees to it itself."""
        ...


@runtime_checkable
class SharesDevice(Protocol):
    """A connection that may share memory of a GPU with its host."""

    device_arena: DeviceArena | None
    """The memory, the same for all hosts of a card; None where nothing is shared."""


class Transport(Protocol):
    """Makes connections. One per router; `close` closes whatever is still open."""

    def connect(self, address: HostAddress) -> Connection:
        """Open a line to `address`, or raise `HostLost` when it cannot be reached within the connect time-out."""
        ...

    def close(self) -> None: ...
