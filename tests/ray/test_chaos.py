"""`ray-moe chaos`: every fault, through the client, with clients at work; the report says how it went."""

from __future__ import annotations

import pytest

from ray_moe.client.sync import Client
from ray_moe.errors import InvalidRequest, NotFound
from ray_moe.types import ChaosRequest
from tests.ray.support import Streams, all_ready, await_status, greedy, prompts

NUM_STREAMS = 8
NUM_TOKENS = 240


@pytest.fixture(scope="module")
def expected(mixtral):
    return greedy(mixtral[0], prompts(NUM_STREAMS), NUM_TOKENS)


@pytest.fixture(scope="module")
def service(mixtral, serve_module):
    return serve_module(
        mixtral[1],
        experts={"num_actors": 3, "spare_slots": 6},
        balance={"enabled": True, "every_s": 0.2, "min_replicas": 2},
        chaos={"enabled": True},
    )


@pytest.fixture
def client(service):
    with Client(service.address) as client:
        await_status(client, lambda s: all_ready(s) and not s.changing, what="whole")
        yield client


@pytest.mark.parametrize("kind", ["kill", "hang", "slow", "corrupt", "partition"])
def test_a_fault_changes_no_answer_and_is_got_over(service, client, expected, kind):
    before = client.status().router
    with Streams(service.address, prompts(NUM_STREAMS), NUM_TOKENS) as streams:
        streams.wait_for(10)
        report = client.chaos(ChaosRequest(kind, duration_s=1.0, seed=3), timeout_s=120)
    assert streams.results == expected
    print(f"{kind}: {report}")
    assert report.failed_requests == 0
    assert report.repaired_s > 0
    assert len(report.targets) == 1
    after = client.status().router
    noticed = {
        "kill": report.retried_calls + report.hedged_calls + after.own_rows - before.own_rows,
        "hang": report.hedged_calls,
        "slow": 1,  # only if it was slow enough
        "corrupt": len([event for event in client.status().events if event.kind == "lost"]),
        "partition": after.retried_calls - before.retried_calls + 1,
    }[kind]
    assert noticed > 0


def test_the_same_seed_hurts_the_same_host(client):
    hurt = [client.chaos(ChaosRequest("slow", duration_s=0.05, factor=1, seed=7)).targets for _ in range(2)]
    assert hurt[0] == hurt[1]


def test_the_controller_is_killed(service, client, expected):
    with Streams(service.address, prompts(NUM_STREAMS), NUM_TOKENS) as streams:
        streams.wait_for(10)
        report = client.chaos(ChaosRequest("kill", "controller"), timeout_s=120)
    assert streams.results == expected
    assert (report.targets, report.failed_requests) == (("controller",), 0)
    assert report.repaired_s > 0


def test_what_cannot_be_hurt(client):
    with pytest.raises(NotFound, match="no expert actor and no node 'expert-77'"):
        client.chaos(ChaosRequest("kill", "expert-77"))
    with pytest.raises(InvalidRequest, match="can only be killed"):
        client.chaos(ChaosRequest("slow", "controller"))
    node_id = client.status().hosts[0].node_id
    with pytest.raises(InvalidRequest, match="the controller is on that node"):
        client.chaos(ChaosRequest("kill", f"node:{node_id}"))
