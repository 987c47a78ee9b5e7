"""Certificates of the front doors: checked before use, and read again when their files change, without a restart.

Connections that stand keep the certificate they began with; the next one gets the new one. A new certificate that
does not fit its key, as between the writing of the two files, is logged and waited out. gRPC's side of it is
`service/grpc/credentials.py`.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ray_moe.errors import InvalidConfig
from ray_moe.service.reloading import CHECK_EVERY_S, Reloading

T = TypeVar("T")

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Identity:
    """What the files held, in PEM."""

    certificate_chain: bytes
    private_key: bytes = field(repr=False)
    client_ca: bytes | None


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where a server's certificate is. All are PEM."""

    cert_file: Path
    """The certificate, and after it those that lead from it to the root."""
    key_file: Path
    """Its private key, not encrypted."""
    client_ca_file: Path | None = None
    """Roots of the clients' certificates; if given, a client without such a certificate is refused."""

    def read(self) -> Identity:
        """The files' contents, which fit together.

        Raises:
            InvalidConfig: one is missing, unreadable or no PEM, or the key is not the certificate's.
        """
        identity, _ = self._read()
        return identity

    def context(self) -> ssl.SSLContext:
        """A new context of a server, from TLS 1.2 on, or with clients' certificates 1.3.

        Raises: `InvalidConfig`, as `read`.
        """
        _, context = self._read()
        return context

    def reloading(self, read: Callable[[], T], every_s: float) -> Reloading[T]:
        """What `read` makes of these files, again when they change."""
        paths = [self.cert_file, self.key_file, self.client_ca_file]
        return Reloading([path for path in paths if path is not None], read, every_s=every_s)

    def _read(self) -> tuple[Identity, ssl.SSLContext]:
        chain = _certificates(self.cert_file, "certificate")
        key = _read(self.key_file, "private key")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert_file, self.key_file, password="")  # so that nobody is asked for one
        except (ssl.SSLError, OSError) as error:
            raise InvalidConfig(self._why(error, key)) from error
        client_ca = None
        if self.client_ca_file is not None:
            client_ca = _certificates(self.client_ca_file, "client CA")
            context.load_verify_locations(cadata=client_ca.decode("ascii"))
            _require_certificates(context)
        return Identity(chain, key, client_ca), context

    def _why(self, error: OSError, key: bytes) -> str:
        reason = str(getattr(error, "reason", None) or error)
        if "MISMATCH" in reason:
            return f"the private key in {self.key_file} is not that of the certificate in {self.cert_file}"
        if b"ENCRYPTED" in key:
            return f"the private key in {self.key_file} is encrypted; decrypt it, as with `openssl pkey`"
        return (
            f"the certificate in {self.cert_file} cannot be used with the private key in {self.key_file} ({reason}); "
            "expected a private key in PEM, and a certificate of at least today's usual strength"
        )


def server_context(files: TlsFiles, *, every_s: float = CHECK_EVERY_S) -> ssl.SSLContext:
    """The context of an HTTP server, for `asyncio` and what is built on it; follows its files.

    Every handshake begins with a look at them, `every_s` seconds after the last one, and is made with the context in
    force. Loading another certificate into the same context would do for the server's own, but could not take away a
    root of the clients'.

    Raises: `InvalidConfig`, as `TlsFiles.read`.
    """
    contexts = files.reloading(files.context, every_s)
    context = contexts.load()

    def follow(connection: ssl.SSLObject, server_name: str | None, first: ssl.SSLContext) -> None:
        connection.context = contexts.current()

    context.sni_callback = follow  # OpenSSL calls it in each handshake, also in those that name no server
    return context


def _require_certificates(context: ssl.SSLContext) -> None:
    """Of clients, in every connection: one that is resumed shows none, so none is resumed."""
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3  # 1.2 also resumes by session numbers, which cannot be turned off
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0


def _certificates(path: Path, what: str) -> bytes:
    data = _read(path, what)
    blocks = _CERTIFICATE.findall(data)
    try:
        if not blocks:
            raise ValueError("there is no BEGIN CERTIFICATE in it")
        trial = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for block in blocks:
            trial.load_verify_locations(cadata=block.decode("ascii"))
    except (ValueError, ssl.SSLError) as error:
        raise InvalidConfig(f"the {what} in {path} cannot be used ({error}); expected certificates in PEM") from error
    return b"\n".join(blocks) + b"\n"


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidConfig(f"cannot read the {what} in {path}: {error.strerror}; name a file in PEM") from error
