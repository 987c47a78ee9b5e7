"""Tokens per expert: few series, none of which ever falls, that add up to what was routed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_moe.service.metrics_experts import TENURE_S, HotExperts


def traffic(layers, num_experts, seed):
    """Looks at totals that grow by a drifting few experts: (seconds, totals by layer)."""
    rng = np.random.default_rng(seed)
    totals = {f"layer {number}": np.zeros(num_experts, dtype=np.int64) for number in range(layers)}
    now_s = 0.0
    while True:
        for total in totals.values():
            favourites = rng.integers(0, num_experts, size=2)
            total[favourites] += rng.integers(0, 1000, size=2)
            total[:] += rng.integers(0, 3, size=num_experts)
        yield now_s, totals
        now_s += float(rng.uniform(1, TENURE_S))


@settings(max_examples=40)
@given(st.integers(0, 12), st.integers(1, 4), st.integers(1, 24), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_series_are_few_never_fall_and_add_up(max_named, layers, num_experts, looks, seed):
    experts = HotExperts(max_named)
    before: dict[tuple[str, int | None], int] = {}
    highest: dict[tuple[str, int | None], int] = {}
    totals_before: dict[str, int] = {}
    for _, (now_s, totals) in zip(range(looks), traffic(layers, num_experts, seed), strict=False):
        rows = {(row.layer, row.expert): row.tokens for row in experts.count(totals, now_s)}
        assert len(rows) <= max_named + layers
        assert all(tokens >= highest.get(key, 0) for key, tokens in rows.items())
        for layer, total in totals.items():
            mine = {key: tokens for key, tokens in rows.items() if key[0] == layer}
            # What Prometheus sees: how much the series have risen that it saw before, or at first all of them.
            risen = sum(tokens - before.get(key, 0) for key, tokens in mine.items() if key in before or not before)
            assert risen == sum(total) - totals_before.get(layer, 0)
        totals_before = {layer: int(sum(total)) for layer, total in totals.items()}
        before = rows
        highest |= rows


def test_a_large_model_has_as_many_series_as_its_layers_and_the_hottest_and_their_names_change_slowly():
    experts, names, now_s = HotExperts(32), set[tuple[str, int | None]](), 0.0
    rng = np.random.default_rng(0)
    totals = {f"model.layers.{number}.mlp.experts": np.zeros(256, dtype=np.int64) for number in range(61)}
    while now_s <= 3600:
        for total in totals.values():  # others are hot each time
            total[:] += rng.permutation(256) ** 3
        rows = experts.count(totals, now_s)
        assert len(rows) == 61 + 32
        names |= {(row.layer, row.expert) for row in rows if row.expert is not None}
        now_s += 15
    assert 32 < len(names) <= 7 * 32


def test_the_hottest_have_names_from_the_first_look_on():
    totals = {"a": np.array([5, 0, 90]), "b": np.array([70, 0, 0, 1])}
    rows = HotExperts(2).count(totals, 0.0)
    assert [(row.layer, row.expert, row.tokens) for row in rows] == [
        ("a", 2, 90),
        ("a", None, 5),
        ("b", 0, 70),
        ("b", None, 1),
    ]


def test_an_expert_that_cools_down_keeps_its_name_for_its_tenure_and_then_yields_it():
    experts = HotExperts(1)

    def named(tokens, now_s):
        return [row.expert for row in experts.count({"a": np.array(tokens)}, now_s) if row.expert is not None]

    assert named([100, 0], 0.0) == [0]
    assert named([100, 10_000], TENURE_S - 1) == [0]
    assert named([100, 20_000], TENURE_S) == [0]  # a last time
    assert named([100, 30_000], TENURE_S + 1) == [1]
    after = experts.count({"a": np.array([100, 30_500])}, TENURE_S + 2)
    assert [(row.expert, row.tokens) for row in after] == [(1, 500), (None, 30_000)]


@pytest.mark.parametrize(
    ("before", "after", "yields"),
    [
        ([0, 0], [1000, 1150], False),  # hotter, but not by much
        ([0, 0], [1000, 1350], True),
        ([1000, 0], [1000, 500], False),  # hot a moment ago
        ([1000, 0], [1000, 2000], True),
    ],
)
def test_a_name_is_lost_only_to_one_that_is_clearly_hotter_now_and_lately(before, after, yields):
    experts, start = HotExperts(1), np.array([50_000, 0])  # long ago
    for now_s, tokens in ((0.0, [0, 0]), (TENURE_S * 2 - 10, before), (TENURE_S * 2, after)):
        experts.count({"a": start + np.array(tokens)}, now_s)
    rows = experts.count({"a": start + np.array(after)}, TENURE_S * 2 + 1)
    assert [row.expert for row in rows] == [1 if yields else 0, None]


def test_experts_without_tokens_have_no_series():
    assert [row.expert for row in HotExperts(8).count({"a": np.array([0, 3, 0])}, 0.0)] == [1, None]
    assert HotExperts(8).count({}, 0.0) == []
