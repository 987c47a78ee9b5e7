"""The router's lines to its hosts: opened, watched, lost, and opened again behind the requests' backs.

A request never waits for a host that is known to be out of reach: one thread per troubled host tries to reach it again
and watches for the answer it owes, until it is well or the table no longer names it. Decides nothing about where rows
go, but says to `runtime/routing.py` who is out and who is late. Called by `runtime/exchange.py`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial

import numpy as np

from ray_moe.errors import HostLost, Unauthenticated, WireError
from ray_moe.ops.dispatch import HostShare
from ray_moe.runtime.latency import LatencyHistory
from ray_moe.runtime.reports import Reports
from ray_moe.runtime.routing import Floats, Routes
from ray_moe.transport.base import Attendable, Connection, ExpertCall, ExpertReply, SharesDevice, Transport
from ray_moe.transport.device_memory import DeviceArena
from ray_moe.types import HostAddress, HostId

logger = logging.getLogger(__name__)

RECONNECT_EVERY_S = 0.1
"""A lost host is tried again this often: perhaps only its line broke."""

WATCH_EVERY_S = 0.05
"""How often a late host is looked at."""

MISSES = 3
"""Deadlines missed in a row, or lengths of one deadline, after which a host is slow enough to be told of."""


class Sent:
    """A share of a batch on its way to a host, or computed."""

    __slots__ = (
        "ahead_rows",
        "deadline_s",
        "error",
        "hear",
        "hedge",
        "num_experts",
        "num_rows",
        "number",
        "peer",
        "reply",
        "sent_s",
        "share",
    )

    def __init__(self, share: HostShare, peer: Peer | None, number: int, hear: Callable[[Sent], None]) -> None:
        self.share = share
        self.peer = peer
        """The host's line; None when the router computes it."""
        self.number = number
        """The exchange's own."""
        self.hear = hear
        """Told of the reply or error, from any thread."""
        self.hedge: object = None
        """The exchange's own."""
        self.reply: ExpertReply | None = None
        self.error: BaseException | None = None
        self.sent_s = 0.0
        self.deadline_s = math.inf
        """Seconds after which the answer is overdue; known once somebody wonders."""
        self.num_rows = len(share.slot)
        self.num_experts = len(share.experts)
        self.ahead_rows = 0
        """Rows that the host had to compute for this answer: its own and those sent before."""

    @property
    def address(self) -> HostAddress | None:
        return None if self.peer is None else self.peer.address

    @property
    def is_done(self) -> bool:
        return self.reply is not None or self.error is not None

    def release(self) -> None:
        """Give the memory of a reply back that nobody wants."""
        reply, self.reply = self.reply, None
        if reply is not None:
            reply.release()


