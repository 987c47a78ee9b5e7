"""What is shipped in `cluster/` lets only processes into the cluster that know its token, and encrypts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_moe.config import Config
from ray_moe.config_sources import config_from, load_config

DIRECTORY = Path(__file__).parents[3] / "cluster"
FILES = sorted(path for path in DIRECTORY.rglob("*.y*ml"))


def unguarded(text: str) -> list[str]:
    """What of a file in YAML would start a Ray without token authentication, or serve on one."""
    found: list[str] = []
    for document in yaml.safe_load_all(text):
        kind = document.get("kind", "")
        if "apiVersion" in document:
            if kind.startswith("Ray"):
                found += [f"{kind} without {wanted}" for spec in _clusters(document) for wanted in _missing(spec)]
        elif "applications" in document:  # of Ray Serve, whose proxies listen where they are told
            keyless = [app for app in document["applications"] if not config_from(app["args"]).server.keys_file]
            found += [f"{app['name']} without server.keys_file" for app in keyless]
        elif "groups" in document:
            pass  # rules of Prometheus: they start nothing
        elif document.keys() <= Config.model_fields.keys():
            if document.get("ray", {}).get("auth") != "token":
                found.append("a service without ray.auth: token")
        elif "featureGates" in document:  # of the operator's chart
            if {"name": "RayClusterMTLS", "enabled": True} not in document["featureGates"]:
                found.append("an operator without the gate RayClusterMTLS")
        elif "provider" not in document:
            found.append("neither a service, a cluster of Ray's launcher nor a Kubernetes resource")
    lines = text.splitlines()
    found += [
        line.strip()
        for number, line in enumerate(lines)
        if re.search(r"\bray start\b", line)
        and not re.search(r"- \. ~/ray-moe/node\.sh( \w+)? &&.*\bray start\b", line)
        and not any("RAY_AUTH_MODE=token" in told for told in lines[: number + 1])
    ]
    return found


def _clusters(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = document["spec"]
    return [spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or spec]


def _missing(spec: dict[str, Any]) -> list[str]:
    asked = {"authOptions.mode: token": ("authOptions", "mode", "token"), "tlsOptions": ("tlsOptions", "enabled", True)}
    return [name for name, (section, key, value) in asked.items() if spec.get(section, {}).get(key) != value]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_a_shipped_file_asks_for_the_token(file: Path) -> None:
    assert unguarded(file.read_text()) == []


def test_what_nodes_start_with_asks_for_the_token() -> None:
    assert "\nexport RAY_AUTH_MODE=token\nexport RAY_USE_TLS=1\n" in (DIRECTORY / "node.sh").read_text()


def test_the_shipped_service_files_can_be_loaded() -> None:
    services = [path for path in FILES if path.stem.endswith("-service")]
    assert services
    assert {load_config(path).config.ray.auth for path in services} == {"token"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ray: {autoscaling: true}", "a service without ray.auth: token"),
        ("ray: {auth: disabled}", "a service without ray.auth: token"),
        ("# ray start --head\nprovider: {}", "# ray start --head"),
        (
            "provider: {}\nhead_start_ray_commands: [ray start]\n# RAY_AUTH_MODE=token",
            "head_start_ray_commands: [ray start]",
        ),
        (
            "apiVersion: ray.io/v1\nkind: RayCluster\nspec: {tlsOptions: {enabled: true}}",
            "RayCluster without authOptions.mode: token",
        ),
        (
            "apiVersion: ray.io/v1\nkind: RayService\nspec: {rayClusterConfig: {authOptions: {mode: token}}}",
            "RayService without tlsOptions",
        ),
        ("featureGates: [{name: RayClusterMTLS, enabled: false}]", "an operator without the gate RayClusterMTLS"),
        ("provider: {}\nx:\n  - ray start && . ~/ray-moe/node.sh", "- ray start && . ~/ray-moe/node.sh"),
        ("applications: [{name: moe, args: {model: m}}]", "moe without server.keys_file"),
        ("something: else", "neither a service, a cluster of Ray's launcher nor a Kubernetes resource"),
    ],
)
def test_the_check_finds_what_is_open(text: str, said: str) -> None:
    assert unguarded(text) == [said]
