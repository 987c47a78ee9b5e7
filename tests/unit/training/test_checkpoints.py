"""Checkpoints of training: what any hosts write any others read, and nothing that is not whole is taken for one."""

from __future__ import annotations

import itertools
import json
import random
import resource
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_moe.errors import (
    InsufficientResources,
    InvalidCheckpoint,
    InvalidConfig,
    InvalidRequest,
    NotFound,
    RayMoEError,
    Unavailable,
)
from ray_moe.ops.gates.registry import GateChoice
from ray_moe.training.checkpoints import BACKBONE, MANIFEST, Draft, drop_after, folder_of, latest, saved
from ray_moe.training.manifest import Manifest, Shard, Stamp, fingerprint
from ray_moe.training.restoring import TrainingCheckpoint
from ray_moe.training.shards import AsyncWriter, write_tensors

LAYERS = {"model.layers.0.mlp.experts": 5, "model.layers.1.mlp.experts": 3}
KEYS = [(path, expert) for path, number in LAYERS.items() for expert in range(number)]
FIRST, SECOND = LAYERS

Key = tuple[str, int]
State = dict[str, torch.Tensor]


def state_of(key: Key, step: int = 0) -> State:
    generator = torch.Generator().manual_seed(KEYS.index(key) + 100 * step)
    weight = torch.randn(4, 3, generator=generator)
    return {
        "master.gate_up_proj": weight,
        "exp_avg.gate_up_proj": weight.T,  # not contiguous
        "exp_avg_sq.gate_up_proj": weight.bfloat16(),
        "step": torch.tensor(float(step)),
        "count": torch.tensor([KEYS.index(key)], dtype=torch.int64),
        "empty": torch.zeros(0, 3),
    }


def backbone_of(step: int) -> State:
    return {"model.norm.weight": torch.full((3,), float(step)), "lm_head.weight": torch.full((5, 3), -1.0)}


def stamp_of(step: int, run_id: str = "run", model: str = "tiny") -> Stamp:
    return Stamp(run_id, step, model)


def begin(root: Path, step: int = 1, keep: int | None = None, stamp: Stamp | None = None) -> Draft:
    return Draft(root, stamp or stamp_of(step), LAYERS, fingerprint({"layers": 2}), keep)


def write(draft: Draft, owners: Mapping[str, Sequence[Key]], max_shard_bytes: int = 500) -> list[Shard]:
    """Every owner writes its experts, and the first one the backbone."""
    step, shards = draft.stamp.step, list[Shard]()
    for number, (owner, keys) in enumerate(owners.items()):
        writer = AsyncWriter(owner, max_shard_bytes)
        files = {BACKBONE: backbone_of(step)} if number == 0 else None
        writer.save(draft.folder, draft.stamp, ((key, state_of(key, step)) for key in keys), files)
        shards += writer.wait()
        writer.close()
    return shards


ONE_OWNER = {"expert-0": KEYS}
TWO_OWNERS = {"expert-0": KEYS[::2], "expert-1": KEYS[1::2]}


def save(root: Path, step: int = 1, keep: int | None = None, stamp: Stamp | None = None) -> Path:
    draft = begin(root, step, keep, stamp)
    return draft.commit(write(draft, TWO_OWNERS))


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# --- What is written is what is read ---------------------------------------------------------------------------------
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    owner_of=st.lists(st.integers(0, 3), min_size=len(KEYS), max_size=len(KEYS)),
    reader_of=st.lists(st.integers(0, 4), min_size=len(KEYS), max_size=len(KEYS)),
    max_shard_bytes=st.sampled_from([1, 400, 700, 10**9]),
    order=st.randoms(use_true_random=False),
)
def test_any_hosts_read_what_any_others_wrote(
    tmp_path: Path, owner_of: list[int], reader_of: list[int], max_shard_bytes: int, order: random.Random
) -> None:
    root = tmp_path / "run"
    shutil.rmtree(root, ignore_errors=True)
    keys = order.sample(KEYS, len(KEYS))
    owners = {f"expert-{o}": [k for k, owner in zip(keys, owner_of, strict=True) if owner == o] for o in range(4)}
    draft = begin(root, 7)
    folder = draft.commit(write(draft, owners, max_shard_bytes))
    checkpoint = TrainingCheckpoint.open(folder)
    for reader in range(5):
        for path in LAYERS:
            wanted = [k[1] for k, r in zip(keys, reader_of, strict=True) if r == reader and k[0] == path]
            got = list(checkpoint.read(path, wanted))
            assert [expert for expert, _ in got] == wanted
            assert all(equal(state, state_of((path, expert), 7)) for expert, state in got)
    assert equal(checkpoint.tensors(BACKBONE), backbone_of(7))


