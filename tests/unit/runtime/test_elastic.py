"""Replicas, failover, hedging, damage and the router's own experts, each by itself."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from ray_moe.errors import Unauthenticated, Unavailable
from ray_moe.ops.experts import StackedExperts
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.runtime.settings import DispatchSettings
from ray_moe.transport.base import ExpertReply
from ray_moe.transport.local import Fault, FaultPlan
from ray_moe.types import HostAddress, Placement, RoutingTable
from tests.toy import LAYER, ToyExperts, local_cluster, own_experts, random_routing

LONG = DispatchSettings(call_timeout_s=120, recovery_timeout_s=120, hedge=False)
"""Whoever waits for one of these runs into the test's own time-out."""

HEDGED = DispatchSettings(call_timeout_s=120, recovery_timeout_s=120, hedge_min_s=0.02, hedge_factor=0.01)
"""Every call is overdue after 20 milliseconds, however slow the machine is."""


class Cluster:
    """Hosts, a dispatcher that must not wait for anything, and what it reported."""

    def __init__(self, num_hosts=2, num_replicas=2, settings=LONG, cache=0, lifeboat=0):
        self.module = ToyExperts()
        self.transport, self.table, self.hosts, _ = local_cluster(self.module, num_hosts, num_replicas)
        self.lost: list[HostAddress] = []
        self.slow: list[HostAddress] = []
        self.corrupt: list[HostAddress] = []
        self.own = own_experts(self.module, cache=cache, lifeboat=lifeboat) if cache or lifeboat else None
        self.dispatcher = ExpertDispatcher(
            self.transport,
            settings,
            on_lost=self.lost.append,
            on_slow=lambda address, seconds: self.slow.append(address),
            on_corrupt=self.corrupt.append,
            own=self.own,
        )
        self.dispatcher.update(self.table)

    def forward(self, num_tokens=5, seed=0, expert=None):
        """A batch computed right; `expert` sends every token there alone."""
        hidden = torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(seed))
        index, weight = random_routing(num_tokens, 6, 2, seed=seed)
        if expert is not None:
            index, weight = torch.full((num_tokens, 1), expert), torch.ones(num_tokens, 1)
        with torch.no_grad():
            out = self.dispatcher.forward(LAYER, hidden, index, weight)
            torch.testing.assert_close(out, self.module.oracle(hidden, index, weight))

    def learn(self, batches=30):
        """Let the dispatcher see how quick the hosts are."""
        for seed in range(batches):
            self.forward(seed=seed)

    def hold_up(self, host_id):
        """Let the host answer nothing until the event that is returned."""
        run, may_go = self.hosts[host_id].run, threading.Event()

        def held_up(calls):
            assert may_go.wait(60)
            return run(calls)

        self.hosts[host_id].run = held_up  # type: ignore[method-assign]
        return may_go

    def wait_until_prompt(self, host_id):
        """Until the host owes no answer."""
        routes = self.dispatcher._routes
        while host_id in (view := routes.view).late:
            assert routes.wait_changed(view, 60)

    def publish(self, hosts_of, addresses=None):
        self.table = RoutingTable(
            self.table.epoch + 1,
            Placement({LAYER: tuple(hosts_of)}),
            self.table.addresses if addresses is None else addresses,
        )
        self.dispatcher.update(self.table)

    @property
    def statistics(self):
        return self.dispatcher.statistics


@pytest.fixture
def make():
    made = []

    def one(*args, **kwargs):
        made.append(Cluster(*args, **kwargs))
        return made[-1]

    yield one
    for cluster in made:
        cluster.dispatcher.close()
        cluster.transport.close()


# --- Replicas --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_tokens", [1, 400])
def test_replicas_share_the_rows_of_a_hot_expert(make, num_tokens):
    cluster = make(2, 2)
    for seed in range(20):
        cluster.forward(num_tokens, seed, expert=3)
    rows = cluster.dispatcher.rows_per_host
    assert sum(rows.values()) == 20 * num_tokens
    assert min(rows.values()) == pytest.approx(max(rows.values()), abs=1)


def test_a_faster_host_gets_more(make):
    cluster = make(2, 2)
    table = cluster.table
    cluster.dispatcher.update(RoutingTable(2, table.placement, table.addresses, {"expert-0": 3.0}))
    cluster.forward(400, expert=3)
    assert cluster.dispatcher.rows_per_host["expert-0"] == pytest.approx(300, abs=2)
    assert cluster.statistics.balancedness() == [pytest.approx(1.0, abs=0.01)]  # of the time that it takes


