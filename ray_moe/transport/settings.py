"""What can be set about the transports between routers and hosts. Plain values, out of the user's."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """Settings of one transport. Both ends may differ: each obeys its own."""

    connect_timeout_s: float = 5.0
    """How long `Transport.connect` may take before the host counts as lost."""
    ping_interval_s: float = 1.0
    """Time without traffic after which the peer is asked whether it is there, or, at a Unix socket, the kernel whether
    it has been stopped."""
    ping_timeout_s: float = 2.0
    """Time without an answer after which the stream counts as broken (a stopped process, a dead network)."""
    inline_bytes: int = 64 * 1024
    """Payloads below this travel inside the message; from here on in shared memory, where there is any."""
    arena_bytes: int = 256 * 1024 * 1024
    """Shared memory of one connection; 0 turns it off. Pages that were never touched cost nothing."""
    device: str = ""
    """The GPU that this end computes on; empty when it has none."""
    device_arena_bytes: int = 256 * 1024 * 1024
    """Memory of the GPU, taken at once, that a router shares with the hosts that compute there; 0 turns it off."""
    chunk_bytes: int = 1024 * 1024
    """Longer messages are cut into frames of this size, so that small ones can pass them."""
    max_message_bytes: int = 8 * 1024**3
    """A peer that announces a longer message than this is refused."""


@dataclass(frozen=True, slots=True)
class MemberCertificate:
    """What a router or host shows of itself on an encrypted line, and what it asks of its peer. In PEM."""

    name: str
    """A DNS name that is in the certificate of every member: it says who they are, since their addresses change."""
    chain: bytes
    """The certificate, and after it those that lead from it to the authority."""
    private_key: bytes = field(repr=False)
    authority: bytes
    """Roots of the members' certificates, and of nobody else's."""
