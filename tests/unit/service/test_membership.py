"""The certificate of a service's members, and what they may not do while Ray itself encrypts nothing."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from ray_moe.actors.spec import ServiceSpec
from ray_moe.config import Config, TransportConfig
from ray_moe.errors import HostLost, InvalidConfig
from ray_moe.service.membership import certificate_of, confined, make_certificate, ray_is_encrypted
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.transport.host_server import HostServer
from ray_moe.transport.settings import MemberCertificate
from ray_moe.transport.stream_transport import StreamTransport
from ray_moe.types import HostAddress
from tests.unit.service.certificates import AUTHORITY, STRANGER_AUTHORITY, cert, key


def files(name: str = "server", ca: Path = AUTHORITY, changes: Mapping[str, object] | None = None) -> TransportConfig:
    paths = {"tls_cert_file": str(cert(name)), "tls_key_file": str(key(name)), "tls_ca_file": str(ca)}
    return TransportConfig.model_validate({"tls": True, **paths, **(changes or {})})


def config(ray: str = "auto", **transport: Any) -> Config:
    copy_from = transport.pop("copy_from", "node")
    return Config.model_validate(
        {"ray": {"address": ray}, "experts": {"copy_from": copy_from}, "transport": {"tls": True, **transport}}
    )


async def meets(host: MemberCertificate | None, router: MemberCertificate | None) -> bool:
    """Whether a router with one certificate gets an answer from a host with the other."""

    async def submit(call: ExpertCall) -> ExpertReply:
        return ExpertReply(call.hidden.clone())

    server = HostServer(submit, "token", certificate=host)
    tcp, unix = await server.start()
    transport = StreamTransport("token", certificate=router)
    try:
        connection = await asyncio.to_thread(transport.connect, HostAddress("expert-0", "", "node", 0, tcp, unix))
        hidden = torch.ones(3, 4)
        call = ExpertCall("layer", 1, hidden, None, None, [0], [3])
        reply = await asyncio.wrap_future(connection.submit(call))
        return connection.is_encrypted and torch.equal(reply.rows, hidden)
    except HostLost:
        return False
    finally:
        await asyncio.to_thread(transport.close)
        await server.stop()


# --- certificates --------------------------------------------------------------------------------------------
async def test_a_new_certificate_is_good_for_both_ends_of_its_own_service_only() -> None:
    ours, theirs = make_certificate(), make_certificate()
    assert await meets(ours, pickle.loads(pickle.dumps(ours)))  # as a restarted actor gets it
    assert not await meets(ours, theirs)
    assert not await meets(theirs, ours)
    assert not await meets(ours, None)


def test_a_new_certificate_holds_for_years_whatever_the_clocks_say() -> None:
    for pem in (make_certificate().chain, make_certificate().authority):
        certificate, now = x509.load_pem_x509_certificate(pem), datetime.now(timezone.utc)
        assert certificate.not_valid_before_utc < now - timedelta(hours=12)
        assert certificate.not_valid_after_utc > now + timedelta(days=5 * 365)


def test_secrets_are_not_shown_with_the_specification() -> None:
    certificate = make_certificate()
    nothing: dict[str, Any] = {each.name: None for each in fields(ServiceSpec)}
    shown = repr(ServiceSpec(**{**nothing, "token": "a-secret", "certificate": certificate}))
    assert certificate.name in shown
    assert "a-secret" not in shown
    assert "PRIVATE" not in shown


async def test_certificates_of_ones_own_are_read_from_files() -> None:
    certificate = certificate_of(files())
    assert certificate is not None
    assert certificate.name == "localhost"
    assert await meets(certificate, certificate)
    assert await meets(certificate, certificate_of(files("client")))
    assert not await meets(certificate, certificate_of(files("stranger", STRANGER_AUTHORITY)))


def test_without_tls_there_is_no_certificate() -> None:
    assert certificate_of(TransportConfig()) is None


def test_files_that_cannot_be_used_are_refused_in_words() -> None:
    for changes, said in (
        ({"tls_cert_file": "none.pem"}, "cannot read the certificate in .*none.pem"),
        ({"tls_key_file": str(key("client"))}, "is not that of the certificate"),
        ({"tls_key_file": str(key("encrypted"))}, "is encrypted"),
        ({"tls_ca_file": str(key("client"))}, "the client CA in .* cannot be used"),
        ({"tls_cert_file": str(AUTHORITY)}, "is not that of the certificate"),
        ({"tls_ca_file": str(STRANGER_AUTHORITY)}, r"would refuse .* \(unable to get local issuer certificate\)"),
    ):
        with pytest.raises(InvalidConfig, match=said):
            certificate_of(files(changes=changes))


@pytest.mark.parametrize(
    ("names", "usages", "days", "said"),
    [
        ([], ["SERVER_AUTH", "CLIENT_AUTH"], 1, "has no DNS name; expected a subject alternative name such as DNS:"),
        (["*.cluster"], ["SERVER_AUTH", "CLIENT_AUTH"], 1, "has no DNS name"),
        (
            ["a"],
            ["SERVER_AUTH"],
            1,
            r"would refuse each other's certificate, .* \(.*purpose.*\); .* for clients as well",
        ),
        (["a"], ["CLIENT_AUTH"], 1, r"would refuse .* \(.*purpose.*\)"),
        (["a"], ["SERVER_AUTH", "CLIENT_AUTH"], -1, r"would refuse .* \(certificate has expired\); .* valid today"),
        (["a"], ["SERVER_AUTH", "CLIENT_AUTH"], 1, ""),
    ],
)
def test_a_certificate_that_members_would_refuse_is_refused_at_the_start(
    tmp_path: Path, names: list[str], usages: list[str], days: int, said: str
) -> None:
    config = files(changes=own_files(tmp_path, names, usages, timedelta(days)))
    if not said:
        assert certificate_of(config) is not None
        return
    with pytest.raises(InvalidConfig, match=said):
        certificate_of(config)


def own_files(directory: Path, names: list[str], usages: list[str], valid: timedelta) -> dict[str, str]:
    """A certificate that is its own root."""
    secret, subject, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([]), datetime.now(timezone.utc)
    begin = now - timedelta(days=2)
    builder = x509.CertificateBuilder(subject, subject, secret.public_key(), 1, begin, now + valid).add_extension(
        x509.ExtendedKeyUsage([getattr(ExtendedKeyUsageOID, usage) for usage in usages]), critical=False
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=False)
    pem, cert_file, key_file = serialization.Encoding.PEM, directory / "cert.pem", directory / "key.pem"
    cert_file.write_bytes(builder.sign(secret, hashes.SHA256()).public_bytes(pem))
    key_file.write_bytes(secret.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return {"tls_cert_file": str(cert_file), "tls_key_file": str(key_file), "tls_ca_file": str(cert_file)}


@pytest.mark.parametrize(
    "settings", [{"tls": True, "tls_cert_file": "a", "tls_key_file": "b"}, {"tls_ca_file": "a"}, {"tls_key_file": "a"}]
)
def test_files_go_together(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="go together"):
        TransportConfig.model_validate(settings)


def test_files_without_tls_are_refused() -> None:
    with pytest.raises(ValueError, match="for tls: true"):
        files(changes={"tls": False})


# --- what Ray carries ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "encrypted"), [(None, False), ("0", False), ("", False), ("1", True), ("true", True), ("True", True)]
)
def test_whether_ray_encrypts_is_read_as_ray_reads_it(value: str | None, encrypted: bool) -> None:
    assert ray_is_encrypted({} if value is None else {"RAY_USE_TLS": value}) == encrypted


@pytest.mark.parametrize(
    "asked", [config(), config(kind="object_store", copy_from="any"), config(tls=False, kind="object_store")]
)
def test_what_ray_encrypts_or_nobody_wants_encrypted_stays_as_it_is(asked: Config) -> None:
    assert confined(asked, ray_encrypted=asked.transport.tls) is asked


def test_neither_tokens_nor_weights_fall_back_to_what_ray_does_not_encrypt(caplog: pytest.LogCaptureFixture) -> None:
    kept = confined(config(), ray_encrypted=False)
    assert (kept.transport.kind, kept.experts.copy_from) == ("grpc", "none")
    assert "RAY_USE_TLS" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING
    caplog.clear()
    confined(config(ray="local"), ray_encrypted=False)  # nobody is on the way
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (config(kind="object_store"), "transport.kind is object_store: .*RAY_USE_TLS=1.*, or transport.kind=grpc"),
        (config(copy_from="any"), "experts.copy_from is any: .*RAY_USE_TLS=1.*, or experts.copy_from=none"),
    ],
)
def test_asking_for_it_by_name_is_refused(asked: Config, said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        confined(asked, ray_encrypted=False)
