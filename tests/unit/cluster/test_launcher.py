"""The files for `ray up`: Ray's own loader takes them, and what they make is what the service's settings ask for."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from ray_moe.config import Config
from ray_moe.config_sources import load_config
from ray_moe.service.cluster import RAY_ENVIRONMENT
from tests.unit.cluster.files import CLUSTER, DEPLOY, ROOT, has_labels, load

CLOUDS = ("aws", "gcp", "azure")
FILES = (*CLOUDS, "onprem")
ACCOUNTED = {"aws": {}, "gcp": {"CPU": 8}, "azure": {"CPU": 8}}
"""CPUs of the heads, where the file has to say them; of AWS, Ray knows what an instance has."""


@pytest.fixture(scope="module")
def service() -> Config:
    return load_config(CLUSTER / "cloud-service.yaml").config


def prepared(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = prepare_config(load(f"{name}.yaml"))
    return tree


@pytest.mark.parametrize("name", FILES)
def test_rays_loader_takes_it(name: str) -> None:
    validate_config(prepared(name))


def test_rays_loader_refuses_what_is_wrong() -> None:
    with pytest.raises(Exception, match="idle_minutes"):
        validate_config({**prepared("aws"), "idle_minutes": 10})


@pytest.mark.parametrize("name", CLOUDS)
def test_expert_actors_find_their_nodes_and_no_others(name: str, service: Config) -> None:
    types = load(f"{name}.yaml")["available_node_types"]
    experts = {kind: node for kind, node in types.items() if has_labels(service, node["labels"])}
    assert set(experts) == {"expert-on-demand", "expert-spot"}
    for node in experts.values():
        assert node["resources"].get("GPU", 1) == service.experts.num_gpus
    assert sum(node["max_workers"] for node in experts.values()) >= service.scaling.max_actors
    assert load(f"{name}.yaml")["max_workers"] >= service.scaling.max_actors
    assert experts["expert-spot"]["priority"] > experts["expert-on-demand"].get("priority", 0)
    assert {node["labels"]["ray.io/market-type"] for node in experts.values()} == {"spot", "on-demand"}
    assert types["head"]["resources"] == ACCOUNTED[name]
    assert types["head"]["resources"].get("CPU", service.router.num_cpus) >= service.router.num_cpus


def test_spot_nodes_are_asked_for_as_each_cloud_wants_it() -> None:
    spot = {name: load(f"{name}.yaml")["available_node_types"]["expert-spot"]["node_config"] for name in CLOUDS}
    assert spot["aws"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert spot["gcp"]["scheduling"][0]["preemptible"] is True
    assert spot["azure"]["azure_arm_parameters"]["priority"] == "Spot"
    assert not load("aws.yaml")["provider"]["cache_stopped_nodes"]  # stopped nodes' disks cost


def test_machines_of_ones_own_carry_the_label_and_there_are_as_many_as_actors(service: Config) -> None:
    tree = load("onprem.yaml")
    labels = [
        dict(pair.split("=") for pair in re.findall(r"--labels=(\S+)", commands[-1])[0].split(","))
        for commands in (tree["head_start_ray_commands"], tree["worker_start_ray_commands"])
    ]
    assert [has_labels(service, each) for each in labels] == [False, True]
    assert len(tree["provider"]["worker_ips"]) == tree["min_workers"] == tree["max_workers"]
    assert service.scaling.max_actors <= tree["max_workers"]


@pytest.mark.parametrize("name", FILES)
def test_no_port_is_opened(name: str, service: Config) -> None:
    text = (CLUSTER / f"{name}.yaml").read_text()
    for opening in ("dashboard-host", "security_group:", "IpPermissions", "ray-client-server-port", "--publish"):
        assert opening not in text
    assert service.server.is_local and service.server.keys_file and service.transport.tls
    assert f"--port-forward {service.server.port}" in DEPLOY


@pytest.mark.parametrize("name", FILES)
def test_what_is_mounted_exists_or_is_made_by_the_page(name: str) -> None:
    mounts = load(f"{name}.yaml")["file_mounts"]
    assert mounts == load("aws.yaml")["file_mounts"]
    for there, here in mounts.items():
        if here == "dist":
            assert "--wheel-dir dist" in DEPLOY
        elif here.startswith("~"):
            assert here in DEPLOY, f"{here} comes from nowhere"
        else:
            assert (ROOT / here).exists()
        # What the head makes itself in a mounted folder would be copied to all others, its certificate among it.
        assert not there.endswith("/tls")


@pytest.mark.parametrize("name", FILES)
def test_every_command_is_bash(name: str) -> None:
    tree = load(f"{name}.yaml")
    commands = [command for key, value in tree.items() if key.endswith("_commands") for command in value]
    assert len(commands) >= 5
    for command in commands:
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0, command


# --- What nodes start with -----------------------------------------------------------------------------------
@pytest.fixture
def node(tmp_path: Path) -> Path:
    """The home of a node, with the cluster's authority."""
    tls = tmp_path / ".ray/tls"
    tls.mkdir(parents=True)
    key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key".split()
    _run("openssl", "req", "-x509", *key, "-subj", "/CN=test", "-days", "2", "-out", "ca.pem", cwd=tls)
    return tmp_path


