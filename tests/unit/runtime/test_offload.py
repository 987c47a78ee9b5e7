"""A host whose experts are elsewhere until a call needs them: the same bits, within a budget of memory."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_moe.errors import ExpertFailed, StaleRouting
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.experts import StackedExperts, unpack
from ray_moe.ops.quantization import Quantization, QuantizedExperts, make_group
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.offload import OffloadedExperts, Residents, offload_to_cpu, offload_to_files
from ray_moe.transport.base import ExpertCall, ExpertReply
from tests.tiny_models import save
from tests.toy import LAYER, ToyExperts

NUM_EXPERTS = 6
EXPERT_BYTES = (10 * 8 + 8 * 5) * 4


def call(experts: Sequence[int], counts: Sequence[int], version: int = 0, seed: int = 0) -> ExpertCall:
    rows = torch.randn(sum(counts), 8, generator=torch.Generator().manual_seed(seed))
    return ExpertCall(LAYER, 0, rows, None, None, list(experts), list(counts), version=version)


class Files:
    """Reads toy experts, and sees how many of them there are in memory."""

    def __init__(self, kind: str = "none", seed: int = 0) -> None:
        self.whole = ToyExperts(seed=seed)
        self.kind: Any = kind
        self.read: list[int] = []
        self.broken: set[int] = set()
        self.most = 0
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(self, expert: int) -> StackedExperts | QuantizedExperts:
        if expert in self.broken:
            raise OSError(f"expert {expert} is gone")
        group = make_group(self.whole.shard([expert]), self.kind)
        self.read.append(expert)
        self._alive.add(group)
        self.most = max(self.most, len(self._alive))
        return group

    @property
    def num_alive(self) -> int:
        return len(self._alive)

    def offloaded(self, experts: Sequence[int], residents: Residents) -> OffloadedExperts:
        return offload_to_files(self, experts, EXPERT_BYTES, residents)


def held(
    files: Files, num_resident: float, experts: Sequence[int] = range(NUM_EXPERTS)
) -> tuple[ExpertHost, Residents]:
    residents = Residents(int(num_resident * EXPERT_BYTES))
    host = ExpertHost("expert-0")
    host.hold(LAYER, list(experts), files.offloaded(list(experts), residents))
    return host, residents


def rows_of(outcomes: Sequence[Any]) -> list[torch.Tensor]:
    assert all(isinstance(outcome, ExpertReply) for outcome in outcomes), outcomes
    return [outcome.rows for outcome in outcomes]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_comes_and_goes_answers_are_bitwise_those_in_memory_and_the_budget_holds(data: st.DataObject) -> None:
    kind: Quantization = data.draw(st.sampled_from(get_args(Quantization)))
    files = Files(kind)
    residents = Residents(data.draw(st.integers(0, 4)) * EXPERT_BYTES + data.draw(st.integers(0, EXPERT_BYTES - 1)))
    within = data.draw(st.booleans())
    host, plain = ExpertHost("offloaded"), ExpertHost("plain")
    some = st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1)
    for _ in range(data.draw(st.integers(1, 12))):
        do = data.draw(st.sampled_from(["hold", "drop", "run", "run", "run", "export"]))
        experts = sorted(data.draw(some))
        there = sorted(set(experts) & set(plain.held().get(LAYER, ())))
        if do == "hold":
            group = make_group(files.whole.shard(experts), kind)
            plain.hold(LAYER, experts, group)
            if within:
                host.hold(LAYER, experts, files.offloaded(experts, residents))
            else:
                host.hold(LAYER, experts, offload_to_cpu(group, len(experts), EXPERT_BYTES, residents, "cpu"))
        elif do == "drop":
            plain.drop(LAYER, experts)
            host.drop(LAYER, experts)
        elif do == "run" and there:
            calls = [call(there, [data.draw(st.integers(1, 3)) for _ in there], seed=n) for n in range(2)]
            for mine, theirs in zip(rows_of(host.run(calls)), rows_of(plain.run(calls)), strict=True):
                assert torch.equal(mine, theirs)
        elif do == "export" and there:
            exported, expected = (unpack(each.export(LAYER, there)) for each in (host, plain))
            assert exported.keys() == expected.keys()
            assert all(torch.equal(exported[name], expected[name]) for name in exported)
        assert residents.num_bytes <= residents.max_bytes
        assert files.num_alive * EXPERT_BYTES <= residents.max_bytes
    assert host.held() == plain.held()
    assert files.most <= residents.max_bytes // EXPERT_BYTES + 1  # the one that computes
    host.drop(LAYER, range(NUM_EXPERTS))
    assert residents.num_bytes == files.num_alive == 0


def test_with_room_for_one_each_call_reads_what_it_needs_and_its_neighbours_come_too() -> None:
    files = Files()
    host, residents = held(files, 1)
    files.read.clear()
    calls = [call([1, 3], [2, 1]), call([3], [4], seed=1)]  # computed together: each expert comes once
    plain = ExpertHost("plain")
    plain.hold(LAYER, list(range(NUM_EXPERTS)), StackedExperts(files.whole))
    for mine, theirs in zip(rows_of(host.run(calls)), rows_of(plain.run(calls)), strict=True):
        assert torch.equal(mine, theirs)
    assert files.read == [1, 3]
    assert residents.num_bytes == EXPERT_BYTES


def test_what_there_is_room_for_is_there_before_the_first_call_and_reads_nothing() -> None:
    files = Files()
    host, residents = held(files, NUM_EXPERTS)
    assert sorted(files.read) == list(range(NUM_EXPERTS))
    rows_of(host.run([call(range(NUM_EXPERTS), [1] * NUM_EXPERTS)]))
    assert residents.num_reads == NUM_EXPERTS


def test_the_hottest_stay() -> None:
    files = Files()
    host, _ = held(files, 1)  # expert 0 is the first to be there
    for _ in range(3):
        rows_of(host.run([call([4], [1])]))
    files.read.clear()
    for other in (1, 2, 3):
        rows_of(host.run([call([4, other], [1, 1])]))
    assert files.read == [1, 2, 3]


def test_experts_that_are_all_as_hot_do_not_drive_each_other_out_in_turn() -> None:
    files = Files()
    host, _ = held(files, NUM_EXPERTS - 1)
    files.read.clear()
    for _ in range(10):
        for expert in range(NUM_EXPERTS):
            rows_of(host.run([call([expert], [1])]))
    assert len(files.read) <= 12  # the last one: nearly each time; the others stay


def test_an_expert_that_cannot_be_read_fails_its_call_alone_and_the_host_goes_on() -> None:
    files = Files()
    host, _ = held(files, 1)
    files.broken = {3}
    good, bad, absent = host.run([call([1], [2]), call([1, 3], [1, 1]), call([9], [1])])
    assert isinstance(good, ExpertReply)
    assert isinstance(bad, ExpertFailed)
    assert "could not be brought into memory: expert 3 is gone" in str(bad)
    assert isinstance(absent, StaleRouting)
    files.broken = set()
    rows_of(host.run([call([1, 3], [1, 1])]))


def test_versions_share_what_they_have_in_common_and_free_the_rest() -> None:
    files, newer = Files(), Files(seed=1)
    host, residents = held(files, 3)
    host.share(LAYER, [0, 1], 1, of=0)
    host.hold(LAYER, [2, 3, 4, 5], newer.offloaded([2, 3, 4, 5], residents), version=1)
    for version, three in ((0, files), (1, newer), (0, files)):
        out = rows_of(host.run([call([0, 3], [2, 2], version)]))[0]
        for expert, whole, part in ((0, files, out[:2]), (3, three, out[2:])):
            expected = StackedExperts(whole.whole).run(call([0, 3], [2, 2]).hidden.split(2)[expert // 3], [expert], [2])
            assert torch.equal(part, expected)
        assert residents.num_bytes <= residents.max_bytes
    host.forget(0)  # gone, but for what version 1 shares
    assert files.num_alive * EXPERT_BYTES <= residents.num_bytes
    assert host.held(1) == {LAYER: list(range(NUM_EXPERTS))}
    rows_of(host.run([call([0, 5], [1, 1], 1)]))
    host.forget(1)
    assert residents.num_bytes == files.num_alive == newer.num_alive == 0


# --- A checkpoint's files ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_of_a_checkpoint_compute_the_same_read_one_by_one(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    for path, layer in checkpoint.layers.items():

        def read(expert: int, path: str = path) -> StackedExperts:
            return StackedExperts(checkpoint.load_experts({path: [expert]})[path])

        ids = list(range(layer.num_experts))
        host, plain = ExpertHost("offloaded"), ExpertHost("plain")
        host.hold(path, ids, offload_to_files(read, ids, layer.expert_bytes, Residents(layer.expert_bytes)))
        plain.hold(path, ids, StackedExperts(checkpoint.load_experts({path: ids})[path]))
        asked = ExpertCall(path, 0, torch.randn(2 * len(ids), layer.hidden_size), None, None, ids, [2] * len(ids))
        assert host.flops(asked) == plain.flops(asked)
        assert torch.equal(rows_of(host.run([asked]))[0], rows_of(plain.run([asked]))[0])


def test_a_checkpoint_that_is_gone_fails_the_call_and_not_the_host(tmp_path: Path) -> None:
    save("mixtral", tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    path, layer = next(iter(checkpoint.layers.items()))
    ids = list(range(layer.num_experts))
    host = ExpertHost("expert-0")
    group = offload_to_files(
        lambda expert: StackedExperts(checkpoint.load_experts({path: [expert]})[path]),
        ids,
        layer.expert_bytes,
        Residents(layer.expert_bytes),
    )
    host.hold(path, ids, group)
    file = tmp_path / "model.safetensors"
    file.rename(tmp_path / "elsewhere")
    here, gone = (
        host.run([ExpertCall(path, 0, torch.randn(1, layer.hidden_size), None, None, [expert], [1])])[0]
        for expert in (0, 5)
    )
    assert isinstance(here, ExpertReply)  # it is resident
    assert isinstance(gone, ExpertFailed)
    assert f"{tmp_path} could not be read" in str(gone)
    (tmp_path / "elsewhere").rename(file)
    rows_of(host.run([ExpertCall(path, 0, torch.randn(1, layer.hidden_size), None, None, [5], [1])]))