class Peer:
    """One line to one life of a host, and what the answers on it were like. Thread-safe."""

    def __init__(self, connection: Connection, everyone: LatencyHistory, on_relief: Callable[[Peer], None]) -> None:
        self.connection = connection
        self.attendable = connection if isinstance(connection, Attendable) else None
        self._shares_device = connection if isinstance(connection, SharesDevice) else None
        self.address = connection.address
        self.last_answer_s = -math.inf
        self.rows_sent = 0
        self.rows_in_flight = 0
        self.experts_in_flight = 0
        self.num_missed = 0
        """Deadlines missed since the last answer in time."""
        self.overdue: set[Sent] = set()
        self._history = LatencyHistory()
        self._everyone = everyone
        self._on_relief = on_relief
        self._lock = threading.Lock()

    @property
    def device_arena(self) -> DeviceArena | None:
        """Memory of a GPU that is shared with the host."""
        return None if self._shares_device is None else self._shares_device.device_arena

    def submit(self, call: ExpertCall, sent: Sent, is_attended: bool = False) -> None:
        """Send `call`; `sent.hear` is told of its reply or error, perhaps before this returns.

        Args: is_attended: whether the caller takes the answer in; only if the line is `attendable`.
        """
        with self._lock:
            self.rows_sent += sent.num_rows
            self.rows_in_flight += sent.num_rows
            self.experts_in_flight += sent.num_experts
            sent.ahead_rows = self.rows_in_flight
        sent.sent_s = time.monotonic()
        try:
            if is_attended and self.attendable is not None:
                future = self.attendable.submit(call, True)
            else:
                future = self.connection.submit(call)
        except BaseException:
            self._landed(sent)
            raise
        future.add_done_callback(partial(self._done, sent))

    def _landed(self, sent: Sent) -> None:
        with self._lock:
            self.rows_in_flight -= sent.num_rows
            self.experts_in_flight -= sent.num_experts

    def _done(self, sent: Sent, future: Future[ExpertReply]) -> None:
        now_s = time.monotonic()
        reply: ExpertReply | None = None
        error: BaseException | None = None
        try:
            reply = future.result()
        except CancelledError:
            error = HostLost(f"the call to host {self.address.host_id} was cancelled")
        except BaseException as raised:
            error = raised
        is_relieved = False
        with self._lock:
            self.rows_in_flight -= sent.num_rows
            self.experts_in_flight -= sent.num_experts
            sent.reply, sent.error = reply, error
            if reply is not None:
                self._history.add(sent.ahead_rows, now_s - sent.sent_s)
                self._everyone.add(sent.ahead_rows, now_s - sent.sent_s)
            if error is None or not isinstance(error, HostLost):
                self.last_answer_s = now_s
                if not self.overdue:
                    self.num_missed = 0
                elif sent in self.overdue:
                    self.overdue.discard(sent)
                    is_relieved = not self.overdue
        if is_relieved:
            self._on_relief(self)
        sent.hear(sent)

    def expected_s(self, rows: int) -> float:
        """Seconds in which an answer comes as a rule; infinite while nothing is known, of this host or another."""
        expected_s = self._history.expected_s(rows)
        return self._everyone.expected_s(rows) if math.isinf(expected_s) else expected_s

    def add_overdue(self, sent: Sent) -> None:
        with self._lock:
            if not sent.is_done and sent not in self.overdue:
                self.overdue.add(sent)
                self.num_missed += 1

    def longest_overdue(self) -> Sent | None:
        """The call that should have been answered first; None when the host owes nothing."""
        with self._lock:
            return min(self.overdue, key=lambda sent: sent.sent_s, default=None)