def _run(*command: str, **options: Any) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, **options).stdout


def source(home: Path, argument: str = "", then: str = "env", path: str = "") -> subprocess.CompletedProcess[str]:
    script = f". {CLUSTER}/node.sh {argument} && {then}"
    environment = {"HOME": str(home), "PATH": f"{path}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_a_node_has_rays_environment_and_a_certificate_for_its_addresses(node: Path) -> None:
    first = source(node)
    assert first.returncode == 0, first.stderr
    environment = dict(line.split("=", 1) for line in first.stdout.splitlines() if "=" in line)
    assert RAY_ENVIRONMENT.items() <= environment.items()
    certificate = Path(environment["RAY_TLS_SERVER_CERT"])
    assert certificate.read_text().startswith("-----BEGIN CERTIFICATE")
    assert Path(environment["RAY_TLS_SERVER_KEY"]).stat().st_mode & 0o77 == 0
    _run("openssl", "verify", "-CAfile", environment["RAY_TLS_CA_CERT"], "-purpose", "sslserver", str(certificate))
    for address in ("127.0.0.1", *_run("hostname", "-I").split()):
        told = _run("openssl", "x509", "-in", str(certificate), "-noout", "-checkip", address)
        assert "does match" in told
    made = certificate.read_bytes()
    source(node)
    assert certificate.read_bytes() == made  # once


def test_another_authority_is_followed(node: Path) -> None:
    source(node)
    before = (node / ".ray/tls/node.pem").read_bytes()
    key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key".split()
    _run("openssl", "req", "-x509", *key, "-subj", "/CN=other", "-days", "2", "-out", "ca.pem", cwd=node / ".ray/tls")
    assert source(node).returncode == 0
    assert (node / ".ray/tls/node.pem").read_bytes() != before


def test_without_the_authority_ray_does_not_start(node: Path) -> None:
    (node / ".ray/tls/ca.key").unlink()
    ended = source(node, then="echo started")
    assert ended.returncode != 0 and "started" not in ended.stdout
    assert "are ca.pem and ca.key in ~/.ray/tls?" in ended.stderr


@pytest.mark.parametrize(
    ("cloud", "answers", "zone"),
    [
        ("aws", {"api/token": "echo secret", "availability-zone": "echo us-west-2b"}, "us-west-2b"),
        ("azure", {"compute/zone": "echo 2", "compute/location": "echo westus2"}, "westus2-2"),
        ("azure", {"compute/zone": "echo", "compute/location": "echo westus2"}, ""),
        ("", {}, None),
    ],
)
def test_the_cloud_is_asked_for_the_zone(node: Path, cloud: str, answers: dict[str, str], zone: str | None) -> None:
    environment = source(node, cloud, path=fake(node, answers)).stdout
    assert re.findall(r"^RAY_NODE_ZONE=(.*)$", environment, re.MULTILINE) == ([] if zone is None else [zone])
    if cloud == "aws":  # the second version of its metadata service
        assert "X-aws-ec2-metadata-token: secret" in (node / "asked").read_text()


def fake(home: Path, answers: dict[str, str]) -> str:
    """A folder with a `curl` that knows addresses by a part of them, and a `ray` that only says what it is told."""
    cases = "\n".join(f"*{part}*) {answer};;" for part, answer in answers.items())
    here = home / "bin"
    here.mkdir()
    (here / "curl").write_text(
        f'#!/bin/bash\necho "$*" >>{home}/asked\ncase "${{@: -1}}" in\n{cases}\n*) exit 22;;\nesac\n'
    )
    (here / "ray").write_text('#!/bin/bash\necho "ray $*"\n')
    for program in here.iterdir():
        program.chmod(0o755)
    return str(here)


# --- Spot nodes ----------------------------------------------------------------------------------------------
RAYLET = "/opt/ray/core/src/ray/raylet/raylet"
ONE_OR_ALL: tuple[dict[str, str], ...] = ({}, {"SPOT_ADDRESS": "two:2"})


def running(home: Path, *commands: list[str]) -> None:
    """Processes with these command lines, as the system shows them."""
    for number, command in enumerate(commands, 1):
        (home / f"proc/{number}").mkdir(parents=True)
        (home / f"proc/{number}/cmdline").write_text("".join(f"{word}\0" for word in command))


def spot(home: Path, cloud: str, path: str, **more: str) -> subprocess.CompletedProcess[str]:
    (home / "ray-moe").mkdir(exist_ok=True)
    environment = {
        "HOME": str(home),
        "PATH": f"{path}:{os.environ['PATH']}",
        "SPOT_POLL_S": "0.05",
        "SPOT_GRACE_S": "0",
        "SPOT_PROC": str(home / "proc"),
        **more,
    }
    command = ["bash", str(CLUSTER / "spot.sh"), cloud]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=20)


