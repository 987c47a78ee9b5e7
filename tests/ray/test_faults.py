"""Actors are killed and hung while streams run: every stream ends with the tokens it would have had."""

from __future__ import annotations

import os
import signal

import pytest

from ray_moe.client.sync import Client
from ray_moe.errors import Unavailable
from tests.ray.support import PROMPT, Streams, all_ready, await_status, greedy, pid_of, prompts

TOP_K = 2
NUM_STREAMS = 8
NUM_TOKENS = 160


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


def test_actors_killed_under_load_are_not_noticed(service, client, expected):
    before = client.status()
    first, second, _ = before.hosts
    with Streams(service.address, prompts(NUM_STREAMS), NUM_TOKENS) as streams:
        streams.wait_for(20)
        os.kill(first.pid, signal.SIGKILL)
        streams.wait_for(80)
        os.kill(second.pid, signal.SIGKILL)
    assert streams.results == expected
    after = await_status(client, all_ready)
    print(f"longest stall {streams.longest_stall_s:.2f} s")

    restarts = {host.host_id: host.restarts for host in before.hosts}
    assert {host.host_id: host.restarts for host in after.hosts} == {
        **restarts,
        first.host_id: restarts[first.host_id] + 1,
        second.host_id: restarts[second.host_id] + 1,
    }
    assert {host.host_id for host in after.hosts if host.pid in (first.pid, second.pid)} == set()
    assert after.epoch > before.epoch
    assert after.router.retried_calls > before.router.retried_calls
    assert after.router.pid == before.router.pid
    num_tokens = NUM_STREAMS * (len(PROMPT) + NUM_TOKENS - 1)
    for path, counts in after.tokens_per_expert.items():  # what is sent again is not counted again
        assert sum(counts) - sum(before.tokens_per_expert[path]) == num_tokens * TOP_K


def test_the_controller_killed_is_not_noticed_and_repairs_afterwards(service, client, expected):
    controller = pid_of(service, "controller")
    with Streams(service.address, prompts(NUM_STREAMS), NUM_TOKENS) as streams:
        streams.wait_for(20)
        os.kill(controller, signal.SIGKILL)
    assert streams.results == expected
    status = await_status(client, all_ready)
    assert pid_of(service, "controller") != controller

    victim = status.hosts[2]
    with Streams(service.address, prompts(NUM_STREAMS), NUM_TOKENS) as streams:
        streams.wait_for(20)
        os.kill(victim.pid, signal.SIGKILL)
    assert streams.results == expected
    after = await_status(client, all_ready)
    assert after.epoch > status.epoch
    assert after.hosts[2].pid not in (0, victim.pid)


def test_actor_and_controller_killed_together(service, client, expected):
    status = client.status()
    with Streams(service.address, prompts(NUM_STREAMS), NUM_TOKENS) as streams:
        streams.wait_for(20)
        os.kill(pid_of(service, "controller"), signal.SIGKILL)
        os.kill(status.hosts[0].pid, signal.SIGKILL)
    assert streams.results == expected
    assert await_status(client, all_ready).hosts[0].pid != status.hosts[0].pid


def test_the_router_killed_comes_back_where_it_was(service, client, expected):
    router = client.status().router
    with Streams(service.address, prompts(NUM_STREAMS), NUM_TOKENS) as streams:
        streams.wait_for(20)
        os.kill(router.pid, signal.SIGKILL)
    assert [type(error) for error in streams.errors] == [Unavailable] * NUM_STREAMS
    client.wait_ready()
    (prompt,), (tokens,) = prompts(1), expected[:1]
    assert client.generate(token_ids=prompt, max_new_tokens=NUM_TOKENS, ignore_eos=True).token_ids == tokens
    assert await_status(client, all_ready).router.pid != router.pid


def test_a_hung_actor_is_put_down(mixtral, serve, expected):
    """Ray may not restart it here, so another one is made under its name."""
    service = serve(
        mixtral[1],
        experts={"num_actors": 2, "max_restarts": 0},
        router={"expert_call_timeout_s": 2},
        transport={"ping_interval_s": 1, "ping_timeout_s": 1},
    )
    with Client(service.address) as client:
        victim = client.status().hosts[1]
        with Streams(service.address, prompts(NUM_STREAMS), NUM_TOKENS) as streams:
            streams.wait_for(20)
            os.kill(victim.pid, signal.SIGSTOP)
        assert streams.results == expected
        after = await_status(client, all_ready).hosts[1]
        assert after.pid != victim.pid
        assert after.restarts == 1
