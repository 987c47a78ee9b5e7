"""What the engine adds to `transformers`: its queue, cancelling, seeds, text, and single layers. No Ray, no sockets."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch

from ray_moe.errors import InvalidRequest, NotFound, Overloaded, Unavailable
from ray_moe.models.experts import experts_modules
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.experts import StackedExperts
from ray_moe.policy.placement import place_by_index
from ray_moe.runtime.engine import Engine, EngineLimits
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.transport.local import LocalTransport
from ray_moe.types import GenerateRequest, RoutingTable
from tests.tiny_models import save, save_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    model = save("qwen3_moe", folder, vocab_size=259)
    save_tokenizer(folder)
    return model, Checkpoint.open(folder)


@pytest.fixture
def make_engine(saved):
    _, checkpoint = saved
    transports = []

    def make(**settings):
        plan = {path: list(range(spec.num_experts)) for path, spec in checkpoint.layers.items()}
        host = ExpertHost("expert-0")
        for path, module in checkpoint.load_experts(plan).items():
            host.hold(path, plan[path], StackedExperts(module))
        transport = LocalTransport({"expert-0": host})
        transports.append(transport)
        dispatcher = ExpertDispatcher(transport)
        placement = place_by_index({path: len(experts) for path, experts in plan.items()}, ["expert-0"])
        dispatcher.update(RoutingTable(1, placement, {"expert-0": transport.address("expert-0")}))
        return Engine(
            checkpoint.load_backbone(), checkpoint.load_tokenizer(), checkpoint.layers, dispatcher, **settings
        )

    yield make
    for transport in transports:
        transport.close()


async def collect(engine, **request):
    return [chunk async for chunk in engine.generate(GenerateRequest(**request))]


async def until(condition):
    async def look():
        while not condition():  # noqa: ASYNC110 - the worker threads have no event to wait for
            await asyncio.sleep(0.005)

    await asyncio.wait_for(look(), 20)


async def test_text_comes_in_pieces_that_add_up(make_engine, saved):
    engine = make_engine()
    _, checkpoint = saved
    chunks = await collect(engine, prompt="def f(", max_new_tokens=40, ignore_eos=True)
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    assert "".join(chunk.text for chunk in chunks) == checkpoint.load_tokenizer().decode(tokens)
    assert [chunk.finish_reason for chunk in chunks] == [""] * 39 + ["length"]
    assert {chunk.num_prompt_tokens for chunk in chunks} == {6}
    assert engine.num_generated_tokens == 40


async def test_an_end_token_ends_it(make_engine, saved):
    model, _ = saved
    engine = make_engine()
    prompt = (5, 9, 33)
    free = [t for c in await collect(engine, token_ids=prompt, max_new_tokens=6, ignore_eos=True) for t in c.token_ids]
    engine._models[0].generation_config.eos_token_id = [free[3]]
    chunks = await collect(engine, token_ids=prompt, max_new_tokens=6)
    assert [t for chunk in chunks for t in chunk.token_ids] == free[: free.index(free[3]) + 1]
    assert chunks[-1].finish_reason == "stop"
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=free[3])
    assert expected[0, 3:].tolist() == [t for chunk in chunks for t in chunk.token_ids]


async def test_a_seed_repeats_a_text_whatever_runs_beside_it(make_engine):
    engine = make_engine()
    request = {"token_ids": (5, 9, 33), "max_new_tokens": 12, "temperature": 1.5, "ignore_eos": True}
    alone = await collect(engine, **request, seed=7)
    together = await asyncio.gather(*(collect(engine, **request, seed=seed) for seed in (7, 8, 9, 7)))
    assert together[0] == together[3] == alone
    assert together[1] != together[2]


async def test_top_p_of_almost_nothing_is_greedy(make_engine):
    engine = make_engine()
    request = {"token_ids": (5, 9, 33), "max_new_tokens": 12, "ignore_eos": True}
    assert await collect(engine, **request, temperature=1.0, top_p=1e-6, seed=3) == await collect(engine, **request)


async def test_leaving_a_stream_frees_its_place(make_engine):
    engine = make_engine(limits=EngineLimits(max_concurrent_requests=1, max_queued_requests=0))
    stream = engine.generate(GenerateRequest(token_ids=(5,), max_new_tokens=200, ignore_eos=True))
    await anext(stream)
    with pytest.raises(Overloaded, match="1 requests are running"):
        await collect(engine, token_ids=(5,), max_new_tokens=1)
    await stream.aclose()
    await until(lambda: not engine.active_requests)
    assert engine.num_generated_tokens < 200
    assert len(await collect(engine, token_ids=(5,), max_new_tokens=2, ignore_eos=True)) == 2


async def test_leaving_the_queue_frees_the_place_at_once(make_engine):
    engine = make_engine(limits=EngineLimits(max_concurrent_requests=1, max_queued_requests=2))
    running = engine.generate(GenerateRequest(token_ids=(5,), max_new_tokens=250, ignore_eos=True))
    await anext(running)
    waiting = [asyncio.create_task(collect(engine, token_ids=(5,), max_new_tokens=1)) for _ in range(2)]
    await until(lambda: engine.queued_requests == 2)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert (engine.active_requests, engine.queued_requests) == (1, 0)
    await running.aclose()


async def test_closing_ends_queued_layer_calls_as_unavailable(make_engine):
    engine = make_engine()
    layer = next(iter(engine.layers))
    held = threading.Event()
    engine._forward_layer = lambda *_: held.wait(20)
    calls = [asyncio.create_task(engine.forward(layer, np.ones((1, 32), np.float32), None)) for _ in range(4)]
    await asyncio.sleep(0.05)
    await engine.close()
    held.set()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [bool, bool, Unavailable, Unavailable]
    with pytest.raises(Unavailable):
        await engine.forward(layer, np.ones((1, 32), np.float32), None)


async def test_closing_ends_what_runs_and_what_waits(make_engine):
    engine = make_engine(limits=EngineLimits(max_concurrent_requests=1))
    running = asyncio.create_task(collect(engine, token_ids=(5,), max_new_tokens=250, ignore_eos=True))
    waiting = asyncio.create_task(collect(engine, token_ids=(5,), max_new_tokens=250, ignore_eos=True))
    await until(lambda: engine.num_generated_tokens)
    await engine.close()
    for task in (running, waiting):
        with pytest.raises(Unavailable, match="stopping"):
            await task
    with pytest.raises(Unavailable):
        await collect(engine, token_ids=(5,), max_new_tokens=1)


async def test_closing_with_grace_lets_it_finish(make_engine):
    engine = make_engine()
    running = asyncio.create_task(collect(engine, token_ids=(5,), max_new_tokens=20, ignore_eos=True))
    await until(lambda: engine.num_generated_tokens)
    await engine.close(grace_s=30)
    assert len(await running) == 20


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": ""}, "no tokens"),
        ({"prompt": "x" * 250, "max_new_tokens": 10}, "250 tokens and max_new_tokens is 10, .* positions for 256"),
    ],
)
async def test_prompts_that_do_not_fit_are_refused(make_engine, request_, message):
    engine = make_engine(max_positions=256)
    with pytest.raises(InvalidRequest, match=message):
        await collect(engine, **request_)


async def test_a_layer_by_given_routing_and_by_the_models_gate(make_engine, saved):
    model, _ = saved
    engine = make_engine()
    layer = next(iter(engine.layers))
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((7, 32), dtype=np.float32)
    index = np.stack([rng.permutation(8)[:3] for _ in range(7)])
    weight = rng.random((7, 3), dtype=np.float32)
    with torch.no_grad():
        experts = experts_modules(model)[layer]
        routed = experts(torch.from_numpy(hidden), torch.from_numpy(index), torch.from_numpy(weight))
        block = model.get_submodule(layer.rpartition(".")[0])(torch.from_numpy(hidden)[None])
    np.testing.assert_allclose(await engine.forward(layer, hidden, (index, weight)), routed, rtol=1e-5, atol=1e-5)
    assert layer in engine.layers_with_gate
    np.testing.assert_allclose(await engine.forward(layer, hidden, None), block[0], rtol=1e-5, atol=1e-5)
    nobody = np.full((7, 1), 8)
    assert not (await engine.forward(layer, hidden, (nobody, weight[:, :1]))).any()
    with pytest.raises(NotFound, match="elsewhere"):
        await engine.forward("elsewhere", hidden, None)


async def test_wishes_of_each_request_reach_its_tokens(make_engine):
    engine = make_engine()
    base = {"token_ids": (5, 9, 33), "max_new_tokens": 12, "ignore_eos": True}
    plain, penalised, told, stopped = await asyncio.gather(
        collect(engine, **base),
        collect(engine, **base, presence_penalty=100.0, frequency_penalty=1.0, logprobs=3),
        collect(engine, **base, logprobs=2),
        collect(engine, **base, temperature=1.0, top_k=1, seed=1),
    )
    tokens = [chunk.token_ids[0] for chunk in plain]
    assert len({chunk.token_ids[0] for chunk in penalised}) == 12  # none comes twice
    assert [chunk.token_ids[0] for chunk in told] == [chunk.token_ids[0] for chunk in stopped] == tokens
    for chunk in told:
        (logprob,) = chunk.logprobs
        assert logprob.token_id == chunk.token_ids[0] == logprob.top[0].token_id
        assert logprob.logprob == logprob.top[0].logprob > logprob.top[1].logprob
    repeated = await collect(engine, **base, repetition_penalty=1e6)
    assert len({5, 9, 33, *(chunk.token_ids[0] for chunk in repeated)}) == 15
