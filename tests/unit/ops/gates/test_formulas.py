"""Gates against the formulas of their papers, written as plain loops over tokens and experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ray_moe.ops.gates.base import Routing, TokenInfo
from ray_moe.ops.gates.dynamic_k import DynamicKSettings
from ray_moe.ops.gates.expert_choice import ExpertChoiceSettings
from ray_moe.ops.gates.hashing import HashSettings
from ray_moe.ops.gates.hierarchical import HierarchicalSettings
from ray_moe.ops.gates.modality import ModalitySettings
from ray_moe.ops.gates.multi_task import MultiTaskSettings
from ray_moe.ops.gates.registry import make_gate
from tests.unit.ops.gates.gates import EXPERTS, INFO, TOKENS, WIDTH, gate_of, spread, tokens


def gate_with(settings: Any, seed: int = 0) -> Any:
    gate = make_gate(settings, WIDTH, EXPERTS).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in gate.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return gate


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def rows(hidden: torch.Tensor, weight: torch.Tensor) -> list[list[float]]:
    """[T][E] logits, number by number."""
    return [
        [sum(a * b for a, b in zip(token, row, strict=True)) for row in weight.tolist()] for token in hidden.tolist()
    ]


def best(values: Sequence[float], number: int) -> list[int]:
    return sorted(range(len(values)), key=lambda place: -values[place])[:number]


def assert_weights(routing: Routing, expected: list[dict[int, float]]) -> None:
    """What each token's experts count, and that no others are asked."""
    for token, wanted in enumerate(expected):
        pairs = zip(routing.index[token].tolist(), routing.weight[token].tolist(), strict=True)
        got = {expert: weight for expert, weight in pairs if expert < EXPERTS}
        assert got == pytest.approx(wanted, abs=1e-12)


# --- Expert choice (arXiv:2202.09368, equations 1 and 2) ------------------------------------------------------
@pytest.mark.parametrize(("factor", "each"), [(2.0, 3), (0.1, 1), (1.0, 2), (6.0, TOKENS)])
def test_each_expert_takes_the_tokens_it_is_most_probable_for(factor: float, each: int) -> None:
    gate = gate_with(ExpertChoiceSettings(factor))
    scores = [softmax(row) for row in rows(tokens(), gate.weight)]
    expected: list[dict[int, float]] = [{} for _ in range(TOKENS)]
    for expert in range(EXPERTS):
        for token in best([row[expert] for row in scores], each):
            expected[token][expert] = scores[token][expert]
    routing = gate(tokens())
    assert_weights(routing, expected)
    assert routing.index.shape[1] == max(map(len, expected))  # no column that nobody needs


# --- Dynamic k (arXiv:2403.07652, equations 4 to 8) -----------------------------------------------------------
@pytest.mark.parametrize(("threshold", "max_k"), [(0.4, None), (0.9, None), (1.0, None), (0.9, 2), (0.01, None)])
def test_a_token_has_experts_until_they_are_probable_enough(threshold: float, max_k: int | None) -> None:
    gate = gate_with(DynamicKSettings(threshold, max_k))
    expected, entropy = [], 0.0
    for row in rows(tokens(), gate.weight):
        probabilities = softmax(row)
        entropy -= sum(p * math.log(p) for p in probabilities) / TOKENS
        total, taken = 0.0, {}
        for expert in best(probabilities, max_k or EXPERTS):
            taken[expert] = probabilities[expert]
            total += probabilities[expert]
            if total >= threshold:
                break
        expected.append(taken)
    routing = gate(tokens())
    assert_weights(routing, expected)
    assert routing.index.shape[1] == max(map(len, expected))
    assert routing.losses["entropy"].item() == pytest.approx(entropy)


def test_how_many_experts_a_token_has_depends_on_how_sure_the_gate_is() -> None:
    gate = gate_with(DynamicKSettings(0.5))
    gate.weight.data.copy_(torch.eye(EXPERTS, WIDTH))
    sure, unsure = torch.eye(WIDTH)[0] * 9, torch.zeros(WIDTH)
    routing = gate(torch.stack([sure, unsure]).double())
    assert (routing.index < EXPERTS).sum(1).tolist() == [1, 3]


