"""Commands at a service that asks who they are, over an encrypted line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import typer
from typer.testing import CliRunner

from ray_moe.cli.commands import commands
from ray_moe.config import ServerConfig
from ray_moe.service.doors import Doors
from ray_moe.service.keys import ApiKey, digest_of, editing, new_key
from tests.unit.service.certificates import AUTHORITY, STRANGER_AUTHORITY, cert, key
from tests.unit.service.fake_backend import FakeBackend

CERTIFICATES = ["--ca-file", str(AUTHORITY), "--cert-file", str(cert("client")), "--key-file", str(key("client"))]


class Guarded:
    """A service that wants a key and a certificate, and is encrypted."""

    def __init__(self, directory: Path) -> None:
        self.backend = FakeBackend()
        self.key = new_key()
        self.port = 0
        keys_file = directory / "keys.json"
        with editing(keys_file) as entries:
            entries.append(ApiKey("ana", digest_of(self.key), frozenset({"infer", "admin"})))
        self.doors = Doors(
            self.backend,
            ServerConfig(
                port=0,
                http_port=None,
                keys_file=str(keys_file),
                tls_cert_file=str(cert("server")),
                tls_key_file=str(key("server")),
                tls_client_ca_file=str(AUTHORITY),
            ),
        )

    async def run(self, *words: str, env: dict[str, str | None] | None = None) -> Any:
        words = (*words, "--server", f"127.0.0.1:{self.port}")
        env = {"RAY_MOE_API_KEY": None, **(env or {})}
        return await asyncio.to_thread(lambda: CliRunner().invoke(commands, words, env=env))


@pytest_asyncio.fixture
async def service(tmp_path: Path) -> AsyncIterator[Guarded]:
    guarded = Guarded(tmp_path)
    guarded.port = (await guarded.doors.start()).grpc
    yield guarded
    await guarded.doors.stop(0.0)


async def test_every_command_shows_its_key_and_its_certificate(service: Guarded) -> None:
    for command, said in (
        ("status", "mixtral"),
        ("generate hi --max-new-tokens 2", "0 1"),
        ("plan --dry-run", "dry run: nothing was changed"),
        ("resize 3 --no-wait", "expert-0"),
        ("drain expert-0 --no-wait", "draining expert-0"),
        ("publish /models/better", "version 3 is current: /models/better"),
        ("rollback", "version 0 is current: /models/tiny"),
        ("canary start /models/better --layer 1 --expert 2", "version 3 is tried out"),
        ("canary promote", "version 2 is current: /models/better"),
        ("canary cancel", "version 2 is current: /models/better"),
        ("chaos kill", "longest stall"),
    ):
        result = await service.run(*command.split(), "--api-key", service.key, *CERTIFICATES)
        assert said in result.stdout, (command, result.output)
        assert (await service.run(*command.split(), *CERTIFICATES)).exit_code == 2, command
    assert [wish[0] for wish in service.backend.wishes] == [
        "plan",
        "resize",
        "drain",
        "publish",
        "roll back",
        "canary",
        "end canary",
        "end canary",
        "chaos",
    ]
    assert [request.caller for request in service.backend.requests] == ["ana"]


async def test_the_key_may_be_in_the_environment(service: Guarded) -> None:
    result = await service.run("status", *CERTIFICATES, env={"RAY_MOE_API_KEY": service.key})
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ([], 1, "127.0.0.1"),
        (["--tls"], 1, "CERTIFICATE_VERIFY_FAILED"),
        (["--ca-file", str(STRANGER_AUTHORITY)], 1, "CERTIFICATE_VERIFY_FAILED"),
        (["--ca-file", str(AUTHORITY)], 1, "127.0.0.1"),
        (["--ca-file", "none.pem"], 2, "cannot read ca_file none.pem: No such file"),
        (CERTIFICATES[:4], 2, "cert_file and key_file go together"),
    ],
)
async def test_who_does_not_show_what_is_asked_for_is_refused_in_one_line(
    service: Guarded, options: list[str], code: int, said: str
) -> None:
    result = await service.run("status", "--api-key", service.key, *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert service.key not in result.stderr


def test_every_command_that_asks_a_service_takes_the_same_options() -> None:
    group: Any = typer.main.get_command(commands)
    options = {
        name: {word for parameter in command.params for word in parameter.opts}
        for name, command in group.commands.items()
    }
    shared = {"--server", "--api-key", "--tls", "--ca-file", "--cert-file", "--key-file"}
    asking = {name for name, words in options.items() if words & shared}
    assert asking >= {"generate", "status", "plan", "resize", "drain", "chaos", "simulate"}
    assert all(shared <= options[name] for name in asking)
