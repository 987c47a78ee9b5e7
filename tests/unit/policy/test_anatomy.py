"""A model in numbers, against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_moe.policy.anatomy import Anatomy, ExpertGroup, Stack, kind_of

GROUPS = (ExpertGroup("a", 8, 100, 2), ExpertGroup("b", 4, 50, 1))
MODEL = Anatomy(total_params=2000, weight_bytes=4000, groups=GROUPS, lookup_params=300, attention_width=10)


def test_what_a_token_uses() -> None:
    assert MODEL.expert_params == 8 * 100 + 4 * 50
    assert MODEL.active_params == 2000 - 6 * 100 - 3 * 50
    assert MODEL.expert_share == 0.5
    assert MODEL.flops_per_token() == 2 * (1250 - 300)
    assert MODEL.flops_per_token(7) == 2 * (1250 - 300) + 4 * 7 * 10
    assert (MODEL.num_experts, MODEL.top_k) == (8, 2)


def test_without_k_nobody_knows_what_is_active() -> None:
    unknown = replace(MODEL, groups=(GROUPS[0], replace(GROUPS[1], top_k=None)))
    assert unknown.active_params is None
    assert unknown.flops_per_token() is None


def test_a_dense_model_uses_all() -> None:
    dense = Anatomy(1000, 2000)
    assert (dense.active_params, dense.num_experts, dense.top_k, dense.expert_share) == (1000, 0, None, 0.0)


@pytest.mark.parametrize(("hosts", "expected"), [(1, 2 * 1000), (3, 2 * (300 + 100)), (8, 2 * 150), (99, 2 * 150)])
def test_memory_is_that_of_the_fullest_host(hosts: int, expected: int) -> None:
    memory = MODEL.memory(hosts)
    assert (memory.expert_bytes, memory.router_bytes) == (expected, 2000)


@pytest.mark.parametrize(
    ("groups", "patterns", "varies", "kind"),
    [
        ((), ["DD"], False, "dense"),
        (GROUPS, ["MM"], False, "moe"),
        (GROUPS, ["DM"], False, "hybrid"),
        (GROUPS, ["M.", "DD"], False, "moe"),  # a tower of images beside it makes no hybrid
        (GROUPS, ["DM"], True, "dynamic_moe"),
    ],
)
def test_kinds(groups: tuple[ExpertGroup, ...], patterns: list[str], varies: bool, kind: str) -> None:
    assert kind_of(groups, [Stack("x", pattern) for pattern in patterns], varies) == kind
