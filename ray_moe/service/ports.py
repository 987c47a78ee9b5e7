"""TCP ports to listen on: free ones that stay free while a router is away, and why one cannot be had.

A router that ends comes back where it was. Where the system chose its port, it may meanwhile have given it to any
process that asked for one, and on a Ray node many do; so ports are chosen here, among those that the system gives to
nobody by itself. Called by the front doors.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from ray_moe.errors import InsufficientResources

Listening = TypeVar("Listening")
"""A listener, or its port."""

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""What Linux gives to who asks for any port, see ip(7)."""

_FIRST = 20_000
"""Ray's workers have 10002 to 19999 unless `ray start` is told otherwise."""

_END = 32_768
"""Where no system that is in use begins to give ports by itself."""

NUM_TRIES = 64


def lasting(host: str) -> int:
    """A port that is free now, and that the system does not choose for anybody; 0 where it may choose any."""
    ports = range(_FIRST, min(_END, _first_ephemeral()))
    tried = random.sample(ports, min(NUM_TRIES, len(ports)))
    return next((port for port in tried if why_taken(host, port) is None), 0)


async def listen(host: str, port: int, listen_at: Callable[[int], Awaitable[Listening]]) -> Listening:
    """What `listen_at` gives for `port`, or for 0 at one that lasts, or at any where somebody was quicker there."""
    if port:
        return await listen_at(port)
    try:
        return await listen_at(lasting(host))
    except InsufficientResources:
        return await listen_at(0)


def why_taken(host: str, port: int) -> str | None:
    """Why nobody can listen there, in the system's own words; None where somebody can."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as exc:
        return (exc.strerror or str(exc)).lower()
    return None


def _first_ephemeral() -> int:
    try:
        return int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _END
