"""The certificate of the gRPC front door, read again when its files change."""

from __future__ import annotations

import time

import grpc

from ray_moe.service.reloading import CHECK_EVERY_S
from ray_moe.service.tls import Identity, TlsFiles

SETTLE_S = 0.5
"""How long other handshakes are kept waiting before a new certificate is handed over.

gRPC asks for the certificate under a lock and uses it after the lock, while the next handshake may already free it
(grpc#36693: the process crashes). Who waits here holds that lock, so that all who have passed it get their time.
"""


def server_credentials(files: TlsFiles, *, every_s: float = CHECK_EVERY_S) -> grpc.ServerCredentials:
    """What `add_secure_port` takes; follows its files, looked at no more than once in `every_s` seconds.

    gRPC asks before each handshake, in a thread of its own, and takes None for no change. Connections that stand go on.

    Raises:
        InvalidConfig: the files cannot be used now. Later that is logged, and what was read before stays in force.
    """
    identities = files.reloading(files.read, every_s)
    in_force = identities.load()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal in_force
        identity = identities.current()
        if identity == in_force:
            return None
        time.sleep(SETTLE_S)
        in_force = identity
        return _configuration(identity)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(in_force),
        fetch,  # type: ignore[arg-type]  # the stubs leave out None
        require_client_authentication=files.client_ca_file is not None,
    )


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    pair = (identity.private_key, identity.certificate_chain)
    return grpc.ssl_server_certificate_configuration([pair], identity.client_ca)
