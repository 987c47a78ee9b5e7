"""The seam between a router and the hosts of experts: what is asked, what comes back, and how it travels.

A router holds one `Connection` per host and submits `ExpertCall`s to it; the host's side of a transport hands
each call to a `Submit` coroutine and sends its `ExpertReply` back. In training, forward and backward use the same call.
Nothing here decides where a token goes (that is `ops/dispatch.py` and the routing table) or retries (that is
`runtime/moe_layer.py`).

Shape legend: t tokens sent to this host, n rows (token, expert) computed there, D model width.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

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
    """int32 [n] into the t tokens, on the CPU; None when row r is token r (n = t)."""
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


Submit = Callable[[ExpertCall], Awaitable[ExpertReply]]
"""The host's entry: queues the call, computes it with whatever else is waiting, and returns the reply."""


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


class Transport(Protocol):
    """Makes connections. One per router; `close` closes whatever is still open."""

    def connect(self, address: HostAddress) -> Connection:
        """Open a line to `address`, or raise `HostLost` when it cannot be reached within the connect time-out."""
        ...

    def close(self) -> None: ...
