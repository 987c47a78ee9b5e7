"""The fault plan of the in-process transport does what it says, each fault by itself."""

import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from queue import SimpleQueue

import pytest
import torch

from ray_moe.errors import HostLost, StaleRouting
from ray_moe.transport.base import ExpertCall
from ray_moe.transport.local import Fault, FaultPlan
from tests.toy import LAYER, ToyExperts, local_cluster


def call(value, layer=LAYER):
    return ExpertCall(layer, 1, torch.full((1, 8), float(value)), None, None, [0], [1])


@pytest.fixture
def connect():
    transport, table, hosts, _ = local_cluster(ToyExperts(), 1)

    def make(*faults):
        transport.faults = FaultPlan(tuple(Fault(kind, "expert-0", nth, 0.05) for kind, nth in faults))
        return transport, transport.connect(table.addresses["expert-0"]), hosts["expert-0"]

    yield make
    transport.close()


def test_without_faults_calls_are_answered_and_errors_come_back(connect):
    _, connection, _ = connect()
    assert connection.submit(call(1)).result(5).rows.shape == (1, 8)
    with pytest.raises(StaleRouting):
        connection.submit(call(1, layer="elsewhere")).result(5)


def test_a_dropped_call_is_computed_but_never_answered(connect):
    _, connection, host = connect(("drop", 1))
    lost = connection.submit(call(1))
    assert connection.submit(call(2)).result(5).rows.shape == (1, 8)
    with pytest.raises(FutureTimeoutError):
        lost.result(0.05)
    assert host.num_calls == 2


def test_a_reordered_call_is_answered_after_the_next(connect):
    _, connection, _ = connect(("reorder", 1))
    order = []
    first, second = connection.submit(call(1)), None
    first.add_done_callback(lambda _: order.append(1))
    second = connection.submit(call(2))
    second.add_done_callback(lambda _: order.append(2))
    first.result(5)
    assert order == [2, 1]


def test_a_duplicated_call_is_delivered_twice_and_answered_once(connect):
    _, connection, host = connect(("duplicate", 1))
    connection.submit(call(1)).result(5)
    assert host.num_calls == 2


def test_a_slow_host_answers_late_from_that_call_on(connect):
    _, connection, _ = connect(("slow", 2))
    started_s = time.monotonic()
    for number in range(3):
        connection.submit(call(number)).result(5)
    assert time.monotonic() - started_s >= 2 * 0.05


def test_a_corrupted_call_is_answered_with_nan(connect):
    _, connection, _ = connect(("corrupt", 1))
    assert connection.submit(call(1)).result(5).rows.isnan().all()
    assert connection.submit(call(1)).result(5).rows.isfinite().all()


def test_a_kill_fails_every_call_in_flight_and_ends_that_life(connect):
    transport, connection, host = connect(("delay", 1), ("kill", 2))
    dead = connection.address
    killed: SimpleQueue[str] = SimpleQueue()
    transport.on_kill = killed.put
    futures = [connection.submit(call(number)) for number in range(4)]
    for future in futures[1:]:
        with pytest.raises(HostLost):
            future.result(5)
    assert killed.get(timeout=5) == "expert-0"
    assert killed.empty()
    with pytest.raises(HostLost):
        connection.submit(call(9)).result(5)
    with pytest.raises(HostLost):
        transport.connect(dead)
    reborn = transport.revive("expert-0", host)
    assert reborn.incarnation != dead.incarnation
    assert transport.connect(reborn).submit(call(1)).result(5).rows.shape == (1, 8)


def test_a_random_plan_is_the_same_for_the_same_seed():
    plans = [FaultPlan.random(seed, ["a", "b"], num_faults=5, num_calls=20) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    assert len({fault.host_id for fault in plans[0].faults if fault.kind == "corrupt"}) <= 1
    assert all(fault.host_id in ("a", "b") and 1 <= fault.nth <= 20 for fault in plans[0].faults)
