"""Experts are replicated, moved, lost and hosts come and go, while clients generate: nobody notices."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from ray_moe.client.sync import Client
from ray_moe.errors import InsufficientResources, NotFound, Unavailable
from tests.ray.support import Streams, all_ready, await_status, greedy, has_actors, pid_of, prompts

NUM_STREAMS = 16
NUM_TOKENS = 150


@pytest.fixture(scope="module")
def expected(mixtral):
    return greedy(mixtral[0], prompts(NUM_STREAMS), NUM_TOKENS)


@contextmanager
def undisturbed(service, expected, num_tokens=NUM_TOKENS) -> Iterator[Streams]:
    """Streams during which something happens: all end with the right tokens."""
    with Streams(service.address, prompts(len(expected)), num_tokens) as streams:
        streams.wait_for(10)
        yield streams
    assert streams.results == [tokens[:num_tokens] for tokens in expected]
    print(f"longest stall {streams.longest_stall_s:.3f} s")


def hosts_of(client):
    """Names of the hosts of each expert, by layer."""
    return client.placement().placement.hosts_of


# --- deaths --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def service(mixtral, serve_module):
    return serve_module(mixtral[1], experts={"num_actors": 3}, chaos={"enabled": True})


@pytest.fixture
def client(service):
    with Client(service.address) as client:
        await_status(client, all_ready, what="whole")
        yield client


def test_one_actor_dies_and_the_lifeboat_carries_its_experts(service, client, expected):
    before = client.status()
    with undisturbed(service, expected):
        os.kill(before.hosts[0].pid, signal.SIGKILL)
    after = await_status(client, all_ready)
    assert after.router.failed_requests == 0
    assert after.router.lifeboat_loads > before.router.lifeboat_loads
    assert after.router.own_rows > before.router.own_rows
    assert await_status(client, lambda status: status.router.own_bytes == 0, what="empty again").state == "ready"


def test_two_actors_die_at_once(service, client, expected):
    hosts = client.status().hosts
    with undisturbed(service, expected):
        for host in hosts[:2]:
            os.kill(host.pid, signal.SIGKILL)
    assert await_status(client, all_ready).router.failed_requests == 0


def test_the_controller_dies_and_an_actor_with_it(service, client, expected):
    controller, victim = pid_of(service, "controller"), client.status().hosts[1]
    with undisturbed(service, expected):
        os.kill(controller, signal.SIGKILL)
        os.kill(victim.pid, signal.SIGKILL)
    status = await_status(client, all_ready)
    assert status.router.failed_requests == 0
    assert status.hosts[1].pid != victim.pid


def test_a_hung_actor_is_left_aside_and_then_put_down(mixtral, serve, expected):
    service = serve(
        mixtral[1],
        experts={"num_actors": 3},
        router={"expert_call_timeout_s": 3},
        transport={"ping_interval_s": 1, "ping_timeout_s": 1},
    )
    with Client(service.address) as client:
        victim = await_status(client, all_ready).hosts[1]
        with undisturbed(service, expected):
            os.kill(victim.pid, signal.SIGSTOP)
        after = await_status(client, lambda s: all_ready(s) and s.hosts[1].pid != victim.pid, what="repaired")
        assert after.router.hedged_calls > 0
        assert after.router.failed_requests == 0


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
def test_two_six_two_actors_while_clients_generate(mixtral, serve, expected):
    service = serve(mixtral[1], balance={"enabled": True, "every_s": 0.2, "drain_s": 0.5})
    with Client(service.address) as client:
        await_status(client, all_ready)
        for wanted in (6, 2):
            with undisturbed(service, expected):
                client.resize(wanted)
                await_status(client, has_actors(wanted), what=f"{wanted} actors")
                client.plan(dry_run=False)
            used = {host for experts in hosts_of(client).values() for hosts in experts for host in hosts}
            assert len(used) == wanted
        assert client.status().router.failed_requests == 0


def test_a_resize_without_resources_is_rolled_back_and_the_next_one_succeeds(mixtral, serve, expected):
    service = serve(mixtral[1], experts={"num_cpus": 1}, scaling={"start_timeout_s": 12})
    with Client(service.address) as client:
        before = await_status(client, all_ready)
        with undisturbed(service, expected[:4]):
            client.resize(50)
            with pytest.raises(Unavailable, match="another change of the cluster is under way"):
                client.resize(3)
            status = await_status(client, lambda s: not s.changing, what="rolled back")
        assert [host.host_id for host in status.hosts] == [host.host_id for host in before.hosts]
        assert any(event.kind == "aborted" and "not done within 12 s" in event.text for event in status.events)
        client.resize(3)
        await_status(client, has_actors(3), what="three")


def test_what_cannot_be_asked_for(service, client):
    with pytest.raises(NotFound, match="no expert actor and no node 'expert-99'; the actors are expert-0, expert-1"):
        client.drain("expert-99")
    with pytest.raises(InsufficientResources, match="have no room for"):
        client.drain(client.status().hosts[0].node_id)
    assert client.plan(dry_run=True).pause_s == 0.0
    assert await_status(client, all_ready).state == "ready"


def test_an_actor_is_drained_and_another_takes_its_place(mixtral, serve, expected):
    service = serve(mixtral[1], experts={"num_actors": 3, "spare_slots": 8}, balance={"enabled": True, "every_s": 0.2})
    with Client(service.address) as client:
        await_status(client, all_ready)
        with undisturbed(service, expected):
            assert client.drain("expert-1", replace=True) == ("expert-1",)
            status = await_status(client, has_actors(3), what="drained")
        assert [host.host_id for host in status.hosts] == ["expert-0", "expert-2", "expert-3"]
        assert status.router.failed_requests == 0
        assert status.router.lifeboat_loads == 0
