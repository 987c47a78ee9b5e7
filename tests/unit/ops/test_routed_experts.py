"""Slots to experts and back: few of them and many, with and without "no expert", beside a loop over tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ray_moe.errors import InvalidRequest
from ray_moe.ops.dispatch import FEW_SLOTS, combine
from ray_moe.ops.routed_experts import run_slots

NUM_EXPERTS = 4


def run(rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """Expert e multiplies by e + 2, or, for a weight of a kind, squares."""
    assert sum(counts) == len(rows)
    assert all(count > 0 for count in counts)
    assert sorted(experts) == list(experts)
    factors = [expert + 2.0 for expert, count in zip(experts, counts, strict=True) for _ in range(count)]
    return rows.square() * torch.tensor(factors, dtype=rows.dtype).unsqueeze(1)


def expected(hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = []
    for token, experts, weights in zip(hidden, index.tolist(), weight, strict=True):
        terms = [w * token**2 * (e + 2.0) for e, w in zip(experts, weights, strict=True) if e < NUM_EXPERTS]
        out.append(sum(terms, torch.zeros_like(token)))
    return torch.stack(out)


@pytest.mark.parametrize("num_tokens", [1, 3, FEW_SLOTS, 600])  # the last are some blocks
@pytest.mark.parametrize("highest", [NUM_EXPERTS - 1, NUM_EXPERTS])
@pytest.mark.parametrize("top_k", [1, 3])
def test_every_slot_comes_back_to_its_token(num_tokens: int, highest: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 5, dtype=torch.float64, generator=generator).requires_grad_()
    index = torch.randint(highest + 1, (num_tokens, top_k), generator=generator)
    weight = torch.rand(num_tokens, top_k, dtype=torch.float64, generator=generator).requires_grad_()
    wanted = expected(hidden, index, weight)
    with torch.no_grad():
        torch.testing.assert_close(run_slots(run, hidden, index, weight, NUM_EXPERTS), wanted)
    found = run_slots(run, hidden, index, weight, NUM_EXPERTS)
    torch.testing.assert_close(found, wanted)
    given = torch.randn(found.shape, dtype=found.dtype, generator=generator)
    for mine, theirs in zip(
        torch.autograd.grad(found, [hidden, weight], given),
        torch.autograd.grad(wanted, [hidden, weight], given),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("num_tokens", [1, FEW_SLOTS])
def test_nobody_is_asked(num_tokens: int) -> None:
    hidden, nowhere = torch.randn(num_tokens, 5), torch.full((num_tokens, 2), NUM_EXPERTS)
    with torch.no_grad():
        out = run_slots(run, hidden, nowhere, torch.ones(num_tokens, 2), NUM_EXPERTS)
    assert torch.equal(out, torch.zeros_like(hidden))


@pytest.mark.parametrize("num_tokens", [1, FEW_SLOTS])
@pytest.mark.parametrize("wrong", [-1, NUM_EXPERTS + 1])
def test_an_expert_that_is_none(num_tokens: int, wrong: int) -> None:
    index = torch.zeros(num_tokens, 2, dtype=torch.int64)
    index[-1, 1] = wrong
    with torch.no_grad(), pytest.raises(InvalidRequest, match=f"sent to expert {wrong}; there are 0 to 3"):
        run_slots(run, torch.randn(num_tokens, 5), index, torch.ones(num_tokens, 2), NUM_EXPERTS)


def test_bits_are_those_of_all_slots_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 5, generator=generator).bfloat16()
    index, weight = torch.randint(4, (600, 3), generator=generator), torch.rand(600, 3, generator=generator)
    rows = torch.stack([expert + 2.0 * hidden for expert in range(NUM_EXPERTS)])  # [E, T, D]
    slots = rows[index.reshape(-1), torch.arange(600).repeat_interleave(3)]

    def run(rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        return torch.cat([e + 2.0 * part for e, part in zip(experts, rows.split(list(counts)), strict=True)])

    assert torch.equal(run_slots(run, hidden, index, weight, NUM_EXPERTS), combine(slots, weight))
