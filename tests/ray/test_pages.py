"""What the README and the pages of docs/ tell people to type works as it stands there, against a real service.

Blocks that need none, and the soundness of all, are in tests/unit/docs/test_pages.py.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_moe import MoELayer
from ray_moe.client.sync import Client
from tests import pages
from tests.pages import README, ROOT
from tests.ray.support import await_status, has_actors
from tests.tiny_models import save, save_tokenizer

BLOCKS = pages.blocks(README)
PYTHON = [block.text for block in BLOCKS if block.language == "python"]
COMMANDS = [line for block in BLOCKS for line in block.commands]
RAY_MOE = [arguments for block in BLOCKS for arguments in pages.our_commands(block)]
NUM_ACTORS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    save("qwen3_moe", folder, vocab_size=259, hidden_size=128)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def service(serve_module, model, tmp_path_factory):
    train = {"checkpoints": {"folder": str(tmp_path_factory.mktemp("checkpoints"))}, "num_cpus": 0.1}
    experts = {"num_actors": NUM_ACTORS, "standby_actors": 1}
    return serve_module(model, server={"http_port": 0}, train=train, experts=experts, chaos={"enabled": True})


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
    asking = [arguments for arguments in RAY_MOE if arguments[0] in ("generate", "status", "config")]
    asking += [arguments for arguments in RAY_MOE if "--dry-run" in arguments]
    assert len(asking) == 4
    for arguments in asking:
        result = run(sys.executable, "-m", "ray_moe.cli.main", *arguments, *(needs(service, arguments) or ()))
        assert result.returncode == 0, f"{arguments}: {result.stderr}"
        assert result.stdout.strip()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_every_make_target_exists(command):
    result = run("make", "--dry-run", *shlex.split(command, comments=True)[1:])
    assert result.returncode == 0, result.stderr


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("name", ["tutorial.md", "how-to/upgrade.md", "how-to/train.md"])
def test_pages_run_from_top_to_bottom(service, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    walk(service, name)
    with Client(service.address) as client:
        if len(client.status().hosts) != NUM_ACTORS + 1:
            client.resize(NUM_ACTORS)
        await_status(client, has_actors(NUM_ACTORS + 1), what="as many actors as before")


def test_the_page_about_scaling_runs_with_a_service_of_its_own(
    serve, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names an actor, which those of other pages may have ended."""
    monkeypatch.chdir(tmp_path)
    service = serve(model, experts={"num_actors": 2, "spare_slots": 2})
    walk(service, "how-to/autoscale.md")
    with Client(service.address) as client:
        hosts = {host.host_id for host in client.status().hosts}
    assert len(hosts) == 3 and "expert-0" not in hosts


def walk(service, name: str) -> None:
    """Run a page from top to bottom."""

    def adapt(text: str) -> str:
        for usual, here in {
            "http://127.0.0.1:8477": service.http_address,
            "127.0.0.1:8476": service.address,
            "/path/to/checkpoint": service.config.model,
            'service_name="ray-moe"': f"service_name={service.config.service_name!r}",
        }.items():
            text = text.replace(usual, here)
        return text

    pages.run(ROOT / "docs" / name, {}, adapt, lambda arguments: needs(service, arguments))


def needs(service, arguments: Sequence[str]) -> Sequence[str] | None:
    """Options that a command needs here; None for one that runs until somebody ends it."""
    if arguments[0] == "serve":
        return None
    if arguments[0] == "train":
        small = ("experts.num_cpus=0.1", "train.num_cpus=0.1", f"service_name={service.config.service_name}-train")
        return [word for setting in small for word in ("--set", setting)]
    return ["--server", service.address] if "server" in pages.parse(arguments) and arguments[0] != "simulate" else []
