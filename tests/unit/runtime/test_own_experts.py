import threading
from collections import Counter

import numpy as np
import pytest
import torch

from ray_moe.errors import ExpertFailed, InvalidCheckpoint
from ray_moe.ops.experts import StackedExperts
from ray_moe.runtime.own_experts import OwnExperts
from ray_moe.transport.base import ExpertCall
from tests.toy import LAYER, ToyExperts

BYTES = 100


class Store:
    """Reads experts of a toy module, and remembers which."""

    def __init__(self):
        self.module = ToyExperts()
        self.loads: Counter[int] = Counter()
        self.fails = False

    def __call__(self, layer, experts, version=0):
        self.loads.update(experts)
        if self.fails:
            raise InvalidCheckpoint("the disk is gone")
        return StackedExperts(self.module.shard(experts))


def own(store, cache=0, lifeboat=0, **more):
    return OwnExperts(store, {LAYER: BYTES}, cache_bytes=cache * BYTES, lifeboat_bytes=lifeboat * BYTES, **more)


def call(*experts, width=8):
    rows = torch.randn(len(experts), width, generator=torch.Generator().manual_seed(len(experts)))
    return ExpertCall(LAYER, 1, rows, None, None, list(experts), [1] * len(experts))


def aboard(experts):
    return sorted(experts.aboard.get((0, LAYER), ()))


def cached(experts):
    return sorted(experts.cached.get((0, LAYER), ()))


def test_the_lifeboat_takes_aboard_what_a_batch_needs_and_computes_it():
    store = Store()
    experts = own(store, lifeboat=4)
    asked = call(1, 4)
    reply = experts.run(asked)
    index = torch.tensor([[1], [4]])
    with torch.no_grad():
        torch.testing.assert_close(reply.rows, store.module.oracle(asked.hidden, index, torch.ones(2, 1)))
    experts.run(call(1, 4))
    assert store.loads == {1: 1, 4: 1}
    assert (experts.num_lifeboat_loads, experts.num_rows, experts.held_bytes) == (2, 4, 2 * BYTES)
    assert aboard(experts) == [1, 4]


def test_without_a_lifeboat_nothing_is_computed():
    assert own(Store()).run(call(1)) is None


def test_over_budget_the_one_used_longest_ago_leaves_but_never_one_of_the_running_batch():
    experts = own(Store(), lifeboat=2)
    experts.run(call(0))
    experts.run(call(1))
    experts.run(call(0))
    experts.run(call(2))
    assert aboard(experts) == [0, 2]
    experts.run(call(3, 4, 5))
    assert aboard(experts) == [3, 4, 5]
    experts.run(call(1))
    assert aboard(experts) == [1, 5]


def test_what_a_host_has_again_leaves_the_lifeboat():
    experts = own(Store(), lifeboat=6)
    experts.run(call(0, 1, 2))
    experts.disembark(lambda layer, expert: expert != 1)
    assert aboard(experts) == [1]
    assert experts.held_bytes == BYTES


def test_concurrent_batches_read_an_expert_once():
    store = Store()
    entered, may_go = threading.Event(), threading.Event()

    def slow(layer, experts, version):
        group = store(layer, experts)
        entered.set()
        assert may_go.wait(10)
        return group

    experts = own(slow, lifeboat=6)
    replies = []
    threads = [threading.Thread(target=lambda: replies.append(experts.run(call(2, 3)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert entered.wait(10)
    may_go.set()
    for thread in threads:
        thread.join()
    assert store.loads == {2: 1, 3: 1}
    assert len(replies) == 4
    assert all(torch.equal(reply.rows, replies[0].rows) for reply in replies)


def test_an_expert_that_cannot_be_read_is_left_for_a_while():
    store = Store()
    store.fails = True
    experts = own(store, lifeboat=6)
    assert experts.run(call(2)) is None
    assert experts.run(call(2)) is None
    assert store.loads == {2: 1}
    assert not experts.may_load(LAYER)


def test_an_expert_that_raises_is_not_a_missing_one():
    with pytest.raises(ExpertFailed, match="router"):
        own(Store(), lifeboat=6).run(call(1, width=7))


def test_what_is_read_while_its_version_is_let_go_is_not_kept():
    store = Store()

    def load(layer, experts, version):
        if store.loads[experts[0]] == 0:
            group = store(layer, experts)
            made.forget(0)
            return group
        return store(layer, experts)

    made = own(load, lifeboat=6)
    assert made.run(call(1)) is None
    assert made.held_bytes == 0
    assert made.run(call(1)) is not None
    made.forget(0)
    assert made.held_bytes == 0
    assert store.loads == {1: 2}


# --- The cache -------------------------------------------------------------------------------------------------------
def counts(*tokens):
    return {LAYER: np.array(tokens)}


def test_the_cache_holds_the_hottest():
    experts = own(Store(), cache=2)
    experts.rebalance(counts(0, 5, 1, 9, 0, 2), 0.0)
    assert cached(experts) == [1, 3]
    assert experts.run(call(1, 3)) is not None
    assert experts.run(call(2)) is None
    assert experts.held_bytes == 2 * BYTES


def test_an_expert_that_nobody_asked_for_is_not_read():
    store = Store()
    experts = own(store, cache=6)
    experts.rebalance(counts(0, 0, 3, 0, 0, 0), 0.0)
    assert store.loads == {2: 1}


def test_old_tokens_fade():
    experts = own(Store(), cache=1, half_life_s=10.0)
    experts.rebalance(counts(100, 0, 0, 0, 0, 0), 0.0)
    assert cached(experts) == [0]
    experts.rebalance(counts(100, 60, 0, 0, 0, 0), 5.0)
    assert cached(experts) == [0]
    experts.rebalance(counts(100, 90, 0, 0, 0, 0), 25.0)
    assert cached(experts) == [1]


def test_a_little_more_heat_moves_nothing():
    store = Store()
    experts = own(store, cache=1, half_life_s=1e9)
    experts.rebalance(counts(100, 0, 0, 0, 0, 0), 0.0)
    experts.rebalance(counts(100, 120, 0, 0, 0, 0), 1.0)
    assert cached(experts) == [0]
    experts.rebalance(counts(100, 130, 0, 0, 0, 0), 2.0)
    assert cached(experts) == [1]
    assert store.loads == {0: 1, 1: 1}


def test_cache_and_lifeboat_share_an_expert():
    store = Store()
    experts = own(store, cache=1, lifeboat=6)
    experts.run(call(3))
    experts.rebalance(counts(0, 0, 0, 7, 0, 0), 0.0)
    assert (cached(experts), aboard(experts)) == ([3], [])
    experts.disembark(lambda layer, expert: True)
    assert cached(experts) == [3]
    assert store.loads == {3: 1}


def test_the_layer_with_the_smaller_experts_comes_first():
    experts = OwnExperts(Store(), {"big": 4 * BYTES, LAYER: BYTES}, cache_bytes=4 * BYTES)
    experts.rebalance({"big": np.array([30, 0]), **counts(10, 10, 10, 0, 0, 0)}, 0.0)
    assert cached(experts) == [0, 1, 2]
    assert (0, "big") not in experts.cached