def test_what_a_checkpoint_says_of_itself(tmp_path: Path) -> None:
    draft = begin(tmp_path, 120)
    rng = {"torch": torch.get_rng_state(), "dropout": torch.Generator().manual_seed(3).get_state()}
    position = {"epoch": 1, "files": ["a", "b"], "sample": 12345678901234}
    folder = draft.commit(write(draft, ONE_OWNER), position, rng)
    assert folder.name == "step-00000120"
    manifest = TrainingCheckpoint.open(folder).manifest
    assert manifest.stamp == Stamp("run", 120, "tiny")
    assert manifest.fingerprint == fingerprint({"layers": 2})
    assert manifest.layers == LAYERS
    assert manifest.position == position
    assert equal(dict(manifest.rng), rng)
    assert manifest.gate is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000120"]


def test_a_manifest_says_which_gate_was_trained() -> None:
    plain = Manifest(Stamp("run", 1, "tiny"), "", {}, ())
    gated = replace(plain, gate=GateChoice("sigmoid", {"num_groups": 2, "normalize": False}))
    assert Manifest.from_json(gated.to_json(), "here") == gated
    versions = [json.loads(each.to_json())["version"] for each in (plain, gated)]
    assert versions == [1, 3]  # a program that knows of no gates does not read the second


def test_models_are_told_apart_by_their_shape_alone() -> None:
    config = {"model_type": "mixtral", "hidden_size": 32, "num_local_experts": 8}
    assert fingerprint(config) == fingerprint({"dtype": "float32", **config, "transformers_version": "5.0"})
    assert fingerprint(config) != fingerprint({**config, "num_local_experts": 16})


def test_many_experts_are_few_files(tmp_path: Path) -> None:
    draft = begin(tmp_path)
    draft.commit(write(draft, TWO_OWNERS, max_shard_bytes=10**9))
    assert len(list(latest_of(tmp_path).rglob("*"))) == 5  # experts/ with two files, the backbone, the manifest


def latest_of(root: Path) -> Path:
    folder = latest(root)
    assert folder is not None
    return folder


def test_experts_are_read_one_by_one_into_memory_of_their_own(tmp_path: Path) -> None:
    checkpoint = TrainingCheckpoint.open(save(tmp_path))
    states = checkpoint.read(FIRST, range(5))
    expert, state = next(states)
    shutil.rmtree(checkpoint.folder / "experts")
    assert expert == 0
    assert equal(state, state_of((FIRST, 0), 1))
    with pytest.raises(InvalidCheckpoint, match=r"experts/expert-1-00000\.safetensors"):
        list(states)


def test_experts_and_files_that_are_not_there(tmp_path: Path) -> None:
    checkpoint = TrainingCheckpoint.open(save(tmp_path))
    with pytest.raises(NotFound, match=r"no experts \[3\] of 'model\.layers\.1.*It has: model\.layers\.0.* \(0 to 4\)"):
        checkpoint.read(SECOND, [0, 3])
    with pytest.raises(NotFound, match=r"no experts \[0\] of 'nowhere'"):
        checkpoint.read("nowhere", [0])
    with pytest.raises(NotFound, match=r"has no other\.safetensors\. It has: backbone\.safetensors"):
        checkpoint.tensors("other.safetensors")


