"""What both ends of the gRPC transport must agree on, and the environment in which grpc is loaded.

`grpc` must come from here (``from ray_moe.transport.grpc_options import grpc``): it reads its environment once, when
it is loaded, and its fork handlers must be off. With them on, a child forked beside a live channel crashes now and
then (grpc issue 43055), and `ray.init` forks. A process that loads grpc before this package sets the same itself.
"""

from __future__ import annotations

import os
from typing import Final

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # that a peer went away is ours to tell

import grpc

from ray_moe.transport.settings import MemberCertificate, TransportSettings

__all__ = [
    "METHOD",
    "SERVICE",
    "channel_credentials",
    "client_options",
    "grpc",
    "server_credentials",
    "server_options",
]

SERVICE: Final = "ray_moe.transport.Host"
METHOD: Final = "Exchange"

# Metadata of the stream: who the router is, which protocol it speaks, which life of the host it wants.
TOKEN_KEY: Final = "authorization"
TOKEN_PREFIX: Final = "Bearer "
VERSION_KEY: Final = "ray-moe-protocol"
INCARNATION_KEY: Final = "ray-moe-incarnation"
ARENA_KEY: Final = "ray-moe-arena-bin"
DEVICE_ARENA_KEY: Final = "ray-moe-device-arena-bin"

Options = list[tuple[str, int | str]]


def client_options(settings: TransportSettings) -> Options:
    return [
        *_common_options(settings),
        # A connection of its own for each channel, without the back-off that another one's failure left behind.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
    ]


def channel_credentials(certificate: MemberCertificate) -> grpc.ChannelCredentials:
    """A router's: of the host it asks for a certificate of the same authority."""
    return grpc.ssl_channel_credentials(certificate.authority, certificate.private_key, certificate.chain)


def server_credentials(certificate: MemberCertificate) -> grpc.ServerCredentials:
    """A host's: of each router it asks for a certificate of the same authority."""
    pair = (certificate.private_key, certificate.chain)
    return grpc.ssl_server_credentials([pair], certificate.authority, require_client_auth=True)


def server_options(settings: TransportSettings) -> Options:
    return [
        *_common_options(settings),
        ("grpc.so_reuseport", 0),  # otherwise a second server on the port would silently take half of the calls
        ("grpc.http2.min_ping_interval_without_data_ms", 10),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def _common_options(settings: TransportSettings) -> Options:
    return [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.keepalive_time_ms", int(settings.ping_interval_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(settings.ping_timeout_s * 1000)),
        ("grpc.http2.ping_timeout_ms", int(settings.ping_timeout_s * 1000)),  # the one that is honoured
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
