"""Whole nodes are lost, or say that they are going, while clients generate."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from ray_moe.client.sync import Client
from ray_moe.errors import HostLost, InvalidRequest, NotFound
from ray_moe.transport.stream_transport import StreamTransport
from ray_moe.types import ChaosRequest
from tests.ray.support import await_status, greedy, has_actors, prompts, undisturbed

NUM_STREAMS = 16
NUM_TOKENS = 100


@pytest.fixture(scope="module")
def expected(mixtral):
    return greedy(mixtral[0], prompts(NUM_STREAMS), NUM_TOKENS)


@pytest.fixture(scope="module")
def add(add_node):
    """Adds a node with room for two actors, in a zone that is its own."""
    zones = itertools.count()
    return lambda: add_node(2, zone=f"zone-{next(zones)}")


@pytest.fixture(scope="module")
def service(add, mixtral, serve_module):
    """With two actors on each of two nodes, and none beside the router."""
    add(), add()
    return serve_module(
        mixtral[1],
        experts={"num_actors": 4, "num_cpus": 0, "resources": {"expert_slot": 1}, "spare_slots": 6},
        balance={"enabled": True, "every_s": 0.2, "min_replicas": 2, "domain_label": "zone", "return_s": 1},
        transport={"tls": True},
        chaos={"enabled": True},
    )


@pytest.fixture
def client(service):
    with Client(service.address) as client:

        def doubled(status):
            node_of = {host.host_id: host.node_id for host in status.hosts}
            return has_actors(4)(status) and all(
                len({node_of.get(host) for host in hosts}) == 2
                for experts in client.placement().placement.hosts_of.values()
                for hosts in experts
            )

        status = await_status(client, doubled, what="with two replicas of each expert on two nodes")
        assert status.p_lossless == 1.0
        yield client


def on_node(status, node_id):
    return [host for host in status.hosts if host.node_id == node_id]


def leave(client, node_id, what):
    return await_status(client, lambda s: has_actors(4)(s) and not on_node(s, node_id), what=what)


def test_hosts_answer_other_nodes_only_over_encrypted_lines(client):
    for address in client.placement().addresses.values():
        with pytest.raises(HostLost, match="perhaps the host expects an encrypted line"):
            StreamTransport("a token").connect(address)


def test_a_whole_node_is_killed(service, client, expected, local_ray, add):
    before = client.status()
    node_id = before.hosts[0].node_id
    (lost,) = (node for node in local_ray.worker_nodes if node.node_id == node_id)
    add()
    with undisturbed(service, expected):
        os.kill(lost.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    after = leave(client, node_id, "on the other nodes")
    assert after.router.failed_requests == 0
    assert after.router.lifeboat_loads == before.router.lifeboat_loads


def test_chaos_kills_a_node_and_reports(service, client, expected, add):
    before = client.status()
    node_id = before.hosts[0].node_id
    add()
    with undisturbed(service, expected):
        report = client.chaos(ChaosRequest("kill", f"node:{node_id[:16]}"), timeout_s=120)
    assert report.failed_requests == 0
    assert report.repaired_s > 0
    assert set(report.targets) == {host.host_id for host in on_node(before, node_id)}
    assert not on_node(client.status(), node_id)
    head = ray.get_runtime_context().get_node_id()
    with pytest.raises((InvalidRequest, NotFound)):
        client.chaos(ChaosRequest("kill", f"node:{head}"))


def test_a_node_that_is_going_is_left_in_time(service, client, expected, local_ray, add):
    """As when a spot machine is taken back: Ray has been told, and tells."""
    before = client.status()
    going = before.hosts[0].node_id
    add()
    with undisturbed(service, expected):
        command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", local_ray.address]
        command += ["--node-id", going, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "spot", "--deadline-remaining-seconds", "300"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        status = leave(client, going, "off the node")
    assert status.router.failed_requests == 0
    assert status.router.lifeboat_loads == before.router.lifeboat_loads
    assert any("their nodes are going" in event.text for event in status.events if event.kind == "resizing")
