"""A transport that can be cut off from some hosts for a while: a network partition on purpose.

Around any other transport. Both ends live on, and see each other again when the time is over. Used for `ray-moe chaos`.
"""

from __future__ import annotations

import threading
import time

from ray_moe.errors import HostLost
from ray_moe.transport.base import Connection, Transport
from ray_moe.types import HostAddress, HostId


class PartitionedTransport:
    """Passes everything on to `inner`, but for the hosts that are cut off. Thread-safe when that is."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._cut_until_s: dict[HostId, float] = {}
        self._open: list[Connection] = []

    def cut_off(self, host_id: HostId, duration_s: float) -> None:
        """Break the lines to `host_id`, and let no other stand for `duration_s`."""
        with self._lock:
            self._cut_until_s[host_id] = time.monotonic() + duration_s
            broken = [connection for connection in self._open if connection.address.host_id == host_id]
            self._open = [connection for connection in self._open if connection.address.host_id != host_id]
        for connection in broken:
            connection.close()

    def connect(self, address: HostAddress) -> Connection:
        """As `inner` does. Raises `HostLost` also for a host that is cut off."""
        self._refuse(address.host_id)
        connection = self._inner.connect(address)
        with self._lock:
            # Of each host the newest line is enough: whoever dials has given the one before up.
            self._open = [other for other in self._open if other.address.host_id != address.host_id]
            self._open.append(connection)
        try:
            self._refuse(address.host_id)  # it may have been cut off meanwhile
        except HostLost:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        self._inner.close()

    def _refuse(self, host_id: HostId) -> None:
        left_s = self._cut_until_s.get(host_id, 0.0) - time.monotonic()
        if left_s > 0:
            raise HostLost(f"host {host_id} is cut off on purpose for another {left_s:.1f} s")
