"""A cloud's notice arrives at Ray: a faked metadata service, `cluster/spot.sh` as it is, and nodes of a real Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_moe.actors.nodes import draining

SPOT = Path(__file__).parents[2] / "cluster/spot.sh"


class Metadata(BaseHTTPRequestHandler):
    """As the service of EC2: a token first, and no notice before the third question."""

    asked: list[str]

    def do_PUT(self) -> None:
        self.answer(200, b"secret" if self.path == "/latest/api/token" else b"")

    def do_GET(self) -> None:
        knows = self.headers["X-aws-ec2-metadata-token"] == "secret"
        self.asked.append(self.path if knows else "without a token")
        self.answer(200 if knows and len(self.asked) > 2 else 404, b'{"action": "terminate"}')

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Metadata,), {"asked": asked}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_ray_drains_the_nodes_of_a_machine_that_the_cloud_takes_back(local_ray, add_node, metadata, tmp_path) -> None:
    class Busy:
        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    node = add_node(1)
    # A node without work would be gone at once.
    busy: Any = ray.remote(num_cpus=0, resources={"expert_slot": 1})(Busy).remote()
    assert ray.get(busy.node.remote()) == node.node_id
    address, asked = metadata
    (tmp_path / "ray-moe").mkdir()
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SPOT_METADATA": address,
        "SPOT_ADDRESS": local_ray.address,
        "SPOT_POLL_S": "0.1",
    }
    assert draining() == frozenset()
    ended = subprocess.run(
        ["bash", str(SPOT), "aws"], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert asked == ["/latest/meta-data/spot/instance-action"] * 3
    deadline_s = time.monotonic() + 30
    while node.node_id not in (going := draining()) and time.monotonic() < deadline_s:
        time.sleep(0.05)  # nodes hear of it from each other
    assert going == {node.node_id}  # and not the head, which is on this machine, too
    ray.kill(busy)
