"""A node is killed while clients generate: no request fails, no token differs, and the experts are whole again.

`python examples/elastic_killed_node.py`: three Ray nodes on this machine, as processes; two of them have an expert
actor with a replica of every expert, and one is spare. The raylet of one is killed, and its actor with it.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported; this cluster is on the loopback, for a minute

from ray.cluster_utils import Cluster

from ray_moe import Client, Config, Service
from ray_moe.models.byte_level import ByteModel, write_new
from ray_moe.service.cluster import RAY_ENVIRONMENT
from ray_moe.types import ServiceStatus

NUM_STREAMS, NUM_TOKENS, KILL_AFTER = 4, 400, 50
NODE = {"num_cpus": 1, "resources": {"expert_slot": 1}}
MISSED_SOON = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}


def generate(address: str, number: int, under_way: threading.Event) -> tuple[list[int], float]:
    """Tokens, and the longest time between two of them."""
    tokens: list[int] = []
    pause_s = last_s = 0.0
    try:
        with Client(address) as client:
            for chunk in client.stream(f"def function_{number}(", max_new_tokens=NUM_TOKENS, ignore_eos=True):
                now_s = time.monotonic()
                pause_s, last_s = max(pause_s, now_s - (last_s or now_s)), now_s
                tokens += chunk.token_ids
                if len(tokens) >= KILL_AFTER:
                    under_way.set()
    finally:
        under_way.set()
    return tokens, pause_s


def load(address: str, disturb: Callable[[], None]) -> list[Future[tuple[list[int], float]]]:
    """Several generations at a time, all of which have ended, and something that happens in the middle of them."""
    under_way = threading.Event()
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(generate, address, number, under_way) for number in range(NUM_STREAMS)]
        under_way.wait()
        disturb()
    return streams


def await_two_replicas(client: Client, timeout_s: float = 60) -> ServiceStatus:
    """The status when every expert is on two actors that are there."""
    end_by = time.monotonic() + timeout_s
    while time.monotonic() < end_by:
        status, table = client.status(), client.placement()
        there = {host.host_id for host in status.hosts if host.state == "ready"}
        if all(len(there & set(hosts)) == 2 for experts in table.placement.hosts_of.values() for hosts in experts):
            return status
        time.sleep(0.1)
    raise SystemExit(f"not two replicas of every expert after {timeout_s:g} s: {client.status()}")


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
        nodes = {host.node_id for host in await_two_replicas(client).hosts}
        node = next(node for node in cluster.worker_nodes if node.node_id in nodes)
        print("every expert is on two nodes; a third one is spare", flush=True)

        def kill() -> None:
            cluster.remove_node(node, allow_graceful=False)
            print(f"node {node.node_id[:8]} is killed", flush=True)

        calm, hurt = load(service.address, lambda: None), load(service.address, kill)
        events = await_two_replicas(client).events
    failed = [error for error in (stream.exception() for stream in (*calm, *hurt)) if error]
    print(f"{len(failed)} of {2 * NUM_STREAMS} requests failed", *failed, sep="\n  ")
    if not failed:
        print(f"the same tokens: {[stream.result()[0] for stream in calm] == [stream.result()[0] for stream in hurt]}")
        for what, streams in (("undisturbed", calm), ("with the kill", hurt)):
            print(f"longest pause {what}: {1000 * max(stream.result()[1] for stream in streams):.0f} ms")
    for event in events:
        print(f"  {event.at_s - events[0].at_s:5.1f} s  {event.kind}: {event.text}")


def main() -> None:
    os.environ.update(RAY_ENVIRONMENT)
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": MISSED_SOON})
    try:
        for _ in range(2):
            cluster.add_node(**NODE)
        with tempfile.TemporaryDirectory() as folder:
            write_new(Path(folder), ByteModel(hidden_size=64, num_layers=2, expert_width=64))
            look(cluster, folder)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
