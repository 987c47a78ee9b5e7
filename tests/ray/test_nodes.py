"""Whole nodes are lost, or say that they are going, while clients generate."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from ray_moe.client.sync import Client
from ray_moe.errors import InvalidRequest, NotFound
from ray_moe.types import ChaosRequest
from tests.ray.support import Streams, all_ready, await_status, greedy, prompts

NUM_STREAMS = 16
NUM_TOKENS = 120


@pytest.fixture(scope="module")
def expected(mixtral):
    return greedy(mixtral[0], prompts(NUM_STREAMS), NUM_TOKENS)


@pytest.fixture
def two_nodes(add_node, mixtral, serve):
    """A service with two actors on each of two nodes, and none beside the router."""
    nodes = [add_node(4, zone="a"), add_node(4, zone="b")]
    service = serve(
        mixtral[1],
        experts={"num_actors": 4, "num_cpus": 0, "resources": {"expert_slot": 1}, "spare_slots": 6},
        balance={"enabled": True, "every_s": 0.2, "min_replicas": 2, "domain_label": "zone", "return_s": 1},
        chaos={"enabled": True},
    )
    with Client(service.address) as client:

        def spread(status):
            node_of = {host.host_id: host.node_id for host in status.hosts}
            return (
                all_ready(status)
                and not status.changing
                and all(
                    len({node_of[host] for host in hosts}) == 2
                    for experts in client.placement().placement.hosts_of.values()
                    for hosts in experts
                )
            )

        status = await_status(client, spread, what="with two replicas of each expert on two nodes")
        assert status.p_lossless == 1.0
        yield service, client, nodes


def on_node(status, node_id):
    return [host for host in status.hosts if host.node_id == node_id]


def test_a_whole_node_is_killed(two_nodes, expected):
    service, client, nodes = two_nodes
    before = client.status()
    lost = next(node for node in nodes if on_node(before, node.node_id))
    with Streams(service.address, prompts(NUM_STREAMS), NUM_TOKENS) as streams:
        streams.wait_for(10)
        os.kill(lost.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    assert streams.results == expected
    print(f"longest stall {streams.longest_stall_s:.3f} s")
    after = await_status(
        client, lambda s: all_ready(s) and not on_node(s, lost.node_id) and not s.changing, what="on the other node"
    )
    assert len(after.hosts) == 4
    assert after.router.failed_requests == 0
    assert after.router.lifeboat_loads == 0


def test_chaos_kills_a_node_and_reports(two_nodes, expected):
    service, client, _ = two_nodes
    before = client.status()
    target = f"node:{before.hosts[0].node_id[:16]}"
    with Streams(service.address, prompts(NUM_STREAMS), NUM_TOKENS) as streams:
        streams.wait_for(10)
        report = client.chaos(ChaosRequest("kill", target), timeout_s=120)
    assert streams.results == expected
    assert report.failed_requests == 0
    assert report.repaired_s > 0
    assert set(report.targets) == {host.host_id for host in on_node(before, before.hosts[0].node_id)}
    assert not on_node(client.status(), before.hosts[0].node_id)
    head = ray.get_runtime_context().get_node_id()
    with pytest.raises((InvalidRequest, NotFound)):
        client.chaos(ChaosRequest("kill", f"node:{head}"))


def test_a_node_that_is_going_is_left_in_time(two_nodes, expected, local_ray):
    """As when a spot machine is taken back: Ray has been told, and tells."""
    service, client, nodes = two_nodes
    going = nodes[0].node_id
    with Streams(service.address, prompts(NUM_STREAMS), NUM_TOKENS) as streams:
        streams.wait_for(10)
        command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", local_ray.address]
        command += ["--node-id", going, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "spot", "--deadline-remaining-seconds", "300"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        status = await_status(
            client,
            lambda s: all_ready(s) and not s.changing and not on_node(s, going) and len(s.hosts) == 4,
            what="off the node",
        )
    assert streams.results == expected
    assert status.router.failed_requests == 0
    assert status.router.lifeboat_loads == 0
    assert any("their nodes are going" in event.text for event in status.events if event.kind == "resizing")
