"""Several versions of the weights at once: each request is computed by one of them, from its beginning to its end."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
import torch

from ray_moe.errors import InvalidRequest, NotFound, StaleRouting, Unavailable
from ray_moe.models import loading
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.experts import StackedExperts
from ray_moe.policy.placement import place_by_index
from ray_moe.policy.versions import Canary
from ray_moe.runtime.drift import MAX_PENDING, DriftMeter
from ray_moe.runtime.engine import Engine
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.runtime.own_experts import OwnExperts
from ray_moe.transport.base import ExpertCall
from ray_moe.transport.local import LocalTransport
from ray_moe.types import CanaryRequest, GenerateRequest, RoutingTable
from tests.tiny_models import save
from tests.toy import LAYER, ToyExperts, local_cluster, random_routing

PROMPT = tuple(range(3, 43))
NUM_TOKENS = 24


def rows_of(version, *experts):
    rows = torch.randn(len(experts), 8, generator=torch.Generator().manual_seed(3))
    return ExpertCall(LAYER, 1, rows, None, None, list(experts), [1] * len(experts), version=version)


def oracle(module, call):
    index = torch.tensor(call.experts).unsqueeze(1)
    with torch.no_grad():
        return module.oracle(call.hidden, index, torch.ones(len(index), 1))


# --- hosts ---------------------------------------------------------------------------------------------------
def test_a_host_computes_each_call_by_the_weights_of_its_version():
    host, old, new = ExpertHost("expert-0"), ToyExperts(seed=1), ToyExperts(seed=2)
    host.hold(LAYER, [0, 1], StackedExperts(old.shard([0, 1])))
    host.hold(LAYER, [1, 2], StackedExperts(new.shard([1, 2])), version=5)
    calls = [rows_of(0, 0, 1), rows_of(5, 1, 2), rows_of(0, 1), rows_of(5, 0), rows_of(4, 1)]
    outcomes: list[Any] = host.run(calls)
    for call, outcome, module in zip(calls, outcomes, (old, new, old), strict=False):
        torch.testing.assert_close(outcome.rows, oracle(module, call))
    assert [type(outcome) for outcome in outcomes[3:]] == [StaleRouting, StaleRouting]
    assert "version 5" in outcomes[3].message
    assert (host.versions, host.held(), host.held(5)) == ([0, 5], {LAYER: [0, 1]}, {LAYER: [1, 2]})


def test_a_version_is_copied_dropped_and_forgotten_without_touching_the_others():
    host, module = ExpertHost("expert-0"), ToyExperts()
    for version in (0, 1, 2):
        host.hold(LAYER, [0, 1], StackedExperts(module.shard([0, 1])), version=version)
    host.drop(LAYER, [0], [1])
    assert [host.held(version) for version in (0, 1)] == [{LAYER: [0, 1]}, {LAYER: [1]}]
    host.export(LAYER, [0], version=2)
    with pytest.raises(NotFound, match=r"experts \[0\] .* version 1"):
        host.export(LAYER, [0, 1], version=1)
    host.forget(2)
    assert (host.versions, host.held(2)) == ([0, 1], {})


def num_rows_of(host, version):
    """Experts in the memory of each group that a version of `LAYER` has."""
    return [len(group.module.down_proj) for group in host._layers[version, LAYER].groups]


def test_versions_share_what_they_have_in_common_and_losing_experts_keeps_it_shared():
    host, old, new = ExpertHost("expert-0"), ToyExperts(seed=1), ToyExperts(seed=2)
    host.hold(LAYER, [0, 1, 2], StackedExperts(old.shard([0, 1, 2])))
    host.share(LAYER, [0, 2], version=1, of=0)
    host.hold(LAYER, [1], StackedExperts(new.shard([1])), version=1)
    mixed = [rows_of(1, 0), rows_of(1, 1), rows_of(1, 0, 1, 2), rows_of(0, 0, 1, 2)]
    outcomes: list[Any] = host.run(mixed)
    outs = [outcome.rows for outcome in outcomes]
    torch.testing.assert_close(outs[0], oracle(old, mixed[0]))
    torch.testing.assert_close(outs[1], oracle(new, mixed[1]))
    expected = torch.cat([oracle(old, mixed[2])[:1], oracle(new, mixed[2])[1:2], oracle(old, mixed[2])[2:]])
    torch.testing.assert_close(outs[2], expected)
    torch.testing.assert_close(outs[3], oracle(old, mixed[3]))
    assert host._layers[1, LAYER].place[0] is host._layers[0, LAYER].place[0]

    host.drop(LAYER, [0], [0, 1])
    assert (host.held(), host.held(1)) == ({LAYER: [1, 2]}, {LAYER: [1, 2]})
    assert host._layers[1, LAYER].place[2][0] is host._layers[0, LAYER].place[2][0]
    host.forget(0)
    assert num_rows_of(host, 1) == [1, 1], "the expert that no version has is still in memory"
    call = rows_of(1, 1, 2)
    left: list[Any] = host.run([call])
    torch.testing.assert_close(left[0].rows, torch.cat([oracle(new, call)[:1], oracle(old, call)[1:]]))


# --- the dispatcher ------------------------------------------------------------------------------------------
@pytest.fixture
def cluster():
    """A dispatcher over two hosts, and the modules of versions 0 and 1; no host has expert 5 of version 1."""
    old, new = ToyExperts(seed=1), ToyExperts(seed=2)
    transport, table, hosts, _ = local_cluster(old, 2)
    for name, host in hosts.items():
        mine = [expert for expert in table.placement.experts_on(name)[LAYER] if expert != 5]
        host.hold(LAYER, mine, StackedExperts(new.shard(mine)), version=1)
    num_bytes = sum(parameter[0].nbytes for parameter in old.parameters())
    own = OwnExperts(
        lambda layer, experts, version: StackedExperts((old, new)[version].shard(experts)),
        {LAYER: num_bytes},
        cache_bytes=2 * num_bytes,
        lifeboat_bytes=6 * num_bytes,
    )
    dispatcher = ExpertDispatcher(transport, own=own)
    dispatcher.update(table)
    yield dispatcher, (old, new)
    dispatcher.close()
    transport.close()


@pytest.mark.parametrize("version", [0, 1])
def test_a_batch_is_answered_by_its_version_also_where_the_lifeboat_must_help(cluster, version):
    dispatcher, modules = cluster
    index, weight = random_routing(20, 6, 2)
    hidden = torch.randn(20, 8)
    with torch.no_grad():
        out = dispatcher.forward(LAYER, hidden, index, weight, version)
        torch.testing.assert_close(out, modules[version].oracle(hidden, index, weight))
    assert dispatcher.own.aboard == ({(1, LAYER): frozenset({5})} if version else {})


def test_the_cache_follows_the_current_version_and_others_go_to_hosts(cluster):
    dispatcher, modules = cluster
    index, weight = random_routing(20, 5, 2)
    hidden = torch.randn(20, 8)
    for version in (0, 1):
        for asked in (0, 1):
            with torch.no_grad():
                out = dispatcher.forward(LAYER, hidden, index, weight, asked)
                torch.testing.assert_close(out, modules[asked].oracle(hidden, index, weight))
        dispatcher.rebalance_cache(float(version), version)
        assert [place for place, experts in dispatcher.own.cached.items() if experts] == [(version, LAYER)]
    dispatcher.forget(1)
    assert dispatcher.own.cached == {}


# --- canaries ------------------------------------------------------------------------------------------------
def canary(**changes):
    return Canary(1, CanaryRequest(**{"layer": LAYER, "expert": 2, "model": "better", **changes}))


@pytest.mark.parametrize(("mode", "share", "watched"), [("shadow", 1.0, 0), ("shadow", 0.5, 0), ("traffic", 0.1, 1)])
def test_the_drift_of_a_canary_is_that_of_its_rows(cluster, mode, share, watched):
    dispatcher, (old, new) = cluster
    meter = dispatcher.drift = DriftMeter(dispatcher.rows_of, canary(mode=mode, share=share), base=0, seed=0)
    index, weight = random_routing(400, 5, 2)
    hidden = torch.randn(400, 8)
    with torch.no_grad():
        for version in (0, 1):
            dispatcher.forward(LAYER, hidden, index, weight, version)
            dispatcher.forward(LAYER, hidden, index.clamp(max=1), weight, version)  # not its expert
    total = int((index == 2).sum())
    meter._thread.shutdown(wait=True)
    drift = meter.drift
    assert drift.number == 1
    if mode == "traffic" or share == 1:
        tokens = hidden[(index == 2).any(1)]
        one, ones = torch.full((len(tokens), 1), 2), torch.ones(len(tokens), 1)
        with torch.no_grad():
            theirs, ours = (module.oracle(tokens, one, ones).double() for module in (old, new))
        assert drift.num_rows == total == len(tokens)
        assert drift.ratio == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-4)
    else:
        assert 0.3 * total < drift.num_rows < 0.7 * total
    assert watched in (0, 1)
    before = sum(counts.sum() for counts in dispatcher.tokens_per_expert.values())
    assert before == 4 * index.numel(), "what is compared must not count as load"


def test_comparing_never_holds_up_or_fails_what_is_compared(cluster):
    dispatcher, (old, _) = cluster
    may_go, compared = threading.Event(), []

    def rows(layer, expert, hidden, version):
        assert may_go.wait(10)
        compared.append(version)
        raise Unavailable("nobody has it")

    meter = dispatcher.drift = DriftMeter(rows, canary(share=1.0), base=0)
    index, weight = torch.full((4, 1), 2), torch.ones(4, 1)
    hidden = torch.randn(4, 8)
    with torch.no_grad():
        for _ in range(5 * MAX_PENDING):
            out = dispatcher.forward(LAYER, hidden, index, weight)
        torch.testing.assert_close(out, old.oracle(hidden, index, weight))
    may_go.set()
    meter._thread.shutdown(wait=True)
    assert (len(compared), meter.drift.num_rows) == (MAX_PENDING, 0)
    meter.close()
    dispatcher.forward(LAYER, hidden, index, weight)


# --- the engine ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints, and what `transformers` continues `PROMPT` with by each."""
    checkpoints, tokens = [], []
    for seed in range(2):
        folder = tmp_path_factory.mktemp(f"seed-{seed}")
        model = save("qwen3_moe", folder, seed=seed)
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=[], pad_token_id=0
            )
        tokens.append(tuple(out[0, len(PROMPT) :].tolist()))
        checkpoints.append(Checkpoint.open(folder))
    assert tokens[0] != tokens[1]
    return checkpoints, tokens


