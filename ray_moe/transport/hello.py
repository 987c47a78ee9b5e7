"""How a router and a host greet each other, whichever way their messages travel.

The router says first who it is; the host lets it in, or says why not. The host's hello is its first message.
"""

from __future__ import annotations

import hmac
import logging
from dataclasses import dataclass
from typing import Final

from ray_moe.errors import HostLost, Unauthenticated, WireError
from ray_moe.wire import tensors

_log = logging.getLogger(__name__)

PROTOCOL_VERSION: Final = 3

HELLO_ID: Final = 0
"""Message id of what both say of the line itself; calls count from 1."""

MAX_HELLO_BYTES: Final = 16 * 1024
"""Nobody who was not let in may send a longer message."""

STOPPING: Final = "the host is stopping"


@dataclass(frozen=True, slots=True)
class Hello:
    """What a router says of itself."""

    token: str
    version: int
    incarnation: str
    """The life of the host that it looks for; empty takes any."""
    arena: bytes | None
    """The shared memory that it offers."""
    device_arena: bytes | None
    """And that of its GPU."""


def write_hello(hello: Hello) -> bytes:
    """`hello` as a message, where the carrier has no place of its own for it."""
    return tensors.encode_header((hello.token, hello.version, hello.incarnation, hello.arena, hello.device_arena), ())


def read_hello(message: memoryview) -> Hello:
    """The hello that was sent. Raises `WireError` for anything else."""
    fields, _, _ = tensors.decode(message)
    if len(fields) == 5:
        token, version, incarnation, *arenas = fields
        are_offers = all(isinstance(arena, bytes | None) for arena in arenas)
        if [type(token), type(version), type(incarnation)] == [str, int, str] and are_offers:
            return Hello(token, version, incarnation, *arenas)
    raise WireError("a router says hello first: its token, its version, whom it looks for and its memory")


class Doorkeeper:
    """Lets routers in that know the token, speak this version and look for this life of the host."""

    def __init__(self, token: str, incarnation: str) -> None:
        self._token = token.encode()
        self._incarnation = incarnation

    def check(self, token: str, version: object, incarnation: object, peer: object) -> None:
        """Raises `Unauthenticated`, `WireError` or `HostLost`: that is what the router must hear."""
        if not hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self._token):
            _log.warning("refused a stream from %s: its token is not that of this service", peer)
            raise Unauthenticated("the token of the router is not the token of this host")
        if str(version) != str(PROTOCOL_VERSION):
            raise WireError(
                f"this host speaks version {PROTOCOL_VERSION} of the protocol and the router {version}: "
                "run the same version of ray_moe everywhere"
            )
        if self._incarnation and incarnation and incarnation != self._incarnation:
            raise HostLost("another life of the host listens here now")
