"""The image and the unit for one machine: linted, and true to the package, the settings and each other."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from ray_moe.cli.commands import commands
from ray_moe.config_sources import load_config
from ray_moe.service.cluster import RAY_ENVIRONMENT
from tests.unit.cluster.files import CLUSTER, DEPLOY, ROOT

DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
SERVICE = load_config(CLUSTER / "machine-service.yaml").config


def instructions(name: str) -> list[str]:
    """What follows an instruction, in order, with continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    return re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)


def parse(command: list[str]) -> None:
    """Refuses what `ray-moe` would."""
    group: Any = typer.main.get_command(commands)
    program, name, *arguments = command
    assert Path(program).name == "ray-moe"
    group.commands[name].make_context(name, arguments)


# --- Image ---------------------------------------------------------------------------------------------------
def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    ended = subprocess.run([hadolint, CLUSTER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    lines = [line for line in instructions("COPY") if not line.startswith("--from")]
    copied = [word for line in lines for word in line.split()[:-1] if not word.startswith("--")]
    assert set(copied) == {"constraints", "pyproject.toml", "README.md", "LICENSE", "ray_moe", "cluster/spot.sh"}
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored
    assert ignored[1] == "*"
    # What the build of the wheel reads.
    project = (ROOT / "pyproject.toml").read_text()
    for name in re.findall(r"(?:readme = |license-files = \[)\"([^\"]+)\"", project):
        assert name in copied


def test_it_installs_extras_and_constraints_that_exist() -> None:
    (extras,) = re.findall(r"'\.\[([a-z,]+)\]'", DOCKERFILE)
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert (ROOT / "constraints/gpu.txt").exists() and (ROOT / "constraints/cpu.txt").exists()
    assert "ARG TORCH=gpu" in DOCKERFILE
    (python,) = re.findall(r"^ARG PYTHON=(.*)$", DOCKERFILE, re.MULTILINE)
    assert f"Python :: {python}" in (ROOT / "pyproject.toml").read_text()


def test_it_has_rays_environment_no_root_and_what_kuberay_calls() -> None:
    environment = dict(word.split("=", 1) for line in instructions("ENV") for word in shlex.split(line))
    assert RAY_ENVIRONMENT.items() <= environment.items()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert instructions("USER") == ["1000"]
    (packages,) = re.findall(r"--no-install-recommends ([a-z ]+?) *&&", "".join(instructions("RUN")))
    assert {"openssl", "wget", "tini"} <= set(packages.split())


def test_its_command_health_check_and_ports_are_those_of_the_service() -> None:
    parse(json.loads(instructions("CMD")[-1]))
    assert instructions("EXPOSE") == [f"{SERVICE.server.port} {SERVICE.server.http_port}"]
    environment = dict(word.split("=", 1) for line in instructions("ENV") for word in shlex.split(line))
    scheme = "https" if SERVICE.server.tls_cert_file else "http"
    assert environment["HEALTH_URL"] == f"{scheme}://127.0.0.1:{SERVICE.server.http_port}/health"


# --- Unit ----------------------------------------------------------------------------------------------------
@pytest.fixture
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(CLUSTER / "systemd/ray-moe.service")
    return parser


def test_the_unit_starts_the_service(unit: configparser.ConfigParser) -> None:
    assert unit.sections() == ["Unit", "Service", "Install"]
    service = unit["Service"]
    command = shlex.split(service["ExecStart"])
    parse(command)
    # As cluster/install.sh puts it there, with HOME=/opt.
    assert command[0] == "/opt/ray-moe/venv/bin/ray-moe" and "HOME=/opt" in DEPLOY
    assert service["User"] != "root"
    assert f"useradd --system --home-dir /var/lib/{service['StateDirectory']}" in DEPLOY
    assert float(service["TimeoutStopSec"]) > SERVICE.server.grace_s + 10  # what `Service.stop` waits, and more
    home = dict(word.split("=", 1) for word in service["Environment"].split())["HOME"]
    assert home == f"/var/lib/{service['StateDirectory']}"


def test_the_service_of_one_machine_is_closed_to_others_without_key_and_encryption() -> None:
    server = SERVICE.server
    assert server.keys_file and server.tls_cert_file and server.tls_key_file and not server.allow_anonymous
    assert SERVICE.ray.auth == "token"
    for file in (server.keys_file, server.tls_cert_file, server.tls_key_file):
        assert file in DEPLOY


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (CLUSTER / "systemd/ray-moe.service").read_text()
    text = text.replace("/opt/ray-moe/venv/bin/ray-moe", "/bin/true").replace("User=ray-moe", "User=root")
    assert _verified(tmp_path / "ray-moe.service", text) == ""
    assert "'KilMode'" in _verified(tmp_path / "wrong.service", text.replace("KillMode", "KilMode"))


def _verified(file: Path, text: str) -> str:
    """What systemd (apt install systemd) has against a unit."""
    file.write_text(text)
    verify = ["systemd-analyze", "verify", str(file)]
    return subprocess.run(verify, capture_output=True, text=True, check=False).stderr
