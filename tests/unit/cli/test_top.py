"""`ray-moe top`: rates between two looks, one picture where there is no terminal, a service that is away a while."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ray_moe.cli import top
from ray_moe.cli.commands import commands
from ray_moe.cli.top import Look, frame
from ray_moe.errors import PermissionDenied, Unavailable
from ray_moe.types import ClusterEvent, HostStatus, ServiceStatus
from tests.unit.cli.fakes import LAYERS, FakeClient, status
from tests.unit.cli.test_status import row, text

run = CliRunner().invoke


def later(seconds: float = 2.0, **changes: Any) -> ServiceStatus:
    """The service of `status()`, after it has worked for a while."""
    before = status()
    first, second = before.hosts
    router = replace(before.router, generated_tokens=64 + 100, retried_calls=3 + 1, longest_pause_s=0.25)
    hosts = (replace(first, num_rows=44 + 600, queued_rows=17), replace(second, num_rows=5, restarts=2))
    tokens = {LAYERS[0]: (0, 310, 20, 110), LAYERS[1]: (25, 5, 205, 5)}
    return replace(before, router=router, hosts=hosts, tokens_per_expert=tokens, **changes)


def looks(*told: ServiceStatus | BaseException) -> type[FakeClient]:
    """A client that is told one after the other, and then Ctrl-C."""
    coming: Iterator[ServiceStatus | BaseException] = iter([*told, KeyboardInterrupt()])

    class Client(FakeClient):
        def status(self) -> ServiceStatus:
            assert self.access["discover"] is False  # two looks at two routers would tell no rate
            item = next(coming)
            if isinstance(item, BaseException):
                raise item
            return item

    return Client


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs the command at a terminal of 80 by 60; its exit code, and all that it drew."""

    def run_live(*told: ServiceStatus | BaseException) -> tuple[int, str]:
        drawn = io.StringIO()
        terminal = Console(file=drawn, force_terminal=True, width=80, height=60, color_system=None)
        monkeypatch.setattr(top, "Console", lambda: terminal)
        monkeypatch.setattr(top, "Client", looks(*told))
        result = run(commands, ["top", "--interval", "0.1"])
        return result.exit_code, drawn.getvalue() + result.stderr

    return run_live


def test_rates_are_differences_of_two_looks() -> None:
    lines = text(frame(Look(10.0, status()), Look(12.0, later())))
    assert row(lines, "now:") == "now: 50.0 tokens/s; 0.5 calls/s again, 0.0 hedged; longest pause 0.25 s".split()
    assert row(lines, "expert-0") == "expert-0 ready 4 300.0 MB 300 62% 17 0".split()
    assert row(lines, "expert-1") == "expert-1 ready 4 300.0 MB 0 62% 0 2".split()  # it has begun anew
    hottest = lines[lines.index("hottest experts") + 3 :]
    assert [line.split() for line in hottest] == [
        ["layers.0.mlp", "1", "150", "75%"],
        ["layers.1.mlp", "2", "100", "100%"],
        ["layers.0.mlp", "3", "50", "25%"],
    ]
    assert max(map(len, lines)) <= 80


def test_a_picture_tells_how_the_service_is() -> None:
    happened = (ClusterEvent(0.0, "lost", "expert-1"),)
    lines = text(frame(Look(0.0, status()), Look(1.0, later(events=happened, changing="resize: 2 to 3 hosts"))))
    whole = "\n".join(lines)
    for said in ("requests: 1 active, 2 queued, 5 failed", "balancedness 0.50", "75% to survive", "changing: resize"):
        assert said in whole
    assert lines[-1].split()[1:] == ["lost", "expert-1"]


def test_a_router_that_began_anew_has_no_negative_rates() -> None:
    whole = "\n".join(text(frame(Look(0.0, later()), Look(1.0, status()))))
    assert "0.0 tokens/s; 0.0 calls/s again" in whole
    assert "-" not in whole.split("now:")[1].splitlines()[0]
    assert "hottest experts" not in whole


def test_of_many_hosts_those_are_shown_that_matter() -> None:
    many = [HostStatus(f"expert-{number}", "ready", utilisation=number / 100) for number in range(50)]
    many[7] = replace(many[7], state="lost")
    lines = text(frame(Look(0.0, status()), Look(1.0, later()), max_hosts=3))
    assert not any("more that are ready" in line for line in lines)
    busy = replace(later(), hosts=tuple(many))
    lines = text(frame(Look(0.0, status()), Look(1.0, busy), max_hosts=3))
    assert [line.split()[0] for line in lines if line.startswith("expert-")] == ["expert-7", "expert-48", "expert-49"]
    assert "and 47 more that are ready and less busy" in lines


@pytest.mark.parametrize("arguments", [[], ["--once"]])
def test_without_a_terminal_one_picture_is_printed(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(top, "Client", looks(status(), later()))
    result = run(commands, ["top", "--interval", "0.1", *arguments])
    assert result.exit_code == 0
    assert result.stdout.count("expert hosts") == result.stdout.count("tokens/s;") == 1


def test_without_a_terminal_a_service_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "Client", looks(Unavailable("nobody answers at HOST")))
    result = run(commands, ["top"])
    assert (result.exit_code, result.stderr) == (1, "error: nobody answers at HOST\n")


def test_ctrl_c_ends_it_well(live: Callable[..., tuple[int, str]]) -> None:
    code, drawn = live(status(), later(), later())
    assert code == 0
    assert "tokens/s" in drawn
    assert drawn.rstrip().endswith("\x1b[?25h\x1b[?1049l")  # the cursor, and the screen as it was


def test_a_service_that_goes_away_is_waited_for(live: Callable[..., tuple[int, str]]) -> None:
    gone = Unavailable("the service is stopping")
    code, drawn = live(gone, status(), later(), gone, later(changing="it is back"))
    assert code == 0
    first, *_, last = drawn.split("cannot be reached, trying again: the service is stopping")
    assert "expert hosts" not in first
    assert "expert hosts" in last.split("it is back")[0]  # the last picture stays meanwhile
    assert "it is back" in last


def test_what_trying_again_does_not_help_is_an_error(live: Callable[..., tuple[int, str]]) -> None:
    code, drawn = live(status(), PermissionDenied("this key is not for that"))
    assert code == 2
    assert "error: this key is not for that" in drawn
