import threading
import time

import pytest
import torch

from ray_moe.errors import ExpertFailed, InvalidRequest, NotFound, Unavailable
from ray_moe.runtime import exchange
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.runtime.settings import DispatchSettings
from ray_moe.transport.local import Fault, FaultPlan
from ray_moe.types import HostAddress, RoutingTable
from tests.toy import LAYER, ToyExperts, local_cluster, random_routing
from tests.unit.runtime.repairing import Repairing


def batch(num_tokens=11, num_experts=6, top_k=2, width=8, dtype=torch.float32, sentinels=True):
    hidden = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(num_tokens)).to(dtype)
    return hidden, *random_routing(num_tokens, num_experts, top_k, seed=num_tokens, sentinels=sentinels)


@pytest.mark.parametrize("num_hosts", [1, 2, 3, 6])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 40])
@pytest.mark.parametrize("combine", ["router", "host"])
def test_forward_equals_the_plain_loop(num_hosts, num_tokens, combine):
    module = ToyExperts()
    transport, table, _, _ = local_cluster(module, num_hosts)
    dispatcher = ExpertDispatcher(transport, DispatchSettings(combine=combine))
    dispatcher.update(table)
    hidden, index, weight = batch(num_tokens)
    with torch.no_grad():
        out = dispatcher.forward(LAYER, hidden, index, weight)
        torch.testing.assert_close(out, module.oracle(hidden, index, weight))
    transport.close()


def test_tokens_are_counted_per_expert_and_no_expert_is_not():
    transport, table, _, _ = local_cluster(ToyExperts(), 2)
    dispatcher = ExpertDispatcher(transport)
    dispatcher.update(table)
    index = torch.tensor([[0, 5], [5, 6], [5, 1]])
    with torch.no_grad():
        dispatcher.forward(LAYER, torch.randn(3, 8), index, torch.ones(3, 2))
    assert dispatcher.tokens_per_expert[LAYER].tolist() == [1, 1, 0, 0, 0, 3]
    transport.close()


@pytest.mark.parametrize("combine", ["router", "host"])
def test_what_serves_computes_with_gradients_enabled_and_gives_none(combine):
    module = ToyExperts()
    transport, table, _, _ = local_cluster(module, 2)
    dispatcher = ExpertDispatcher(transport, DispatchSettings(combine=combine))
    dispatcher.update(table)
    hidden, index, weight = batch()
    out = dispatcher.forward(LAYER, hidden, index, weight)
    torch.testing.assert_close(out, module.oracle(hidden, index, weight))
    assert not out.requires_grad
    for needs in (hidden, weight):
        needs.requires_grad_()
        with pytest.raises(InvalidRequest, match="no_grad"):
            dispatcher.forward(LAYER, hidden, index, weight)
        with torch.no_grad():
            dispatcher.forward(LAYER, hidden, index, weight)
        needs.requires_grad_(False)
    transport.close()


@pytest.mark.parametrize("combine", ["router", "host"])
def test_there_is_time_for_something_else_while_hosts_compute(combine, monkeypatch):
    module = ToyExperts()
    transport, table, hosts, _ = local_cluster(module, 2)
    dispatcher = ExpertDispatcher(transport, DispatchSettings(combine=combine))
    dispatcher.update(table)
    began, may_answer = threading.Barrier(3), threading.Event()
    for host in hosts.values():

        def run(calls, compute=host.run):
            began.wait(10)
            assert may_answer.wait(10)
            return compute(calls)

        monkeypatch.setattr(host, "run", run)

    def meanwhile():
        began.wait(10)  # both hosts are at it
        may_answer.set()

    hidden, index, weight = batch(40)
    with torch.no_grad():
        out = dispatcher.forward(LAYER, hidden, index, weight, meanwhile=meanwhile)
    assert may_answer.is_set()
    torch.testing.assert_close(out, module.oracle(hidden, index, weight))
    transport.close()


def test_what_fails_meanwhile_fails_the_batch_and_leaves_nothing_open():
    transport, table, _, _ = local_cluster(ToyExperts(), 2)
    dispatcher = ExpertDispatcher(transport)
    dispatcher.update(table)

    def meanwhile():
        raise ZeroDivisionError

    hidden, index, weight = batch(40)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            dispatcher.forward(LAYER, hidden, index, weight, meanwhile=meanwhile)
        dispatcher.forward(LAYER, hidden, index, weight)
    assert set(dispatcher.rows_in_flight.values()) == {0}
    transport.close()


@pytest.mark.parametrize("lifeboat", [0, 6])
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("seed", range(7))
def test_no_fault_plan_changes_an_answer(seed, num_replicas, lifeboat):
    module = ToyExperts()
    cluster = Repairing(module, 3, num_replicas, lifeboat)
    plan = FaultPlan.random(seed, [f"expert-{n}" for n in range(3)], num_faults=4, num_calls=8)
    if num_replicas == 1 and not lifeboat:  # nobody could tell damage from what the model computes
        plan = FaultPlan(tuple(fault for fault in plan.faults if fault.kind != "corrupt"))
    cluster.transport.faults = plan
    with torch.no_grad():
        for step in range(8):
            hidden, index, weight = batch(num_tokens=5 + step)
            out = cluster.dispatcher.forward(LAYER, hidden, index, weight)
            torch.testing.assert_close(out, module.oracle(hidden, index, weight))
    cluster.close()