@pytest.fixture
def engine(saved):
    """With versions 0 (current) and 1."""
    checkpoints, _ = saved
    host = ExpertHost("expert-0")
    plan = {path: list(range(spec.num_experts)) for path, spec in checkpoints[0].layers.items()}
    for version, checkpoint in enumerate(checkpoints):
        for path, module in checkpoint.load_experts(plan).items():
            host.hold(path, plan[path], StackedExperts(module), version)
    for path, experts in plan.items():
        host.share(path, experts, version=2, of=1)
    transport = LocalTransport({"expert-0": host})
    dispatcher = ExpertDispatcher(transport)
    placement = place_by_index({path: len(experts) for path, experts in plan.items()}, ["expert-0"])
    dispatcher.update(RoutingTable(1, placement, {"expert-0": transport.address("expert-0")}))
    made = Engine(checkpoints[0].load_backbone(), None, checkpoints[0].layers, dispatcher)
    made.add_version(1, checkpoints[1].load_backbone())
    yield made
    transport.close()


def asked(**changes):
    return GenerateRequest(**{"token_ids": PROMPT, "max_new_tokens": NUM_TOKENS, "ignore_eos": True, **changes})


async def answer(engine, **changes):
    """Versions that answered, tokens, and how many were reused."""
    chunks = [chunk async for chunk in engine.generate(asked(**changes))]
    tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
    return {chunk.version for chunk in chunks}, tokens, chunks[-1].num_cached_tokens