def test_rows_in_flight_push_others_away(make):
    cluster = make(2, 2)
    cluster.forward(1, expert=3)
    may_go = cluster.hold_up("expert-0")
    # Only host 0 has expert 0.
    cluster.publish([("expert-0",), *[("expert-0", "expert-1")] * 5])
    waiting = threading.Thread(target=lambda: cluster.forward(100, expert=0))
    waiting.start()
    while cluster.dispatcher.rows_in_flight.get("expert-0", 0) < 100:
        waiting.join(0.001)
    before = cluster.dispatcher.rows_per_host["expert-0"]
    for seed in range(5):
        cluster.forward(1, seed, expert=3)
    cluster.forward(60, expert=4)
    assert cluster.dispatcher.rows_per_host["expert-0"] == before
    may_go.set()
    waiting.join()
    assert cluster.dispatcher.rows_in_flight == {"expert-0": 0, "expert-1": 0}


def test_balancedness_is_that_of_each_batch_over_the_hosts_of_the_layer(make):
    cluster = make(2, 1)
    cluster.forward(10, expert=0)
    index = torch.tensor([[0], [0], [0], [5]])
    with torch.no_grad():
        cluster.dispatcher.forward(LAYER, torch.randn(4, 8), index, torch.ones(4, 1))
    assert cluster.statistics.balancedness() == [0.5, 4 / 2 / 3]


# --- Failover --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_tokens", [1, 60])
def test_rows_of_a_dead_host_go_to_the_other_replica_at_once(make, num_tokens):
    cluster = make(2, 2)
    cluster.transport.faults = FaultPlan((Fault("kill", "expert-0", 1), Fault("kill", "expert-0", 2)))
    for seed in range(4):
        cluster.forward(num_tokens, seed)
    assert [address.host_id for address in cluster.lost] == ["expert-0"]
    assert cluster.statistics.num_retried_calls == 1
    assert cluster.dispatcher.rows_per_host["expert-1"] >= 3 * num_tokens * 2


def test_a_host_that_cannot_be_dialled_is_left_out(make):
    cluster = make(2, 2)
    cluster.transport.kill("expert-0")
    for seed in range(4):
        cluster.forward(seed=seed)
    assert [address.host_id for address in cluster.lost] == ["expert-0"]
    assert "expert-0" not in cluster.dispatcher.rows_per_host


def test_a_slow_dial_holds_no_request_up_once_it_has_failed(make):
    cluster = make(2, 2)
    cluster.forward()
    connect = cluster.transport.connect
    dialled, may_go = threading.Event(), threading.Event()

    def slow(address):
        dialled.set()
        assert may_go.wait(10)
        return connect(address)

    cluster.transport.connect = slow
    for connection in list(cluster.transport._open):
        if connection.address.host_id == "expert-0":
            connection.close()  # only the line broke
    cluster.forward()
    assert dialled.wait(10)
    cluster.forward()  # while the dial goes on
    may_go.set()
    view = cluster.dispatcher._routes.view
    while "expert-0" in view.out:
        cluster.dispatcher._routes.wait_changed(view, 10)
        view = cluster.dispatcher._routes.view
    before = cluster.dispatcher.rows_per_host["expert-0"]
    cluster.forward(40)
    assert cluster.dispatcher.rows_per_host["expert-0"] > before


def test_a_replica_that_is_not_there_is_left_out_and_its_neighbours_are_not(make):
    cluster = make(2, 2)
    cluster.hosts["expert-0"].drop(LAYER, [2, 3])
    for seed in range(6):
        cluster.forward(40, seed)
    # For each of the experts that host 0 does not have, a call with others and then one for it alone.
    assert cluster.statistics.num_retried_calls <= 4
    before = cluster.dispatcher.rows_per_host
    cluster.forward(40, expert=2)
    after = cluster.dispatcher.rows_per_host
    assert (after["expert-0"] - before["expert-0"], after["expert-1"] - before["expert-1"]) == (0, 40)
    before = after
    cluster.forward(40, expert=1)
    assert cluster.dispatcher.rows_per_host["expert-0"] == before["expert-0"] + 20
    cluster.hosts["expert-0"].hold(LAYER, [2, 3], StackedExperts(cluster.module.shard([2, 3])))
    cluster.publish([("expert-0", "expert-1")] * 6)
    before = cluster.dispatcher.rows_per_host
    cluster.forward(40, expert=2)
    assert cluster.dispatcher.rows_per_host["expert-0"] == before["expert-0"] + 20


