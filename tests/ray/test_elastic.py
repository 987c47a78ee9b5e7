"""Experts are replicated, moved, lost and hosts come and go, while clients generate: nobody notices."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest

from ray_moe.client.sync import Client
from ray_moe.errors import InsufficientResources, InvalidConfig, InvalidRequest, NotFound, Unavailable
from ray_moe.types import ChaosRequest
from tests.ray.support import all_ready, await_rest, await_status, greedy, has_actors, prompts, undisturbed

NUM_STREAMS = 16
NUM_TOKENS = 100


@pytest.fixture(scope="module")
def expected(mixtral):
    return greedy(mixtral[0], prompts(NUM_STREAMS), NUM_TOKENS)


def hosts_of(client):
    """Names of the hosts of each expert, by layer."""
    return client.placement().placement.hosts_of


# --- replicas ------------------------------------------------------------------------------------------------
def test_a_hot_expert_gets_a_replica_and_both_serve(mixtral, serve):
    model, folder = mixtral
    service = serve(folder, balance={"enabled": True, "every_s": 0.2, "half_life_s": 0.5})
    with Client(service.address) as client:
        layer, experts = next(iter(hosts_of(client).items()))
        assert [len(hosts) for hosts in experts] == [1] * len(experts)
        rng = np.random.default_rng(0)
        hidden = rng.standard_normal((512, model.config.hidden_size), dtype=np.float32)
        index = rng.integers(0, len(experts), (512, 1))
        index[rng.random(512) < 0.8] = 0
        weight = np.ones((512, 1), dtype=np.float32)
        first = client.forward(layer, hidden, index, weight)

        stop = threading.Event()
        asking = threading.Thread(target=lambda: _ask_until(client, stop, layer, hidden, index, weight, first))
        asking.start()
        began_s = time.monotonic()
        try:
            await_status(client, lambda _: len(hosts_of(client)[layer][0]) == 2, what="replicated")
            print(f"replicated and routed to after {time.monotonic() - began_s:.2f} s")
            rows = {host.host_id: host.num_rows for host in client.status().hosts}
            await_status(
                client,
                lambda status: all(host.num_rows > rows[host.host_id] + 2048 for host in status.hosts),
                what="serving from both",
            )
            status = await_status(client, lambda status: status.router.balancedness > 0.95, what="balanced")
        finally:
            stop.set()
            asking.join()
        assert "replicated" in {event.kind for event in status.events}


def _ask_until(client, stop, layer, hidden, index, weight, expected) -> None:
    while not stop.is_set():
        np.testing.assert_allclose(client.forward(layer, hidden, index, weight), expected, rtol=1e-5, atol=1e-6)


def test_with_two_replicas_of_everything_no_expert_is_ever_missing(mixtral, serve, expected):
    service = serve(
        mixtral[1],
        experts={"num_actors": 3, "spare_slots": 8},
        balance={"enabled": True, "every_s": 0.2, "min_replicas": 2},
        router={"lifeboat_bytes": 0},
    )
    with Client(service.address) as client:

        def doubled(status):
            return (
                all_ready(status)
                and not status.changing
                and all(len(hosts) >= 2 for experts in hosts_of(client).values() for hosts in experts)
            )

        before = await_status(client, doubled, what="doubled")
        assert before.p_lossless == 1.0 or len({host.node_id for host in before.hosts}) == 1
        with undisturbed(service, expected):
            os.kill(before.hosts[0].pid, signal.SIGKILL)
        assert await_status(client, doubled, what="doubled again").router.failed_requests == 0


def test_the_routers_cache_computes_the_hottest_experts(mixtral, serve, expected):
    service = serve(
        mixtral[1], balance={"enabled": False, "every_s": 0.1}, router={"expert_cache_bytes": 2**30, "num_cpus": 0.1}
    )
    with Client(service.address) as client:
        with undisturbed(service, expected[:2]):
            pass
        total = sum(host.weight_bytes for host in client.status().hosts)
        await_status(client, lambda status: status.router.own_bytes == total, what="cached whole")
        rows = [host.num_rows for host in client.status().hosts]
        with undisturbed(service, expected[:2], 50):
            pass
        assert [host.num_rows for host in client.status().hosts] == rows


# --- more and fewer ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def service(mixtral, serve_module):
    """Two actors of a CPU each, which follow the load; there is room for six or seven."""
    return serve_module(
        mixtral[1],
        experts={"num_cpus": 1, "spare_slots": 8},
        balance={"enabled": True, "every_s": 0.2, "drain_s": 0.5},
        scaling={"start_timeout_s": 30},
    )


@pytest.fixture
def client(service):
    with Client(service.address) as client:
        await_rest(client, 2)
        yield client


def carry_out_a_plan(client):
    """As soon as nothing else changes the cluster: it balances itself, too."""
    until_s = time.monotonic() + 30
    while True:
        try:
            client.plan(dry_run=False)
            return
        except Unavailable:
            assert time.monotonic() < until_s
            time.sleep(0.05)


def test_two_four_two_actors_while_clients_generate(service, client, expected):
    for wanted in (4, 2):
        with undisturbed(service, expected):
            client.resize(wanted)
            await_status(client, has_actors(wanted), what=f"{wanted} actors")
            carry_out_a_plan(client)
        used = {host for experts in hosts_of(client).values() for hosts in experts for host in hosts}
        assert len(used) == wanted
    assert client.status().router.failed_requests == 0


def test_a_resize_without_resources_is_rolled_back_and_the_next_one_succeeds(service, client, expected):
    before = client.status()
    with undisturbed(service, expected[:4]):
        client.resize(50)
        with pytest.raises(Unavailable, match="another change of the cluster is under way"):
            client.resize(3)
        status = await_status(client, lambda s: not s.changing, what="rolled back")
    assert [host.host_id for host in status.hosts] == [host.host_id for host in before.hosts]
    assert any(event.kind == "aborted" and "not done within 30 s" in event.text for event in status.events)
    client.resize(3)
    await_status(client, has_actors(3), what="three")
    client.resize(2)


def test_a_resize_during_which_an_actor_dies_ends_well(service, client, expected):
    with undisturbed(service, expected):
        client.resize(4)
        os.kill(client.status().hosts[0].pid, signal.SIGKILL)
        status = await_status(client, lambda s: all_ready(s) and not s.changing, what="settled")
    assert len(status.hosts) in (2, 4)  # it may be undone
    client.resize(3)
    await_status(client, has_actors(3), what="three")
    assert client.status().router.failed_requests == 0
    client.resize(2)


def test_an_actor_is_drained_and_another_takes_its_place(service, client, expected):
    before = client.status()
    going, kept = (host.host_id for host in before.hosts)
    with undisturbed(service, expected):
        assert client.drain(going, replace=True) == (going,)
        status = await_status(client, has_actors(2), what="drained")
    hosts = {host.host_id for host in status.hosts}
    assert kept in hosts
    assert going not in hosts
    assert status.router.failed_requests == 0
    assert status.router.lifeboat_loads == before.router.lifeboat_loads


def test_what_cannot_be_asked_for(service, client):
    names = ", ".join(host.host_id for host in client.status().hosts)
    with pytest.raises(NotFound, match=f"no expert actor and no node 'expert-99'; the actors are {names}"):
        client.drain("expert-99")
    with pytest.raises(InsufficientResources, match="have no room for"):
        client.drain(client.status().hosts[0].node_id)
    with pytest.raises(InvalidRequest, match="num_actors is -1; expected 0 to"):
        client.resize(-1)
    with pytest.raises(InvalidConfig, match="may not be hurt"):
        client.chaos(ChaosRequest("kill"))
    assert client.plan(dry_run=True).pause_s == 0.0
    assert await_status(client, all_ready).state == "ready"
