"""One batch's rows out to those who compute them, and back: grouping, failover and hedging.

Rows of a host that fails go at once to another replica, else to the router's own copy, and only else wait for a newer
table. A call that takes much longer than its host is used to is sent to others as well, and the first answer wins. Used
for one batch and thrown away, by one thread. Decides no placement. Called by `runtime/moe_layer.py`.

Shape legend: T tokens, K experts per token, N = T*K slots, n rows of one share, D model width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Literal

import numpy as np
import torch

from ray_moe.errors import HostLost, StaleRouting, Unavailable
from ray_moe.ops.dispatch import HostShare, Ints, cut, split_by_host
from ray_moe.runtime.lines import RECONNECT_EVERY_S, Lines, Peer, Sent
from ray_moe.runtime.own_experts import OwnExperts
from ray_moe.runtime.routing import LayerRoutes, Reach, Routes, View
from ray_moe.runtime.statistics import Statistics
from ray_moe.transport.base import ExpertCall
from ray_moe.types import HostAddress, HostId, LayerPath

CombineAt = Literal["router", "host"]

MAX_ROWS_PER_CALL = 4096
"""Larger shares are cut, so that a host with a huge batch still answers something now and then."""

UNKNOWN_SHARE = 0.1
"""Part of the call time-out after which a call is overdue while no answer has been seen from any host."""

LOAD_PATIENCE = 3.0
"""Deadlines after which an answer is so late that an expert is read into the lifeboat for it: reading is work too."""

MakeCall = Callable[[HostShare, int], ExpertCall]


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """How the dispatcher combines, how long it waits, and when it asks somebody else."""

    combine: CombineAt = "router"
    """``router``: unweighted rows come back and are summed in `transformers`' own order (bit-equal).
    ``host``: weighted partial sums come back; less traffic, other rounding in bf16."""
    call_timeout_s: float = 30.0
    """A host that has answered nothing for so long is taken for lost."""
    recovery_timeout_s: float = 60.0
    """How long rows wait for a host that can compute them before the batch fails with `Unavailable`."""
    hedge: bool = True
    """Whether a call that is overdue is sent to another replica as well."""
    hedge_factor: float = 3.0
    """A call is overdue after this many times what its host needs as a rule."""
    hedge_min_s: float = 0.05
    """But not before so long: what is faster than this is not worth computing twice."""
    check_finite: bool = True
    """Whether NaN and infinity in the experts' outputs, of tokens without, are computed again elsewhere."""


@dataclass(frozen=True, slots=True)
class Router:
    """What the exchanges of one dispatcher share."""

    settings: DispatchSettings
    routes: Routes
    lines: Lines
    statistics: Statistics
    own: OwnExperts | None

    def note_own(self) -> None:
        """Route by what the router holds itself at this moment."""
        if self.own is not None:
            self.routes.set_own(self.own.cached, self.own.aboard)


@dataclass(frozen=True, slots=True)
class Answer:
    """Computed rows, valid until the next answer is asked for."""

    share: HostShare
    rows: torch.Tensor
    address: HostAddress | None
    """Who computed them; None for the router itself."""


@dataclass(frozen=True, slots=True, eq=False)
class How:
    """Who may compute which of a batch's slots, and how the answers come."""

    reach: Reach = "any"
    in_order: bool = False
    """Whether the answers come in the order of the shares, so that a sum over them is always the same."""
    only: Ints | None = None
    """Ascending slots to compute; None for all of them."""
    avoid: frozenset[HostId] = frozenset()
    """Hosts that are not asked. What then finds nobody fails at once."""


class _Job:
    """Slots that are answered together: by the host they were sent to, or by all of those they were sent to later."""

    __slots__ = ("hedge_at_s", "is_open", "number", "slot", "ways")

    def __init__(self, number: int, slot: Ints) -> None:
        self.number = number
        self.slot = slot
        self.ways: list[_Way] = []
        self.is_open = True
        self.hedge_at_s = math.inf


class _Way:
    """One way to answer a job: shares that together have its slots. The job is done when all are answered."""

    __slots__ = ("is_hedge", "job", "num_open", "sent")

    def __init__(self, job: _Job, is_hedge: bool) -> None:
        self.job = job
        self.is_hedge = is_hedge
        self.sent: list[Sent] = []
        self.num_open = 0
        job.ways.append(self)