def test_an_expert_that_its_only_host_does_not_have_yet_is_asked_for_again(make):
    cluster = make(2, 1)
    cluster.hosts["expert-0"].drop(LAYER, [1])
    held = threading.Timer(
        0.15, lambda: cluster.hosts["expert-0"].hold(LAYER, [1], StackedExperts(cluster.module.shard([1])))
    )
    held.start()
    cluster.forward(30)
    held.join()


def test_experts_come_and_go_under_load(make):
    cluster = make(2, 2)
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(seed):
        try:
            while not stop.is_set():
                cluster.forward(20, seed)
                cluster.forward(1, seed)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(0)
    both = ("expert-0", "expert-1")
    for _ in range(40):  # make before break: published without, dropped, held again, published with
        moved = sorted(rng.permutation(6)[:3].tolist())
        at = str(rng.choice(both))
        other = both[1 - both.index(at)]
        cluster.publish([(other,) if expert in moved else both for expert in range(6)])
        cluster.hosts[at].drop(LAYER, moved)
        cluster.hosts[at].hold(LAYER, moved, StackedExperts(cluster.module.shard(moved)))
        cluster.publish([both] * 6)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert cluster.lost == []


# --- Hedging ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("combine", ["router", "host"])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_an_overdue_call_is_answered_by_another_replica(make, num_tokens, combine):
    cluster = make(2, 2, replace(HEDGED, combine=combine))
    cluster.learn()
    may_go = cluster.hold_up("expert-0")
    for seed in range(4):
        cluster.forward(num_tokens, seed)
    assert cluster.statistics.num_hedged_calls >= cluster.statistics.num_hedges_won >= 1
    assert "expert-0" in cluster.dispatcher._routes.view.late  # and is not asked
    assert cluster.lost == []
    may_go.set()


def test_a_late_answer_that_comes_after_all_is_released_and_its_host_trusted_again(make):
    cluster = make(2, 2, HEDGED)
    cluster.learn()
    cluster.wait_until_prompt("expert-0")
    released = []
    run = cluster.hosts["expert-0"].run
    may_go = threading.Event()

    def held_up(calls):
        assert may_go.wait(60)
        return [ExpertReply(reply.rows, lambda: released.append(1)) for reply in run(calls)]

    cluster.hosts["expert-0"].run = held_up
    cluster.forward(40)
    assert cluster.statistics.num_hedges_won >= 1
    assert released == []
    may_go.set()
    cluster.wait_until_prompt("expert-0")
    cluster.forward(40)
    assert cluster.dispatcher.rows_in_flight["expert-0"] == 0
    assert len(released) == 2


def test_a_stranger_where_a_host_should_be_is_a_host_out_of_reach(make, monkeypatch):
    cluster = make(2, 2)
    connect, refused = cluster.transport.connect, threading.Semaphore(0)

    def refuse(address):
        if address.host_id == "expert-0":
            refused.release()
            raise Unauthenticated("the token is not the token of this host")
        return connect(address)

    monkeypatch.setattr(cluster.transport, "connect", refuse)
    for seed in range(4):
        cluster.forward(40, seed)
    assert {address.host_id for address in cluster.lost} == {"expert-0"}
    for _ in range(3):  # it is tried again and again
        assert refused.acquire(timeout=60)
    monkeypatch.undo()
    while not cluster.dispatcher.rows_per_host.get("expert-0"):
        cluster.forward(40)


def test_a_host_that_hangs_is_told_of_as_slow_and_then_as_lost(make):
    cluster = make(2, 2, replace(HEDGED, call_timeout_s=1.5))
    cluster.learn()
    may_go = cluster.hold_up("expert-0")
    cluster.forward(40)
    assert cluster.statistics.num_hedges_won >= 1
    assert cluster.lost == []  # the rows were answered long before
    while not cluster.lost:
        may_go.wait(0.01)
    assert cluster.lost[0].host_id == "expert-0"
    assert "expert-0" in {address.host_id for address in cluster.slow}
    may_go.set()