# --- Two levels (arXiv:1701.06538, appendix B) ----------------------------------------------------------------
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(2, 1, 2), (3, 2, 1), (2, 2, 3), (6, 2, 1), (1, 1, 2)])
def test_an_expert_counts_as_its_group_times_itself(groups: int, top_groups: int, top_k: int, normalize: bool) -> None:
    gate = gate_with(HierarchicalSettings(groups, top_groups, top_k, normalize))
    size = EXPERTS // groups
    expected, joint = [], []
    for primary, secondary in zip(rows(tokens(), gate.group_weight), rows(tokens(), gate.weight), strict=True):
        of_groups = softmax(primary)
        within = [softmax(secondary[group * size : group * size + size]) for group in range(groups)]
        joint.append([of_groups[expert // size] * within[expert // size][expert % size] for expert in range(EXPERTS)])
        chosen = best(of_groups, top_groups)
        all_groups = sum(of_groups[group] for group in chosen) if normalize else 1
        weights = {}
        for group in chosen:
            taken = best(within[group], top_k)
            all_taken = sum(within[group][expert] for expert in taken) if normalize else 1
            for expert in taken:
                weights[group * size + expert] = of_groups[group] / all_groups * within[group][expert] / all_taken
        expected.append(weights)
    routing = gate(tokens())
    assert_weights(routing, expected)
    torch.testing.assert_close(routing.logits.softmax(-1), torch.tensor(joint, dtype=torch.float64))


# --- Hash layers (arXiv:2106.04426) ---------------------------------------------------------------------------
def scattered(value: int) -> int:
    """The last step of SplitMix64, with Python's integers."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


@pytest.mark.parametrize(("top_k", "seed"), [(1, 0), (3, 0), (2, 12_345_678_901)])
def test_experts_are_ranked_by_a_hash_of_token_and_expert(top_k: int, seed: int) -> None:
    golden = 0x9E3779B97F4A7C15
    routing = gate_with(HashSettings(top_k, seed))(tokens(), INFO)
    assert INFO.ids is not None
    for token, number in enumerate(INFO.ids.tolist()):
        own = scattered((number + seed * golden) % 2**64)
        ranks = [scattered((own + expert * golden) % 2**64) for expert in range(EXPERTS)]
        signed = [rank - 2**64 if rank >= 2**63 else rank for rank in ranks]
        assert routing.index[token].tolist() == best(signed, top_k)
    assert torch.equal(routing.weight, torch.full_like(routing.weight, 1 / top_k))


def test_hashing_is_even_and_another_expert_moves_only_its_own_tokens() -> None:
    ids = torch.arange(40_000)
    info, hidden = TokenInfo(ids=ids), torch.zeros(len(ids), 1)
    eight, nine, other = (
        make_gate(HashSettings(seed=seed), 1, number)(hidden, info).index.flatten()
        for number, seed in ((8, 0), (9, 0), (8, 1))
    )
    assert eight.bincount().sub(5000).abs().max() < 300  # four standard deviations
    assert bool(((eight == nine) | (nine == 8)).all())
    assert 4400 < int((eight == other).sum()) < 5600  # seeds have nothing to do with each other


def test_without_ids_a_token_is_hashed_by_its_place() -> None:
    gate = gate_of("hash")
    assert torch.equal(spread(gate(tokens())), spread(gate(tokens(), TokenInfo(ids=torch.arange(TOKENS)))))
    assert torch.equal(spread(gate(tokens(seed=1))), spread(gate(tokens(seed=2), TokenInfo())))


# --- Tasks and modalities -------------------------------------------------------------------------------------
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_each_task_has_a_gate_of_its_own(top_k: int | None) -> None:
    gate = gate_with(MultiTaskSettings(3, top_k))
    assert INFO.task is not None
    expected = []
    for token, task in enumerate(INFO.task.tolist()):
        (row,) = rows(tokens()[token : token + 1], gate.weight[task * EXPERTS : task * EXPERTS + EXPERTS])
        probabilities = softmax(row)
        taken = best(probabilities, top_k or EXPERTS)
        total = sum(probabilities[expert] for expert in taken)
        expected.append({expert: probabilities[expert] / total for expert in taken})
    assert_weights(gate(tokens(), INFO), expected)


def test_tasks_learn_from_their_own_tokens() -> None:
    gate = gate_with(MultiTaskSettings(2))
    routing = gate(tokens(), TokenInfo(task=torch.ones(TOKENS, dtype=torch.long)))
    routing.weight.square().sum().backward()
    assert not gate.weight.grad[:EXPERTS].any() and bool(gate.weight.grad[EXPERTS:].any())


@pytest.mark.parametrize(
    ("own", "sees"),
    [
        (None, ([0, 1, 4, 5], [2, 3, 4, 5])),
        ((1, 3), ([0, 4, 5], [1, 2, 3, 4, 5])),
        ((0, 2), ([2, 3, 4, 5], [0, 1, 2, 3, 4, 5])),
        ((3, 3), ([0, 1, 2], [3, 4, 5])),
        ((2, 2, 0), ([0, 1, 4, 5], [2, 3, 4, 5], [4, 5])),
    ],
)
def test_a_modality_sees_its_own_experts_and_the_shared(own: Any, sees: tuple[list[int], ...]) -> None:
    gate = gate_with(ModalitySettings(own))
    modality = torch.arange(TOKENS) % len(sees)
    expected = []
    for row, which in zip(rows(tokens(), gate.weight), modality.tolist(), strict=True):
        powers = {expert: math.exp(row[expert]) for expert in sees[which]}
        taken = sorted(powers, key=lambda expert: -powers[expert])[:2]
        total = sum(powers[expert] for expert in taken)
        expected.append({expert: powers[expert] / total for expert in taken})
    routing = gate(tokens(), TokenInfo(modality=modality))
    assert_weights(routing, expected)
    for token, which in enumerate(modality.tolist()):
        assert routing.logits[token].isfinite().nonzero().flatten().tolist() == sees[which]
