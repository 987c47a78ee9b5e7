"""A node is killed while clients generate: no request fails, no token differs, and the experts are whole again.

`python examples/elastic_killed_node.py`: four Ray nodes on this machine, as processes; two of them have an expert actor
with a replica of every expert, and one is spare. The raylet of one is killed, and its actor with it.
"""

from __future__ import annotations

import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported; this cluster is on the loopback, for a minute

import tempfile
import threading
import time
from pathlib import Path

from ray.cluster_utils import Cluster

from ray_moe import Client, Config, Service
from ray_moe.models.byte_level import ByteModel, write_new
from ray_moe.service.cluster import RAY_ENVIRONMENT
from ray_moe.types import ServiceStatus

NUM_STREAMS, NUM_TOKENS = 4, 400
MISSED_AFTER = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
}


class Stream(threading.Thread):
    """A generation, and the longest time between two of its tokens."""

    def __init__(self, address: str, number: int) -> None:
        super().__init__()
        self.address, self.prompt = address, f"def function_{number}("
        self.tokens: list[int] = []
        self.pause_s = 0.0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with Client(self.address) as client:
                last_s = None
                for chunk in client.stream(self.prompt, max_new_tokens=NUM_TOKENS, ignore_eos=True):
                    now_s = time.monotonic()
                    self.pause_s = max(self.pause_s, now_s - (last_s or now_s))
                    self.tokens += chunk.token_ids
                    last_s = now_s
        except Exception as error:
            self.error = error


def run(address: str, kill: bool, cluster: Cluster) -> list[Stream]:
    streams = [Stream(address, number) for number in range(NUM_STREAMS)]
    for stream in streams:
        stream.start()
    while min(len(stream.tokens) for stream in streams) < 50 and any(stream.is_alive() for stream in streams):
        time.sleep(0.01)
    if kill:
        victim = next(node for node in cluster.worker_nodes if node.node_id == victim_of(address))
        cluster.remove_node(victim, allow_graceful=False)
        print(f"node {victim.node_id[:8]} is killed")
    for stream in streams:
        stream.join()
    return streams


def victim_of(address: str) -> str:
    with Client(address) as client:
        return client.status().hosts[0].node_id


def await_two_copies(client: Client, timeout_s: float = 60) -> ServiceStatus:
    """The status when every expert has a replica on two actors that are there."""
    end_by = time.monotonic() + timeout_s
    while time.monotonic() < end_by:
        status, table = client.status(), client.placement()
        there = {host.host_id for host in status.hosts if host.state == "ready"}
        if all(len(there & set(hosts)) == 2 for layer in table.placement.hosts_of.values() for hosts in layer):
            return status
        time.sleep(0.1)
    raise SystemExit(f"not two copies of every expert after {timeout_s:g} s: {client.status()}")


def main() -> None:
    os.environ.update(RAY_ENVIRONMENT)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "_system_config": MISSED_AFTER})
    for _ in range(3):
        cluster.add_node(num_cpus=1, resources={"expert_slot": 1})
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_new(Path(folder), ByteModel(hidden_size=64, num_layers=2, expert_width=64))
            look(cluster, folder)
    finally:
        cluster.shutdown()


def look(cluster: Cluster, model: str) -> None:
    config = Config.model_validate(
        {
            "model": model,
            "ray": {"address": cluster.address, "auth": "disabled"},
            "experts": {"num_actors": 2, "num_cpus": 0, "resources": {"expert_slot": 1}, "spare_slots": 8},
            "router": {"num_cpus": 0.1},
            "balance": {"min_replicas": 2, "every_s": 0.2},
            "server": {"port": 0, "http_port": None},
        }
    )
    with Service(config) as service, Client(service.address) as client:
        await_two_copies(client)
        print("every expert is on two nodes; a third one is spare")
        calm, hurt = (run(service.address, kill, cluster) for kill in (False, True))
        status = await_two_copies(client)
        failed = [stream.error for stream in (*calm, *hurt) if stream.error]
        same = [stream.tokens for stream in calm] == [stream.tokens for stream in hurt]
        print(f"{len(failed)} of {2 * NUM_STREAMS} requests failed; the same tokens: {same}")
        for what, streams in (("undisturbed", calm), ("with the kill", hurt)):
            print(f"longest pause {what}: {1000 * max(stream.pause_s for stream in streams):.0f} ms")
        for event in status.events:
            print(f"  {event.at_s - status.events[0].at_s:5.1f} s  {event.kind}: {event.text}")


if __name__ == "__main__":
    main()
