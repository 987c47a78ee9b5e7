"""One transport where it works, another where it does not: streams, and Ray's object store for a port out of reach."""

from __future__ import annotations

import logging

from ray_moe.errors import HostLost
from ray_moe.transport.base import Connection, Transport
from ray_moe.types import HostAddress

_log = logging.getLogger(__name__)


class AutoTransport:
    """Decides for each host, each time it connects. Thread-safe when both transports are."""

    def __init__(self, preferred: Transport, fallback: Transport) -> None:
        self._preferred = preferred
        self._fallback = fallback
        self._reached: set[str] = set()

    def connect(self, address: HostAddress) -> Connection:
        """A line by the preferred transport, or by the other. Raises `HostLost` when neither reaches the host.

        A life that the preferred transport has reached before is gone when it cannot be reached any more: waiting for
        the other transport would only keep rows from their next host.
        """
        try:
            connection = self._preferred.connect(address)
        except HostLost as error:
            if address.incarnation in self._reached:
                raise
            reason = str(error)
        else:
            self._reached.add(address.incarnation)
            return connection
        try:
            connection = self._fallback.connect(address)
        except HostLost as error:
            raise HostLost(f"{reason}; {error}") from None
        _log.warning("%s: its calls go another way, which is slower", reason)
        return connection

    def close(self) -> None:
        self._preferred.close()
        self._fallback.close()
