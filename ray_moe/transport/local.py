"""Hosts in the router's own process, and a plan of the faults they should show.

The reference implementation of the transport seam: no bytes, no sockets, one worker thread per host. A `FaultPlan`
makes it drop, delay, duplicate, reorder, kill, slow down or corrupt at a chosen call, so that everything above the seam
can be tested against faults deterministically. Used by tests, and to run a model with its experts apart in one process.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from ray_moe.errors import HostLost, RayMoEError
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.types import HostAddress, HostId

FaultKind = Literal["drop", "delay", "duplicate", "reorder", "kill", "slow", "corrupt"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the `nth` call (from 1) that `host_id` receives."""

    kind: FaultKind
    host_id: HostId
    nth: int
    delay_s: float = 0.0
    """For ``delay``: how long the call waits before it is computed. For ``slow``: how long each one waits."""


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Faults by host and call number.

    ``drop``: the reply never comes. ``delay``: it comes late. ``duplicate``: the call is delivered twice.
    ``reorder``: it is answered after the host's next call. ``kill``: the host dies on it; every call in flight fails.
    ``slow``: it and every later call of this life come late. ``corrupt``: it is answered with NaN.
    """

    faults: tuple[Fault, ...] = ()

    @classmethod
    def random(cls, seed: int, hosts: Sequence[HostId], num_faults: int, num_calls: int) -> FaultPlan:
        """`num_faults` faults spread over the first `num_calls` calls of the hosts; the same for the same seed.

        At most one host corrupts: two that answer the same damage are believed.
        """
        rng = random.Random(seed)
        kinds: Sequence[FaultKind] = ("drop", "delay", "duplicate", "reorder", "kill", "slow", "corrupt")
        corrupting = rng.choice(hosts)
        faults = []
        for _ in range(num_faults):
            kind, host_id = rng.choice(kinds), rng.choice(hosts)
            faults.append(
                Fault(
                    kind,
                    corrupting if kind == "corrupt" else host_id,
                    rng.randint(1, num_calls),
                    delay_s=rng.uniform(0, 0.02),
                )
            )
        return cls(tuple(faults))

    def at(self, host_id: HostId, nth: int) -> Fault | None:
        return next((fault for fault in self.faults if (fault.host_id, fault.nth) == (host_id, nth)), None)


class Host(Protocol):
    """What this transport needs of a host (`runtime.expert_host.ExpertHost`)."""

    def run(self, calls: Sequence[ExpertCall]) -> Sequence[ExpertReply | RayMoEError]: ...


class LocalTransport:
    """Connections to hosts in this process."""

    def __init__(self, hosts: Mapping[HostId, Host], faults: FaultPlan | None = None) -> None:
        self.hosts = dict(hosts)
        self.faults = faults or FaultPlan()
        self.num_calls: Counter[HostId] = Counter()
        self.on_kill: Callable[[HostId], None] = lambda host_id: None
        """Called when the plan kills a host (in its worker thread), e.g. to publish a table without it."""
        self._lives: Counter[HostId] = Counter()
        self._open: list[LocalConnection] = []
        self._lock = threading.Lock()

    def address(self, host_id: HostId) -> HostAddress:
        """The address of the host's present life."""
        return HostAddress(host_id, f"{host_id}#{self._lives[host_id]}", "local", 0, "", "")

    def connect(self, address: HostAddress) -> LocalConnection:
        if address != self.address(address.host_id) or address.host_id not in self.hosts:
            raise HostLost(f"host {address.host_id} ({address.incarnation}) is not there")
        connection = LocalConnection(self, address)
        with self._lock:
            self._open.append(connection)
        return connection

    def revive(self, host_id: HostId, host: Host) -> HostAddress:
        """Put a new life of the host in place of a killed one."""
        self.hosts[host_id] = host
        return self.address(host_id)

    def kill(self, host_id: HostId) -> None:
        """End the host's life: its calls in flight fail with `HostLost`, and so does every later connect."""
        with self._lock:
            self.hosts.pop(host_id, None)
            self._lives[host_id] += 1
            dying = [connection for connection in self._open if connection.address.host_id == host_id]
        for connection in dying:
            connection.close()
        self.on_kill(host_id)

    def close(self) -> None:
        with self._lock:
            closing, self._open = self._open, []
        for connection in closing:
            connection.close()


class LocalConnection:
    """One worker thread that plays the host."""

    def __init__(self, transport: LocalTransport, address: HostAddress) -> None:
        self.address = address
        self._transport = transport
        self._host = transport.hosts[address.host_id]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"local-{address.host_id}")
        self._in_flight: set[Future[ExpertReply]] = set()
        self._held_back: list[tuple[Future[ExpertReply], ExpertReply | RayMoEError]] = []
        self._closed = threading.Event()
        self._slow_s = 0.0
        self._lock = threading.Lock()

    def submit(self, call: ExpertCall) -> Future[ExpertReply]:
        future: Future[ExpertReply] = Future()
        with self._lock:
            if self._closed.is_set():
                future.set_exception(HostLost(f"host {self.address.host_id} is gone"))
                return future
            self._in_flight.add(future)
            self._worker.submit(self._play, call, future)
        return future

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            lost, self._in_flight = self._in_flight, set()
        for future in lost:
            _complete(future, HostLost(f"host {self.address.host_id} was lost"))
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _play(self, call: ExpertCall, future: Future[ExpertReply]) -> None:
        host_id = self.address.host_id
        self._transport.num_calls[host_id] += 1
        fault = self._transport.faults.at(host_id, self._transport.num_calls[host_id])
        kind = fault.kind if fault else None
        if kind == "kill":
            self._transport.kill(host_id)
            return
        if fault and kind == "delay":
            self._closed.wait(fault.delay_s)
        if fault and kind == "slow":
            self._slow_s = fault.delay_s
        if self._slow_s:
            self._closed.wait(self._slow_s)
        outcomes = [self._host.run([call])[0] for _ in range(2 if kind == "duplicate" else 1)]
        if kind == "drop":
            return
        if kind == "corrupt":
            outcomes = [_corrupted(outcome) for outcome in outcomes]
        if kind == "reorder":
            self._held_back.append((future, outcomes[0]))
            return
        for done, outcome in ((future, outcomes[-1]), *self._held_back):
            with self._lock:
                self._in_flight.discard(done)
            _complete(done, outcome)
        self._held_back.clear()


def _corrupted(outcome: ExpertReply | RayMoEError) -> ExpertReply | RayMoEError:
    if isinstance(outcome, RayMoEError):
        return outcome
    return ExpertReply(torch.full_like(outcome.rows, torch.nan), outcome.release)


def _complete(future: Future[ExpertReply], outcome: ExpertReply | RayMoEError) -> None:
    try:
        if isinstance(outcome, RayMoEError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:  # cancelled by the caller, or failed by close()
        if isinstance(outcome, ExpertReply):
            outcome.release()
