"""The routed experts of a model, wherever they live: dispatch, exchange and combine.

This is the one dispatch core behind every door. It is given the gate's choice (index and weight) and answers the sum
of the chosen experts' outputs; a host that dies, hangs, is slow, answers damaged rows or has lost an expert is dealt
with here and never seen by the model. It decides no placement: the routing table comes from outside, and what is found
out about hosts is reported outside. Where experts are cut into parts, it is asked for experts and asks hosts for parts.

Shape legend: T tokens, K experts per token (or parts of them), N = T*K slots, E experts, P parts of all of them, D
model width, n rows of one host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch

from ray_moe.errors import ExpertFailed, InvalidRequest, Unavailable
from ray_moe.ops.dispatch import HostShare, Ints, combine, put_rows, sum_parts
from ray_moe.policy.parts import parts_of, slots_in_parts
from ray_moe.runtime.device_batch import DeviceBatch
from ray_moe.runtime.drift import DriftMeter
from ray_moe.runtime.exchange import Exchange, MakeCall, Router
from ray_moe.runtime.lines import Lines
from ray_moe.runtime.own_experts import OwnExperts
from ray_moe.runtime.reports import Reports
from ray_moe.runtime.routing import How, Routes
from ray_moe.runtime.settings import DispatchSettings
from ray_moe.runtime.statistics import Statistics
from ray_moe.transport.base import ExpertCall, Transport
from ray_moe.types import HostAddress, HostId, LayerPath, RoutingTable

Sources = list[tuple[Ints, HostAddress | None]]
"""Slots, and the host that computed them; None is the router itself."""

ROWS, SUMS = How(), How(in_order=True)
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
        self.drift: DriftMeter | None = None
        """Compares a canary with what it is to replace."""
        self._reports = Reports(on_lost, on_slow, on_corrupt)
        self._routes = Routes(has_lifeboat=own is not None and own.has_lifeboat)
        self._lines = Lines(transport, self._routes, self._reports, self.settings.call_timeout_s)
        self._router = Router(self.settings, self._routes, self._lines, self.statistics, own)

    # --- the routing table ---------------------------------------------------------------------------------
    def update(self, table: RoutingTable) -> None:
        """Route by `table` from the next batch on (and for what is being retried); older tables are ignored."""
        parts = {layer: len(hosts) for layer, hosts in table.placement.hosts_of.items()}
        self.statistics.add_layers({layer: number // self.settings.num_parts for layer, number in parts.items()})
        if not self._routes.update(table):
            return
        self._lines.end_lives()
        if self.own is not None:
            self.own.disembark(self._routes.view.has_host)
            self._router.note_own()

    @property
    def table(self) -> RoutingTable:
        return self._routes.view.table

    def report_lost(self, address: HostAddress) -> None:
        """Tell of a host whose line broke while nothing was in flight."""
        self._reports.lost(address)

    def rebalance_cache(self, now_s: float, version: int = 0) -> None:
        """Bring the router's cache of experts up to date with the load; reads weights, so not in an event loop."""
        if self.own is not None:
            self.own.rebalance(self.tokens_per_part, now_s, version)
            self._router.note_own()

    def forget(self, version: int) -> None:
        """Let go of what the router itself holds of a version that nobody uses any more."""
        if self.own is not None:
            self.own.forget(version)
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
    def tokens_per_part(self) -> Mapping[LayerPath, Ints]:
        """[P] the same as hosts and placements count experts."""
        if self.settings.num_parts == 1:
            return self.tokens_per_expert
        return {layer: np.tile(tokens, self.settings.num_parts) for layer, tokens in self.tokens_per_expert.items()}

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
        self,
        layer: LayerPath,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        version: int = 0,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """The weighted sum of each token's experts.

        Args:
            layer: path of the experts.
            hidden: [T, D].
            index: [T, K] integers in 0..E; E means "no expert".
            weight: [T, K], used in its own dtype.
            version: which weights compute it.
            meanwhile: called, perhaps, when hosts have been asked, before they are waited for.

        Returns: [T, D] in the dtype and on the device of `hidden`.

        Raises: `Unavailable` when rows found no living host within `recovery_timeout_s`; `ExpertFailed`;
        `InvalidRequest` when a gradient is wanted: what serves does not learn (see `training/dispatcher.py`).
        """
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            raise InvalidRequest(
                f"the experts of {layer} serve and give no gradients; call the model under torch.no_grad(), or train it"
            )
        slots = index.detach().cpu().numpy().astype(np.int64, copy=False).reshape(-1)
        tokens_per_expert = self.statistics.add_tokens(layer, slots)
        if self.drift is not None:
            self.drift.see(layer, hidden, slots, version)
        if self.settings.num_parts > 1:
            slots = slots_in_parts(slots, self._num_experts(layer), self.settings.num_parts)
        if self.settings.combine == "host":
            out = self._partial_sums(layer, hidden, slots, weight.cpu(), version, meanwhile)
            if not self.settings.check_finite or _is_finite(out):
                return out
            # Whose rows are at fault cannot be seen in a sum: let them all come unweighted.
        batch = None
        if tokens_per_expert is not None and self.settings.num_parts == 1:
            view = self._routes.view
            routes = view.routes(layer, version=version)
            batch = DeviceBatch.put(self._lines, view, routes, hidden, index.detach(), slots, tokens_per_expert)
        rows, sources = self._rows(layer, hidden, slots, version, batch, meanwhile)
        out = combine(sum_parts(rows, self.settings.num_parts), weight)
        if not self.settings.check_finite or _is_finite(out):  # a K-th of the numbers that the rows have
            return out
        checked = self._checked(layer, hidden, slots, rows, sources, version)
        return combine(sum_parts(checked, self.settings.num_parts), weight)

    def _num_experts(self, layer: LayerPath) -> int:
        """E. Raises: `NotFound` for a layer that the table does not have."""
        num_parts = len(self._routes.view.routes(layer).owner) - 1
        return num_parts // self.settings.num_parts

    def _rows(
        self,
        layer: LayerPath,
        hidden: torch.Tensor,
        slots: Ints,
        version: int,
        batch: DeviceBatch | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> tuple[torch.Tensor, Sources]:
        """[T, D], [N] -> [N, D] unweighted outputs by slot, zeros where a slot goes nowhere; and who computed them."""
        rows: torch.Tensor | None = None
        sources: Sources = []
        exchange = self._exchange(layer, hidden, slots, how=ROWS, version=version, batch=batch)
        for share, reply, address in exchange.answers(meanwhile):
            if rows is None:
                every = exchange.num_rows == len(slots)
                make = torch.empty if every else torch.zeros
                rows = make(len(slots), reply.shape[-1], dtype=hidden.dtype, device=hidden.device)
            put_rows(rows, share.slot if share.placed is None else share.placed, reply)
            sources.append((share.slot, address))
        return hidden.new_zeros(len(slots), hidden.shape[-1]) if rows is None else rows, sources

    def _exchange(
        self,
        layer: LayerPath,
        hidden: torch.Tensor,
        slots: Ints,
        make: MakeCall | None = None,
        how: How = SUMS,
        version: int = 0,
        batch: DeviceBatch | None = None,
    ) -> Exchange:
        def make_call(share: HostShare, epoch: int) -> ExpertCall:
            call = None if batch is None else batch.call(share, layer, epoch, version)
            return call or _call(layer, epoch, hidden, share, version)

        top_k = len(slots) // max(len(hidden), 1)
        return Exchange(self._router, layer, slots, top_k, make or make_call, how, version, batch)

    def _partial_sums(
        self,
        layer: LayerPath,
        hidden: torch.Tensor,
        slots: Ints,
        weight: torch.Tensor,
        version: int,
        meanwhile: Callable[[], None] | None,
    ) -> torch.Tensor:
        """[T, D] with the hosts combining: one row per token and host comes back."""
        flat_weight = weight.reshape(-1)
        if self.settings.num_parts > 1:
            flat_weight = flat_weight.repeat_interleave(self.settings.num_parts)
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        sums = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)

        def make(share: HostShare, epoch: int) -> ExpertCall:
            call = _call(layer, epoch, hidden, share, version)
            call.weight = flat_weight[torch.from_numpy(share.slot)]
            return call

        for share, reply, _ in self._exchange(layer, hidden, slots, make, version=version).answers(meanwhile):
            _add(sums, share, reply)
        return sums.to(hidden.dtype)

    def rows_of(self, layer: LayerPath, expert: int, hidden: torch.Tensor, version: int) -> torch.Tensor:
        """[t, D] -> [t, D] through one expert, counted nowhere. Without gradients."""
        num_parts = self.settings.num_parts
        slots = np.tile(parts_of(expert, self._num_experts(layer), num_parts), len(hidden))
        return sum_parts(self._rows(layer, hidden, slots, version)[0], num_parts)

    # --- damage --------------------------------------------------------------------------------------------
    def _checked(
        self,
        layer: LayerPath,
        hidden: torch.Tensor,
        slots: Ints,
        rows: torch.Tensor,
        sources: Sources,
        version: int,
    ) -> torch.Tensor:
        """[N, D] rows, of which those that a host damaged have been computed elsewhere.

        NaN and infinity are damage if the token had none and another copy of the expert answers numbers; otherwise they
        are the model's own, or nobody can tell.
        """
        if _is_finite(rows):
            return rows
        top_k = len(slots) // len(hidden)
        is_bad = ~rows.isfinite().all(1) & hidden.isfinite().all(1).repeat_interleave(top_k)
        bad = is_bad.cpu().numpy()
        for slot, address in sources:
            mine = np.sort(slot[bad[slot]])
            if address is not None and len(mine):
                self._ask_another(layer, hidden, slots, rows, mine, address, version)
        return rows

    def _ask_another(
        self,
        layer: LayerPath,
        hidden: torch.Tensor,
        slots: Ints,
        rows: torch.Tensor,
        suspect: Ints,
        address: HostAddress,
        version: int,
    ) -> None:
        """Compute the slots in `suspect` without the host at `address`; what comes back as numbers goes into `rows`."""
        view, avoid = self._routes.view, frozenset((address.host_id,))
        if self.own is None or not self.own.has_lifeboat:
            others = {expert for expert in np.unique(slots[suspect]).tolist() if view.is_named(layer, (expert,), avoid)}
            suspect = suspect[np.isin(slots[suspect], list(others))]
        if not len(suspect):
            return
        is_damaged = False
        try:
            how = How(only=suspect, avoid=avoid)
            for share, reply, _ in self._exchange(layer, hidden, slots, how=how, version=version).answers():
                is_good = reply.isfinite().all(1).to(rows.device)
                if bool(is_good.any()):
                    is_damaged = True
                    rows[torch.from_numpy(share.slot).to(rows.device)[is_good]] = reply.to(rows.device)[is_good]
        except (Unavailable, ExpertFailed):  # no second opinion: the first is what there is
            return
        finally:
            if is_damaged:
                self._reports.corrupt(address)


def _call(layer: LayerPath, epoch: int, hidden: torch.Tensor, share: HostShare, version: int) -> ExpertCall:
    return ExpertCall(
        layer=layer,
        epoch=epoch,
        hidden=hidden,
        gather=None if share.gather is None else torch.from_numpy(share.gather),
        token=None if share.token is None else torch.from_numpy(share.token),
        experts=share.experts,
        counts=share.counts,
        version=version,
    )


def _add(sums: torch.Tensor, share: HostShare, reply: torch.Tensor) -> None:
    """Add [t, D], one row for each token of a share, to [T, D]."""
    if share.gather is None:
        sums += reply.to(sums.device)
    else:
        sums.index_add_(0, torch.from_numpy(share.gather).to(sums.device), reply.to(sums.device, sums.dtype))


def _is_finite(numbers: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity, by one sum; in rare cases numbers so large that their sum is none."""
    if numbers.is_cpu and numbers.dtype in (torch.float32, torch.float64):
        # numpy starts sooner, and half of decoding is starting
        return math.isfinite(np.add.reduce(numbers.numpy(), axis=None))
    return math.isfinite(numbers.sum(dtype=torch.float32 if numbers.dtype is torch.float16 else None).item())
