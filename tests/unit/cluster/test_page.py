"""docs/deploy.md: every file is on it and exists, every block is bash, every command of ours and of Ray's parses."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from ray.scripts.scripts import cli as ray
from ray.serve.scripts import cli as serve

from ray_moe.cli.commands import commands
from ray_moe.config_sources import load_config
from tests.unit.cluster.files import BASH, CLUSTER, DEPLOY, ROOT

SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", DEPLOY, re.MULTILINE | re.DOTALL))


def words(block: str) -> list[list[str]]:
    """The commands of a block as words, without comments, joined over continued lines."""
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [found for line in lines if (found := shlex.split(line, comments=True))]


COMMANDS = [command for block in BASH for command in words(block)]


def inner(command: list[str]) -> list[list[str]]:
    """The commands in a command: of `ray exec`, of `ray job submit` and `kubectl exec` after `--`."""
    if command[:2] == ["ray", "exec"]:
        return [part for line in command[3].split(" && ") for part in [shlex.split(line), *inner(shlex.split(line))]]
    if "--" in command:
        rest = command[command.index("--") + 1 :]
        return [rest, *inner(rest)]
    return []


ALL = [each for command in COMMANDS for each in (command, *inner(command))]
OURS = [command for command in ALL if command[0] == "ray-moe"]


def parse(group: click.Group, arguments: list[str]) -> None:
    """Raises for a command or an option that does not exist."""
    name, *rest = arguments
    command = group.get_command(click.Context(group), name)
    assert command is not None, f"there is no {name}"
    if isinstance(command, click.Group):
        parse(command, rest)
        return
    with contextlib.suppress(click.exceptions.Exit):
        command.make_context(name, rest)


def shown(command: list[str]) -> str:
    return shlex.join(command)[:60]


@pytest.mark.parametrize("command", OURS, ids=shown)
def test_our_commands_parse(command: list[str]) -> None:
    group: Any = typer.main.get_command(commands)
    parse(group, command[1:])


@pytest.mark.parametrize("command", [command for command in ALL if command[0] in ("ray", "serve")], ids=shown)
def test_rays_commands_parse(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parse({"ray": ray, "serve": serve}[command[0]], command[1:])


def test_a_wrong_option_is_found() -> None:
    with pytest.raises(click.exceptions.NoSuchOption):
        parse(ray, ["up", "cluster/aws.yaml", "--now"])


@pytest.mark.parametrize("command", [command for command in OURS if "--set" in command], ids=shown)
def test_settings_that_are_set_exist(command: list[str]) -> None:
    given = [command[number + 1].partition("=") for number, word in enumerate(command) if word == "--set"]
    load_config(None, {}, [(key, value, "--set") for key, _, value in given])


@pytest.mark.parametrize("block", BASH, ids=lambda block: block.splitlines()[0][:60])
def test_every_block_is_bash(block: str) -> None:
    assert subprocess.run(["bash", "-n"], input=block, text=True, check=False).returncode == 0


def test_every_file_is_on_the_page_and_every_one_named_is_there() -> None:
    monitoring = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w.~/-])(?:\.\./)?cluster/[\w./-]*\w", DEPLOY + monitoring))
    paths = {name.removeprefix("../") for name in named}
    for name in paths:
        assert (ROOT / name).exists(), name
    shipped = {str(path.relative_to(ROOT)) for path in CLUSTER.rglob("*") if path.is_file()}
    assert shipped - paths == {"cluster/Dockerfile.dockerignore"}  # which belongs to the other


def test_every_link_leads_somewhere() -> None:
    anchors = {re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in SECTIONS}
    for target in re.findall(r"\]\(([^)]+)\)", DEPLOY):
        file, _, anchor = target.partition("#")
        if not file:
            assert anchor in anchors, target
        elif not target.startswith("https://"):
            assert (Path(ROOT / "docs") / file).exists(), target


TARGETS = {"One machine", "AWS", "Google Cloud", "Azure", "Machines of your own", "Kubernetes", "A Ray that you have"}


@pytest.mark.parametrize("section", sorted(TARGETS))
def test_every_target_says_how_to_begin_what_it_costs_and_how_it_ends(section: str) -> None:
    text = SECTIONS[section]
    assert "generate" in text or "/v1/models" in text  # the first request
    assert "**To leave it running**" in text
    assert "**Take it down" in text.replace("\n", " ")


def test_the_prices_table_has_the_machines_of_the_files() -> None:
    rows = SECTIONS["What it costs to leave running"]
    for name, keys in {"aws": "InstanceType", "gcp": "machineType", "azure": "vmSize"}.items():
        machines = re.findall(rf"{keys}: (\S+)", (CLUSTER / f"{name}.yaml").read_text())
        assert machines
        for machine in machines:
            assert machine in rows, machine
