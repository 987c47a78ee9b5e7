"""How the clients show who they are, and make sure of whom they talk to: API keys, TLS, and which addresses to believe.

A key is never sent where others could read it, unless the caller says that it may be.
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read when grpc is loaded; its fork handlers crash children

import grpc

from ray_moe.errors import InvalidConfig
from ray_moe.types import RouterAddress

KEY_VARIABLE: Final = "RAY_MOE_API_KEY"

_SYSTEM_ROOTS = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Arch, Gentoo
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # openSUSE
    "/etc/ssl/cert.pem",  # Alpine, macOS
)


@dataclass(frozen=True, slots=True)
class Access:
    """A client's key and certificates, as given; checked by `metadata` and `credentials`."""

    api_key: str | None = field(default=None, repr=False)
    """None: that of the environment variable RAY_MOE_API_KEY, if it is set. Empty: none."""
    tls: bool = False
    """Encrypt, and check the service's certificate against the system's roots. A file below turns it on too."""
    ca_file: str | os.PathLike[str] | None = None
    """Roots in PEM to check against instead of the system's."""
    cert_file: str | os.PathLike[str] | None = None
    """The client's own certificate in PEM, for a service that asks for one; goes with `key_file`."""
    key_file: str | os.PathLike[str] | None = None
    """Its private key in PEM."""
    allow_plaintext_key: bool = False
    """Send the key unencrypted, also to another machine."""

    @property
    def encrypted(self) -> bool:
        return self.tls or any(path is not None for path in (self.ca_file, self.cert_file, self.key_file))

    def settled(self) -> Access:
        """With the key of the environment as it is now, if that is the one."""
        return self if self.api_key is not None else replace(self, api_key=os.environ.get(KEY_VARIABLE, ""))

    def metadata(self, target: str) -> tuple[tuple[str, str], ...]:
        """What goes with each call to `target`.

        Raises:
            InvalidConfig: the key cannot be one, or would travel unencrypted to another machine.
        """
        key, source = self.api_key, "api_key"
        if key is None:
            key, source = os.environ.get(KEY_VARIABLE, ""), f"the environment variable {KEY_VARIABLE}"
        key = key.strip()
        if not key:
            return ()
        if not re.fullmatch("[!-~]+", key):
            raise InvalidConfig(f"{source} is no API key: it has blanks, or letters that are not ASCII")
        if not (self.encrypted or self.allow_plaintext_key or stays_here(target)):
            raise InvalidConfig(
                f"the API key ({source}) would travel unencrypted to {target}: use TLS (tls=True, or ca_file=... for "
                'roots of your own), send none (api_key=""), or, where everybody on the way may know the key, allow it '
                "(allow_plaintext_key=True)"
            )
        return (("authorization", f"Bearer {key}"),)

    def believed(self, routers: Sequence[RouterAddress], told_by: str) -> tuple[RouterAddress, ...]:
        """Those of a service's routers that may be talked to, told by the one that is reached as `told_by`.

        Left out is what is no ``HOST:PORT``, and where the key would travel unencrypted to another machine. A loopback
        address is believed only from this machine, and if the one that tells it stands in the list with the port under
        which it is reached: else the way there goes through a tunnel, and its loopback is not this one.
        """
        port = told_by.rpartition(":")[2]
        addresses = [router.grpc_address for router in routers]
        is_this_machine = stays_here(told_by) and any(
            stays_here(address) and address.endswith(f":{port}") for address in addresses
        )
        return tuple(
            router
            for router in routers
            if _names_a_machine(router.grpc_address)
            and (is_this_machine or not stays_here(router.grpc_address))
            and self._may_know_the_key(router.grpc_address)
        )

    def _may_know_the_key(self, target: str) -> bool:
        try:
            self.metadata(target)
        except InvalidConfig:
            return False
        return True

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Those of the channel; None for one without encryption.

        Raises:
            InvalidConfig: a file is missing, unreadable or no PEM, or does not fit the others.
        """
        if not self.encrypted:
            return None
        if (self.cert_file is None) != (self.key_file is None):
            raise InvalidConfig("cert_file and key_file go together: give both or neither")
        roots = _system_roots() if self.ca_file is None else _read(self.ca_file, "ca_file", b"CERTIFICATE")
        if self.cert_file is None or self.key_file is None:
            return grpc.ssl_channel_credentials(roots)
        chain = _read(self.cert_file, "cert_file", b"CERTIFICATE")
        key = _read(self.key_file, "key_file", b"PRIVATE KEY")
        try:
            trial = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            trial.load_cert_chain(self.cert_file, self.key_file, password="")  # so that nobody is asked for one
        except OSError as error:  # an SSLError is one
            raise InvalidConfig(
                f"cert_file and key_file do not fit together, or the key is encrypted: {error}"
            ) from error
        return grpc.ssl_channel_credentials(roots, key, chain)


def stays_here(target: str) -> bool:
    """Whether what is sent to a gRPC target surely stays on this machine. In doubt it does not."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    addresses = re.sub("^(dns:///|dns:|ipv4:|ipv6:)", "", target)
    return all(_is_loopback(address) for address in addresses.split(","))


def name_in(target: str) -> str:
    """The name of a machine or service in a gRPC target; empty where it is an address, or of another kind."""
    match = re.fullmatch(r"(?:dns:///|dns:)?([0-9A-Za-z._-]+)(?::[0-9]+)?", target)
    try:
        ipaddress.ip_address(match[1] if match else "127.0.0.1")
    except ValueError:
        return match[1] if match else ""
    return ""


def _names_a_machine(address: str) -> bool:
    """Whether it is HOST:PORT or [V6]:PORT, and not the 0.0.0.0 that servers listen on."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z._-]+)):[0-9]{1,5}", address)
    if match is None:
        return False
    try:
        return not ipaddress.ip_address(match[1] or match[2]).is_unspecified
    except ValueError:
        return match[2] is not None


def _is_loopback(address: str) -> bool:
    """Of HOST, HOST:PORT, [V6] or [V6]:PORT."""
    match = re.fullmatch(r"\[(.+)\](:\d+)?|([^:]+)(:\d+)?", address)
    host = (match[1] or match[3]) if match else address
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _system_roots() -> bytes | None:
    """The machine's, which know a company's own too; None, gRPC's own, where there are none."""
    for path in (ssl.get_default_verify_paths().cafile, *_SYSTEM_ROOTS):
        if path and Path(path).is_file():
            return Path(path).read_bytes()
    return None


def _read(path: str | os.PathLike[str], name: str, kind: bytes) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InvalidConfig(f"cannot read {name} {os.fspath(path)}: {error.strerror}") from error
    if not re.search(rb"-----BEGIN [A-Z ]*" + kind + rb"-----", data):
        raise InvalidConfig(f"{name} {os.fspath(path)} has no BEGIN {kind.decode()}; expected PEM")
    return data