class Lines:
    """The lines to the hosts of the newest routing table. Thread-safe."""

    def __init__(self, transport: Transport, routes: Routes, reports: Reports, call_timeout_s: float) -> None:
        self._transport = transport
        self._routes = routes
        self._reports = reports
        self._call_timeout_s = call_timeout_s
        self._lock = threading.Lock()
        self._peers: dict[HostId, Peer] = {}
        self._everyone = LatencyHistory()
        self._dialing: dict[HostId, threading.Lock] = {}
        self._nursed: set[HostAddress] = set()
        self._strangers: set[HostAddress] = set()
        """Addresses of which it has been told that somebody else is there."""
        self._rows_before: Counter[HostId] = Counter()
        """Rows sent on lines that have ended."""
        self._closing = threading.Event()

    def end_lives(self) -> None:
        """Close the lines to lives that the newest table no longer names."""
        with self._lock:
            addresses = self._routes.view.table.addresses
            ended = [peer for peer in self._peers.values() if addresses.get(peer.address.host_id) != peer.address]
            for peer in ended:
                self._forget(peer)
        for peer in ended:
            peer.connection.close()

    def peer(self, host_id: HostId) -> Peer | None:
        """The line to the host's present life, opened when needed; None at once while it is known to be out."""
        peer = self._peers.get(host_id)
        if peer is not None:
            return peer
        if host_id in self._routes.view.out:
            return None
        with self._dialing.setdefault(host_id, threading.Lock()):  # one dials; tables and other hosts do not wait
            peer = self._peers.get(host_id)
            view = self._routes.view
            address = view.table.addresses.get(host_id)
            if peer is not None or address is None or host_id in view.out or self._closing.is_set():
                return peer
            peer = self._dial(address)
            if peer is None and self._is_named(address):
                self._routes.set_out(host_id, True)
        if peer is None:
            self._reports.lost(address)
            self._nurse(address)
        return peer

    def lose(self, peer: Peer) -> None:
        """Close a line that failed; a thread of its own tries the host again."""
        with self._lock:
            is_present = self._peers.get(peer.address.host_id) is peer
            if is_present:
                self._forget(peer)
        if is_present and self._is_named(peer.address):
            self._routes.set_out(peer.address.host_id, True)
        peer.connection.close()
        self._reports.lost(peer.address)
        if is_present:
            self._nurse(peer.address)

    def late(self, sent: Sent, is_hung: bool) -> None:
        """An answer is overdue: until it comes, others are asked where there are others."""
        peer = sent.peer
        if peer is None:
            return
        peer.add_overdue(sent)
        if peer.longest_overdue() is None or self._peers.get(peer.address.host_id) is not peer:
            return  # it came this very moment, or the line is gone
        self._routes.set_late(peer.address.host_id, True, is_hung)
        if peer.longest_overdue() is None:
            self._relieved(peer)
        if peer.num_missed >= MISSES:
            self._reports.slow(peer.address, time.monotonic() - sent.sent_s)
        self._nurse(peer.address)

    def load(self, hosts: Sequence[HostId]) -> tuple[Floats, Floats]:
        """[H + 1] rows, and [H + 1] experts, that each host is at for this router (0 for the router itself)."""
        rows, experts = np.zeros(len(hosts) + 1), np.zeros(len(hosts) + 1)
        for place, host_id in enumerate(hosts):
            peer = self._peers.get(host_id)
            if peer is not None and peer.rows_in_flight:
                rows[place], experts[place] = peer.rows_in_flight, peer.experts_in_flight
        return rows, experts

    @property
    def rows_in_flight(self) -> dict[HostId, int]:
        """Rows that each host has been sent and has not answered."""
        with self._lock:
            return {host_id: peer.rows_in_flight for host_id, peer in self._peers.items()}

    @property
    def rows_per_host(self) -> dict[HostId, int]:
        """Rows sent to each host since the start."""
        with self._lock:
            total = self._rows_before.copy()
            for host_id, peer in self._peers.items():
                total[host_id] += peer.rows_sent
            return dict(total)

    def close(self) -> None:
        self._closing.set()
        with self._lock:
            peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            peer.connection.close()

    # --- dialling and watching -----------------------------------------------------------------------------
    def _dial(self, address: HostAddress) -> Peer | None:
        try:
            connection = self._transport.connect(address)
        except HostLost:
            return None
        except (Unauthenticated, WireError) as error:  # somebody else listens there, or an older life
            if address not in self._strangers:
                self._strangers.add(address)
                logger.warning("%s at %s is not the host that is meant: %s", address.host_id, address.tcp, error)
            return None
        peer = Peer(connection, self._everyone, self._relieved)
        with self._lock:
            if not self._closing.is_set() and self._is_named(address):
                self._peers[address.host_id] = peer
                return peer
        connection.close()  # the table moved on meanwhile
        return None

    def _is_named(self, address: HostAddress) -> bool:
        return self._routes.view.table.addresses.get(address.host_id) == address

    def _forget(self, peer: Peer) -> None:
        del self._peers[peer.address.host_id]
        self._rows_before[peer.address.host_id] += peer.rows_sent

    def _relieved(self, peer: Peer) -> None:
        """The host has answered everything it owed."""
        if self._peers.get(peer.address.host_id) is peer:
            self._routes.set_late(peer.address.host_id, False)

    def _nurse(self, address: HostAddress) -> None:
        """See to a troubled host in a thread of its own, if none does already."""
        with self._lock:
            if address in self._nursed or self._closing.is_set():
                return
            self._nursed.add(address)
        threading.Thread(target=self._sit_up, args=(address,), name=f"nurse-{address.host_id}", daemon=True).start()

    def _sit_up(self, address: HostAddress) -> None:
        host_id = address.host_id
        while True:
            with self._lock:
                view, peer = self._routes.view, self._peers.get(host_id)
                is_well = host_id not in view.out and (peer is None or not peer.overdue)
                if is_well or self._closing.is_set() or not self._is_named(address):
                    self._nursed.discard(address)
                    break
            if peer is not None and host_id not in view.out:
                self._watch(peer)
            elif peer is not None or self._dial(address) is not None:
                self._routes.set_out(host_id, False)
            else:
                self._reports.lost(address)
                self._closing.wait(RECONNECT_EVERY_S)
        peer = self._peers.get(host_id)
        if host_id in self._routes.view.late and (peer is None or not peer.overdue):
            self._routes.set_late(host_id, False)  # it was called late just when it answered, or began another life

    def _watch(self, peer: Peer) -> None:
        """Give a late host up when it has answered nothing for the call time-out."""
        sent = peer.longest_overdue()
        if sent is None:
            return
        now_s = time.monotonic()
        if now_s - max(sent.sent_s, peer.last_answer_s) >= self._call_timeout_s:
            self.lose(peer)
            return
        if now_s - sent.sent_s >= MISSES * sent.deadline_s:
            self._reports.slow(peer.address, now_s - sent.sent_s)
        self._closing.wait(WATCH_EVERY_S)