def test_a_host_that_is_always_slow_is_told_of_and_then_given_its_time(make):
    cluster = make(2, 2, HEDGED)
    cluster.learn()
    nth = cluster.transport.num_calls["expert-0"] + 1
    cluster.transport.faults = FaultPlan((Fault("slow", "expert-0", nth, 0.05),))
    peer = cluster.dispatcher._lines.peer("expert-0")
    for seed in range(12):
        cluster.forward(40, seed)
        cluster.wait_until_prompt("expert-0")
    assert peer.expected_s(40) > 0.045
    assert cluster.statistics.num_hedged_calls >= 3
    assert "expert-0" in {address.host_id for address in cluster.slow}


def test_without_hedging_a_late_host_is_waited_for(make):
    cluster = make(2, 2, LONG)
    cluster.learn()
    waiting = threading.Timer(0.2, cluster.hold_up("expert-0").set)
    waiting.start()
    cluster.forward(40)
    waiting.join()
    assert cluster.statistics.num_hedged_calls == 0
    assert cluster.dispatcher._routes.view.late == frozenset()


# --- The router's own experts ----------------------------------------------------------------------------------------
def test_an_expert_without_a_host_boards_the_lifeboat_and_leaves_it_when_a_host_has_it(make):
    cluster = make(2, 1, lifeboat=6)
    hosts_of = cluster.table.placement.hosts_of[LAYER]
    cluster.publish([(), *hosts_of[1:]])
    cluster.forward(30)
    cluster.forward(30)
    assert (cluster.own.num_lifeboat_loads, cluster.own.aboard) == (1, {(0, LAYER): frozenset({0})})
    assert cluster.own.num_rows > 0
    cluster.publish(hosts_of)
    assert cluster.own.held_bytes == 0
    rows = cluster.own.num_rows
    cluster.forward(30)
    assert cluster.own.num_rows == rows


def test_rows_of_the_only_host_that_dies_are_computed_here_within_the_request(make):
    cluster = make(2, 1, lifeboat=6)
    cluster.transport.faults = FaultPlan((Fault("kill", "expert-0", 2),))
    for seed in range(4):
        cluster.forward(30, seed)
    assert cluster.own.aboard == {(0, LAYER): frozenset({0, 1, 2})}


def test_a_hung_only_host_is_hedged_by_the_lifeboat(make):
    cluster = make(2, 1, HEDGED, lifeboat=6)
    cluster.learn()
    may_go = cluster.hold_up("expert-0")
    for seed in range(4):
        cluster.forward(30, seed)
    assert cluster.statistics.num_hedges_won >= 1
    assert {0, 1, 2} <= cluster.own.aboard[0, LAYER]
    may_go.set()


def test_a_lifeboat_that_cannot_read_leaves_the_rows_waiting(make):
    cluster = make(2, 1, replace(LONG, recovery_timeout_s=0.5), lifeboat=6)

    def broken(layer, experts, version):
        raise OSError("the disk is gone")

    cluster.own._load = broken
    cluster.publish([(), *cluster.table.placement.hosts_of[LAYER][1:]])
    with pytest.raises(Unavailable, match=r"experts \[0\]"):
        cluster.forward(30)
    later = threading.Timer(0.1, lambda: cluster.publish([("expert-0",), *[("expert-1",)] * 5]))
    cluster.hosts["expert-1"].hold(LAYER, range(6), StackedExperts(cluster.module.shard(range(6))))
    later.start()
    cluster.forward(30)
    later.join()


def test_cached_experts_cost_no_hop(make):
    cluster = make(2, 2, cache=2)
    for seed in range(3):
        cluster.forward(20, seed, expert=4)
    cluster.dispatcher.rebalance_cache(now_s=0.0)
    assert cluster.own.cached == {(0, LAYER): frozenset({4})}
    before = cluster.dispatcher.rows_per_host
    cluster.forward(20, expert=4)
    assert cluster.dispatcher.rows_per_host == before
    cluster.forward(20)
    assert cluster.own.num_rows > 20


def test_a_router_that_caches_everything_needs_no_host(make):
    cluster = make(1, 1, cache=6)
    cluster.forward(60)
    cluster.dispatcher.rebalance_cache(now_s=0.0)
    cluster.transport.kill("expert-0")
    for num_tokens in (1, 60):
        cluster.forward(num_tokens)


# --- Damage ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("combine", ["router", "host"])
@pytest.mark.parametrize(("num_replicas", "lifeboat"), [(2, 0), (1, 6)])
def test_damaged_rows_are_computed_elsewhere_and_their_host_is_told_of(make, combine, num_replicas, lifeboat):
    cluster = make(2, num_replicas, replace(LONG, combine=combine), lifeboat=lifeboat)
    # With host combine a batch with damage is asked for again, unweighted.
    cluster.transport.faults = FaultPlan(tuple(Fault("corrupt", "expert-0", nth) for nth in (1, 2)))
    cluster.forward(40)
    assert [address.host_id for address in cluster.corrupt] == ["expert-0"]
    cluster.forward(40)


