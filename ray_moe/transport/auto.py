"""One transport where it works, another where it does not: gRPC, and Ray's object store for a port out of reach."""

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

    def connect(self, address: HostAddress) -> Connection:
        """A line by the preferred transport, or by the other. Raises `HostLost` when neither reaches the host."""
        try:
            return self._preferred.connect(address)
        except HostLost as error:
            reason = str(error)
        try:
            connection = self._fallback.connect(address)
        except HostLost as error:
            raise HostLost(f"{reason}; {error}") from None
        _log.warning("%s: its calls go another way, which is slower", reason)
        return connection

    def close(self) -> None:
        self._preferred.close()
        self._fallback.close()
