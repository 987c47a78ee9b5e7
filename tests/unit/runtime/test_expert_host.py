import asyncio
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_moe.errors import ExpertFailed, InvalidRequest, NotFound, StaleRouting, WireError
from ray_moe.ops.experts import StackedExperts
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.host_loop import MAX_BATCH_ROWS, HostLoop
from ray_moe.transport.base import ExpertCall, ExpertReply
from tests.toy import LAYER, ToyExperts


def call(rows, experts, counts, **changes):
    return replace(ExpertCall(LAYER, 3, rows, None, None, experts, counts), **changes)


@pytest.fixture
def host():
    host = ExpertHost("expert-0")
    host.hold(LAYER, [1, 3], StackedExperts(ToyExperts().shard([1, 3])))
    return host


def plain(module, expert, rows):
    weight = torch.ones(len(rows), 1)
    with torch.no_grad():
        return module.oracle(rows, torch.full((len(rows), 1), expert), weight)


def test_calls_that_wait_for_a_layer_are_computed_together_with_the_same_result(host):
    first, second = torch.randn(5, 8), torch.randn(4, 8)
    calls = [call(first, [1, 3], [2, 3]), call(second, [3], [4]), call(first[:1], [1], [1])]
    outs = [reply.rows for reply in host.run(calls)]
    module = ToyExperts()
    torch.testing.assert_close(outs[0], torch.cat([plain(module, 1, first[:2]), plain(module, 3, first[2:])]))
    torch.testing.assert_close(outs[1], plain(module, 3, second))
    torch.testing.assert_close(outs[2], plain(module, 1, first[:1]))
    assert host.num_calls == 3
    assert host.num_rows == 10


def test_one_calls_error_does_not_touch_the_others(host):
    good = torch.randn(2, 8)
    outcomes = host.run(
        [
            call(good, [3], [2]),
            call(good, [0], [2]),
            call(torch.randn(2, 7), [3], [2]),
            call(good, [3], [5]),
            call(good, [3], [2], layer="elsewhere"),
        ]
    )
    torch.testing.assert_close(outcomes[0].rows, plain(ToyExperts(), 3, good))
    kinds = [type(outcome) for outcome in outcomes[1:]]
    assert kinds == [StaleRouting, ExpertFailed, WireError, StaleRouting]
    assert "does not hold experts [0]" in str(outcomes[1])
    assert "epoch 3" in str(outcomes[1])


def test_a_gradient_for_what_serves_is_refused_and_touches_no_other_call(host):
    rows = torch.randn(2, 8)
    refused, computed = host.run([call(rows, [1], [2], grad=torch.ones(2, 8)), call(rows, [1], [2])])
    assert isinstance(refused, InvalidRequest)
    assert "version 0" in str(refused)
    torch.testing.assert_close(computed.rows, plain(ToyExperts(), 1, rows))


# --- Experts one by one ----------------------------------------------------------------------------------------------
@pytest.fixture
def whole():
    return ToyExperts()


def groups_of(whole, *parts):
    """A host that was given the experts of each part in a group of its own."""
    host = ExpertHost("expert-0")
    for part in parts:
        host.hold(LAYER, part, StackedExperts(whole.shard(part)))
    return host


def test_no_experts_are_no_layer(whole):
    host = ExpertHost("expert-0")
    host.hold(LAYER, [], StackedExperts(whole.shard([1])))
    assert host.held() == {}


def test_experts_are_added_replaced_and_dropped(whole):
    host = groups_of(whole, [1, 3], [0], [3, 5])
    assert host.held() == {LAYER: [0, 1, 3, 5]}
    assert [len(group.module.down_proj) for group in host._layers[0, LAYER].groups] == [1, 1, 2]
    host.drop(LAYER, [0, 5, 2])
    host.drop("elsewhere", [0])
    assert host.held() == {LAYER: [1, 3]}
    rows = torch.randn(3, 8)
    out = host.run([call(rows, [1, 3], [1, 2])])[0].rows
    torch.testing.assert_close(out, torch.cat([plain(whole, 1, rows[:1]), plain(whole, 3, rows[1:])]))
    assert isinstance(host.run([call(rows, [0], [3])])[0], StaleRouting)
    host.drop(LAYER, [1, 3])
    assert host.held() == {}


