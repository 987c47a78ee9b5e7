"""`ray-moe serve`: whatever happens, what was started is stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from ray_moe.cli.commands import commands
from ray_moe.config import Config
from ray_moe.errors import InsufficientResources
from ray_moe.service.composition import ServiceProgress

run = CliRunner().invoke


class FakeService:
    """Stands in for `ray_moe.service.composition.Service`; `on_start` and `on_wait` are what happens then."""

    on_start: Callable[[], None] = staticmethod(lambda: None)
    on_wait: Callable[[], None] = staticmethod(lambda: None)
    made: list[FakeService] = []  # noqa: RUF012
    address = "127.0.0.1:9"
    http_address = "http://127.0.0.1:8"

    def __init__(self, config: Config, on_progress: Callable[[ServiceProgress], None]) -> None:
        self.config = config
        self.events: list[str] = []
        self._on_progress = on_progress
        self.made.append(self)

    def start(self) -> None:
        self._on_progress(ServiceProgress("loading", 1, 2, "1 of 2 actors ready"))
        self.on_start()
        self.events.append("started")

    def wait(self) -> None:
        self.on_wait()

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)  # an impatient user
        self.events.append("stopped")


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeService]]:
    fake: Any = type("Service", (FakeService,), {"made": []})
    monkeypatch.setattr("ray_moe.cli.serve.Service", fake)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield fake
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt(number: signal.Signals) -> Callable[[], None]:
    return staticmethod(lambda: os.kill(os.getpid(), number))


def test_it_serves_until_it_is_told_to_stop(service: type[FakeService]) -> None:
    result = run(commands, ["serve", "m", "--port", "0", "--actors", "3", "--address", "auto"])
    assert result.exit_code == 0
    assert "serving m on 127.0.0.1:9 (gRPC) and http://127.0.0.1:8/v1 (OpenAI)" in result.stdout
    assert "\n  http://127.0.0.1:8/dashboard\n" in result.stdout
    assert result.stdout.endswith("Ctrl-C stops\nstopped\n")
    assert "loading: 1 of 2 actors ready (50%)" in result.stderr
    (made,) = service.made
    assert made.events == ["started", "stopped"]
    config = made.config
    assert (config.model, config.server.port, config.experts.num_actors, config.ray.address) == ("m", 0, 3, "auto")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "no API keys: listens on this machine only; whoever reaches it may do everything"),
        (
            {"host": "0.0.0.0", "allow_anonymous": "true"},
            "no API keys: listens on 0.0.0.0; whoever reaches it may do everything",
        ),
        (
            {"tls_cert_file": "/c", "tls_key_file": "/k", "tls_client_ca_file": "/ca"},
            "no API keys: listens on this machine only; whoever reaches it with a certificate of /ca may do everything",
        ),
        (
            {"host": "::", "keys_file": "/keys", "tls_cert_file": "/c", "tls_key_file": "/k"},
            "listens on ::, for those with a key of /keys",
        ),
        (
            {"keys_file": "/keys", "tls_cert_file": "/c", "tls_key_file": "/k", "tls_client_ca_file": "/ca"},
            "listens on this machine only, for those with a key of /keys and a certificate of /ca",
        ),
    ],
)
def test_it_says_where_it_listens_and_who_may_call(settings: dict[str, str], said: str) -> None:
    flags = [f"--set=server.{name}={value}" for name, value in settings.items()]
    lines = run(commands, ["serve", "m", *flags]).stdout.splitlines()
    assert lines[1] == said
    tls = ["--tls"] if "tls_cert_file" in settings else []
    assert lines[3].split() == ["ray-moe", "status", "--server", "127.0.0.1:9", *tls]


def test_without_keys_it_listens_on_this_machine_only(service: type[FakeService]) -> None:
    result = run(commands, ["serve", "m", "--set", "server.host=0.0.0.0"])
    assert result.exit_code == 2
    assert "without keys everybody who reaches 0.0.0.0 could do everything: set keys_file" in result.stderr
    assert service.made == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["on_start", "on_wait"])
def test_an_interrupt_stops_it_with_exit_code_0(service: type[FakeService], number: signal.Signals, when: str) -> None:
    setattr(service, when, interrupt(number))
    result = run(commands, ["serve", "m"])
    assert result.exit_code == 0
    assert result.stdout.endswith("stopped\n")
    assert service.made[0].events[-1] == "stopped"


def test_rays_own_exit_at_sigterm_is_an_interrupt(service: type[FakeService]) -> None:
    def leave() -> None:
        raise SystemExit(15)

    service.on_start = staticmethod(leave)
    assert run(commands, ["serve", "m"]).exit_code == 0


def test_a_failed_start_is_one_line(service: type[FakeService]) -> None:
    def fail() -> None:
        raise InsufficientResources("port 8476 is in use; choose another with --port")

    service.on_start = staticmethod(fail)
    result = run(commands, ["serve", "m"])
    assert result.exit_code == 2
    assert result.stderr.endswith("error: port 8476 is in use; choose another with --port\n")
    assert service.made[0].events == ["stopped"]