# --- Writing while training goes on ----------------------------------------------------------------------------------
def test_what_is_saved_is_what_it_was_when_save_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()
    delay(monkeypatch, may_write)
    draft = begin(tmp_path)
    states = {key: state_of(key, 1) for key in KEYS}
    writer = AsyncWriter("expert-0")
    writer.save(draft.folder, draft.stamp, states.items())
    for state in states.values():  # training goes on
        for tensor in state.values():
            tensor.zero_()
    assert list(draft.folder.rglob("*.safetensors")) == []
    may_write.set()
    checkpoint = TrainingCheckpoint.open(draft.commit(writer.wait()))
    writer.close()
    assert all(equal(state, state_of((FIRST, expert), 1)) for expert, state in checkpoint.read(FIRST, range(5)))


def delay(monkeypatch: pytest.MonkeyPatch, until: threading.Event) -> None:
    from ray_moe.training import shards

    write_experts = shards.write_experts

    def late(*arguments: Any) -> tuple[Shard, ...]:
        assert until.wait(60)
        return write_experts(*arguments)

    monkeypatch.setattr(shards, "write_experts", late)


def test_an_error_surfaces_once_at_the_next_save_or_wait(tmp_path: Path) -> None:
    gone, draft = begin(tmp_path / "other"), begin(tmp_path)
    gone.abort()
    states = [(key, state_of(key, 1)) for key in KEYS]
    writer = AsyncWriter("expert-0")
    writer.save(gone.folder, gone.stamp, states)
    with pytest.raises(Unavailable, match="the checkpoint has been given up"):
        writer.save(draft.folder, draft.stamp, states)
    assert writer.wait() == ()  # nothing was begun
    writer.save(gone.folder, gone.stamp, states)
    with pytest.raises(Unavailable):
        writer.wait()
    writer.save(draft.folder, draft.stamp, states)
    draft.commit(writer.wait())
    writer.close()
    with pytest.raises(Unavailable, match="closed"):
        writer.save(draft.folder, draft.stamp, states)


def test_names_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    draft = begin(tmp_path / "run")
    for name in ("../expert", "a/b", "", ".hidden"):
        writer = AsyncWriter(name)
        writer.save(draft.folder, draft.stamp, [(KEYS[0], state_of(KEYS[0]))])
        with pytest.raises(InvalidRequest, match="a writer is named"):
            writer.wait()
        writer.close()
    writer = AsyncWriter("expert-0")
    writer.save(draft.folder, draft.stamp, [], {"../../escaped.safetensors": backbone_of(1)})
    with pytest.raises(InvalidRequest, match="cannot be a file of a checkpoint"):
        writer.wait()
    writer.close()
    draft.abort()
    assert content(tmp_path) == {}


# --- Committing ------------------------------------------------------------------------------------------------------
def lose(shards: list[Shard], folder: Path) -> list[Shard]:
    return [shard for shard in shards if (FIRST, 1) not in {(p, e) for p, ids in shard.experts.items() for e in ids}]


