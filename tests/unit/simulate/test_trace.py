"""Synthetic traffic and single batches: what is drawn is possible, and follows from the seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import InvalidConfig
from ray_moe.simulate.trace import Jump, capped, draw_batch, parse_kind
from tests.unit.simulate.small import trace


@pytest.mark.parametrize("kind", ["zipf", "lognormal", "uniform"])
@pytest.mark.parametrize("shape", [0.0, 1.0, 10.0])
def test_no_expert_is_chosen_by_more_tokens_than_there_are(kind, shape):
    for step in trace(kind=kind, shape=shape, drift=1.0):
        assert step.rows.shape == (2, 8)
        assert step.rows.min() >= 0
        assert step.rows.max() <= 2000
        np.testing.assert_allclose(step.rows.sum(-1), 4000, atol=8)


def test_uniform_traffic_is_even_and_zipf_is_not():
    (even, *_), (steep, *_) = trace(kind="uniform"), trace(kind="zipf")
    assert (even.rows == 500).all()
    assert steep.rows.max() > 3 * np.median(steep.rows)


def test_the_same_seed_gives_the_same_traffic_and_another_seed_another():
    one, again, other = (np.array([step.rows for step in trace(drift=0.1, seed=seed)]) for seed in (3, 3, 4))
    assert (one == again).all()
    assert (one != other).any()


def test_drift_changes_who_is_popular_and_without_it_nothing_changes():
    still = [step.rows for step in trace()]
    assert all((rows == still[0]).all() for rows in still)
    drifting = [step.rows for step in trace(drift=0.3)]
    assert (drifting[0].argsort(-1) != drifting[-1].argsort(-1)).any()


def test_in_a_flash_crowd_one_expert_of_each_layer_grows():
    steps = list(trace(kind="uniform", flash_crowd=Jump(10.0, 5.0)))
    before, after = steps[9].rows, steps[10].rows
    assert (before == 500).all()
    assert ((after > 1000).sum(-1) == 1).all()
    np.testing.assert_allclose(after.sum(-1), before.sum(-1), atol=8)


def test_in_a_surge_all_of_it_grows():
    steps = list(trace(surge=Jump(10.0, 3.0)))
    np.testing.assert_allclose(steps[10].rows, 3 * steps[9].rows, atol=2)


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 300), st.floats(0, 3), st.integers(0, 3000))
def test_a_batch_is_possible(seed, top_k, num_tokens, noise, total):
    """It has all its rows, none of experts without traffic, and none twice for a token."""
    random = np.random.default_rng(seed)
    weight = random.pareto(1.0, (3, 8)) + 1e-3
    weight[0, 5:] = 0.0
    rows = np.rint(capped(weight, np.full(3, 1 / top_k)) * total).astype(np.int64)
    batch = draw_batch(rows, num_tokens, top_k, noise, random)
    assert batch.min() >= 0
    assert batch[rows == 0].sum() == 0
    expected = np.minimum(num_tokens * top_k, rows.sum(-1))
    np.testing.assert_allclose(batch.sum(-1), expected, atol=top_k)
    limit = np.maximum(expected / top_k, expected * rows.max(-1) / np.maximum(rows.sum(-1), 1))
    assert (batch.max(-1) <= limit + 1.01).all()


@given(st.lists(st.floats(1e-6, 1e6), min_size=4, max_size=12), st.integers(1, 4))
def test_capped_shares_are_shares_and_keep_their_order(weights, top_k):
    weight = np.array([weights])
    share = capped(weight, np.array([1 / top_k]))
    assert share.sum() == pytest.approx(1.0)
    assert share.max() <= 1 / top_k + 1e-9
    order = weight[0].argsort(kind="stable")
    assert (np.diff(share[0][order]) >= -1e-9).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [("zipf:1.5", ("zipf", 1.5)), ("uniform", ("uniform", 1.0)), ("zpif:1", None), ("traffic.npz", None)],
)
def test_kinds_of_traces(text, said):
    assert parse_kind(text) == said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": -1.0}, "the number of --trace zipf is -1; expected a number that is 0 or more, and at most 10"),
        ({"shape": float("nan")}, "the number of --trace zipf is nan"),
        ({"num_layers": 0}, "--layers is 0; expected a number that is 1 or more"),
        ({"experts_per_layer": 0}, "--experts is 0"),
        ({"experts_per_layer": 2**24}, "--layers times --experts is"),
        ({"top_k": 9}, "--top-k is 9, but a layer has 8 experts"),
        ({"seconds": 0.0}, "--seconds is 0; expected a number that is more than 0"),
        ({"drift": -0.1}, "--drift is -0.1"),
        ({"tokens_per_s": float("inf")}, "--tokens-per-second is inf"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_impossible_traffic_is_refused_by_its_option(changes, said):
    with pytest.raises(InvalidConfig) as caught:
        trace(**changes)
    assert caught.value.message.startswith(said)


@pytest.mark.parametrize("text", ["", "5", "1:2:3", "a:b", "-1:2", "1:-2", "1:nan"])
def test_a_jump_that_is_none(text):
    with pytest.raises(InvalidConfig, match="--surge"):
        Jump.parse("--surge", text)


def test_a_number_that_is_none():
    with pytest.raises(InvalidConfig, match=r"such as zipf:1\.0"):
        parse_kind("zipf:steep")