async def test_requests_of_two_versions_side_by_side_are_each_answered_by_their_own(engine, saved):
    engine.use_version(0, [1])
    answers = await asyncio.gather(*(answer(engine, version=number % 2) for number in range(6)))
    assert [(versions, tokens) for versions, tokens, _ in answers] == [
        ({number % 2}, saved[1][number % 2]) for number in range(6)
    ]


async def test_a_request_stays_with_the_version_it_began_with(engine, saved):
    stream = engine.generate(asked())
    first = await anext(stream)
    engine.use_version(1)
    assert engine.versions_in_use == {0}
    assert await answer(engine) == ({1}, saved[1][1], 0)
    rest = [chunk async for chunk in stream]
    assert tuple(token for chunk in [first, *rest] for token in chunk.token_ids) == saved[1][0]
    assert {chunk.version for chunk in rest} == {0}
    assert engine.versions_in_use == frozenset()


async def test_beginnings_are_reused_within_a_version_and_never_across(engine, saved):
    engine.use_version(0, [1])
    assert (await answer(engine))[2] == 0
    assert await answer(engine, version=1) == ({1}, saved[1][1], 0)
    for version in (0, 1):
        versions, tokens, num_cached = await answer(engine, version=version)
        assert (versions, tokens) == ({version}, saved[1][version])
        assert num_cached >= len(PROMPT) - 1
    engine.drop_version(1)
    used, _ = engine.kv_cache_bytes
    while engine.kv_cache_bytes[0] == used:  # noqa: ASYNC110 - the thread that computes has no event to wait for
        await asyncio.sleep(0.005)


