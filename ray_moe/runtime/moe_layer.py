"""The routed experts of a model, wherever they live: dispatch, exchange and combine.

This is the one dispatch core behind every door. It is given the gate's choice (index and weight) and answers the sum
of the chosen experts' outputs; a host that dies, hangs, is slow, answers damaged rows or has lost an expert is dealt
with here and never seen by the model. It decides no placement: the routing table comes from outside, and what is found
out about hosts is reported outside.

Shape legend: T tokens, K experts per token, N = T*K slots, E experts, D model width, n rows of one host.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ray_moe.errors import ExpertFailed, Unavailable
from ray_moe.ops.dispatch import HostShare, Ints, combine
from ray_moe.runtime.exchange import Exchange, MakeCall, Router
from ray_moe.runtime.lines import Lines
from ray_moe.runtime.own_experts import OwnExperts
from ray_moe.runtime.reports import Reports
from ray_moe.runtime.routing import How, Reach, Routes
from ray_moe.runtime.settings import DispatchSettings
from ray_moe.runtime.statistics import Statistics
from ray_moe.transport.base import ExpertCall, Transport
from ray_moe.types import HostAddress, HostId, LayerPath, RoutingTable

Sources = list[tuple[Ints, HostAddress | None]]
"""Slots, and the host that computed them; None is the router itself."""

ROWS: dict[Reach, How] = {"any": How("any"), "hosts": How("hosts")}
SUMS, GRADIENTS = How(in_order=True), How("first", in_order=True)
"""A sum is always taken in the same order, so that its bits are the same too."""


class ExpertDispatcher:
    """Sends the tokens of each batch to the hosts of their experts. Thread-safe; one per router."""

    def __init__(
        self,
        transport: Transport,
        settings: DispatchSettings | None = None,
        on_lost: Callable[[HostAddress], None] = lambda address: None,
        *,
        on_slow: Callable[[HostAddress, float], None] = lambda address, seconds: None,
        on_corrupt: Callable[[HostAddress], None] = lambda address: None,
        own: OwnExperts | None = None,
    ) -> None:
        """
        Args:
            transport: makes the lines to hosts; closed by whoever made it.
            settings: how to combine, wait and hedge.
            on_lost: told of a host that cannot be reached, again each second while it stays so, from any thread.
            on_slow: told of a host that keeps answering late, and for how many seconds it owes its answer; likewise.
            on_corrupt: told of a host that answered NaN or infinity where another computed numbers; likewise.
            own: the router's own experts: its cache and its lifeboat.
        """
        self.settings = settings or DispatchSettings()
        self.statistics = Statistics()
        self.own = own
        self._reports = Reports(on_lost, on_slow, on_corrupt)
        self._routes = Routes(has_lifeboat=own is not None and own.has_lifeboat)
        self._lines = Lines(transport, self._routes, self._reports, self.settings.call_timeout_s)
        self._router = Router(self.settings, self._routes, self._lines, self.statistics, own)
        self._anchor = torch.zeros((), requires_grad=True)

    # --- the routing table ---------------------------------------------------------------------------------
    def update(self, table: RoutingTable) -> None:
        """Route by `table` from the next batch on (and for what is being retried); older tables are ignored."""
        self.statistics.add_layers({layer: len(experts) for layer, experts in table.placement.hosts_of.items()})
        if not self._routes.update(table):
            return
        self._lines.end_lives()
        if self.own is not None:
            self.own.disembark(self._has_host)
            self._router.note_own()

    def _has_host(self, layer: LayerPath, expert: int) -> bool:
        view = self._routes.view
        if layer not in view.table.placement.hosts_of:
            return False
        return bool(view.routes(layer, "hosts").owner[expert] != view.here)

    @property
    def table(self) -> RoutingTable:
        return self._routes.view.table

    def report_lost(self, address: HostAddress) -> None:
        """Tell of a host whose line broke while nothing was in flight."""
        self._reports.lost(address)

    def rebalance_cache(self, now_s: float) -> None:
        """Bring the router's cache of experts up to date with the load; reads weights, so not in an event loop."""
        if self.own is not None:
            self.own.rebalance(self.statistics.tokens_per_expert, now_s)
            self._router.note_own()

    def clear_own(self) -> None:
        """Let go of the router's own experts: the weights have changed."""
        if self.own is not None:
            self.own.clear()
            self._router.note_own()

    def close(self) -> None:
        """Close every line; batches in flight fail over and then end with `Unavailable`."""
        self._lines.close()

    # --- what it tells of itself ---------------------------------------------------------------------------
    @property
    def tokens_per_expert(self) -> Mapping[LayerPath, Ints]:
        """[E] tokens routed to each expert since the start, by layer."""
        return self.statistics.tokens_per_expert

    @property
    def num_retried_calls(self) -> int:
        """Calls whose rows were sent again, because a host was lost or did not hold an expert."""
        return self.statistics.num_retried_calls

    @property
    def rows_in_flight(self) -> dict[HostId, int]:
        """Rows that each host has been sent and has not answered."""
        return self._lines.rows_in_flight

    @property
    def rows_per_host(self) -> dict[HostId, int]:
        """Rows sent to each host since the start."""
        return self._lines.rows_per_host

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
        self.statistics.add_tokens(layer, slots)
        if torch.is_grad_enabled():
            anchor = self._anchor.to(hidden.device)
            return combine(_RemoteRows.apply(hidden, anchor, self, layer, slots), weight)  # type: ignore[no-untyped-call]
        tokens = hidden if hidden.device.type == "cpu" else hidden.cpu()
        if self.settings.combine == "host":
            out = self._partial_sums(layer, tokens, slots, weight.cpu())
            if not self.settings.check_finite or _is_finite(out):
                return out.to(hidden.device)
            # Whose rows are at fault cannot be seen in a sum: let them all come unweighted.
        rows, sources = self._rows(layer, tokens, slots, "any")
        if not self.settings.check_finite:
            return combine(rows.to(hidden.device), weight)
        if hidden.device.type != "cpu":
            return combine(self._checked(layer, tokens, slots, rows, sources).to(hidden.device), weight)
        out = combine(rows, weight)
        if _is_finite(out):  # a K-th of the numbers that the rows have
            return out
        return combine(self._checked(layer, tokens, slots, rows, sources), weight)

    def _rows(self, layer: LayerPath, hidden: torch.Tensor, slots: Ints, reach: Reach) -> tuple[torch.Tensor, Sources]:
        """[T, D], [N] -> [N, D] unweighted outputs by slot, zeros where a slot goes nowhere; and who computed them."""
        rows: torch.Tensor | None = None
        sources: Sources = []
        exchange = self._exchange(layer, hidden, slots, how=ROWS[reach])
        for share, reply, address in exchange.answers():
            if rows is None:
                every = exchange.num_rows == len(slots)
                rows = (torch.empty if every else torch.zeros)(len(slots), reply.shape[-1], dtype=hidden.dtype)
            rows.index_copy_(0, torch.from_numpy(share.slot), reply)
            sources.append((share.slot, address))
        return hidden.new_zeros(len(slots), hidden.shape[-1]) if rows is None else rows, sources

    def _exchange(
        self, layer: LayerPath, hidden: torch.Tensor, slots: Ints, make: MakeCall | None = None, how: How = SUMS
    ) -> Exchange:
        make = make or (lambda share, epoch: _call(layer, epoch, hidden, share))
        return Exchange(self._router, layer, slots, len(slots) // max(len(hidden), 1), make, how)

    def _partial_sums(self, layer: LayerPath, hidden: torch.Tensor, slots: Ints, weight: torch.Tensor) -> torch.Tensor:
        """[T, D] with the hosts combining: one row per token and host comes back."""
        flat_weight = weight.reshape(-1)
        sums = torch.zeros(hidden.shape, dtype=torch.promote_types(hidden.dtype, weight.dtype))

        def make(share: HostShare, epoch: int) -> ExpertCall:
            call = _call(layer, epoch, hidden, share)
            call.weight = flat_weight[torch.from_numpy(share.slot)]
            return call

        for share, reply, _ in self._exchange(layer, hidden, slots, make).answers():
            _add(sums, share, reply)
        return sums.to(hidden.dtype)

    def backward_rows(
        self, layer: LayerPath, hidden: torch.Tensor, slots: Ints, grad: torch.Tensor, call_id: str
    ) -> torch.Tensor:
        """Push gradients back through the rows: `grad` [N, D] -> [T, D], the gradient in `hidden`.

        The hosts recompute the rows from `hidden` and add to their experts' gradients, each call counted once. All rows
        of an expert go to its first host, and are never sent to two.
        """
        sums = torch.zeros_like(hidden)

        def make(share: HostShare, epoch: int) -> ExpertCall:
            call = _call(layer, epoch, hidden, share)
            call.grad = grad.index_select(0, torch.from_numpy(share.slot))
            # Each expert's rows in this call are named by the first of them: the same in every attempt (see `cut`).
            firsts = np.cumsum([0, *share.counts[:-1]])
            call.call_id = f"{call_id}:{','.join(map(str, share.slot[firsts].tolist()))}"
            return call

        for share, reply, _ in self._exchange(layer, hidden, slots, make, GRADIENTS).answers():
            _add(sums, share, reply)
        return sums

    # --- damage --------------------------------------------------------------------------------------------
    def checked_rows(self, layer: LayerPath, hidden: torch.Tensor, slots: Ints) -> torch.Tensor:
        """[T, D], [N] -> [N, D] from hosts alone, for a batch with gradients."""
        rows, sources = self._rows(layer, hidden, slots, "hosts")
        return self._checked(layer, hidden, slots, rows, sources, "hosts") if self.settings.check_finite else rows

    def _checked(
        self,
        layer: LayerPath,
        hidden: torch.Tensor,
        slots: Ints,
        rows: torch.Tensor,
        sources: Sources,
        reach: Reach = "any",
    ) -> torch.Tensor:
        """[N, D] rows, of which those that a host damaged have been computed elsewhere.

        NaN and infinity are damage if the token had none and another copy of the expert answers numbers; otherwise they
        are the model's own, or nobody can tell.
        """
        if _is_finite(rows):
            return rows
        top_k = len(slots) // len(hidden)
        is_bad = ~rows.isfinite().all(1) & hidden.isfinite().all(1).repeat_interleave(top_k)
        bad = is_bad.numpy()
        for slot, address in sources:
            mine = np.sort(slot[bad[slot]])
            if address is not None and len(mine):
                self._ask_another(layer, hidden, slots, rows, mine, address, reach)
        return rows

    def _ask_another(
        self,
        layer: LayerPath,
        hidden: torch.Tensor,
        slots: Ints,
        rows: torch.Tensor,
        suspect: Ints,
        address: HostAddress,
        reach: Reach,
    ) -> None:
        """Compute the slots in `suspect` without the host at `address`; what comes back as numbers goes into `rows`."""
        view, avoid = self._routes.view, frozenset((address.host_id,))
        if reach == "hosts" or self.own is None or not self.own.has_lifeboat:
            others = {expert for expert in np.unique(slots[suspect]).tolist() if view.is_named(layer, (expert,), avoid)}
            suspect = suspect[np.isin(slots[suspect], list(others))]
        if not len(suspect):
            return
        is_damaged = False
        try:
            how = How(reach, only=suspect, avoid=avoid)
            for share, reply, _ in self._exchange(layer, hidden, slots, how=how).answers():
                is_good = reply.isfinite().all(1)
                if bool(is_good.any()):
                    is_damaged = True
                    rows[torch.from_numpy(share.slot)[is_good]] = reply[is_good]
        except (Unavailable, ExpertFailed):  # no second opinion: the first is what there is
            return
        finally:
            if is_damaged:
                self._reports.corrupt(address)


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


def _add(sums: torch.Tensor, share: HostShare, reply: torch.Tensor) -> None:
    """Add [t, D], one row for each token of a share, to [T, D]."""
    if share.gather is None:
        sums += reply
    else:
        sums.index_add_(0, torch.from_numpy(share.gather), reply.to(sums.dtype))


def _is_finite(numbers: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity, by one sum; in rare cases numbers so large that their sum is none."""
    if numbers.dtype in (torch.float32, torch.float64):  # numpy starts sooner, and half of decoding is starting
        return math.isfinite(np.add.reduce(numbers.numpy(), axis=None))
    return math.isfinite(numbers.sum(dtype=torch.float32 if numbers.dtype is torch.float16 else None).item())


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
        return dispatcher.checked_rows(layer, tokens, slots).to(hidden.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        into = ctx.dispatcher.backward_rows(ctx.layer, tokens, ctx.slots, grad.detach().cpu(), ctx.call_id)
        return into.to(grad.device), None, None, None, None
