"""A service on a Ray cluster that runs: connect with its token, deploy, ask, take down; the cluster stays as it was.

`python examples/ray_cluster.py --address HOST:6379 [--model MODEL]` on a node of the cluster, with the token in
RAY_AUTH_TOKEN or ~/.ray/auth_token, and the same environment and model on every node. Without an address, a cluster of
one node is started as on any machine, `ray start --head`, and ended. docs/deploy.md is the same for clouds, with their
machines, TLS and keys.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_moe import Client, Config, Service
from ray_moe.models.byte_level import ByteModel, write_new
from ray_moe.service.cluster import RAY_ENVIRONMENT


@contextmanager
def a_cluster(folder: Path) -> Iterator[str]:
    """One node, which only those who know the token may join; its address."""
    os.environ |= {**RAY_ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = f"start --head --block --port {port} --node-ip-address 127.0.0.1 --num-cpus 2 --include-dashboard false"
    # In a folder of its own: what Ray notes of a head in /tmp/ray outlives it, and would lead others to it.
    start += f" --temp-dir {folder} --disable-usage-stats"
    command = [Path(sys.executable).parent / "ray", *start.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as head:
        try:
            for line in head.stdout:
                if "--block" in line:  # it is up, and will stay
                    break
            else:
                raise SystemExit("Ray did not start")
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()


def deploy(address: str, model: str) -> None:
    config = Config.model_validate(
        {
            "model": model,
            "model_name": "on-a-cluster",
            "ray": {"address": address},
            "experts": {"num_actors": 2, "num_cpus": 0.1},
            "router": {"num_cpus": 0.1},
            "server": {"port": 0, "http_port": None},
        }
    )
    with Service(config) as service, Client(service.address) as client:
        status = client.status()
        nodes = {host.node_id for host in status.hosts}
        print(
            f"{status.model} is {status.state}: {len(status.hosts)} expert actors on {len(nodes)} node(s) of {address}"
        )
        answer = client.generate("def main(", max_new_tokens=24, ignore_eos=True)
        print(f"{len(answer.token_ids)} tokens: {answer.text!r}")
    print("the service is taken down")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help="HOST:PORT of the cluster's head; without it one is started here")
    parser.add_argument("--model", help="a checkpoint that all nodes can read; without it a tiny one is made here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        model = arguments.model or f"{scratch}/model"
        if not arguments.model:
            write_new(Path(model), ByteModel(hidden_size=64, num_layers=2, expert_width=64))
        if arguments.address:
            deploy(arguments.address, model)
        else:
            with a_cluster(Path(scratch, "ray")) as address:
                deploy(address, model)
            print("and so is the cluster")


if __name__ == "__main__":
    main()
