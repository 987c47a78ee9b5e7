"""The routed experts of a model, wherever they live: dispatch, exchange, combine, and retry.

This is the one dispatch core behind every door. It is given the gate's choice (index and weight) and answers the sum
of the chosen experts' outputs; a host that dies, hangs or has lost an expert is retried here and never seen by the
model. It decides no placement: the routing table comes from outside, and the loss of a host is reported outside.

Shape legend: T tokens, K experts per token, N = T*K slots, E experts, D model width, n rows of one host.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ray_moe.errors import HostLost, StaleRouting, Unavailable
from ray_moe.ops.dispatch import HostShare, Ints, combine, cut, split_by_host
from ray_moe.runtime.routing import Routes
from ray_moe.transport.base import Connection, ExpertCall, ExpertReply, Transport
from ray_moe.types import HostAddress, LayerPath, RoutingTable

CombineAt = Literal["router", "host"]
RECONNECT_EVERY_S = 0.1
"""While no newer table has come, a lost host is tried again this often: perhaps only its line broke."""

REPORT_EVERY_S = 1.0
"""A host that stays out of reach is reported again after this: the first report may have reached nobody."""
MAX_ROWS_PER_CALL = 4096
"""Larger shares are cut, so that a host with a huge batch still answers something now and then."""

MakeCall = Callable[[HostShare, int], ExpertCall]


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """How the dispatcher combines and how long it waits."""

    combine: CombineAt = "router"
    """``router``: unweighted rows come back and are summed in `transformers`' own order (bit-equal).
    ``host``: weighted partial sums come back; less traffic, other rounding in bf16."""
    call_timeout_s: float = 30.0
    """A host that has answered nothing for so long is taken for lost."""
    recovery_timeout_s: float = 60.0
    """How long rows wait for a host that can compute them before the batch fails with `Unavailable`."""


class ExpertDispatcher:
    """Sends the tokens of each batch to the hosts of their experts. Thread-safe; one per router."""

    def __init__(
        self,
        transport: Transport,
        settings: DispatchSettings | None = None,
        on_lost: Callable[[HostAddress], None] = lambda address: None,
    ) -> None:
        """`on_lost` is called from the thread that finds a host lost, again each second while it stays so."""
        self.settings = settings or DispatchSettings()
        self.num_retried_calls = 0
        self.tokens_per_expert: dict[LayerPath, Ints] = {}
        """[E] tokens routed to each expert since the start, by layer."""
        self._routes = Routes(transport)
        self._on_lost = on_lost
        self._anchor = torch.zeros((), requires_grad=True)
        self._counting = threading.Lock()
        self._last_reply_s: WeakKeyDictionary[Connection, float] = WeakKeyDictionary()
        self._reported_s: dict[str, float] = {}
        self._reporting = threading.Lock()

    # --- the routing table ---------------------------------------------------------------------------------
    def update(self, table: RoutingTable) -> None:
        """Route by `table` from the next batch on (and for what is being retried); older tables are ignored."""
        self._routes.update(table)
        for layer, experts in table.placement.hosts_of.items():
            self.tokens_per_expert.setdefault(layer, np.zeros(len(experts), dtype=np.int64))

    @property
    def table(self) -> RoutingTable:
        return self._routes.view.table

    def close(self) -> None:
        """Close every line; batches in flight fail over and then end with `Unavailable`."""
        self._routes.close()

    # --- the contract --------------------------------------------------------------------------------------
    def forward(
        self, layer: LayerPath, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts.

        Args:
            layer: path of the experts.
            hidden: [T, D].
            index: [T, K] integers in 0..E; E means "no expert".
            weight: [T, K], used in its own dtype.

        Returns: [T, D] in the dtype and on the device of `hidden`. With gradients enabled it is differentiable in
        `hidden` and `weight`, and backward accumulates the experts' gradients on their hosts.

        Raises: `Unavailable` when rows found no living host within `recovery_timeout_s`; `ExpertFailed`.
        """
        slots = index.detach().cpu().numpy().astype(np.int64, copy=False).reshape(-1)
        self._count(layer, slots)
        if torch.is_grad_enabled():
            anchor = self._anchor.to(hidden.device)
            return combine(_RemoteRows.apply(hidden, anchor, self, layer, slots), weight)  # type: ignore[no-untyped-call]
        tokens = hidden if hidden.device.type == "cpu" else hidden.cpu()
        if self.settings.combine == "host":
            return self._partial_sums(layer, tokens, slots, weight.cpu()).to(hidden.device)
        return combine(self._rows(layer, tokens, slots).to(hidden.device), weight)

    def _count(self, layer: LayerPath, slots: Ints) -> None:
        counts = self.tokens_per_expert.get(layer)
        if counts is not None:
            with self._counting:
                counts += np.bincount(slots, minlength=len(counts) + 1)[:-1]

    def _rows(self, layer: LayerPath, hidden: torch.Tensor, slots: Ints) -> torch.Tensor:
        """[T, D], [N] -> [N, D] unweighted outputs by slot; zeros where a slot goes nowhere."""
        rows: torch.Tensor | None = None
        for share, reply in self._exchange(layer, slots, len(hidden), lambda s, e: _call(layer, e, hidden, s)):
            if rows is None:
                every = len(share.slot) == len(slots)
                rows = (torch.empty if every else torch.zeros)(len(slots), reply.shape[-1], dtype=hidden.dtype)
            rows.index_copy_(0, torch.from_numpy(share.slot), reply)
        return hidden.new_zeros(len(slots), hidden.shape[-1]) if rows is None else rows

    def _partial_sums(self, layer: LayerPath, hidden: torch.Tensor, slots: Ints, weight: torch.Tensor) -> torch.Tensor:
        """The same with the hosts combining: one row per token and host comes back."""
        flat_weight = weight.reshape(-1)
        sums = torch.zeros(hidden.shape, dtype=torch.promote_types(hidden.dtype, weight.dtype))

        def make(share: HostShare, epoch: int) -> ExpertCall:
            call = _call(layer, epoch, hidden, share)
            call.weight = flat_weight[torch.from_numpy(share.slot)]
            return call

        for share, reply in self._exchange(layer, slots, len(hidden), make):
            if share.gather is None:
                sums += reply
            else:
                sums.index_add_(0, torch.from_numpy(share.gather), reply.to(sums.dtype))
        return sums.to(hidden.dtype)

    def backward_rows(
        self, layer: LayerPath, hidden: torch.Tensor, slots: Ints, grad: torch.Tensor, call_id: str
    ) -> torch.Tensor:
        """Push gradients back through the rows: `grad` [N, D] -> [T, D], the gradient in `hidden`.

        The hosts recompute the rows from `hidden` and add to their experts' gradients, each call counted once.
        """
        sums = torch.zeros_like(hidden)

        def make(share: HostShare, epoch: int) -> ExpertCall:
            call = _call(layer, epoch, hidden, share)
            call.grad = grad.index_select(0, torch.from_numpy(share.slot))
            # Each expert's rows in this call are named by the first of them: the same in every attempt (see `cut`).
            firsts = np.cumsum([0, *share.counts[:-1]])
            call.call_id = f"{call_id}:{','.join(map(str, share.slot[firsts].tolist()))}"
            return call

        for share, reply in self._exchange(layer, slots, len(hidden), make):
            if share.gather is None:
                sums += reply
            else:
                sums.index_add_(0, torch.from_numpy(share.gather), reply)
        return sums

    # --- exchange and retry --------------------------------------------------------------------------------
    def _exchange(
        self, layer: LayerPath, slots: Ints, num_tokens: int, make: MakeCall
    ) -> Iterator[tuple[HostShare, torch.Tensor]]:
        """Every share of the batch with its reply's rows (valid until the next is asked for), in any order.

        Shares whose host was lost, or did not hold an expert, are regrouped by the newest table and sent again.
        """
        if not len(slots):
            return
        top_k = len(slots) // num_tokens
        pending: Ints | None = None
        give_up_at = 0.0
        while True:
            view = self._routes.view
            index = slots if pending is None else slots[pending]
            shares = split_by_host(index, view.owner_of(layer), top_k, pending)
            sent: list[tuple[HostShare, Connection, Future[ExpertReply]]] = []
            failed: list[HostShare] = []
            try:
                for share in shares:
                    host_id = view.hosts[share.host]
                    connection = self._routes.connection(host_id)
                    if connection is None:
                        failed.append(share)
                        self.report_lost(view.table.addresses.get(host_id))
                        continue
                    sent += [
                        (piece, connection, connection.submit(make(piece, view.table.epoch)))
                        for piece in cut(share, top_k, MAX_ROWS_PER_CALL)
                    ]
                for share, connection, future in sent:
                    reply = self._await(connection, future)
                    if reply is None:
                        self.num_retried_calls += 1
                        failed.append(share)
                        continue
                    try:
                        yield share, reply.rows
                    finally:
                        reply.release()
            finally:  # after an error the other replies are nobody's
                for _, _, future in sent:
                    future.cancel()
            if not failed:
                return
            give_up_at = give_up_at or time.monotonic() + self.settings.recovery_timeout_s
            if time.monotonic() > give_up_at:
                experts = sorted({expert for share in failed for expert in share.experts})
                raise Unavailable(
                    f"experts {experts} of {layer} had no living host for {self.settings.recovery_timeout_s:g} s; "
                    "retry when the service has recovered"
                )
            self._routes.wait_newer(view.table.epoch, RECONNECT_EVERY_S)
            pending = np.sort(np.concatenate([share.slot for share in failed]))

    def _await(self, connection: Connection, future: Future[ExpertReply]) -> ExpertReply | None:
        """The reply; None when the rows must be sent again. Reports a lost host.

        A host with much to do is slow, not lost: what counts is the time since it answered anything.
        """
        while True:
            try:
                reply = future.result(self.settings.call_timeout_s)
            except StaleRouting:
                return None
            except FutureTimeoutError:
                if time.monotonic() - self._last_reply_s.get(connection, 0.0) < self.settings.call_timeout_s:
                    continue
                future.cancel()
            except HostLost:
                pass
            else:
                self._last_reply_s[connection] = time.monotonic()
                return reply
            self._routes.lose(connection)
            self.report_lost(connection.address)
            return None

    def report_lost(self, address: HostAddress | None) -> None:
        """Tell of a host that cannot be reached; again while that goes on, but not more than once a second."""
        if address is None:
            return
        now_s = time.monotonic()
        with self._reporting:
            if now_s - self._reported_s.get(address.incarnation, -REPORT_EVERY_S) < REPORT_EVERY_S:
                return
            self._reported_s[address.incarnation] = now_s
        self._on_lost(address)


