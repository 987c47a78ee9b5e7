"""`ray-moe publish` and `rollback`: what they ask for, and what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from ray_moe.cli import versions
from ray_moe.cli.commands import commands
from ray_moe.errors import InvalidCheckpoint
from ray_moe.types import VersionStatus
from tests.unit.cli.fakes import FakeClient

run = CliRunner().invoke


class Versioned(FakeClient):
    """A service, and what was asked of it."""

    asked: ClassVar[list[Any]] = []
    failure: Exception | None = None

    def publish(self, model: str) -> VersionStatus:
        self.asked.append(model)
        if self.failure is not None:
            raise self.failure
        return VersionStatus(3, model, "current")

    def rollback(self, to: int | None) -> VersionStatus:
        self.asked.append(to)
        return VersionStatus(2, "/models/old", "current")

    def versions(self) -> tuple[VersionStatus, ...]:
        return (VersionStatus(2, "/models/old", "kept"), VersionStatus(3, "/models/new", "current"))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> type[Versioned]:
    kind = type("Client", (Versioned,), {"asked": []})
    monkeypatch.setattr(versions, "Client", kind)
    return kind


def test_publishing_tells_what_is_current_and_what_is_kept(service: type[Versioned]) -> None:
    result = run(commands, ["publish", "/models/new"])
    assert (result.exit_code, service.asked) == (0, ["/models/new"])
    assert "version 3 is current: /models/new" in result.stdout
    for line in ("2  kept     /models/old", "3  current  /models/new"):
        assert line in " ".join(result.stdout.split(" ")), result.stdout


def test_a_directory_is_named_as_the_service_finds_it_too(
    service: type[Versioned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path)
    run(commands, ["publish", "new"])
    run(commands, ["publish", "someone/model"])
    assert service.asked == [str(tmp_path / "new"), "someone/model"]


def test_what_cannot_be_published_is_an_error(service: type[Versioned]) -> None:
    service.failure = InvalidCheckpoint("model.safetensors is missing")
    result = run(commands, ["publish", "/models/new"])
    assert result.exit_code != 0
    assert "model.safetensors is missing" in result.output


@pytest.mark.parametrize(("words", "asked"), [([], None), (["--to", "2"], 2)])
def test_rolling_back_names_a_version_or_takes_the_one_before(
    service: type[Versioned], words: list[str], asked: int | None
) -> None:
    result = run(commands, ["rollback", *words])
    assert (result.exit_code, service.asked) == (0, [asked])
    assert "version 2 is current: /models/old" in result.stdout
