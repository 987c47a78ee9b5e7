"""The documentation site builds without a warning or a dead link, fetches nothing, and leaves nothing out."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

import ray_moe
from ray_moe import errors
from ray_moe.config import Config
from ray_moe.config_types import Section
from tests.pages import ROOT
from tools.docs import walks


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    return folder


def text_of(page: Path) -> str:
    """What a reader sees, without tags."""
    return unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"([^\"]+)\"", page.read_text(encoding="utf-8"))
        loaded += re.findall(r"<link[^>]*\shref=\"([^\"]+)\"", page.read_text(encoding="utf-8"))
        assert not [target for target in loaded if re.match(r"(https?:)?//", target)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_every_setting_is_there(site: Path) -> None:
    text = text_of(site / "reference" / "settings.html")
    keys = list(settings(Config))
    assert len(keys) > 150
    assert [key for key in keys if key not in text] == []


def settings(section: type[Section], above: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        options = (field.annotation, *getattr(field.annotation, "__args__", ()))
        inner = [each for each in options if inspect.isclass(each) and issubclass(each, Section)]
        yield from settings(inner[0], f"{above}{name}.") if inner else [f"{above}{name}"]


def test_every_command_is_there(site: Path) -> None:
    text = text_of(site / "reference" / "cli.html")
    helped = subprocess.run(
        [sys.executable, "-m", "ray_moe.cli.main", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    commands = re.findall(r"^[^\w\n-]*([a-z][a-z-]+)  ", helped, re.MULTILINE)
    assert {"serve", "generate", "canary", "train"} <= set(commands)
    assert [name for name in commands if f"ray-moe {name}" not in text] == []


def test_every_call_and_error_and_export_is_there(site: Path) -> None:
    wire = text_of(site / "reference" / "protos.html")
    for file in (ROOT / "protos" / "ray_moe" / "v1").glob("*.proto"):
        names = re.findall(r"^\s*(?:rpc|message|enum) (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert [name for name in names if name not in wire] == []
    known = text_of(site / "reference" / "errors.html")
    assert [name for name, value in vars(errors).items() if inspect.isclass(value) and name not in known] == []
    python = text_of(site / "reference" / "python.html")
    assert [name for name in ray_moe.__all__ if name not in python and name != "__version__"] == []


def test_the_drawings_are_what_the_script_draws(tmp_path: Path) -> None:
    walks.write(tmp_path)
    for name in walks.WALKS:
        drawn = (tmp_path / name).read_text(encoding="utf-8")
        assert (walks.FOLDER / name).read_text(encoding="utf-8") == drawn, "run `make docs` and commit what it draws"