def cut(shards: list[Shard], folder: Path) -> list[Shard]:
    path = folder / shards[0].file
    path.write_bytes(path.read_bytes()[:-1])
    return shards


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lose, r"experts are missing: .*model\.layers\.0\.mlp\.experts/1"),
        (lambda shards, folder: [*shards, shards[0]], r"experts were written more than once: model\.layers"),
        (lambda shards, folder: [*shards, Shard("x.safetensors", 1, "", {FIRST: (5,)})], r"unknown: .*experts/5"),
        (lambda shards, folder: [*shards, Shard("x.safetensors", 1, "")], r"x\.safetensors is not there as it was"),
        (cut, r"experts/expert-0-00000\.safetensors is not there as it was written"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_not_committed(
    change: Callable[[list[Shard], Path], list[Shard]], said: str, tmp_path: Path
) -> None:
    save(tmp_path, 1)
    before = content(tmp_path)
    draft = begin(tmp_path, 2)
    shards = change(write(draft, TWO_OWNERS, max_shard_bytes=1), draft.folder)
    with pytest.raises(InvalidRequest, match=said):
        draft.commit(shards)
    assert content(tmp_path) == before


@pytest.mark.parametrize("position", [{1, 2}, float("nan"), {"a": object()}])
def test_a_position_that_json_cannot_hold(position: Any, tmp_path: Path) -> None:
    draft = begin(tmp_path)
    with pytest.raises(InvalidRequest, match="which JSON cannot hold"):
        draft.commit(write(draft, ONE_OWNER), position)
    assert content(tmp_path) == {}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert list(saved(tmp_path)) == [30, 20, 10]
    save(tmp_path, 40, keep=2)
    assert saved(tmp_path) == {step: folder_of(tmp_path, step) for step in (40, 30)}
    assert latest(tmp_path) == folder_of(tmp_path, 40)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(InvalidConfig, match="0 checkpoints are to be kept"):
        begin(tmp_path, 50, keep=0)
    assert latest(tmp_path / "nothing") is None


def test_a_step_that_is_done_again_replaces_the_first_one(tmp_path: Path) -> None:
    save(tmp_path, 10)
    draft = begin(tmp_path, 10)
    shards = write(draft, ONE_OWNER)
    assert TrainingCheckpoint.open(folder_of(tmp_path, 10)).manifest.position is None
    draft.commit(shards, "again")
    assert TrainingCheckpoint.open(folder_of(tmp_path, 10)).manifest.position == "again"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_a_run_that_goes_back_drops_what_came_after(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    with pytest.raises(InvalidConfig, match=r"step 20 is to be saved in .*, where step 30 is already"):
        begin(tmp_path, 20)
    drop_after(tmp_path, 10)
    assert list(saved(tmp_path)) == [10]
    save(tmp_path, 20)
    assert list(saved(tmp_path)) == [20, 10]


# --- Losses ----------------------------------------------------------------------------------------------------------
@contextmanager
def room(num_bytes: int) -> Iterator[None]:
    """No file may become larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("num_bytes", "file"),
    [
        (0, r"experts/expert-0-00000\.safetensors"),
        (1000, r"experts/expert-0-00000\.safetensors"),
        (5000, r"manifest\.json"),
    ],
)
def test_a_full_disk_leaves_the_older_checkpoints_alone(num_bytes: int, file: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = content(tmp_path)
    draft = begin(tmp_path, 2, keep=1)
    with room(num_bytes), pytest.raises(InsufficientResources, match=f"there is no room for .*{file}"):
        try:
            shards = write_and_close(draft)
        except RayMoEError:
            draft.abort()
            raise
        draft.commit(shards, rng={"torch": torch.get_rng_state()})
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    save(tmp_path, 2)
    assert list(saved(tmp_path)) == [2, 1]


def write_and_close(draft: Draft) -> tuple[Shard, ...]:
    writer = AsyncWriter("expert-0", max_shard_bytes=500)
    try:
        writer.save(draft.folder, draft.stamp, ((key, state_of(key, 2)) for key in KEYS))
        return writer.wait()
    finally:
        writer.close()


def test_what_a_lost_coordinator_has_begun_is_removed_and_what_another_writes_is_not(tmp_path: Path) -> None:
    save(tmp_path, 1)
    left = tmp_path / ".step-00000002.partial-0123"
    left.mkdir()
    (left / "backbone.safetensors").write_bytes(b"half")
    alive = begin(tmp_path, 3)
    shards = write(alive, TWO_OWNERS)
    assert not left.exists()
    begin(tmp_path, 4).abort()
    alive.commit(shards)
    assert list(saved(tmp_path)) == [3, 1]


def test_an_unfinished_checkpoint_is_none(tmp_path: Path) -> None:
    draft = begin(tmp_path, 2)
    write(draft, TWO_OWNERS)
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-last").mkdir()
    assert saved(tmp_path) == {}
    with pytest.raises(InvalidCheckpoint, match=r"no checkpoint of training: it has no manifest\.json"):
        TrainingCheckpoint.open(draft.folder)
    draft.abort()
    draft.abort()
    assert content(tmp_path) == {}


# --- Damage ----------------------------------------------------------------------------------------------------------
def test_nothing_is_left_of_a_checkpoint_that_is_given_up_while_it_is_written(tmp_path: Path) -> None:
    draft = begin(tmp_path, 1)
    written = threading.Event()

    def write() -> None:
        with pytest.raises((Unavailable, InvalidConfig), match=r"is not there|cannot write"):
            for number in itertools.count():
                write_tensors(draft.folder, draft.stamp, f"experts/{number}.safetensors", backbone_of(1))
                written.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        assert written.wait(10)
        draft.abort()
        writing.result(10)
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path)
    for path in sorted(folder.rglob("*.safetensors")):
        kept = path.read_bytes()
        path.unlink()
        with pytest.raises(InvalidCheckpoint, match=f"lacks 1 of its files: .*{path.name}"):
            TrainingCheckpoint.open(folder, check_hashes=False)
        path.write_bytes(kept)
    assert TrainingCheckpoint.open(folder).manifest.stamp.step == 1


@pytest.mark.parametrize(
    ("stamp", "said"),
    [
        (stamp_of(2), "its step is '2', that of the manifest is '1'"),
        (stamp_of(1, run_id="another"), "its run_id is 'another'"),
        (stamp_of(1, model="large"), "its model is 'large'"),
    ],
)
def test_a_file_of_another_checkpoint_is_named(stamp: Stamp, said: str, tmp_path: Path) -> None:
    folder, other = save(tmp_path / "one"), save(tmp_path / "other", stamp=stamp, step=stamp.step)
    shutil.copy(other / "experts" / "expert-1-00001.safetensors", folder / "experts")
    with pytest.raises(InvalidCheckpoint, match=f"expert-1-00001.safetensors belongs to another checkpoint: {said}"):
        TrainingCheckpoint.open(folder, check_hashes=False)


def test_a_file_that_the_manifest_does_not_name_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path)
    shutil.copy(folder / "experts" / "expert-1-00001.safetensors", folder / "experts" / "expert-9-00000.safetensors")
    with pytest.raises(InvalidCheckpoint, match=r"manifest does not name: experts/expert-9-00000\.safetensors"):
        TrainingCheckpoint.open(folder)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_byte_goes_unnoticed(tmp_path: Path, data: st.DataObject) -> None:
    folder = latest(tmp_path) or save(tmp_path)
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    kept = path.read_bytes()
    changed = bytearray(kept)
    if data.draw(st.booleans()):
        changed[data.draw(st.integers(0, len(kept) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del changed[data.draw(st.integers(0, len(kept) - 1)) :]
    path.write_bytes(changed)
    try:
        if path.name == MANIFEST and same_json(changed, kept):  # a blank between two values
            TrainingCheckpoint.open(folder)
        else:
            with pytest.raises(InvalidCheckpoint, match=path.name):
                TrainingCheckpoint.open(folder)
    finally:
        path.write_bytes(kept)


def same_json(one: bytes | bytearray, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_a_manifest_of_a_later_format_says_so(tmp_path: Path) -> None:
    folder = save(tmp_path)
    tree = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**tree, "version": 4}))
    with pytest.raises(
        InvalidCheckpoint, match=r"is of format version 4; this program reads versions up to 3\. Update"
    ):
        TrainingCheckpoint.open(folder)
