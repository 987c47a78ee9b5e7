import asyncio
from dataclasses import replace

import pytest
import torch

from ray_moe.errors import ExpertFailed, StaleRouting, WireError
from ray_moe.ops.experts import StackedExperts
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.host_loop import MAX_BATCH_ROWS, HostLoop
from ray_moe.transport.base import ExpertCall
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


def test_forgetting_gradients_lets_a_call_count_again(host):
    rows = torch.randn(2, 8)
    for part in host._layers[LAYER].groups[0].parameters():
        part.requires_grad_(True)
    backward = call(rows, [1], [2], grad=torch.ones(2, 8), call_id="step 1:0")
    first, again = host.run([backward, backward])
    torch.testing.assert_close(first.rows, again.rows)
    parameter = host._layers[LAYER].groups[0].parameters()[0]
    once = parameter.grad.clone()
    host.zero_grad()
    assert parameter.grad is None
    host.run([backward])
    torch.testing.assert_close(parameter.grad, once)


def test_rows_that_come_again_in_another_grouping_count_once(host):
    rows, grad = torch.randn(5, 8), torch.randn(5, 8)
    for part in host._layers[LAYER].groups[0].parameters():
        part.requires_grad_(True)
    together = call(rows, [1, 3], [2, 3], grad=grad, call_id="step 1:0,7")
    host.run([together])
    parameter = host._layers[LAYER].groups[0].parameters()[0]
    once = parameter.grad.clone()
    host.zero_grad()
    alone = host.run([call(rows[2:], [3], [3], grad=grad[2:], call_id="step 1:7")])[0]
    both = host.run([together])[0]
    torch.testing.assert_close(parameter.grad, once)
    torch.testing.assert_close(both.rows[2:], alone.rows)
    assert isinstance(host.run([call(rows, [1, 3], [2, 3], grad=grad, call_id="step 1:0")])[0], WireError)


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