def test_the_memory_of_dropped_experts_is_freed(whole):
    host = groups_of(whole, [0, 1, 2, 3])
    stack = weakref.ref(host._layers[0, LAYER].groups[0].module.down_proj)
    host.drop(LAYER, [1, 2])
    assert stack() is None
    (group,) = host._layers[0, LAYER].groups
    assert [tuple(p.shape) for p in group.module.parameters()] == [(2, 10, 8), (2, 8, 5)]
    assert group.module.down_proj.untyped_storage().nbytes() == 2 * 8 * 5 * 4


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_whatever_came_and_went_calls_are_computed_as_by_the_whole(data):
    whole = ToyExperts()
    host = ExpertHost("expert-0")
    held: set[int] = set()
    some = st.sets(st.integers(0, 5), min_size=1)
    for adds in data.draw(st.lists(st.booleans(), min_size=1, max_size=6)):
        experts = sorted(data.draw(some))
        if adds:
            host.hold(LAYER, experts, StackedExperts(whole.shard(experts)))
            held |= set(experts)
        else:
            host.drop(LAYER, experts)
            held -= set(experts)
        assert host.held() == ({LAYER: sorted(held)} if held else {})
    calls = []
    for _ in range(data.draw(st.integers(1, 3))):
        if held:
            touched = sorted(data.draw(st.sets(st.sampled_from(sorted(held)), min_size=1)))
            counts = [data.draw(st.integers(1, 3)) for _ in touched]
            calls.append(call(torch.randn(sum(counts), 8), touched, counts))
    for asked, reply in zip(calls, host.run(calls), strict=True):
        assert isinstance(reply, ExpertReply)
        parts = asked.hidden.split(asked.counts)
        expected = [plain(whole, expert, part) for expert, part in zip(asked.experts, parts, strict=True)]
        torch.testing.assert_close(reply.rows, torch.cat(expected))


def test_experts_come_go_and_are_copied_while_calls_are_computed(whole):
    host = groups_of(whole, range(6))
    stop = threading.Event()
    failures: list[object] = []

    def compute():
        rows = torch.randn(4, 8)
        expected = torch.cat([plain(whole, 1, rows[:2]), plain(whole, 4, rows[2:])])
        while not stop.is_set():
            outcome = host.run([call(rows, [1, 4], [2, 2])])[0]
            if isinstance(outcome, Exception) or not torch.allclose(outcome.rows, expected, rtol=1e-4, atol=1e-5):
                failures.append(outcome)

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        host.drop(LAYER, [0, 2, 3])
        host.hold(LAYER, [5, 3], StackedExperts(whole.shard([5, 3])))
        host.export(LAYER, [1, 5])
        host.hold(LAYER, [0, 2], StackedExperts(whole.shard([0, 2])))
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert host.num_calls > 0


def test_what_is_not_held_cannot_be_copied(host):
    with pytest.raises(NotFound, match=r"\[2\]"):
        host.export(LAYER, [1, 2])
    with pytest.raises(NotFound, match="elsewhere"):
        host.export("elsewhere", [1])


class Whole:
    """A group that cannot be taken apart."""

    flops_per_row = 0
    device = torch.device("cpu")

    def run(self, rows, experts, counts):
        return rows


def test_a_group_that_cannot_be_taken_apart_is_held_and_dropped_as_a_whole():
    host = ExpertHost("expert-0")
    host.hold(LAYER, [0, 1], Whole())
    for refused in (lambda: host.drop(LAYER, [0]), lambda: host.export(LAYER, [0])):
        with pytest.raises(InvalidRequest, match="Whole"):
            refused()
    assert host.held() == {LAYER: [0, 1]}
    host.drop(LAYER, [0, 1])
    assert host.held() == {}


async def test_a_batch_has_a_bound_and_its_age_is_known(host):
    loop = HostLoop(host, inline_flops=0)
    ages, sizes = [], []
    run = host.run

    def watching_run(calls):
        ages.append(loop.busy_s)
        sizes.append(sum(one.num_rows for one in calls))
        return run(calls)

    host.run = watching_run
    await asyncio.gather(*(loop.submit(call(torch.randn(3000, 8), [1], [3000])) for _ in range(5)))
    assert sum(sizes) == 15_000
    assert max(sizes) <= MAX_BATCH_ROWS
    assert all(age >= 0 for age in ages)
    assert loop.busy_s == 0
    await loop.close()


async def test_the_loop_batches_what_arrives_while_it_computes(host):
    loop = HostLoop(host, inline_flops=0)
    sizes = []
    run = host.run

    def counting_run(calls):
        sizes.append(len(calls))
        return run(calls)

    host.run = counting_run
    rows = [torch.randn(2, 8) for _ in range(6)]
    replies = await asyncio.gather(*(loop.submit(call(part, [1], [2])) for part in rows))
    for part, reply in zip(rows, replies, strict=True):
        torch.testing.assert_close(reply.rows, plain(ToyExperts(), 1, part))
    assert sum(sizes) == 6
    assert max(sizes) > 1
    with pytest.raises(StaleRouting):
        await loop.submit(call(rows[0], [2], [2]))
    await loop.close()