@pytest.mark.parametrize(
    ("cloud", "answers", "seconds"),
    [
        # The first two times there is no notice yet.
        ("aws", {"api/token": "echo t", "instance-action": "[ $(grep -c action $HOME/asked) -gt 2 ] || exit 22"}, 110),
        ("gcp", {"preempted": "[ $(wc -l <$HOME/asked) -gt 2 ] && echo TRUE || echo FALSE"}, 25),
        (
            "azure",
            {"scheduledevents": """[ $(wc -l <$HOME/asked) -gt 2 ] && echo '{"EventType":"Preempt"}' || echo '{}'"""},
            25,
        ),
        ("pod", {}, 60),
    ],
)
def test_ray_hears_of_a_node_that_the_cloud_takes_back(
    node: Path, cloud: str, answers: dict[str, str], seconds: int
) -> None:
    running(
        node, [RAYLET, "--node_id=ab1", "--gcs-address=10.0.0.1:6379", "--python_worker_command=x --head --node_id=y"]
    )
    ended = spot(node, cloud, fake(node, answers))
    assert ended.returncode == 0, ended.stderr
    (told,) = ended.stdout.splitlines()
    assert told.startswith(
        "ray drain-node --address 10.0.0.1:6379 --node-id ab1 --reason DRAIN_NODE_REASON_PREEMPTION "
    )
    assert told.endswith(f" --deadline-remaining-seconds {seconds}")


def test_all_nodes_of_the_machine_are_told_of_and_no_head(node: Path) -> None:
    """`ray drain-node` alone would find one of them, and a head before all others."""
    running(
        node,
        [RAYLET, "--node_id=a", "--gcs-address=one:1", "--head"],
        [RAYLET, "--gcs-address=one:1", "--node_id=b"],
        [RAYLET, "--node_id=c", "--gcs-address=two:2"],
        ["/usr/bin/python", "agent.py", "--node_id=d", "--gcs-address=two:2"],
        [],
    )
    path = fake(node, {})
    told = [
        re.findall(r"--address (\S+) --node-id (\S+)", spot(node, "pod", path, **more).stdout) for more in ONE_OR_ALL
    ]
    assert told == [[("one:1", "b"), ("two:2", "c")], [("two:2", "c")]]


def test_where_no_node_runs_it_is_said(node: Path) -> None:
    running(node, ["/usr/bin/bash"])
    ended = spot(node, "pod", fake(node, {}))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "no node of Ray on this machine could be told" in ended.stderr


def test_ray_knows_what_it_is_told() -> None:
    from ray.scripts.scripts import drain_node

    told = re.findall(r"--[a-z-]+", (CLUSTER / "spot.sh").read_text().partition("ray drain-node")[2].partition("[ ")[0])
    known = {name: option for option in drain_node.params for name in option.opts}
    words = {"--address", "--node-id", "--reason", "--reason-message", "--deadline-remaining-seconds"}
    assert set(told) == words <= set(known)
    assert "DRAIN_NODE_REASON_PREEMPTION" in known["--reason"].type.choices


def test_another_cloud_is_refused(node: Path) -> None:
    ended = spot(node, "other", fake(node, {}))
    assert ended.returncode == 2
    assert "expected aws, gcp, azure or pod, not 'other'" in ended.stderr


@pytest.mark.parametrize("name", CLOUDS)
def test_every_worker_waits_for_the_notice_of_its_cloud(name: str) -> None:
    *_, watch = load(f"{name}.yaml")["worker_start_ray_commands"]
    assert f"bash ~/ray-moe/spot.sh {name} " in watch


# --- Installation --------------------------------------------------------------------------------------------
def test_only_one_wheel_is_installed(tmp_path: Path) -> None:
    (tmp_path / "ray-moe/dist").mkdir(parents=True)
    install = ["bash", str(CLUSTER / "install.sh")]
    ended = subprocess.run(
        install, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "expected one wheel in ~/ray-moe/dist" in ended.stderr
