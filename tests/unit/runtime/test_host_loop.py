import asyncio
import threading
import time

import pytest
import torch

from ray_moe.ops.experts import StackedExperts
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.host_loop import Disturbance, HostLoop
from ray_moe.transport.base import ExpertCall
from tests.toy import LAYER, ToyExperts


def call(num_rows=2):
    return ExpertCall(LAYER, 1, torch.ones(num_rows, 8), None, None, [1], [num_rows])


@pytest.fixture
async def loop():
    host = ExpertHost("expert-0")
    host.hold(LAYER, [1], StackedExperts(ToyExperts().shard([1])))
    made = HostLoop(host)
    yield made
    await made.close()


async def test_what_waits_and_how_fast_it_goes_can_be_asked(loop):
    assert (loop.queued_rows, loop.flops_per_s, loop.busy_fraction) == (0, 0, 0)
    loop.disturb(Disturbance(hang_s=60))
    waiting = [asyncio.create_task(loop.submit(call(5))) for _ in range(3)]
    for _ in range(5):  # the tasks start, and the first batch is taken
        await asyncio.sleep(0)
    waiting += [asyncio.create_task(loop.submit(call(7)))]
    await asyncio.sleep(0)
    assert loop.queued_rows == 7
    assert loop.busy_fraction > 0
    loop.disturb(None)
    await asyncio.gather(*waiting)
    assert loop.queued_rows == 0
    rows = 40_000  # 2 * (2 * 8 * 5 + 8 * 5) flops each
    await loop.submit(call(rows))
    assert loop.flops_per_s > 0


@pytest.mark.parametrize("on_gpu", [False, True])
async def test_a_gpu_is_given_its_work_in_the_event_loop_whose_wait_is_short(loop, on_gpu, monkeypatch):
    threads = set()
    run = loop.host.run

    def noted(calls):
        threads.add(threading.current_thread())
        return run(calls)

    monkeypatch.setattr(loop.host, "run", noted)
    monkeypatch.setattr(loop.host, "is_on_gpu", lambda call: on_gpu)
    loop._inline_flops = 100
    await loop.submit(call(500))
    assert (threads == {threading.main_thread()}) is on_gpu


async def test_a_hung_host_answers_nothing_and_then_everything(loop):
    loop.disturb(Disturbance(hang_s=60))
    waiting = asyncio.create_task(loop.submit(call()))
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.1)
    assert loop.busy_s > 0
    loop.disturb(None)
    assert (await waiting).rows.isfinite().all()


async def test_a_hang_ends_by_itself(loop):
    started_s = time.monotonic()
    loop.disturb(Disturbance(hang_s=0.1))
    await loop.submit(call())
    assert time.monotonic() - started_s >= 0.1


async def test_a_slow_host_takes_longer(loop):
    loop.disturb(Disturbance(slow_factor=3.0, extra_s=0.05))
    started_s = time.monotonic()
    await loop.submit(call())
    assert time.monotonic() - started_s >= 0.05


async def test_a_corrupt_host_damages_the_same_answers_for_the_same_seed(loop):
    seen = []
    for seed in (3, 3, 4):
        loop.disturb(Disturbance(corrupt_probability=0.5, seed=seed))
        seen.append([bool((await loop.submit(call())).rows.isnan().all()) for _ in range(32)])
    assert seen[0] == seen[1] != seen[2]
    assert 0 < sum(seen[0]) < 32
    loop.disturb(None)
    assert (await loop.submit(call())).rows.isfinite().all()


async def test_a_host_that_hangs_can_be_closed():
    host = ExpertHost("expert-0")
    host.hold(LAYER, [1], StackedExperts(ToyExperts().shard([1])))
    loop = HostLoop(host)
    loop.disturb(Disturbance(hang_s=60))
    waiting = asyncio.create_task(loop.submit(call()))
    await asyncio.sleep(0)
    await asyncio.wait_for(loop.close(), 10)
    assert (await waiting).rows.isfinite().all()