async def test_a_version_may_share_the_backbone_of_another_and_get_a_share_of_the_requests(engine, saved):
    engine.share_version(2, of=0)  # of which the host has other experts
    engine.use_version(0, trial=(2, 0.5))
    answers = await asyncio.gather(*(answer(engine) for _ in range(40)))
    by_version = {version: {tokens for versions, tokens, _ in answers if versions == {version}} for version in (0, 2)}
    assert by_version[0] == {saved[1][0]}
    assert len(by_version[2]) == 1
    assert by_version[2] != by_version[0]
    engine.use_version(0)
    engine.drop_version(2)
    assert (await answer(engine))[:2] == ({0}, saved[1][0])
    assert sum(parameter.numel() for parameter in engine._models[0].parameters()) > 0


async def test_only_open_versions_can_be_asked_for(engine):
    with pytest.raises(NotFound, match=r"no version 1 of the weights; there are \[0\]"):
        await answer(engine, version=1)
    engine.use_version(1, [0, 7])
    with pytest.raises(NotFound, match=r"no version 7 of the weights; there are \[0, 1\]"):
        await answer(engine, version=7)


async def test_a_dropped_version_gives_its_memory_back_and_the_other_goes_on(engine, saved):
    model = engine._models[0]
    assert (await answer(engine))[1] == saved[1][0]
    engine.use_version(1)
    engine.drop_version(0)
    assert await answer(engine) == ({1}, saved[1][1], 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 0
    assert engine.versions == {1}


async def test_single_layers_are_computed_by_the_current_version(engine, saved):
    layer, spec = next(iter(engine.layers.items()))
    hidden = np.random.default_rng(0).standard_normal((5, spec.hidden_size), dtype=np.float32)
    outs = []
    for version in (0, 1):
        engine.use_version(version)
        block = saved[0][version]
        outs.append(await engine.forward(layer, hidden, None))
        weight = np.ones((5, 1), np.float32)
        index = np.zeros((5, 1), np.int64)
        routed = await engine.forward(layer, hidden, (index, weight))
        shard = block.load_experts({layer: [0]})[layer]
        with torch.no_grad():
            expected = shard(torch.from_numpy(hidden), torch.from_numpy(index), torch.from_numpy(weight))
        np.testing.assert_allclose(routed, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(outs[0] - outs[1]).max() > 1e-3
    assert engine.versions_in_use == frozenset()


# --- what can be published -----------------------------------------------------------------------------------
def test_a_checkpoint_of_another_architecture_is_told_apart(saved, tmp_path):
    first, second = saved[0]
    first.check_same_architecture(second)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("mixtral", {}, "by its model_type: mixtral, not qwen3_moe"),
        ("qwen3_moe", {"vocab_size": 128}, "by its vocab_size: 128, not 96"),
        ("qwen3_moe", {"num_experts": 4}, "by its layers"),
        ("qwen3_moe", {"num_key_value_heads": 4}, "self_attn.k_proj"),
    ]
    for name, changes, what in cases:
        folder = tmp_path / f"{name}-{len(what)}"
        save(name, folder, **changes)
        with pytest.raises(InvalidRequest, match=what):
            first.check_same_architecture(Checkpoint.open(folder))


def test_experts_that_are_loaded_meanwhile_do_not_change_the_architecture(saved, monkeypatch):
    first, second = saved[0]
    checked = []

    def check_and_fill(*args):
        first.check_same_architecture(second)
        checked.append(True)
        return fill(*args)

    fill = loading.fill
    monkeypatch.setattr(loading, "fill", check_and_fill)
    first.load_experts({layer: [0] for layer in first.layers})
    assert len(checked) == len(first.layers)
