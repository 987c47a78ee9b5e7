"""The whole story on one machine: load comes, Ray's autoscaler starts nodes, replicas serve; load goes, nodes leave.

A cluster of its own, started and served as a user would, from the files in `cluster/`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from ray_moe.client.sync import Client
from tests.ray.support import await_status, free_port, greedy, prompts, running

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "0",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
}
NUM_TOKENS = 24


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A cluster that grows and shrinks by itself."""
    port = free_port()
    tree = yaml.safe_load((ROOT / "cluster/local-autoscaling.yaml").read_text())
    tree["provider"]["gcs_address"] = f"127.0.0.1:{port}"
    config = tmp_path / "cluster.yaml"
    config.write_text(yaml.safe_dump(tree))
    command = [str(BIN / "ray"), "start", "--head", "--node-ip-address", "127.0.0.1", "--port", str(port)]
    command += ["--num-cpus", "2", "--include-dashboard", "false", "--object-store-memory", "200000000"]
    command += ["--autoscaling-config", str(config), "--block"]
    # Ports that are given are not waited for. For others a busy machine may be too slow: Ray's node waits for 15 s.
    for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"):
        command += [f"--{name}", str(free_port())]
    log = tmp_path / "head.log"
    with running(command, log, ENVIRONMENT) as head:
        end_s = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None, "the head has ended"
            assert time.monotonic() < end_s, "the head does not come up"
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"


class Users:
    """People who ask again and again, and know what they should hear."""

    def __init__(self, target: str, answers: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        self.num_answers = 0
        self.wrong: list[object] = []
        self._target = target
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=answer) for answer in answers]

    def _ask(self, prompt: tuple[int, ...], expected: tuple[int, ...]) -> None:
        with Client(self._target, timeout_s=60) as client:
            while not self._stop.is_set():
                try:
                    answer = client.generate(token_ids=prompt, max_new_tokens=NUM_TOKENS, ignore_eos=True).token_ids
                except Exception as error:
                    self.wrong.append(error)
                    return
                if answer != expected:
                    self.wrong.append(answer)
                self.num_answers += 1

    def __enter__(self) -> Users:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.timeout(600)
def test_nodes_come_with_the_load_and_go_with_it(mixtral, address, tmp_path) -> None:
    model, folder = mixtral
    answers = list(zip(prompts(6), greedy(model, prompts(6), NUM_TOKENS), strict=True))
    port = free_port()
    command = [str(BIN / "ray-moe"), "serve", str(folder), "--address", address, "--port", str(port)]
    command += ["--config", str(ROOT / "cluster/local-autoscaling-service.yaml"), "--set", "ray.auth=disabled"]
    command += ["--set", "router.max_concurrent_requests=1", "--set", "server.http_port=null"]
    began_s = time.monotonic()
    with running(command, tmp_path / "serve.log", ENVIRONMENT), Client(f"127.0.0.1:{port}") as client:
        client.wait_ready(120)
        print(f"a node for the first actor, and ready, after {time.monotonic() - began_s:.0f} s")
        first = await_status(client, lambda status: status.state == "ready")
        assert len(first.hosts) == 1
        with Users(client.target, answers[:1]) as one:
            with Users(client.target, answers[1:]) as crowd:
                began_s = time.monotonic()
                grown = await_status(
                    client,
                    lambda status: len({host.node_id for host in status.hosts if host.state == "ready"}) == 3,
                    timeout_s=120,
                    what="on three nodes",
                )
                print(f"three nodes after {time.monotonic() - began_s:.0f} s")
                nodes = {host.node_id for host in grown.hosts}
                rows = {host.host_id: host.num_rows for host in grown.hosts}
                await_status(
                    client,
                    lambda status: all(host.num_rows > rows.get(host.host_id, 0) for host in status.hosts),
                    what="served by all",
                )
            began_s = time.monotonic()
            await_status(client, lambda status: len(status.hosts) == 1 and not status.changing, 120, what="small again")
            _await_raylets(address, 2)
            print(f"one node again after {time.monotonic() - began_s:.0f} s")
        status = client.status()
        assert one.wrong == crowd.wrong == []
        assert one.num_answers and crowd.num_answers
        assert status.router.failed_requests == 0
        assert len(nodes) == 3


def _await_raylets(address: str, count: int) -> None:
    """Until the head and its living nodes are `count` raylets."""
    end_s = time.monotonic() + 90
    while True:
        raylets = [
            process
            for process in psutil.process_iter(["name", "cmdline"])
            if process.info["name"] == "raylet" and any(address in word for word in process.info["cmdline"] or ())
        ]
        if len(raylets) == count:
            return
        assert time.monotonic() < end_s, f"{len(raylets)} raylets, not {count}"
        time.sleep(0.5)
