"""What `cluster/` has and docs/deploy.md says, on a cluster of one node that starts as those of `ray up` do.

`cluster/node.sh` has Ray ask for the token and encrypt; the service comes by `serve deploy`, and as a job.
"""

from __future__ import annotations

import os
import re
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from ray_moe.client.sync import Client
from ray_moe.errors import Unauthenticated
from tests.ray.support import free_port, running
from tests.ray.test_serve import BIN, NUM_TOKENS, PROMPT, checkpoint

ROOT = Path(__file__).parents[2]
DEPLOY = (ROOT / "docs/deploy.md").read_text()
START_TIMEOUT_S = 150


@dataclass(frozen=True)
class Head:
    """A cluster, as somebody sees it who is logged in on its head."""

    environment: dict[str, str]
    dashboard: str
    keys: Path
    key: str

    def run(self, command: str, **variables: str) -> str:
        """What a command says, in the environment of `cluster/node.sh`."""
        ended = subprocess.run(
            ["bash", "-c", f". {ROOT}/cluster/node.sh && {command}"],
            env={**os.environ, **self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return checkpoint(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A cluster with the token and the authority that docs/deploy.md makes, in a home of its own."""
    home = tmp_path_factory.mktemp("home")
    (prepare,) = [block for block in re.findall(r"```bash\n(.*?)```", DEPLOY, re.DOTALL) if "get-auth-token" in block]
    environment = {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for name in ("RAY_AUTH_MODE", "RAY_ADDRESS"):
        environment[name] = ""
    prepared = subprocess.run(
        ["bash", "-euc", prepare],
        env={**os.environ, **environment},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (key,) = re.findall(r"\brm_\S+", prepared.stdout)
    tls = home / ".ray/tls"
    tls.mkdir()
    for name in ("ca.pem", "ca.key"):  # as file_mounts puts them on every node
        (tls / name).write_bytes((home / ".ray-moe/tls" / name).read_bytes())

    gcs, dashboard = free_port(), free_port()
    start = f"ray start --head --port {gcs} --dashboard-port {dashboard} --num-cpus 4 --labels tier=expert --block"
    start += " --node-ip-address 127.0.0.1 --object-store-memory 200000000 --disable-usage-stats"
    for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"):
        start += f" --{name} {free_port()}"
    # Ray gives a node 30 s to start, and none more where other tests have the cores: as somebody would, try again.
    start = " || ".join(3 * [f"{{ . {ROOT}/cluster/node.sh && {start}; }}"])
    log = tmp_path_factory.mktemp("log") / "head.log"
    environment["RAY_ADDRESS"] = f"127.0.0.1:{gcs}"
    with running(["bash", "-c", start], log, environment) as process:
        end_by = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end_by, "the head does not come up"
            time.sleep(0.1)
        yield Head(environment, f"http://127.0.0.1:{dashboard}", home / ".ray-moe/keys.json", key)


def test_ray_shows_the_certificate_of_its_node(head: Head) -> None:
    host, port = head.environment["RAY_ADDRESS"].split(":")
    shown = ssl.get_server_certificate((host, int(port)), timeout=10)
    assert shown.strip() == (Path(head.environment["HOME"]) / ".ray/tls/node.pem").read_text().strip()


@pytest.mark.timeout(600)
def test_serve_deploy_brings_the_application_up(head: Head, model: tuple[Path, str], tmp_path: Path) -> None:
    tree = yaml.safe_load((ROOT / "cluster/serve.yaml").read_text())
    http, grpc, direct = free_port(), free_port(), free_port()
    tree["http_options"]["port"], tree["grpc_options"]["port"] = http, grpc
    settings = tree["applications"][0]["args"]
    assert settings["router"].pop("max_actors") >= settings["router"]["num_actors"]
    settings |= {"model": str(model[0]), "model_name": "tiny"}
    settings["experts"] = {"num_actors": 1, "num_cpus": 0.1}
    settings["router"] |= {"num_actors": 1, "num_cpus": 0.1}
    settings["server"] |= {"keys_file": str(head.keys), "port": direct}
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(tree))
    try:
        head.run(f"serve deploy {config} --address {head.dashboard}")
        base_url = f"http://127.0.0.1:{http}/v1"
        with openai.OpenAI(base_url=base_url, api_key=head.key, max_retries=0) as client:
            answer = _ask_until_it_is_up(head, client)
        assert answer == model[1]
        wrong = openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0)
        with wrong as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        for address in (f"127.0.0.1:{grpc}", f"127.0.0.1:{direct}"):  # of Serve's proxy, and of the router
            with Client(address, discover=False, api_key=head.key) as client:
                assert client.generate(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True).text == model[1]
    finally:
        head.run(f"serve shutdown --yes --address {head.dashboard}")


def _ask_until_it_is_up(head: Head, client: openai.OpenAI) -> str:
    options: Any = {"temperature": 0, "extra_body": {"ignore_eos": True}}
    end_by = time.monotonic() + START_TIMEOUT_S
    while True:
        with suppress(openai.APIConnectionError, openai.NotFoundError, openai.InternalServerError):
            return (
                client.completions.create(model="tiny", prompt=PROMPT, max_tokens=NUM_TOKENS, **options).choices[0].text
            )
        if time.monotonic() > end_by:
            pytest.fail(head.run(f"serve status --address {head.dashboard}"))
        time.sleep(0.2)


@pytest.mark.timeout(600)
def test_a_service_runs_as_a_job_of_the_cluster(head: Head, model: tuple[Path, str]) -> None:
    port = free_port()
    settings = {
        "server.port": port,
        "server.http_port": "null",
        "server.keys_file": head.keys,
        "experts.num_gpus": 0,
        "router.num_cpus": 0.1,
        "router.num_threads": 1,
        "scaling.enabled": "false",
        "experts.num_actors": 1,
    }
    serve = f"ray-moe serve {model[0]} --config {ROOT}/cluster/cloud-service.yaml"
    serve += "".join(f" --set {name}={value}" for name, value in settings.items())
    submit = f"ray job submit --address {head.dashboard} --no-wait --submission-id ray-moe -- {serve}"
    head.run(submit)
    try:
        with Client(f"127.0.0.1:{port}", api_key=head.key) as client:
            client.wait_ready(START_TIMEOUT_S)
            assert client.generate(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True).text == model[1]
        with Client(f"127.0.0.1:{port}", api_key="wrong", max_attempts=1) as client, pytest.raises(Unauthenticated):
            client.generate(PROMPT)
    except BaseException:
        print(head.run(f"ray job logs --address {head.dashboard} ray-moe"))
        raise
    stopped = head.run(f"ray job stop --address {head.dashboard} ray-moe")
    assert "was stopped" in stopped, stopped
    # It was told to end, and ended what it had started.
    assert "\nstopped" in head.run(f"ray job logs --address {head.dashboard} ray-moe")
