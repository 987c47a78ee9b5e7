"""Recorded traffic: read from a service's totals, written, read again, and refused when it is not what it should be."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from ray_moe.errors import InvalidConfig, Unavailable
from ray_moe.simulate.checks import check_writable
from ray_moe.simulate.recording import FIELDS, VERSION, RecordedTrace, watch
from ray_moe.simulate.trace import Step
from tests.unit.cli.fakes import status
from tests.unit.simulate.small import trace


def recorded(**changes) -> RecordedTrace:
    of = trace(drift=0.1, seconds=5, **changes)
    return RecordedTrace.of(dict(zip(of.layers, of.num_experts, strict=True)), list(of))


def test_a_saved_trace_replays_to_the_same_counts(tmp_path):
    original, file = recorded(), tmp_path / "trace.npz"
    original.save(file)
    again = RecordedTrace.load(file)
    assert (again.layers, again.num_experts, again.duration_s) == (original.layers, original.num_experts, 5.0)
    for one, other in zip(original, again, strict=True):
        assert one.duration_s == other.duration_s
        assert (one.rows == other.rows).all()
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]


def test_the_first_seconds_of_a_trace():
    assert recorded().first(2.5).duration_s == 3.0
    assert recorded().first(1e-9).duration_s == 1.0
    assert recorded().first(100).duration_s == 5.0


# --- files that are no traces ----------------------------------------------------------------------------------
def arrays(**changes):
    good = {
        "version": np.array(VERSION),
        "layers": np.array(["a", "b"]),
        "num_experts": np.array([4, 3]),
        "duration_s": np.array([1.0, 0.5]),
        "rows": np.zeros((2, 2, 4), dtype=np.int64),
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def test_a_trace_with_layers_of_different_widths_is_one(tmp_path):
    np.savez(tmp_path / "t.npz", **arrays())
    assert RecordedTrace.load(tmp_path / "t.npz").num_experts == (4, 3)


beyond = np.zeros((2, 2, 4), dtype=np.int64)
beyond[0, 1, 3] = 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": np.array(VERSION + 1)}, f"is a trace of version {VERSION + 1}, and this ray-moe reads version"),
        ({"version": np.array([VERSION])}, "is a trace of version"),
        *(({name: None}, f"is not a trace: it has no {name}") for name in FIELDS),
        ({"rows": np.zeros((2, 2, 5), dtype=np.int64)}, "its rows are [2, 2, 5] where 2 steps, 2 layers and 4"),
        ({"rows": np.zeros((2, 4), dtype=np.int64)}, "its rows has 2 axes"),
        ({"rows": np.zeros((2, 2, 4))}, "its rows has 3 axes of float64"),
        ({"rows": np.full((2, 2, 4), -1)}, "negative rows"),
        ({"rows": beyond}, "rows of experts that there are not"),
        ({"rows": np.array([[[{}]]], dtype=object)}, "is not a trace"),
        ({"layers": np.array(["a", "a"])}, "two layers of one name"),
        ({"layers": np.array(["a"])}, "1 layers"),
        ({"num_experts": np.array([4, 0])}, "a layer without experts"),
        ({"num_experts": np.array([], dtype=np.int64), "layers": np.array([])}, "is not a trace"),
        ({"duration_s": np.array([1.0, 0.0])}, "a step has no duration above 0"),
        ({"duration_s": np.array([1.0, np.nan])}, "a step has no duration above 0"),
        ({"duration_s": np.array([]), "rows": np.zeros((0, 2, 4), dtype=np.int64)}, "it has no steps"),
    ],
)
def test_files_with_wrong_contents_are_refused(tmp_path, changes, said):
    file = tmp_path / "t.npz"
    np.savez(file, allow_pickle=True, **arrays(**changes))
    with pytest.raises(InvalidConfig) as caught:
        RecordedTrace.load(file)
    assert str(file) in caught.value.message
    assert said in caught.value.message


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole, part = tmp_path / "whole.npz", tmp_path / "part.npz"
    recorded().save(whole)
    content = whole.read_bytes()
    for length in range(0, len(content), 97):
        part.write_bytes(content[:length])
        with pytest.raises(InvalidConfig, match="is not a trace"):
            RecordedTrace.load(part)


def test_a_file_with_flipped_bytes_is_read_or_refused_and_nothing_else(tmp_path):
    whole, bad = tmp_path / "whole.npz", tmp_path / "bad.npz"
    recorded().save(whole)
    content = whole.read_bytes()
    num_refused = 0
    for place in range(0, len(content), 41):
        bad.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            RecordedTrace.load(bad)
        except InvalidConfig:
            num_refused += 1
    assert num_refused > len(content) / 41 / 2


@pytest.mark.parametrize("content", [b"", b"PK", b"\x93NUMPY", b"version: 1\n", b"\x80\x04."])
def test_other_files_are_refused(tmp_path, content):
    file = tmp_path / "t.npz"
    file.write_bytes(content)
    with pytest.raises(InvalidConfig, match="is not a trace"):
        RecordedTrace.load(file)


def test_a_plain_array_is_no_trace(tmp_path):
    np.save(tmp_path / "t.npy", np.zeros(3))
    with pytest.raises(InvalidConfig, match="is not a trace"):
        RecordedTrace.load(tmp_path / "t.npy")


def test_missing_files_and_places_that_cannot_be_written(tmp_path):
    with pytest.raises(InvalidConfig, match=r"cannot read the trace .*: No such file"):
        RecordedTrace.load(tmp_path / "none.npz")
    with pytest.raises(InvalidConfig, match=r"cannot read the trace .*: Is a directory"):
        RecordedTrace.load(tmp_path)
    for file in (tmp_path / "none" / "t.npz", tmp_path):
        for write in (recorded().save, check_writable):
            with pytest.raises(InvalidConfig, match="cannot write"):
                write(file)
    check_writable(tmp_path / "t.npz")
    assert list(tmp_path.iterdir()) == []


# --- from a service --------------------------------------------------------------------------------------------
def watched(looks, seconds=10.0) -> list[Step]:
    """What is seen of a service whose totals are `looks`, one after the other, a second apart."""
    clock = count()
    statuses = iter([replace(status(), tokens_per_expert=tokens) for tokens in looks])
    steps = watch(lambda: next(statuses), seconds, 1.0, lambda: float(next(clock)), lambda _: None)
    return [step for _, step in steps]


def test_a_service_is_recorded_as_differences_of_its_totals():
    steps = watched([{"a": (1, 2), "b": (5,)}, {"a": (4, 2), "b": (5,)}, {"b": (7,), "a": (4, 3)}], seconds=2)
    assert [step.duration_s for step in steps] == [1.0, 1.0]
    assert [step.rows.tolist() for step in steps] == [[[3, 0], [0, 0]], [[0, 1], [2, 0]]]


def test_a_router_that_starts_anew_counts_from_zero():
    steps = watched([{"a": (100, 50)}, {}, {"a": (3, 60)}, {"a": (4, 60)}], seconds=3)
    assert [(step.duration_s, step.rows.tolist()) for step in steps] == [(2.0, [[3, 60]]), (1.0, [[1, 0]])]


def test_a_service_that_counts_nothing_yet_or_becomes_another_model():
    with pytest.raises(Unavailable, match="no layers to count yet"):
        watched([{}])
    with pytest.raises(Unavailable, match="another model"):
        watched([{"a": (1, 2)}, {"a": (1, 2, 3)}])
