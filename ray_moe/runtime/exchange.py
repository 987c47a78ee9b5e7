"""One batch's rows out to those who compute them, and back: grouping, failover and hedging.

Rows of a host that fails go at once to another replica, else to the router's own copy, and only else wait for a newer
table. A call that takes much longer than its host is used to is sent to others as well, and the first answer wins. Used
for one batch and thrown away, by one thread. Decides no placement. Called by `runtime/moe_layer.py`.

Shape legend: T tokens, K experts per token, N = T*K slots, n rows of one share, D model width.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty

import numpy as np
import torch

from ray_moe.errors import HostLost, StaleRouting, Unavailable
from ray_moe.ops.dispatch import HostShare, Ints, cut, split_by_host
from ray_moe.runtime.arrivals import Arrivals
from ray_moe.runtime.device_batch import DeviceBatch
from ray_moe.runtime.lines import RECONNECT_EVERY_S, Lines, Peer, Sent
from ray_moe.runtime.own_experts import OwnExperts
from ray_moe.runtime.routing import How, LayerRoutes, Routes, View
from ray_moe.runtime.settings import DispatchSettings
from ray_moe.runtime.statistics import Statistics
from ray_moe.runtime.tracing import Span, Value, current
from ray_moe.transport.base import ExpertCall
from ray_moe.types import HostAddress, HostId, LayerPath

MAX_ROWS_PER_CALL = 4096
"""Larger shares are cut, so that a host with a huge batch still answers something now and then."""

UNKNOWN_SHARE = 0.1
"""Part of the call time-out after which a call is overdue while no answer has been seen from any host."""

LOAD_PATIENCE = 3.0
"""Deadlines after which an answer is so late that an expert is read into the lifeboat for it: reading is work too."""

MakeCall = Callable[[HostShare, int], ExpertCall]


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


class _Hedge:
    """Shares that together have the slots of an overdue one, sent to others. It is answered when all of them are."""

    __slots__ = ("first", "is_open", "num_open", "sent")

    def __init__(self, first: Sent) -> None:
        self.first = first
        self.sent: list[Sent] = []
        self.num_open = 0
        self.is_open = True

    def close(self) -> None:
        self.is_open = False
        for sent in self.sent:
            sent.release()


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
        version: int = 0,
        batch: DeviceBatch | None = None,
    ) -> None:
        """
        Args:
            router: whose batch it is.
            layer: path of the experts.
            slots: [N] expert of each slot.
            top_k: K.
            make: the call for a share, in an epoch.
            how: who may compute which of the slots.
            version: which weights compute it, as in the calls that `make` makes.
            batch: where it lies and how it is split already.
        """
        self._router = router
        self._layer = layer
        self._version = version
        self._batch = batch
        self._slots = slots
        self._top_k = top_k
        self._make = make
        self._in_order = how.in_order
        self._only = how.only
        self._avoid = how.avoid
        self._arrived = Arrivals()
        self._is_over = False
        self._open: dict[int, Sent] = {}
        """What has been sent and not been answered."""
        self._hedge_of: dict[int, _Hedge] = {}
        self._look_at_s: dict[int, float] = {}
        """When to look again at what was overdue."""
        self._answered: dict[int, Sequence[Sent]] = {}
        self._num_sent = 0
        self._num_owed = 0
        """Answers of hosts that have not arrived."""
        self._num_told = 0
        self._again: list[Ints] = []
        """Slots whose host failed."""
        self._waiting: list[Ints] = []
        """Slots that nobody can compute."""
        self._view: View = router.routes.view
        self._stuck_view: View = self._view
        """By which the slots that wait found nobody."""
        self._try_again_at_s = 0.0
        self._give_up_at_s = 0.0
        self._wake_at_s = math.inf
        self._may_hedge = router.settings.hedge
        self.num_rows = 0
        """Slots that go somewhere; known with the first answer."""
        self._span: Span | None = None
        """None when it is not traced."""
        self._asked: set[HostId] = set()
        """Filled for the trace."""

    def answers(
        self, meanwhile: Callable[[], None] | None = None
    ) -> Iterator[tuple[HostShare, torch.Tensor, HostAddress | None]]:
        """Every row of the batch exactly once, in shares.

        Args: meanwhile: called once when hosts have been asked, before they are waited for.

        Yields: a share, its rows (valid until the next share is asked for), and the host that computed them (None is
        the router itself).

        Raises: `Unavailable` when rows found nobody within the recovery time-out; what a computation raised.
        """
        answered = self._answered
        self._begin_span()
        try:
            if len(self._slots):
                self._group(self._only, is_first=True)
            if meanwhile is not None and self._open:
                meanwhile()
            while True:
                while answered:
                    number = self._num_told if self._in_order else next(iter(answered))
                    if number not in answered:
                        break
                    self._num_told += 1
                    for sent in answered[number]:
                        reply = sent.reply
                        if reply is not None:
                            yield sent.share, reply.rows, sent.address
                            sent.release()
                    del answered[number]
                if self._waiting:
                    self._wait_for_somebody()
                elif self._open:
                    self._wait(math.inf)
                else:
                    return
        finally:
            self._end()

    def _end(self) -> None:
        if self._num_owed:  # late answers, which nobody waits for
            self._arrived.leave()
        if self._open or self._answered:  # after an error, what still comes is nobody's
            for sent in [sent for each in self._answered.values() for sent in each]:
                sent.release()
            for hedge in self._hedge_of.values():
                hedge.close()
        self._is_over = True
        self._release_late()
        self._end_span()

    # --- the trace -----------------------------------------------------------------------------------------
    def _begin_span(self) -> None:
        whole = current.get()
        if whole is not None:
            self._span = whole.child("experts.exchange", {"layer": self._layer})

    def _end_span(self) -> None:
        """Also while an error is on its way."""
        if self._span is not None:
            self._span.set({"rows": self.num_rows, "hosts": sorted(self._asked)})
            self._span.end(sys.exc_info()[1])

    def _note(self, what: str, **how: Value) -> None:
        """An event for the trace, if there is one."""
        if self._span is not None:
            self._span.event(what, how)

    # --- sending -------------------------------------------------------------------------------------------
    def _group(self, pending: Ints | None, is_first: bool = False) -> None:
        """Send slots ([m] ascending, None for all) to those who can compute them by the newest view."""
        router = self._router
        while True:
            view = self._view = router.routes.view
            routes = view.routes(self._layer, self._avoid, self._version)
            here: list[HostShare] = []
            unreached: list[Ints] = []
            loads: list[int] = []
            speeds: list[float] = []
            batch = self._batch if is_first and self._batch is not None and self._batch.view is view else None
            for share in self._shares(routes, pending) if batch is None else batch.shares:
                if share.host == view.here:
                    here.append(share)
                    continue
                loads.append(len(share.slot))
                speeds.append(1.0 if routes.speed is None else float(routes.speed[share.host]))
                peer = router.lines.peer(view.hosts[share.host])
                if peer is None:
                    unreached.append(share.slot)
                elif len(share.slot) <= MAX_ROWS_PER_CALL or batch is not None:
                    self._send(share, peer)
                else:
                    for piece in cut(share, self._top_k, MAX_ROWS_PER_CALL):
                        self._send(piece, peer)
            # When a call is overdue is worked out if it is still open when the quickest could be.
            settings = router.settings
            soon_s = settings.hedge_min_s if self._may_hedge else settings.call_timeout_s
            self._wake_at_s = min(self._wake_at_s, time.monotonic() + soon_s)
            if is_first:
                is_first = False
                self.num_rows = sum(loads) + sum(len(share.slot) for share in here)
                router.statistics.add_batch(loads, speeds, routes.speed_in_all)
            for share in here:  # while the hosts are at theirs
                sent = self._compute(share, likely=np.flatnonzero(routes.owner == view.here).tolist())
                if sent is None:
                    self._set_aside(share.slot, view)
                else:
                    self._answered[sent.number] = (sent,)
            if not unreached:
                return
            if router.routes.view is view:  # nobody else is known
                self._set_aside(np.concatenate(unreached), view)
                return
            pending = np.sort(np.concatenate(unreached))

    def _set_aside(self, slot: Ints, view: View) -> None:
        if not self._waiting:
            self._stuck_view, self._try_again_at_s = view, time.monotonic() + RECONNECT_EVERY_S
            self._note("waits for a host", rows=len(slot))
        self._waiting.append(slot)

    def _shares(self, routes: LayerRoutes, pending: Ints | None) -> list[HostShare]:
        index = self._slots if pending is None else self._slots[pending]
        owner, host = routes.hosts_of(index, self._router.lines.load)
        return split_by_host(index, owner, self._top_k, pending, host)

    def _next_number(self) -> int:
        self._num_sent += 1
        return self._num_sent - 1

    def _send(self, share: HostShare, peer: Peer, hedge: _Hedge | None = None) -> None:
        sent = Sent(share, peer, -1 if hedge is not None else self._next_number(), self._hear)
        if hedge is None:
            self._open[sent.number] = sent
        else:
            sent.hedge = hedge
            hedge.sent.append(sent)
            hedge.num_open += 1
        call = self._make(share, self._view.table.epoch)
        if self._span is not None:
            self._asked.add(peer.address.host_id)
            call.trace = self._span.context
        self._num_owed += 1
        line = peer.attendable
        peer.submit(call, sent, line is not None and self._arrived.attend(line))

    def _compute(self, share: HostShare, hedge: _Hedge | None = None, likely: Sequence[int] = ()) -> Sent | None:
        """Compute a share in this process; None when that cannot be. Args: likely: as of `OwnExperts.run`."""
        own = self._router.own
        if own is None:
            return None
        if not own.has(self._layer, share.experts, self._version):
            self._arrived.leave()  # reading experts takes long, and answers shall not wait for it
        num_loads = own.num_lifeboat_loads
        reply = own.run(self._make(share, self._view.table.epoch), likely)
        if own.num_lifeboat_loads != num_loads:
            self._router.note_own()
        if reply is None:
            return None
        self._note("computed here", rows=len(share.slot))
        sent = Sent(share, None, -1 if hedge is not None else self._next_number(), self._hear)
        sent.reply = reply
        if hedge is not None:
            hedge.sent.append(sent)
        return sent

    # --- hearing -------------------------------------------------------------------------------------------
    def _hear(self, sent: Sent) -> None:
        """From any thread: an answer came, or will not."""
        self._arrived.put(sent)
        if self._is_over:
            self._release_late()

    def _release_late(self) -> None:
        while not self._arrived.empty():
            try:
                self._arrived.get_nowait().release()
            except Empty:
                return

    def _wait(self, until_s: float) -> None:
        """Take in what arrives, until something has been done; look at the clocks when they say so."""
        timeout_s = min(self._wake_at_s, until_s) - time.monotonic()
        try:
            # A batch is never left alone for longer than a host may be silent.
            longest_s = self._router.settings.call_timeout_s
            self._take(self._arrived.get(min(timeout_s, longest_s)))
            while not self._arrived.empty():
                self._take(self._arrived.get_nowait())
        except Empty:
            pass
        if self._again:
            pending, self._again = np.sort(np.concatenate(self._again)), []
            self._group(pending)
        if self._open and time.monotonic() >= self._wake_at_s:
            self._look_at_clocks(time.monotonic())

    def _take(self, sent: Sent) -> None:
        self._num_owed -= 1
        hedge = sent.hedge
        if hedge is None and sent.error is None and not self._hedge_of:  # as a rule
            if self._open.pop(sent.number, None) is None:
                sent.release()
            else:
                self._answered[sent.number] = (sent,)
        elif isinstance(hedge, _Hedge):
            self._take_hedged(hedge, sent)
        elif sent.number not in self._open:  # the others were quicker
            sent.release()
        elif sent.error is None:
            self._close(sent, (sent,))
        elif isinstance(sent.error, HostLost):
            if sent.peer is not None:
                self._router.lines.lose(sent.peer)
            self._fail(sent)
        elif isinstance(sent.error, StaleRouting):
            self._fail_stale(sent)
        else:
            raise sent.error

    def _take_hedged(self, hedge: _Hedge, sent: Sent) -> None:
        if not hedge.is_open:
            sent.release()
        elif sent.error is None:
            hedge.num_open -= 1
            if not hedge.num_open:
                self._won(hedge)
        else:
            if isinstance(sent.error, HostLost) and sent.peer is not None:
                self._router.lines.lose(sent.peer)
            elif isinstance(sent.error, StaleRouting):
                self._note_missing(sent)
            else:
                raise sent.error
            hedge.close()
            first = hedge.first
            if first.is_done:  # it failed before
                self._fail(first)
            else:
                del self._hedge_of[first.number]
                self._look_at_s[first.number] = self._wake_at_s = 0.0

    def _won(self, hedge: _Hedge) -> None:
        self._router.statistics.add_hedge_won()
        self._note("hedge won", host=_host(hedge.first), rows=hedge.first.num_rows)
        self._hedge_of.pop(hedge.first.number)
        self._close(hedge.first, hedge.sent)

    def _close(self, sent: Sent, answer: Sequence[Sent]) -> None:
        """The slots of `sent` are answered, by itself or by others, or are sent again (no answer)."""
        del self._open[sent.number]
        self._answered[sent.number] = answer
        hedge = self._hedge_of.pop(sent.number, None)
        if hedge is not None:
            hedge.close()

    def _fail(self, sent: Sent) -> None:
        """What was sent came to nothing: others may be at it already; otherwise its slots are sent again."""
        hedge = self._hedge_of.get(sent.number)
        if hedge is not None and hedge.is_open:
            return
        self._close(sent, ())
        self._router.statistics.add_retry()
        self._note("failover", host=_host(sent), rows=sent.num_rows, error=type(sent.error).__name__)
        self._again.append(sent.share.slot)

    def _note_missing(self, sent: Sent) -> None:
        if sent.peer is not None:
            for expert in sent.share.experts:
                self._router.routes.add_missing(sent.peer.address.host_id, self._layer, expert, self._version)

    def _fail_stale(self, sent: Sent) -> None:
        """A host does not hold some of the experts. Which ones is found by asking for each alone."""
        share, peer = sent.share, sent.peer
        if len(share.experts) == 1 or peer is None:
            self._note_missing(sent)
            self._fail(sent)
            return
        self._close(sent, ())
        self._router.statistics.add_retry()
        self._note("failover", host=_host(sent), rows=sent.num_rows, error=type(sent.error).__name__)
        for expert, slot in zip(share.experts, np.split(share.slot, np.cumsum(share.counts)[:-1]), strict=True):
            owner = np.zeros(expert + 1, dtype=np.int64)
            for alone in split_by_host(self._slots[slot], owner, self._top_k, slot):
                self._send(alone, peer)
        self._wake_at_s = min(self._wake_at_s, time.monotonic() + self._router.settings.hedge_min_s)

    # --- waiting and hedging -------------------------------------------------------------------------------
    def _wait_for_somebody(self) -> None:
        """Slots have nobody to go to: wait for another view, going on with what is under way."""
        settings, routes, now_s = self._router.settings, self._router.routes, time.monotonic()
        patience_s = settings.call_timeout_s if self._avoid else settings.recovery_timeout_s
        self._give_up_at_s = self._give_up_at_s or now_s + patience_s
        is_same = routes.view is self._stuck_view
        experts = np.unique(self._slots[np.concatenate(self._waiting)]).tolist()
        is_hopeless = bool(self._avoid) and not routes.view.is_named(self._layer, experts, self._avoid)
        if is_hopeless or (is_same and now_s >= self._give_up_at_s):
            raise Unavailable(
                f"experts {experts} of {self._layer} had no living host for {patience_s:g} s; "
                "retry when the service has recovered"
            )
        if is_same and now_s < self._try_again_at_s:
            if self._open:
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
        settings = self._router.settings
        self._wake_at_s = math.inf
        for sent in list(self._open.values()):
            for each in (sent, *(self._hedge_of[sent.number].sent if sent.number in self._hedge_of else ())):
                if each.peer is not None and not each.is_done:
                    lost_at_s = max(each.sent_s, each.peer.last_answer_s) + settings.call_timeout_s
                    if now_s >= lost_at_s:
                        self._router.lines.lose(each.peer)
                    self._wake_at_s = min(self._wake_at_s, lost_at_s)
            if self._may_hedge and not sent.is_done:
                if now_s >= self._look_at_s.get(sent.number, sent.sent_s + self._deadline_s(sent)):
                    self._hedge(sent, now_s)
                look_at_s = self._look_at_s.get(sent.number, sent.sent_s + sent.deadline_s)
                self._wake_at_s = min(self._wake_at_s, look_at_s)

    def _deadline_s(self, sent: Sent) -> float:
        """Seconds after its sending when a call is overdue."""
        settings = self._router.settings
        if math.isinf(sent.deadline_s) and sent.peer is not None:
            expected_s = sent.peer.expected_s(sent.ahead_rows)
            if math.isinf(expected_s):
                sent.deadline_s = max(settings.hedge_min_s, UNKNOWN_SHARE * settings.call_timeout_s)
            else:
                sent.deadline_s = max(settings.hedge_min_s, settings.hedge_factor * expected_s)
        return sent.deadline_s

    def _hedge(self, sent: Sent, now_s: float) -> None:
        """Send an overdue share to others as well, if there are others for all of it."""
        router, late_s = self._router, now_s - sent.sent_s
        is_very_late = late_s >= LOAD_PATIENCE * sent.deadline_s
        router.lines.late(sent, is_very_late)
        self._look_at_s[sent.number] = now_s + sent.deadline_s
        if sent.number in self._hedge_of or sent.address is None:
            return
        view = self._view = router.routes.view
        avoid = self._avoid | {sent.address.host_id}
        routes = view.routes(self._layer, avoid, self._version)
        shares = self._shares(routes, np.sort(sent.share.slot))
        here = [share for share in shares if share.host == view.here]
        away = [(share, router.lines.peer(view.hosts[share.host])) for share in shares if share.host != view.here]
        if any(peer is None for _, peer in away) or not all(self._may_compute(share, is_very_late) for share in here):
            return
        hedge = self._hedge_of[sent.number] = _Hedge(sent)
        router.statistics.add_hedge()
        self._note("hedge", host=_host(sent), rows=sent.num_rows, late_s=late_s)
        for share, peer in away:
            if peer is not None:
                self._send(share, peer, hedge)
        if any(self._compute(share, hedge) is None for share in here):
            hedge.close()
            del self._hedge_of[sent.number]
        elif not hedge.num_open:
            self._won(hedge)

    def _may_compute(self, share: HostShare, may_load: bool) -> bool:
        own = self._router.own
        if own is None:
            return False
        return own.has(self._layer, share.experts, self._version) or (
            may_load and own.may_load(self._layer, self._version)
        )


def _host(sent: Sent) -> HostId:
    return "" if sent.address is None else sent.address.host_id
