"""What the README tells people to type works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from ray_moe import MoELayer
from ray_moe.cli.commands import commands
from tests.tiny_models import save, save_tokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
RAY_MOE = [command for command in COMMANDS if command.startswith("ray-moe ")]


@pytest.fixture(scope="module")
def service(serve_module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    save("qwen3_moe", folder, vocab_size=259, hidden_size=128)
    save_tokenizer(folder)
    train = {"checkpoints": {"folder": str(tmp_path_factory.mktemp("checkpoints"))}, "num_cpus": 0.1}
    return serve_module(folder, server={"http_port": 0}, train=train)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)


def run_block(service, number):
    """What a block of Python prints; it names the ports that are usual."""
    block = PYTHON[number].replace("127.0.0.1:8476", service.address)
    result = run(sys.executable, "-c", block.replace("http://127.0.0.1:8477", service.http_address))
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_python_blocks_run(service):
    assert len(PYTHON) == 6
    assert run_block(service, 0).splitlines()[-2:] == ["(5, 128)", "(5, 128)"]
    assert run_block(service, 1)
    assert run_block(service, 2)


def test_the_layer_for_a_network_of_ones_own_runs():
    assert "MoELayer" in PYTHON[3]
    result = run(sys.executable, "-W", "error", "-c", PYTHON[3])
    assert result.returncode == 0, result.stderr


def test_the_experts_of_a_network_of_ones_own_train_on_the_service(service):
    assert "remote_trainer" in PYTHON[4]
    name = service.config.service_name
    namespace: dict[str, Any] = {}
    exec(PYTHON[4].replace('service_name="ray-moe"', f"service_name={name!r}"), namespace)
    assert namespace["trainer"].step == 20
    assert namespace["weights"]["1.experts.down_proj"].shape == (8, 64, 256)
    home = torch.nn.Sequential(torch.nn.Linear(4, 64), MoELayer(64, 256, num_experts=8), torch.nn.Linear(64, 1))
    home.load_state_dict(namespace["weights"])


def test_the_training_block_runs(service):
    assert "client.training" in PYTHON[5]
    lines = run_block(service, 5).splitlines()
    losses = [float(line) for line in lines[:3]]
    assert losses == sorted(losses, reverse=True)
    assert lines[3].startswith("4 ")
    assert lines[-1] == "1"


def test_the_commands_against_a_running_service_run(service):
    asking = [command for command in RAY_MOE if command.split()[1] in ("generate", "status", "config")]
    asking += [command for command in RAY_MOE if "--dry-run" in command]
    assert len(asking) == 4
    for command in asking:
        server = [] if " config " in command else ["--server", service.address]
        result = run(sys.executable, "-m", "ray_moe.cli.main", *shlex.split(command)[1:], *server)
        assert result.returncode == 0, f"{command}: {result.stderr}"
        assert result.stdout.strip()


@pytest.mark.parametrize("command", RAY_MOE)
def test_every_command_parses(command):
    group: Any = typer.main.get_command(commands)
    name, *arguments = shlex.split(command)[1:]
    group.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_every_make_target_exists(command):
    result = run("make", "--dry-run", *command.split()[1:])
    assert result.returncode == 0, result.stderr


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