def test_a_hung_host_is_reported_once_and_its_rows_go_elsewhere():
    module = ToyExperts()
    cluster = Repairing(module, 2)
    cluster.transport.faults = FaultPlan((Fault("drop", "expert-1", nth=1),))
    hidden, index, weight = batch(num_tokens=20)
    with torch.no_grad():
        out = cluster.dispatcher.forward(LAYER, hidden, index, weight)
    torch.testing.assert_close(out, module.oracle(hidden, index, weight))
    assert [address.host_id for address in cluster.losses] == ["expert-1"]
    assert cluster.dispatcher.num_retried_calls == 1
    cluster.transport.close()


def test_a_host_that_cannot_be_dialled_is_reported():
    module = ToyExperts()
    transport, table, _, _ = local_cluster(module, 2)
    reported: list[HostAddress] = []
    dispatcher = ExpertDispatcher(transport, DispatchSettings(recovery_timeout_s=0.3), on_lost=reported.append)
    dispatcher.update(table)
    transport.kill("expert-1")
    hidden, index, weight = batch(num_tokens=20)
    with torch.no_grad(), pytest.raises(Unavailable):
        dispatcher.forward(LAYER, hidden, index, weight)
    assert reported == [table.addresses["expert-1"]]
    transport.close()


def test_a_slow_host_is_not_a_lost_one(monkeypatch):
    monkeypatch.setattr(exchange, "MAX_ROWS_PER_CALL", 4)
    module = ToyExperts()
    transport, table, hosts, _ = local_cluster(module, 1)
    run = hosts["expert-0"].run

    def slow_run(calls):
        time.sleep(0.05)
        return run(calls)

    monkeypatch.setattr(hosts["expert-0"], "run", slow_run)
    lost: list[HostAddress] = []
    dispatcher = ExpertDispatcher(transport, DispatchSettings(call_timeout_s=0.2), on_lost=lost.append)
    dispatcher.update(table)
    hidden, index, weight = batch(num_tokens=30)
    with torch.no_grad():
        out = dispatcher.forward(LAYER, hidden, index, weight)  # 15 calls and more, one after the other
    torch.testing.assert_close(out, module.oracle(hidden, index, weight))
    assert lost == []
    transport.close()


@pytest.mark.parametrize("max_rows", [1, 3, 7])
def test_cutting_changes_no_answer(monkeypatch, max_rows):
    monkeypatch.setattr(exchange, "MAX_ROWS_PER_CALL", max_rows)
    test_forward_equals_the_plain_loop(2, 40, "router")
    test_forward_equals_the_plain_loop(2, 40, "host")


def test_rows_wait_for_a_host_that_is_on_its_way():
    module = ToyExperts()
    transport, table, _, _ = local_cluster(module, 2)
    dispatcher = ExpertDispatcher(transport, DispatchSettings(recovery_timeout_s=10))
    only_one = {"expert-0": table.addresses["expert-0"]}
    dispatcher.update(RoutingTable(1, table.placement, only_one))
    later = threading.Timer(0.15, lambda: dispatcher.update(RoutingTable(2, table.placement, table.addresses)))
    later.start()
    hidden, index, weight = batch(num_tokens=20)
    with torch.no_grad():
        out = dispatcher.forward(LAYER, hidden, index, weight)
    torch.testing.assert_close(out, module.oracle(hidden, index, weight))
    later.join()
    transport.close()


def test_experts_that_never_come_back_end_the_batch_with_a_clear_error():
    module = ToyExperts()
    transport, table, _, _ = local_cluster(module, 2)
    dispatcher = ExpertDispatcher(transport, DispatchSettings(recovery_timeout_s=0.2))
    dispatcher.update(RoutingTable(1, table.placement, {"expert-0": table.addresses["expert-0"]}))
    hidden, index, weight = batch(num_tokens=20)
    started = time.monotonic()
    with torch.no_grad(), pytest.raises(Unavailable, match=r"experts \[3, 4, 5\] of model.layers.0"):
        dispatcher.forward(LAYER, hidden, index, weight)
    assert time.monotonic() - started < 5
    transport.close()


def test_an_older_table_is_ignored():
    transport, table, _, _ = local_cluster(ToyExperts(), 2)
    dispatcher = ExpertDispatcher(transport)
    dispatcher.update(RoutingTable(7, table.placement, table.addresses))
    dispatcher.update(RoutingTable(6, table.placement, {}))
    assert dispatcher.table.epoch == 7
    assert dispatcher.table.addresses == table.addresses


def test_an_unknown_layer_is_named():
    transport, table, _, _ = local_cluster(ToyExperts(), 2)
    dispatcher = ExpertDispatcher(transport)
    dispatcher.update(table)
    with torch.no_grad(), pytest.raises(NotFound, match=LAYER):
        dispatcher.forward("model.layers.9.mlp.experts", *batch())


def test_an_expert_that_raises_fails_the_batch_and_no_other():
    transport, table, _, _ = local_cluster(ToyExperts(), 2)
    dispatcher = ExpertDispatcher(transport)
    dispatcher.update(table)
    with torch.no_grad():
        with pytest.raises(ExpertFailed, match=r"host expert-[01]"):
            dispatcher.forward(LAYER, torch.randn(3, 7), *random_routing(3, 6, 2))
        hidden, index, weight = batch()
        assert dispatcher.forward(LAYER, hidden, index, weight).isfinite().all()
    transport.close()
