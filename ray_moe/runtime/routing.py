"""The routing table as a router uses it: owners as arrays, and one connection per living host.

Turns a `RoutingTable` into what the dispatcher needs per batch, keeps the connections of hosts that live on across
tables, and lets callers wait for a newer table. Never decides a placement. Called by `runtime/moe_layer.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ray_moe.errors import HostLost, NotFound
from ray_moe.ops.dispatch import NOWHERE, Ints
from ray_moe.transport.base import Connection, Transport
from ray_moe.types import HostId, LayerPath, Placement, RoutingTable


@dataclass(frozen=True, slots=True)
class View:
    """One routing table, ready for use."""

    table: RoutingTable
    hosts: tuple[HostId, ...] = ()
    owner: Mapping[LayerPath, Ints] = field(default_factory=dict)
    """[E + 1] number (in `hosts`) of each expert's host; the last entry, the sentinel's, is `NOWHERE`."""

    @classmethod
    def of(cls, table: RoutingTable) -> View:
        numbers: dict[HostId, int] = {}
        owner = {}
        for layer, experts in table.placement.hosts_of.items():
            firsts = [numbers.setdefault(hosts[0], len(numbers)) for hosts in experts]
            owner[layer] = np.array([*firsts, NOWHERE], dtype=np.int64)
        return cls(table, tuple(numbers), owner)

    def owner_of(self, layer: LayerPath) -> Ints:
        try:
            return self.owner[layer]
        except KeyError:
            raise NotFound(f"no layer {layer!r} in the routing table; it has {sorted(self.owner)}") from None


class Routes:
    """The newest view, and the connections it needs. Thread-safe."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._changed = threading.Condition()
        self._connections: dict[HostId, Connection] = {}
        self._dialing: dict[HostId, threading.Lock] = {}
        self.view = View(RoutingTable(epoch=0, placement=Placement({})))

    def update(self, table: RoutingTable) -> None:
        """Use `table` from now on; older ones than the present are ignored. Connections to ended lives close."""
        with self._changed:
            if table.epoch <= self.view.table.epoch:
                return
            self.view = View.of(table)
            ended = [
                self._connections.pop(host_id)
                for host_id, connection in list(self._connections.items())
                if table.addresses.get(host_id) != connection.address
            ]
            self._changed.notify_all()
        for connection in ended:
            connection.close()

    def connection(self, host_id: HostId) -> Connection | None:
        """The line to the host's present life, opened when needed; None while it cannot be reached."""
        connection = self._connections.get(host_id)
        if connection is not None:
            return connection
        with self._dialing.setdefault(host_id, threading.Lock()):  # one dials; tables and other hosts do not wait
            connection = self._connections.get(host_id)
            address = self.view.table.addresses.get(host_id)
            if connection is not None or address is None:
                return connection
            try:
                connection = self._transport.connect(address)
            except HostLost:
                return None
            with self._changed:
                if self.view.table.addresses.get(host_id) == address:
                    self._connections[host_id] = connection
                    return connection
        connection.close()  # the table moved on meanwhile
        return None

    def lose(self, connection: Connection) -> None:
        """Close a line that failed; the next call opens another."""
        with self._changed:
            if self._connections.get(connection.address.host_id) is connection:
                del self._connections[connection.address.host_id]
        connection.close()

    def wait_newer(self, epoch: int, timeout_s: float) -> bool:
        """Wait until the table is newer than `epoch`; False when `timeout_s` passed first."""
        with self._changed:
            return self._changed.wait_for(lambda: self.view.table.epoch > epoch, timeout_s)

    def close(self) -> None:
        with self._changed:
            open_lines, self._connections = list(self._connections.values()), {}
        for connection in open_lines:
            connection.close()
