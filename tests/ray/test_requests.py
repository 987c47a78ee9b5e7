"""Clients that go away, and clients that are too many."""

from __future__ import annotations

import pytest
import ray

from ray_moe.client.sync import Client
from ray_moe.errors import Cancelled, Overloaded
from ray_moe.service.composition import Service
from tests.ray.support import PROMPT, Streams, await_status, greedy, make_config, no_leaks, prompts

LONG = 1900
"""Tokens that no test waits for."""


@pytest.fixture(scope="module")
def service(mixtral, serve_module):
    return serve_module(
        mixtral[1], experts={"num_actors": 1}, router={"max_concurrent_requests": 3, "max_queued_requests": 0}
    )


def test_clients_that_go_away_are_not_served_further(mixtral, service):
    expected = greedy(mixtral[0], prompts(1), 200)
    with Client(service.address) as client:
        with Streams(service.address, prompts(1), 200) as unharmed:
            unharmed.wait_for(5)
            closed = client.stream(token_ids=PROMPT, max_new_tokens=LONG, ignore_eos=True)
            leaving = Client(service.address)
            left = leaving.stream(token_ids=PROMPT, max_new_tokens=LONG, ignore_eos=True)
            for _ in range(3):
                next(closed)
                next(left)
            assert client.status().router.active_requests == 3
            closed.close()  # a generation given up
            leaving.close()  # a connection that ends
            with pytest.raises(Cancelled):
                list(left)
            await_status(client, lambda status: status.router.active_requests <= 1, 5, "cancelled")
        assert unharmed.results == expected
        status = await_status(client, lambda status: status.router.active_requests == 0, 5, "idle")
        assert status.router.queued_requests == 0
        num_tokens = status.router.generated_tokens
        assert client.status().router.generated_tokens == num_tokens


def test_one_request_too_many_is_refused(service):
    with Client(service.address) as client:
        running = [client.stream(token_ids=PROMPT, max_new_tokens=LONG, ignore_eos=True) for _ in range(3)]
        for stream in running:
            next(stream)
        with pytest.raises(Overloaded, match="3 requests are running and 0 waiting; retry later"):
            client.generate(token_ids=PROMPT, max_new_tokens=2)
        assert all(len(next(stream).token_ids) == 1 for stream in running)  # unharmed
        for stream in running:
            stream.close()
        await_status(client, lambda status: status.router.active_requests == 0, 5, "idle")
        assert len(client.generate(token_ids=PROMPT, max_new_tokens=2, ignore_eos=True).token_ids) == 2


def test_a_service_stops_while_streams_run(mixtral):
    """What runs gets its grace and then a clear end. Until then, the check for leaks finds what there is."""
    config = make_config(mixtral[1], {"experts": {"num_actors": 1}, "server": {"grace_s": 0.2}})
    service = Service(config)
    with no_leaks(config.service_name):
        with (
            pytest.raises(AssertionError, match=r"processes.*ExpertActor.*actors.*/expert-0.*sockets.*@ray-moe-"),
            no_leaks(config.service_name, timeout_s=0.1),
        ):
            service.start()
        with Streams(service.address, prompts(2), LONG) as streams:
            streams.wait_for(5)
            service.stop()
        assert {type(error).__name__ for error in streams.errors} == {"Unavailable"}
        service.stop()


def test_actors_that_only_coordinate_do_not_load_torch(service):
    for role in ("launcher", "controller"):
        actor = ray.get_actor(f"{service.config.service_name}/{role}")
        loaded = ray.get(actor.__ray_call__.remote(lambda _: set(__import__("sys").modules)))
        assert "ray_moe.service.grpc.server" in loaded
        assert not {"torch", "transformers"} & loaded, f"the {role} loads what it does not need"
