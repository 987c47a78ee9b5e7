"""What `ray-moe bench scale` measures, on a cluster so small that it can be counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import scale_work
from benchmarks.pages import scale as pages

TOKENS = (1, 16)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    sizes = (
        {"hosts": 3, "experts": 8, "layers": 2, "tokens": TOKENS},
        {"hosts": 6, "experts": 8, "layers": 2, "tokens": TOKENS, "hosts_a_layer": 2},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_work, "LEAST_S", 0.0)
        patch.setattr(scale_work, "WIDTH", 4)
        return [{"size": size, "now": scale_work.measure(size)} for size in sizes]


def test_every_host_with_a_share_gets_a_message_and_every_token_comes_back_for_each_choice(
    rows: list[dict[str, Any]],
) -> None:
    for row, num_hosts in zip(rows, (3, 2), strict=True):
        for tokens in TOKENS:
            batch = row["now"]["batch"][str(tokens)]
            assert batch["messages"] == num_hosts  # top-8 of 8 experts: everybody is needed
            assert batch["bytes_back"] == tokens * 8 * 4 * 2
            assert tokens * num_hosts * 4 * 2 < batch["bytes_out"] < tokens * num_hosts * 4 * 2 + 2000 * num_hosts


def test_a_layer_of_its_own_hosts_is_on_as_many_as_asked(rows: list[dict[str, Any]]) -> None:
    placement = scale_work.few_hosts_a_layer(rows[1]["size"])
    first, second = placement.hosts_of.values()
    assert [host for (host,) in first] == ["expert-0"] * 4 + ["expert-1"] * 4
    assert [host for (host,) in second] == ["expert-2"] * 4 + ["expert-3"] * 4
    assert rows[1]["now"]["replicas"] == 16


def test_the_model_is_what_its_terms_say() -> None:
    batch = {"messages": 10, "bytes_out": 10**6, "bytes_back": 2 * 10**6, "split_s": 1e-3, "encode_s": 1e-4}
    row = {"size": {"layers": 5}, "now": {"batch": {"16": {**batch, "combine_s": 5e-4}}}}
    one = pages.tokens_per_s(row, "16", 1e-4)
    assert one["thread"] == pytest.approx(16 / (5 * (1e-3 + 5e-4 + 10 * 1e-4)))
    assert one["25 Gbit/s"] == pytest.approx(16 / (5 * 2e6 * 8 / 25e9))
    assert one["400 Gbit/s"] == pytest.approx(16 * one["25 Gbit/s"])


def test_the_page_has_a_row_for_each_size_and_names_what_is_least(rows: list[dict[str, Any]]) -> None:
    data = {"rows": rows, "tokens": TOKENS, "before": None, "message": {"socket_s": 1e-5, "grpc_s": 10.0}}
    text = pages.page(data)
    assert "| 3 hosts, 16 | 16 | 16 | 3 |" in text
    slow = [line for line in text.splitlines() if line.startswith("| 6 hosts, 2 a layer, 16 tokens |")]
    assert len(slow) == 1
    assert slow[0].endswith("| messages |")
    both = {**data, "before": "abc", "rows": [{**rows[0], "before": rows[0]["now"]}]}
    assert "## Before (`abc`) and now" in pages.page(both)