class Exchange:
    """The rows of one batch on their way."""

    def __init__(
        self,
        router: Router,
        layer: LayerPath,
        slots: Ints,
        top_k: int,
        make: MakeCall,
        how: How,
    ) -> None:
        """
        Args:
            router: whose batch it is.
            layer: path of the experts.
            slots: [N] expert of each slot.
            top_k: K.
            make: the call for a share, in an epoch.
            how: who may compute which of the slots.
        """
        self._router = router
        self._layer = layer
        self._slots = slots
        self._top_k = top_k
        self._make = make
        self._reach: Reach = how.reach
        self._in_order = how.in_order
        self._only = how.only
        self._avoid = how.avoid
        self._arrived: SimpleQueue[Sent] = SimpleQueue()
        self._is_over = False
        self._jobs: dict[int, _Job] = {}
        self._num_jobs = 0
        self._answered: dict[int, list[Sent]] = {}
        self._next = 0
        self._again: list[Ints] = []
        self._waiting: list[Ints] = []
        self._view: View = router.routes.view
        self._stuck_view: View = self._view
        """By which the slots that wait found nobody."""
        self._try_again_at_s = 0.0
        self._give_up_at_s = 0.0
        self._wake_at_s = math.inf
        self._may_hedge = router.settings.hedge and how.reach != "first"
        self.num_rows = 0
        """Slots that go somewhere, once the first answer is there."""

    def answers(self) -> Iterator[Answer]:
        """Every row of the batch exactly once.

        Raises: `Unavailable` when rows found nobody within the recovery time-out; what a computation raised.
        """
        try:
            if len(self._slots):
                self._group(self._only, is_first=True)
            while True:
                for sent in self._ready():
                    if sent.reply is not None:
                        try:
                            yield Answer(sent.share, sent.reply.rows, sent.address)
                        finally:
                            sent.reply.release()
                if self._waiting:
                    self._wait_for_somebody()
                elif self._jobs:
                    self._wait(self._router.settings.call_timeout_s + time.monotonic())
                elif not self._answered:
                    return
        finally:  # what still comes is nobody's
            self._is_over = True
            for ready in self._answered.values():
                for sent in ready:
                    _release(sent)
            for job in self._jobs.values():
                _abandon(job)
            self._release_late()

    def _ready(self) -> Iterator[Sent]:
        if not self._in_order:
            while self._answered:
                yield from self._answered.pop(next(iter(self._answered)))
            return
        while self._next in self._answered:
            self._next += 1
            yield from self._answered.pop(self._next - 1)

    # --- sending -------------------------------------------------------------------------------------------
    def _group(self, pending: Ints | None, is_first: bool = False) -> None:
        """Send slots ([m] ascending, None for all) to those who can compute them by the newest view."""
        router = self._router
        while True:
            view = self._view = router.routes.view
            routes = view.routes(self._layer, self._reach, self._avoid)
            here: list[HostShare] = []
            unreached: list[Ints] = []
            loads: list[int] = []
            for share in self._shares(routes, pending):
                if share.host == view.here:
                    here.append(share)
                    continue
                loads.append(len(share.slot))
                peer = router.lines.peer(view.hosts[share.host])
                if peer is None:
                    unreached.append(share.slot)
                    continue
                for piece in cut(share, self._top_k, MAX_ROWS_PER_CALL):
                    job = self._new_job(piece.slot)
                    self._send(_Way(job, is_hedge=False), piece, peer)
            if is_first:
                is_first = False
                self.num_rows = sum(loads) + sum(len(share.slot) for share in here)
                router.statistics.add_batch(loads, routes.num_holding)
            for share in here:  # while the hosts are at theirs
                if not self._compute(self._new_job(share.slot), share):
                    self._set_aside(share.slot, view)
            if not unreached:
                return
            if router.routes.view is view:  # nobody else is known
                self._set_aside(np.concatenate(unreached), view)
                return
            pending = np.sort(np.concatenate(unreached))

    def _set_aside(self, slot: Ints, view: View) -> None:
        if not self._waiting:
            self._stuck_view, self._try_again_at_s = view, time.monotonic() + RECONNECT_EVERY_S
        self._waiting.append(slot)

    def _shares(self, routes: LayerRoutes, pending: Ints | None) -> list[HostShare]:
        index = self._slots if pending is None else self._slots[pending]
        host = None if routes.replicas is None else routes.hosts_of(index, self._router.lines.load)
        return split_by_host(index, routes.owner, self._top_k, pending, host)

    def _new_job(self, slot: Ints) -> _Job:
        job = self._jobs[self._num_jobs] = _Job(self._num_jobs, slot)
        self._num_jobs += 1
        return job

    def _send(self, way: _Way, share: HostShare, peer: Peer) -> None:
        settings = self._router.settings
        sent = Sent(share, peer, way)
        way.sent.append(sent)
        way.num_open += 1
        peer.submit(self._make(share, self._view.table.epoch), sent, self._hear)
        expected_s = peer.expected_s(sent.ahead_rows)
        if math.isinf(expected_s):
            expected_s = UNKNOWN_SHARE * settings.call_timeout_s / settings.hedge_factor
        sent.deadline_s = max(settings.hedge_min_s, settings.hedge_factor * expected_s)
        if self._may_hedge:
            way.job.hedge_at_s = min(way.job.hedge_at_s, sent.sent_s + sent.deadline_s)
        self._wake_at_s = min(self._wake_at_s, sent.sent_s + settings.call_timeout_s, way.job.hedge_at_s)

    def _compute(self, job: _Job, share: HostShare, way: _Way | None = None) -> bool:
        """Compute a share in this process; false, and the job is no more, when that cannot be."""
        own = self._router.own if self._reach == "any" else None
        call = None if own is None else self._make(share, self._view.table.epoch)
        sent = Sent(share, None, None)
        if own is not None and call is not None:
            num_loads = own.num_lifeboat_loads
            sent.reply = own.run(call)
            if own.num_lifeboat_loads != num_loads:
                self._router.note_own()
        if sent.reply is None:
            if way is None:
                self._close(job, [])
            return False
        if way is None:
            self._close(job, [sent])
        else:
            way.sent.append(sent)
        return True

    # --- hearing -------------------------------------------------------------------------------------------
    def _hear(self, sent: Sent) -> None:
        """From any thread: an answer came, or will not."""
        self._arrived.put(sent)
        if self._is_over:
            self._release_late()

    def _release_late(self) -> None:
        while True:
            try:
                _release(self._arrived.get_nowait())
            except Empty:
                return

    def _wait(self, until_s: float) -> None:
        """Take in what arrives, until something has been done; look at the clocks when they say so."""
        timeout_s = min(self._wake_at_s, until_s) - time.monotonic()
        try:
            sent = self._arrived.get(timeout=timeout_s) if timeout_s > 0 else self._arrived.get_nowait()
            while True:
                self._take(sent)
                sent = self._arrived.get_nowait()
        except Empty:
            pass
        if self._again:
            pending, self._again = np.sort(np.concatenate(self._again)), []
            self._group(pending)
        now_s = time.monotonic()
        if now_s >= self._wake_at_s:
            self._look_at_clocks(now_s)

    def _take(self, sent: Sent) -> None:
        way = sent.tag
        peer = sent.peer
        if not isinstance(way, _Way) or peer is None:
            return
        job = way.job
        if not job.is_open or way not in job.ways:
            _release(sent)
        elif sent.error is None:
            way.num_open -= 1
            if not way.num_open:
                self._close(job, way.sent)
                if way.is_hedge:
                    self._router.statistics.add_hedge_won()
        elif isinstance(sent.error, HostLost):
            self._router.lines.lose(peer)
            self._fail(way)
        elif isinstance(sent.error, StaleRouting):
            self._fail_stale(way, sent, peer)
        else:
            raise sent.error

    def _close(self, job: _Job, winners: Sequence[Sent]) -> None:
        job.is_open = False
        del self._jobs[job.number]
        self._answered[job.number] = list(winners)
        for way in job.ways:
            for sent in way.sent:
                if sent not in winners:
                    _release(sent)

    def _fail(self, way: _Way) -> None:
        """A way came to nothing. Another may be open; otherwise the job's slots are sent again."""
        job = way.job
        job.ways.remove(way)
        for sent in way.sent:
            _release(sent)
        if job.ways:
            job.hedge_at_s = time.monotonic()
            self._wake_at_s = 0.0
            return
        self._close(job, [])
        self._router.statistics.add_retry()
        self._again.append(job.slot)

    def _fail_stale(self, way: _Way, sent: Sent, peer: Peer) -> None:
        """A host does not hold some of the experts. Which ones is found by asking for each alone."""
        share = sent.share
        if len(share.experts) == 1 or way.is_hedge:
            for expert in share.experts:
                self._router.routes.add_missing(peer.address.host_id, self._layer, expert)
            self._fail(way)
            return
        self._close(way.job, [])
        self._router.statistics.add_retry()
        for slot in np.split(share.slot, np.cumsum(share.counts)[:-1]):
            owner = np.zeros(int(self._slots.max(initial=0)) + 2, dtype=np.int64)
            for alone in split_by_host(self._slots[slot], owner, self._top_k, slot):
                self._send(_Way(self._new_job(slot), is_hedge=False), alone, peer)

    # --- waiting and hedging -------------------------------------------------------------------------------
    def _wait_for_somebody(self) -> None:
        """Slots have nobody to go to: wait for another view, going on with what is under way."""
        settings, routes, now_s = self._router.settings, self._router.routes, time.monotonic()
        if not self._give_up_at_s:
            self._give_up_at_s = now_s if self._avoid else now_s + settings.recovery_timeout_s
        is_same = routes.view is self._stuck_view
        if is_same and now_s >= self._give_up_at_s:
            experts = np.unique(self._slots[np.concatenate(self._waiting)]).tolist()
            raise Unavailable(
                f"experts {experts} of {self._layer} had no living host for {settings.recovery_timeout_s:g} s; "
                "retry when the service has recovered"
            )
        if is_same and now_s < self._try_again_at_s:
            if self._jobs:
                self._wait(self._try_again_at_s)
            else:
                routes.wait_changed(self._stuck_view, min(self._try_again_at_s, self._give_up_at_s) - now_s)
            return
        if is_same:
            routes.forget_missing(self._layer)
        waiting, self._waiting = np.sort(np.concatenate(self._waiting)), []
        self._group(waiting)
        if not self._waiting:
            self._give_up_at_s = 0.0

    def _look_at_clocks(self, now_s: float) -> None:
        """Give up hosts that have answered nothing for too long, and ask others beside those that are late."""
        call_timeout_s = self._router.settings.call_timeout_s
        self._wake_at_s = math.inf
        for job in list(self._jobs.values()):
            for sent in [sent for way in job.ways for sent in way.sent]:
                if sent.peer is None or sent.reply is not None or sent.error is not None:
                    continue
                lost_at_s = max(sent.sent_s, sent.peer.last_answer_s) + call_timeout_s
                if now_s >= lost_at_s:
                    self._router.lines.lose(sent.peer)
                else:
                    self._wake_at_s = min(self._wake_at_s, lost_at_s)
            if now_s >= job.hedge_at_s:
                self._hedge(job, now_s)
            self._wake_at_s = min(self._wake_at_s, job.hedge_at_s)

    def _hedge(self, job: _Job, now_s: float) -> None:
        """Send a late job to others as well, if there are others for all of it."""
        router = self._router
        late = [sent for way in job.ways for sent in way.sent if sent.reply is None and sent.error is None]
        overdue = [sent for sent in late if now_s - sent.sent_s >= sent.deadline_s]
        may_load = any(now_s - sent.sent_s >= LOAD_PATIENCE * sent.deadline_s for sent in late)
        for sent in overdue:
            router.lines.late(sent, now_s - sent.sent_s >= LOAD_PATIENCE * sent.deadline_s)
        again_s = min((sent.deadline_s for sent in overdue), default=router.settings.hedge_min_s)
        job.hedge_at_s = now_s + again_s
        if len(job.ways) > 1:
            return
        asked = {sent.address.host_id for sent in late if sent.address is not None}
        view = self._view = router.routes.view
        shares = self._shares(view.routes(self._layer, self._reach, self._avoid | asked), job.slot)
        here = [share for share in shares if share.host == view.here]
        if here and not self._may_compute(here, may_load):
            return
        peers = {share.host: router.lines.peer(view.hosts[share.host]) for share in shares if share.host != view.here}
        if None in peers.values():
            return
        way = _Way(job, is_hedge=True)
        router.statistics.add_hedge()
        for share in shares:
            peer = peers.get(share.host)
            if peer is not None:
                self._send(way, share, peer)
        job.hedge_at_s = now_s + again_s
        if not all(self._compute(job, share, way) for share in here):
            self._fail(way)
        elif not way.num_open:
            self._close(job, way.sent)
            router.statistics.add_hedge_won()

    def _may_compute(self, shares: Sequence[HostShare], may_load: bool) -> bool:
        own = self._router.own
        if own is None or self._reach != "any":
            return False
        return all(own.has(self._layer, share.experts) or (may_load and own.may_load(self._layer)) for share in shares)


def _release(sent: Sent) -> None:
    """Give the memory of a reply back that nobody wants."""
    reply, sent.reply = sent.reply, None
    if reply is not None:
        reply.release()


def _abandon(job: _Job) -> None:
    job.is_open = False
    for way in job.ways:
        for sent in way.sent:
            _release(sent)
