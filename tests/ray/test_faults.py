"""Processes are killed and hung while clients generate: every stream ends with the tokens it would have had."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack

import pytest

from ray_moe.client.sync import Client
from ray_moe.errors import Unavailable
from tests.ray.support import PROMPT, Streams, all_ready, await_status, greedy, pid_of, prompts, undisturbed

TOP_K = 2
NUM_STREAMS = 16
NUM_TOKENS = 100


@pytest.fixture(scope="module")
def expected(mixtral):
    return greedy(mixtral[0], prompts(NUM_STREAMS), NUM_TOKENS)


@pytest.fixture(scope="module")
def service(mixtral, serve_module):
    return serve_module(mixtral[1], experts={"num_actors": 3})


@pytest.fixture
def client(service):
    with Client(service.address) as client:
        await_status(client, all_ready, what="whole")
        yield client


def test_two_actors_killed_in_turn_are_not_noticed_and_counted_right(service, client, expected):
    before = client.status()
    first, second, _ = before.hosts
    with undisturbed(service, expected) as streams:
        os.kill(first.pid, signal.SIGKILL)
        streams.wait_for(50)
        os.kill(second.pid, signal.SIGKILL)
    after = await_status(client, all_ready)
    restarts = {host.host_id: host.restarts for host in before.hosts}
    assert {host.host_id: host.restarts for host in after.hosts} == {
        **restarts,
        first.host_id: restarts[first.host_id] + 1,
        second.host_id: restarts[second.host_id] + 1,
    }
    assert {host.host_id for host in after.hosts if host.pid in (first.pid, second.pid)} == set()
    assert after.epoch > before.epoch
    assert after.router.failed_requests == 0
    assert after.router.retried_calls > before.router.retried_calls
    assert after.router.pid == before.router.pid
    num_tokens = NUM_STREAMS * (len(PROMPT) + NUM_TOKENS - 1)
    for path, counts in after.tokens_per_expert.items():  # what is sent again is not counted again
        assert sum(counts) - sum(before.tokens_per_expert[path]) == num_tokens * TOP_K


def test_steps_of_two_rows_at_once_go_on_when_an_actor_dies(mixtral, serve, expected):
    service = serve(mixtral[1], router={"overlap_min_tokens": 2})
    with Client(service.address) as client:
        before = client.status()
        with undisturbed(service, expected):
            os.kill(before.hosts[0].pid, signal.SIGKILL)
        after = await_status(client, all_ready)
    assert after.router.failed_requests == 0
    assert after.router.retried_calls > before.router.retried_calls


def test_two_actors_die_at_once_and_the_lifeboat_carries_their_experts(service, client, expected):
    before = client.status()
    with undisturbed(service, expected):
        for host in before.hosts[:2]:
            os.kill(host.pid, signal.SIGKILL)
    after = await_status(client, all_ready)
    assert after.router.failed_requests == 0
    assert after.router.lifeboat_loads > before.router.lifeboat_loads
    assert after.router.own_rows > before.router.own_rows
    assert await_status(client, lambda status: status.router.own_bytes == 0, what="empty again").state == "ready"


def test_the_controller_dies_and_an_actor_with_it(service, client, expected):
    controller, before = pid_of(service, "controller"), client.status()
    with undisturbed(service, expected):
        os.kill(controller, signal.SIGKILL)
        os.kill(before.hosts[1].pid, signal.SIGKILL)
    status = await_status(client, all_ready)
    assert status.router.failed_requests == 0
    assert status.hosts[1].pid != before.hosts[1].pid
    assert status.epoch > before.epoch
    assert pid_of(service, "controller") != controller


def test_the_launcher_dies_and_what_it_had_started_comes_back(service, client, expected):
    """All of it dies with the launcher, the router as well: clients go on where they were when it is there again."""
    launcher, before = pid_of(service, "launcher"), client.status()
    with Streams(service.address, prompts(NUM_STREAMS), NUM_TOKENS, max_attempts=50) as streams:
        streams.wait_for(10)
        os.kill(launcher, signal.SIGKILL)
    assert streams.results == expected
    after = await_status(client, all_ready)
    assert {host.pid for host in after.hosts}.isdisjoint(host.pid for host in before.hosts)
    assert after.router.pid != before.router.pid
    assert after.epoch > before.epoch
    assert any(event.kind == "lost" and "launcher" in event.text for event in after.events)
    assert pid_of(service, "launcher") != launcher


def test_the_router_killed_comes_back_where_it_was(service, client, expected):
    router = client.status().router
    with Streams(service.address, prompts(NUM_STREAMS), NUM_TOKENS, max_attempts=1) as streams:
        streams.wait_for(20)
        os.kill(router.pid, signal.SIGKILL)
    assert [type(error) for error in streams.errors] == [Unavailable] * NUM_STREAMS
    client.wait_ready()
    (prompt,), (tokens,) = prompts(1), expected[:1]
    assert client.generate(token_ids=prompt, max_new_tokens=NUM_TOKENS, ignore_eos=True).token_ids == tokens
    assert await_status(client, all_ready).router.pid != router.pid


def test_of_two_routers_one_is_killed_and_the_other_goes_on_with_its_streams(mixtral, serve, expected):
    service = serve(mixtral[1], router={"num_actors": 2})
    with Client(service.address) as client:
        status = await_status(client, lambda status: sum(router.ready for router in status.routers) == 2, what="told")
    addresses = [router.grpc_address for router in status.routers]
    with ExitStack() as opened:
        one, other = (opened.enter_context(Client(address, discover=False)) for address in addresses)
        before = other.status().router
        with (
            Streams(addresses[1], prompts(NUM_STREAMS), NUM_TOKENS, discover=False) as untouched,
            Streams(addresses, prompts(NUM_STREAMS), NUM_TOKENS) as streams,
        ):
            untouched.wait_for(10)
            streams.wait_for(10)
            os.kill(one.status().router.pid, signal.SIGKILL)
        assert streams.results == untouched.results == expected
        after = other.status().router
        assert (after.pid, after.failed_requests) == (before.pid, 0)
        assert after.generated_tokens - before.generated_tokens > NUM_STREAMS * NUM_TOKENS  # the others' streams, too
        one.wait_ready()
        assert one.status().router.pid != other.status().router.pid


def test_a_hung_actor_is_left_aside_and_then_put_down(mixtral, serve, expected):
    """Ray may not restart it here, so another one is made under its name."""
    service = serve(
        mixtral[1],
        experts={"num_actors": 3, "max_restarts": 0},
        router={"expert_call_timeout_s": 3},
        transport={"ping_interval_s": 1, "ping_timeout_s": 1},
    )
    with Client(service.address) as client:
        victim = await_status(client, all_ready).hosts[1]
        with undisturbed(service, expected):
            os.kill(victim.pid, signal.SIGSTOP)
        after = await_status(client, lambda s: all_ready(s) and s.hosts[1].pid != victim.pid, what="repaired")
        assert after.hosts[1].restarts == 1
        assert after.router.hedged_calls > 0
        assert after.router.failed_requests == 0