def test_damaged_rows_of_a_batch_with_gradients_are_computed_elsewhere(make):
    cluster = make(2, 2)
    cluster.transport.faults = FaultPlan((Fault("corrupt", "expert-0", 1),))
    index, weight = random_routing(20, 6, 2)
    hidden = torch.randn(20, 8)
    out = cluster.dispatcher.forward(LAYER, hidden, index, weight)
    torch.testing.assert_close(out, cluster.module.oracle(hidden, index, weight))
    assert len(cluster.corrupt) == 1


def test_what_the_model_itself_makes_infinite_is_returned_as_it_is(make):
    cluster = make(2, 2)
    for host in cluster.hosts.values():
        broken = cluster.module.shard(range(6))
        broken.down_proj.data[1] = torch.inf
        host.hold(LAYER, range(6), StackedExperts(broken))
    index = torch.tensor([[1], [2]])
    with torch.no_grad():
        out = cluster.dispatcher.forward(LAYER, torch.ones(2, 8), index, torch.ones(2, 1))
    assert not out[0].isfinite().any()
    assert out[1].isfinite().all()
    assert cluster.corrupt == []


def test_tokens_that_are_not_finite_are_nobodys_fault(make):
    cluster = make(2, 2)
    hidden = torch.ones(2, 8)
    hidden[0, 0] = torch.nan
    with torch.no_grad():
        out = cluster.dispatcher.forward(LAYER, hidden, torch.tensor([[1], [2]]), torch.ones(2, 1))
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    assert sum(cluster.transport.num_calls.values()) <= 2
    assert cluster.corrupt == []


def test_without_a_second_opinion_damaged_rows_are_returned(make):
    cluster = make(2, 1)
    cluster.transport.faults = FaultPlan((Fault("corrupt", "expert-0", 1),))
    with torch.no_grad():
        out = cluster.dispatcher.forward(LAYER, torch.ones(2, 8), torch.tensor([[0], [5]]), torch.ones(2, 1))
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    assert cluster.corrupt == []


def test_the_check_can_be_turned_off(make):
    cluster = make(2, 2, replace(LONG, check_finite=False))
    cluster.transport.faults = FaultPlan(tuple(Fault("corrupt", host, 1) for host in cluster.hosts))
    with torch.no_grad():
        out = cluster.dispatcher.forward(LAYER, torch.ones(2, 8), torch.tensor([[0], [5]]), torch.ones(2, 1))
    assert out.isnan().all()


# --- Tables ----------------------------------------------------------------------------------------------------------
def test_a_restarted_host_is_dialled_anew_with_the_next_table(make):
    cluster = make(2, 2)
    cluster.forward()
    host = cluster.hosts["expert-0"]
    cluster.transport.kill("expert-0")
    cluster.forward()
    reborn = cluster.transport.revive("expert-0", host)
    cluster.publish([("expert-0", "expert-1")] * 6, {**cluster.table.addresses, "expert-0": reborn})
    before = cluster.dispatcher.rows_per_host["expert-0"]
    cluster.forward(40)
    assert cluster.dispatcher.rows_per_host["expert-0"] > before


def test_hosts_come_with_a_newer_table(make):
    cluster = make(2, 1)
    cluster.forward()
    host = ExpertHost("newcomer")
    host.hold(LAYER, range(6), StackedExperts(cluster.module.shard(range(6))))
    address = cluster.transport.revive("newcomer", host)
    hosts_of = cluster.table.placement.hosts_of[LAYER]
    cluster.publish([(*hosts, "newcomer") for hosts in hosts_of], {**cluster.table.addresses, "newcomer": address})
    cluster.forward(60)
    assert host.num_rows > 0


def test_waiting_for_a_table_ends_with_the_table(make):
    cluster = make(2, 1)
    hosts_of = cluster.table.placement.hosts_of[LAYER]
    cluster.publish([(), *hosts_of[1:]])
    later = threading.Timer(0.05, lambda: cluster.publish(hosts_of))
    started_s = time.monotonic()
    later.start()
    cluster.forward(30)
    later.join()
    assert time.monotonic() - started_s >= 0.05
