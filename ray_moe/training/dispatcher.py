"""The routed experts of a model that is trained, wherever they live: rows out, gradients back.

The same contract as `runtime/moe_layer.py`, differentiable in the tokens and in the weights. Where that one finds
another way for rows whose host fails, this one gives up: a gradient that may or may not have been counted can only be
made good by repeating the step. A call is sent again only to the same life of the same host, which counts it once.
Where experts are cut into parts, it is asked for experts and asks hosts for parts.

Shape legend: T tokens, K experts per token, N = T*K slots (times the parts of an expert, where they are cut), D model
width, n rows and t tokens of one share.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ray_moe.errors import HostLost, InvalidRequest, StepInterrupted, StepRefused, WireError
from ray_moe.ops.compression import pack_rows, unpack_rows
from ray_moe.ops.dispatch import HostShare, Ints, combine, cut, put_rows, split_by_host, spread, sum_parts
from ray_moe.policy.parts import slots_in_parts
from ray_moe.policy.split import Replicas, split_tokens
from ray_moe.training.settings import ExchangeSettings
from ray_moe.transport.base import TRAINING, Connection, ExpertCall, ExpertReply, Transport
from ray_moe.types import HostId, LayerPath, Placement, RoutingTable

MAX_ROWS_PER_CALL = 4096
"""Larger shares are cut, so that hosts begin before all is sent."""

MAX_TRIES = 3
"""How often a call is sent to a host whose line breaks while the host lives."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A share of a batch: which rows go to which host, forward and back."""

    host_id: HostId
    share: HostShare
    call_id: str


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where the experts of one layer are trained, by host number."""

    hosts: tuple[HostId, ...]
    owner: Ints
    replicas: Replicas | None


class TrainingDispatcher:
    """Sends the rows of training batches to the hosts that train their experts. Thread-safe; one per worker."""

    def __init__(self, transport: Transport, settings: ExchangeSettings | None = None, name: str = "0") -> None:
        """
        Args:
            transport: makes the lines to hosts; closed with this.
            settings: what is kept and sent.
            name: of this worker, among all that train the same experts.
        """
        self.settings = settings or ExchangeSettings()
        self.name = name
        self._transport = transport
        self._lock = threading.Lock()
        self._connections: dict[HostId, Connection] = {}
        self._table = RoutingTable(0, Placement({}))
        self._plans: dict[LayerPath, _Plan] = {}
        self.anchor = torch.zeros((), requires_grad=True)
        """Every row depends on it. Who asks for single gradients must ask for its too: or experts whose tokens need
        none would not learn."""
        self._attempt = ""
        self._ids = itertools.count()
        self.num_backward_calls: Counter[HostId] = Counter()
        """Of this attempt, that were answered."""
        self.tokens_per_expert: dict[LayerPath, Ints] = {}
        """[E] rows of each expert in this attempt, by layer."""
        self.num_dropped = 0
        """Choices of the gates in this attempt that went to no expert."""

    @property
    def table(self) -> RoutingTable:
        """By which rows are sent."""
        return self._table

    # --- what is where -------------------------------------------------------------------------------------
    def update(self, table: RoutingTable) -> None:
        """Send rows by `table` from now on; lines to lives that it no longer names are closed."""
        with self._lock:
            self._table, self._plans = table, {}
            ended = {h: c for h, c in self._connections.items() if table.addresses.get(h) != c.address}
            for host_id in ended:
                del self._connections[host_id]
        for connection in ended.values():
            connection.close()

    def begin(self, attempt: str) -> None:
        """Everything from now on belongs to `attempt`, and is counted anew."""
        with self._lock:
            self._attempt = attempt
            self.num_backward_calls = Counter()
            self.tokens_per_expert = {}
            self.num_dropped = 0

    def close(self) -> None:
        """Close every line and the transport; whoever waits for rows gets `HostLost`."""
        with self._lock:
            closing, self._connections = list(self._connections.values()), {}
        for connection in closing:
            connection.close()
        self._transport.close()

    # --- the contract --------------------------------------------------------------------------------------
    def forward(
        self, layer: LayerPath, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, [T, D]; backward accumulates the experts' gradients on their hosts.

        Args: as of `ExpertDispatcher.forward`: hidden [T, D], index [T, K] (E is "no expert"), weight [T, K].

        Raises: `HostLost`, `StepInterrupted`: the step must be repeated. `ExpertFailed`.
        """
        slots = index.detach().cpu().numpy().astype(np.int64, copy=False).reshape(-1)
        slots, counts = self._count(layer, slots)
        parts = self._parts(layer, slots, counts, index.shape[-1] * self.settings.num_parts)
        if torch.is_grad_enabled():
            anchor = self.anchor.to(hidden.device)
            rows = _RemoteRows.apply(hidden, anchor, self, layer, parts, len(slots))  # type: ignore[no-untyped-call]
        else:
            rows = self.rows(layer, hidden, parts, len(slots), keep=False)
        return combine(sum_parts(rows, self.settings.num_parts), weight)

    def _count(self, layer: LayerPath, slots: Ints) -> tuple[Ints, Ints]:
        """Count the rows of each expert. The slots, and the rows of each, in parts."""
        num_parts = self.settings.num_parts
        num_experts = (len(self._plan(layer).owner) - 1) // num_parts
        counts = np.bincount(slots, minlength=num_experts + 1)[:num_experts]
        with self._lock:
            so_far = self.tokens_per_expert.get(layer)
            self.tokens_per_expert[layer] = counts if so_far is None else so_far + counts
            self.num_dropped += len(slots) - int(counts.sum())
        if num_parts == 1:
            return slots, counts
        return slots_in_parts(slots, num_experts, num_parts), np.tile(counts, num_parts)

    def _parts(self, layer: LayerPath, slots: Ints, counts: Ints, top_k: int) -> list[_Part]:
        plan = self._plan(layer)
        host = None
        if plan.replicas is not None:
            host = spread(slots, plan.replicas.host, split_tokens(counts, plan.replicas))
        pieces = [
            piece
            for share in split_by_host(slots, plan.owner, top_k, None, host)
            for piece in cut(share, top_k, MAX_ROWS_PER_CALL)
        ]
        with self._lock:
            return [
                _Part(plan.hosts[piece.host], piece, f"{self._attempt}/{self.name}.{next(self._ids)}")
                for piece in pieces
            ]

    def _plan(self, layer: LayerPath) -> _Plan:
        plan = self._plans.get(layer)
        if plan is None:
            table = self._table
            experts = table.placement.hosts_of.get(layer)
            if experts is None:
                raise StepInterrupted(f"no host trains the experts of {layer}")
            hosts = tuple(table.addresses)
            number = {host_id: place for place, host_id in enumerate(hosts)}
            homes = [[number[host] for host in each if host in number] for each in experts]
            if not all(homes):
                raise StepInterrupted(f"experts {[e for e, at in enumerate(homes) if not at]} of {layer} have no host")
            owner = np.array([at[0] for at in homes] + [-1], dtype=np.int64)
            has_choice = any(len(at) > 1 for at in homes)
            plan = _Plan(hosts, owner, Replicas.of(homes, len(hosts)) if has_choice else None)
            self._plans[layer] = plan
        return plan

    def rows(
        self, layer: LayerPath, hidden: torch.Tensor, parts: Sequence[_Part], num_slots: int, keep: bool
    ) -> torch.Tensor:
        """[T, D] -> [N, D] unweighted outputs by slot, zeros where a slot goes nowhere."""
        sent = self._to_wire(layer, hidden)
        calls = []
        for part in parts:
            call = self._call(layer, sent, part)
            call.keep = keep
            calls.append(call)
        rows = hidden.new_zeros(num_slots, hidden.shape[-1])
        for part, reply in self._exchange(parts, calls, hidden.dtype):
            if reply.shape[-1] != rows.shape[-1]:
                rows = hidden.new_zeros(num_slots, reply.shape[-1])
            put_rows(rows, part.share.slot, reply.to(rows.dtype))
        return rows

    def backward_rows(
        self, layer: LayerPath, hidden: torch.Tensor, parts: Sequence[_Part], grad: torch.Tensor, kept: bool
    ) -> torch.Tensor:
        """Push gradients back through the very rows that went forward: `grad` [N, D] -> [T, D] in the tokens."""
        grad_sent = self._to_wire(layer, grad)
        if kept:  # the host has them: only what they would look like is needed
            sent = grad_sent.new_empty(1, 1).expand(len(hidden), grad_sent.shape[1])
        else:
            sent = self._to_wire(layer, hidden)
        calls = []
        for part in parts:
            call = self._call(layer, sent, part)
            call.kept = kept
            call.grad = grad_sent.index_select(0, torch.from_numpy(part.share.slot).to(grad.device))
            calls.append(call)
        sums = torch.zeros(hidden.shape, dtype=grad.dtype, device=grad.device)
        for part, reply in self._exchange(parts, calls, grad.dtype):
            here = reply.to(sums.device, sums.dtype)
            if part.share.gather is None:
                sums += here
            else:
                sums.index_add_(0, torch.from_numpy(part.share.gather).to(sums.device), here)
            with self._lock:
                self.num_backward_calls[part.host_id] += 1
        return sums

    def _to_wire(self, layer: LayerPath, tensor: torch.Tensor) -> torch.Tensor:
        """Raises: `StepRefused` for numbers that cannot be sent."""
        wire = self.settings.wire
        if wire == "int8":
            try:
                return pack_rows(tensor)
            except InvalidRequest as error:
                raise StepRefused(f"going to {layer}: {error}; the step was not made and nothing changed") from None
        return tensor if wire == "same" else tensor.to(getattr(torch, wire))

    def _from_wire(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Raises: `WireError` for rows that were not answered as they were asked for."""
        if (rows.dtype == torch.uint8) != (self.settings.wire == "int8"):
            raise WireError(f"rows of {rows.dtype} were answered where {self.settings.wire} was sent")
        return unpack_rows(rows, dtype) if self.settings.wire == "int8" else rows

    @staticmethod
    def _call(layer: LayerPath, hidden: torch.Tensor, part: _Part) -> ExpertCall:
        share = part.share
        return ExpertCall(
            layer=layer,
            epoch=0,
            hidden=hidden,
            gather=None if share.gather is None else torch.from_numpy(share.gather),
            token=None if share.token is None else torch.from_numpy(share.token),
            experts=share.experts,
            counts=share.counts,
            call_id=part.call_id,
            version=TRAINING,
        )

    # --- there and back ------------------------------------------------------------------------------------
    def _exchange(
        self, parts: Sequence[_Part], calls: Sequence[ExpertCall], dtype: torch.dtype
    ) -> Iterator[tuple[_Part, torch.Tensor]]:
        """The answers in the order of the calls, so that sums are always taken in the same order."""
        futures: deque[Future[ExpertReply]] = deque()
        try:
            for part, call in zip(parts, calls, strict=True):
                futures.append(self._submit(part, call))
            for part, call in zip(parts, calls, strict=True):
                reply = self._answer(part, call, futures.popleft())
                try:
                    yield part, self._from_wire(reply.rows, dtype)
                finally:
                    reply.release()
        finally:
            for future in futures:  # after an error, what still comes is nobody's
                _let_go(future)

    def _submit(self, part: _Part, call: ExpertCall) -> Future[ExpertReply]:
        try:
            return self._connection(part.host_id).submit(call)
        except HostLost as error:
            failed: Future[ExpertReply] = Future()
            failed.set_exception(error)
            return failed

    def _answer(self, part: _Part, call: ExpertCall, future: Future[ExpertReply]) -> ExpertReply:
        for _ in range(MAX_TRIES - 1):
            try:
                return self._await(part.host_id, future)
            except HostLost:
                future = self._submit(part, call)
        return self._await(part.host_id, future)

    def _await(self, host_id: HostId, future: Future[ExpertReply]) -> ExpertReply:
        timeout_s = self.settings.call_timeout_s
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            self._lose(host_id)
            raise StepInterrupted(f"host {host_id} has answered nothing for {timeout_s:g} s") from None
        except HostLost:
            self._lose(host_id)
            raise

    def _connection(self, host_id: HostId) -> Connection:
        connection = self._connections.get(host_id)
        if connection is None:
            address = self._table.addresses.get(host_id)
            if address is None:
                raise HostLost(f"host {host_id} is gone")
            made = self._transport.connect(address)
            with self._lock:
                connection = self._connections.setdefault(host_id, made)
            if connection is not made:
                made.close()
        return connection

    def _lose(self, host_id: HostId) -> None:
        with self._lock:
            connection = self._connections.pop(host_id, None)
        if connection is not None:
            connection.close()


def _let_go(future: Future[ExpertReply]) -> None:
    """Free what an answer lies in, that has come or will come."""
    if not future.cancel() and future.exception() is None:
        future.result().release()


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
        dispatcher: TrainingDispatcher,
        layer: LayerPath,
        parts: list[_Part],
        num_slots: int,
    ) -> torch.Tensor:
        tokens = hidden.detach()
        ctx.dispatcher, ctx.layer, ctx.parts, ctx.shape = dispatcher, layer, parts, tuple(tokens.shape)
        ctx.kept, ctx.is_spent = not dispatcher.settings.recompute, False
        ctx.save_for_backward(tokens if not ctx.kept else tokens.new_empty(1, 1))
        return dispatcher.rows(layer, tokens, parts, num_slots, keep=ctx.kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.is_spent:  # hosts would take it for the same call, delivered twice
            raise InvalidRequest("the gradients of remote experts can be computed once; compute forward again")
        ctx.is_spent = True
        (tokens,) = ctx.saved_tensors
        if ctx.kept:
            tokens = tokens.expand(ctx.shape)
        into = ctx.dispatcher.backward_rows(ctx.layer, tokens, ctx.parts, grad.detach(), ctx.kept)
        return into, None, None, None, None, None
