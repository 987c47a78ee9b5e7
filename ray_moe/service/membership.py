"""Who belongs to the service: the certificate that its routers and expert actors show each other across nodes.

Made or read once, when the service starts, and handed to all actors with its specification, so that one that is
restarted has it too. Also says what an encrypted service may not do while Ray itself encrypts nothing. Called by
`service/composition.py`; the lines are encrypted in `transport/`.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ray_moe.config import Config, TransportConfig
from ray_moe.errors import InvalidConfig
from ray_moe.service.tls import TlsFiles
from ray_moe.transport.settings import MemberCertificate

if TYPE_CHECKING:
    from cryptography import x509

_log = logging.getLogger(__name__)

NAME = "member.ray-moe.internal"
"""In the certificates that are made here."""

VALID_DAYS = 3650
"""A service that runs for longer than this has to be started again."""

CLOCKS_DAYS = 1
"""The clocks of the nodes may differ by this."""


def ray_is_encrypted(environ: Mapping[str, str]) -> bool:
    """Whether Ray's own traffic is. All nodes of a cluster must say the same, so it is true of all."""
    return environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def confined(config: Config, *, ray_encrypted: bool) -> Config:
    """`config`, such that with `transport.tls` neither tokens nor weights go from node to node unencrypted.

    Raises: `InvalidConfig` when a setting asks for just that.
    """
    if not config.transport.tls or ray_encrypted:
        return config
    for name, value, wanted in (
        ("transport.kind", config.transport.kind, "grpc"),
        ("experts.copy_from", config.experts.copy_from, "none"),
    ):
        if value in ("object_store", "any"):
            raise InvalidConfig(
                f"{name} is {value}: that is Ray's own traffic, which transport.tls does not encrypt; set "
                f"RAY_USE_TLS=1 (and RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY, RAY_TLS_CA_CERT) on every node, or "
                f"{name}={wanted}"
            )
    if config.ray.address != "local":
        _log.warning(
            "transport.tls is on and Ray's own traffic is not encrypted (RAY_USE_TLS is not set): whoever can read it "
            "on the network learns this service's token and certificate, and Ray's token"
        )
    return config.model_copy(
        update={
            "transport": config.transport.model_copy(update={"kind": "grpc"}),
            "experts": config.experts.model_copy(update={"copy_from": "none"}),
        }
    )


def certificate_of(config: TransportConfig) -> MemberCertificate | None:
    """That of the configured files, or a new one; None without `tls`.

    Raises: `InvalidConfig` when a file cannot be used, the certificate has no DNS name, or its peers would refuse it.
    """
    if not config.tls:
        return None
    return _read(config) if config.tls_cert_file else make_certificate()


def make_certificate() -> MemberCertificate:
    """A certificate of a new authority, whose key is forgotten: it will not sign another one."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def subject(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def draft(name: str, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject(name))
            .issuer_name(subject(authority_name))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=CLOCKS_DAYS))
            .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )

    now = datetime.datetime.now(datetime.timezone.utc)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name = f"ray-moe service {x509.random_serial_number():x}"
    authority = (
        draft(authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        draft(NAME, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return MemberCertificate(
        name=NAME,
        chain=certificate.public_bytes(serialization.Encoding.PEM),
        private_key=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        authority=authority.public_bytes(serialization.Encoding.PEM),
    )


def _read(config: TransportConfig) -> MemberCertificate:
    from cryptography import x509

    identity = TlsFiles(Path(config.tls_cert_file), Path(config.tls_key_file), Path(config.tls_ca_file)).read()
    name = _dns_name(x509.load_pem_x509_certificate(identity.certificate_chain))
    if name is None or identity.client_ca is None:
        raise InvalidConfig(
            f"the certificate in {config.tls_cert_file} has no DNS name; expected a subject alternative name such as "
            f"DNS:{NAME}, by which the members of the cluster know each other (transport.tls_cert_file)"
        )
    try:
        _shake_hands(config, name)
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", error.reason)
        raise InvalidConfig(
            f"members of the cluster would refuse each other's certificate, {config.tls_cert_file} ({reason}); "
            f"expected one that {config.tls_ca_file} leads to, valid today, and for clients as well as servers"
        ) from error
    return MemberCertificate(name, identity.certificate_chain, identity.private_key, identity.client_ca)


def _dns_name(certificate: x509.Certificate) -> str | None:
    """The first one that is no pattern."""
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    return next((name for name in names.get_values_for_type(x509.DNSName) if not name.startswith("*")), None)


def _shake_hands(config: TransportConfig, name: str) -> None:
    """A router's end with a host's, in memory. Raises `ssl.SSLError` when one does not accept the other."""
    router, host = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for context in (router, host):
        context.load_cert_chain(config.tls_cert_file, config.tls_key_file)
        context.load_verify_locations(config.tls_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    to_host, to_router = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        router.wrap_bio(to_router, to_host, server_hostname=name),
        host.wrap_bio(to_host, to_router, server_side=True),
    )
    for end in ends * 2:  # hello, certificate and request for one, certificate, done
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
