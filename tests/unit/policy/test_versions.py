"""The rules of publishing, rolling back and retiring versions of the weights."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import InvalidRequest, NotFound, Unavailable
from ray_moe.policy.versions import MIN_ROWS, Drift, Source, Versions, by_source, distinct, num_copies
from ray_moe.types import CanaryRequest


def published(count, keep=2):
    versions = Versions.first("m0")
    for number in range(1, count + 1):
        versions = versions.begin(f"m{number}").commit(keep)
    return versions


def live(versions):
    return {number: str(weights) for number, weights in versions.live.items()}


def states(versions):
    return {status.number: status.state for status in versions.statuses()}


def test_a_published_version_is_current_and_the_one_before_is_kept():
    loading = Versions.first("m0").begin("m1")
    assert states(loading) == {0: "current", 1: "loading"}
    assert {number: str(weights) for number, weights in loading.wanted.items()} == {0: "m0", 1: "m1"}
    assert states(loading.commit(2)) == {0: "kept", 1: "current"}
    assert states(loading.commit(2).begin("m2").commit(2)) == {0: "ending", 1: "kept", 2: "current"}


def test_what_was_given_up_leaves_nothing_but_its_number():
    before = Versions.first("m0")
    after = before.begin("broken").give_up()
    assert (after.live, after.open, after.loading) == (before.live, before.open, None)
    assert live(after.begin("m2").commit(2)) == {0: "m0", 2: "m2"}


def test_rolling_back_goes_to_the_newest_older_version_and_forward_by_name():
    versions = published(3, keep=3)
    back = versions.roll_back()
    assert (back.current, back.roll_back().current) == (2, 1)
    assert back.roll_back(3).current == 3
    with pytest.raises(InvalidRequest, match="no version before 1"):
        back.roll_back().roll_back()
    with pytest.raises(NotFound, match=r"version 0 is not there to roll back to; there are \[1, 2, 3\]"):
        versions.roll_back(0)


def test_a_version_ends_with_the_last_request_that_uses_it():
    versions = published(3)
    assert live(versions.retire({0, 3})) == {0: "m0", 2: "m2", 3: "m3"}
    assert live(versions.retire(())) == {2: "m2", 3: "m3"}
    assert versions.retire({0, 1}) is versions


def test_nothing_is_committed_that_was_not_begun():
    with pytest.raises(InvalidRequest, match="no version is being published"):
        published(1).commit(2)


# --- canaries ------------------------------------------------------------------------------------------------
ASKED = CanaryRequest("layer", 3, "better", max_drift=0.5)


def test_a_canary_is_the_current_version_but_for_one_expert():
    begun = published(1).begin_canary(ASKED)
    assert (states(begun), begun.trial) == ({0: "kept", 1: "current", 2: "loading"}, None)
    tried = begun.commit_canary()
    assert states(tried) == {0: "kept", 1: "current", 2: "canary"}
    current, canary = tried.live[1], tried.live[2]
    assert [canary.source("layer", expert) for expert in (2, 3)] == [current.base, Source(2, "better")]
    assert num_copies(tried.live.values(), "layer", 2) == 2
    assert num_copies(tried.live.values(), "layer", 3) == 3
    assert distinct({1: current, 2: canary}, {"layer": [2, 3]}) == {1: {"layer": [2, 3]}, 2: {"layer": [3]}}
    assert by_source(canary, "layer", [2, 3, 4]) == {current.base: [2, 4], Source(2, "better"): [3]}
    assert str(canary) == "m1, expert 3 of layer from better"


def test_a_canary_of_an_expert_in_parts_has_all_of_them_and_is_told_of_as_one_expert():
    canary = published(1).begin_canary(ASKED, [3, 11]).commit_canary().live[2]
    assert {canary.source("layer", part) for part in (3, 11)} == {Source(2, "better")}
    assert canary.source("layer", 4) == canary.base
    assert str(canary) == "m1, expert 3 of layer from better"


def test_a_canary_is_promoted_or_ends_and_nothing_is_published_beside_it():
    tried = published(1).begin_canary(ASKED).commit_canary()
    promoted = tried.promote(2)
    assert (states(promoted), promoted.canary) == ({0: "ending", 1: "kept", 2: "current"}, None)
    again = promoted.begin_canary(CanaryRequest("layer", 4, "best")).commit_canary().promote(2)
    assert str(again.live[3]) == "m1, expert 3 of layer from better, expert 4 of layer from best"
    cancelled = tried.cancel()
    assert states(cancelled) == {0: "kept", 1: "current", 2: "ending"}
    assert states(tried.retire(())) == states(tried)
    assert live(cancelled.retire(())) == {0: "m0", 1: "m1"}
    assert tried.roll_back().canary is None
    for change in (lambda: tried.begin("m2"), lambda: tried.begin_canary(ASKED)):
        with pytest.raises(Unavailable, match="version 2 is being tried out"):
            change()
    for change in (lambda: promoted.promote(2), promoted.cancel):
        with pytest.raises(InvalidRequest, match="no version is being tried out"):
            change()
    given_up = published(1).begin_canary(ASKED).give_up()
    assert (states(given_up), given_up.canary) == ({0: "kept", 1: "current"}, None)


@pytest.mark.parametrize(
    ("difference", "size", "num_rows", "is_too_far"),
    [
        (0.0, 0.0, 100, False),
        (0.24, 1.0, 100, False),
        (0.26, 1.0, 100, True),
        (0.26, 1.0, MIN_ROWS - 1, False),
        (math.nan, 1.0, 100, True),
        (math.inf, math.inf, 100, True),
        (1.0, 0.0, 100, True),
    ],
)
def test_a_canary_that_drifts_too_far_must_not_go_on(difference, size, num_rows, is_too_far):
    tried = published(1).begin_canary(ASKED).commit_canary()
    halves = [
        Drift(2, num_rows // 2, difference / 2, size / 2),
        Drift(2, num_rows - num_rows // 2, difference / 2, size / 2),
    ]
    drift = tried.measured([*halves, Drift(1, 10_000, 1e9, 1.0)])
    assert tried.is_too_far(drift) == is_too_far
    assert tried.statuses(drift)[2].num_rows == num_rows
    assert not tried.cancel().is_too_far(drift)
    assert tried.cancel().measured(halves) is None


@given(st.lists(st.sampled_from(["publish", "fail", "back", "retire", "recover"]), max_size=30), st.integers(1, 3))
def test_whatever_happens_requests_have_a_version_and_no_number_comes_twice(steps, keep):
    versions, given_numbers = Versions.first("m0"), [0]
    for step in steps:
        before = versions
        if step in ("publish", "fail"):
            versions = versions.begin("m")
            given_numbers.append(versions.last)
            versions = versions.commit(keep) if step == "publish" else versions.give_up()
        elif step == "back":
            try:
                versions = versions.roll_back()
            except InvalidRequest:
                assert versions.current == min(versions.open)
        elif step == "retire":
            versions = versions.retire(())
            assert set(versions.live) == set(versions.open)
        else:
            versions = versions.recovered()
        assert versions is before or versions.revision > before.revision
        assert set(versions.open) <= set(versions.live)
        assert len(versions.open) == len(set(versions.open)) <= keep or versions.open == (0,)
        assert states(versions)[versions.current] == "current"
    assert len(given_numbers) == len(set(given_numbers))