def _call(layer: LayerPath, epoch: int, hidden: torch.Tensor, share: HostShare) -> ExpertCall:
    return ExpertCall(
        layer=layer,
        epoch=epoch,
        hidden=hidden,
        gather=None if share.gather is None else torch.from_numpy(share.gather),
        token=None if share.token is None else torch.from_numpy(share.token),
        experts=share.experts,
        counts=share.counts,
    )


class _RemoteRows(torch.autograd.Function):
    """[T, D] -> [N, D] through the remote experts, differentiable in the tokens.

    Gathering the weights and summing stay ordinary autograd, so the gate's gradients come for free. The `anchor`
    requires a gradient so that backward runs (and the experts learn) even when the tokens need none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        anchor: torch.Tensor,
        dispatcher: ExpertDispatcher,
        layer: LayerPath,
        slots: Ints,
    ) -> torch.Tensor:
        tokens = hidden.detach().cpu()
        ctx.dispatcher, ctx.layer, ctx.slots, ctx.call_id = dispatcher, layer, slots, uuid.uuid4().hex
        ctx.save_for_backward(tokens)
        return dispatcher._rows(layer, tokens, slots).to(hidden.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        into = ctx.dispatcher.backward_rows(ctx.layer, tokens, ctx.slots, grad.detach().cpu(), ctx.call_id)
        return into.to(grad.device), None, None, None, None
