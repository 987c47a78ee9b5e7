"""Witnesses heard, and the verdict: which experts count, which kind of model that makes, and what speaks against it.

Pure: what the witnesses found comes in as values. Called by `models/inspect.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from ray_moe.models import inspect_module
from ray_moe.models.inspect_config import Words
from ray_moe.models.inspect_forward import Usage
from ray_moe.models.inspect_headers import Weights
from ray_moe.models.inspect_module import Found
from ray_moe.policy.anatomy import KIND_NAMES, Anatomy, ExpertGroup, Kind, Stack, kind_of


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one witness says."""

    source: str
    """``forward``, ``weights``, ``modules`` or ``configuration``."""
    says: Kind | None
    """None where it cannot tell."""
    text: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a model is."""

    name: str
    family: str
    """`model_type` of its configuration, GGUF's architecture, or the class of the module."""
    kind: Kind
    basis: str
    """Source of the evidence that decided."""
    anatomy: Anatomy
    evidence: tuple[Evidence, ...]
    contradictions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    dtype: str = ""
    mixers: dict[str, int] = field(default_factory=dict)
    """How many layers mix tokens in which way, where the configuration says so."""
    k_per_token: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By path of each group that was measured: experts that each token of the run used."""
    servable: bool | None = None
    """Whether `ray-moe serve` takes it; None where its weights are not there to be checked."""
    not_servable: str = ""
    """Why not."""

    @property
    def is_moe(self) -> bool:
        return self.kind != "dense"


@dataclass(slots=True)
class Case:
    """What has been found so far."""

    evidence: list[Evidence] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    usages: dict[str, Usage] = field(default_factory=dict)

    def hear(self, source: str, says: Kind | None, text: str) -> None:
        self.evidence.append(Evidence(source, says, text))

    @property
    def varies(self) -> bool:
        return any(usage.varies for usage in self.usages.values())

    def k_per_token(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(usage.per_token) for path, usage in self.usages.items()}


def hear_words(case: Case, words: Words) -> None:
    case.hear("configuration", words.says, words.text)


def judge_modules(
    case: Case, model: nn.Module, found: Sequence[Found], words: Words, whose: str
) -> tuple[tuple[ExpertGroup, ...], tuple[Stack, ...]]:
    """The groups that are experts, by modules and measurement."""
    accepted = [one for one in found if _is_accepted(case, one)]
    groups = tuple(_group(one, case.usages, words) for one in accepted)
    patterns = inspect_module.stacks(model, [one.path for one in accepted])
    stacks = tuple(Stack(path, pattern) for path, pattern in patterns)
    claimed = [one for one in found if one.standing != "bare"]
    # What the modules say by themselves: before the measurement took away or gave.
    by_shape = tuple(_group(one, {}, words) for one in claimed)
    patterns = inspect_module.stacks(model, [one.path for one in claimed])
    says = kind_of(by_shape, [Stack(path, pattern) for path, pattern in patterns], False)
    case.hear("modules", says, f"{whose} have {_in_words(by_shape)}")
    if case.usages:
        _hear_usages(case, found, groups, stacks, words)
    return groups, stacks


def _is_accepted(case: Case, one: Found) -> bool:
    usage = case.usages.get(one.path)
    if one.standing == "declared":
        return True
    if usage is None:
        return one.standing == "gated"
    if one.standing == "gated" and not usage.depends_on_token and usage.uses_all:
        case.contradictions.append(
            f"{one.path} looks like {one.num_experts} experts with a gate, but every token uses all of them"
        )
        return False
    return usage.depends_on_token or one.standing == "gated"


def _hear_usages(
    case: Case, found: Sequence[Found], groups: Sequence[ExpertGroup], stacks: Sequence[Stack], words: Words
) -> None:
    measured = {one.path: case.usages[one.path] for one in found if one.path in case.usages}
    relevant = {group.path: measured[group.path] for group in groups if group.path in measured}
    if not relevant:
        case.hear("forward", "dense", "no weights whose use depends on the token: each token uses all of them")
        return
    counts = sorted({k for usage in relevant.values() for k in usage.per_token})
    often = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    tokens = max(len(usage.per_token) for usage in relevant.values())
    # What depends on the token is sparse; a group that every token uses whole computes as a dense layer does.
    sparse = [path for path, usage in relevant.items() if not usage.uses_all]
    says = kind_of(groups, stacks, case.varies) if sparse else "dense"
    layers = "1 layer" if len(relevant) == 1 else f"{len(relevant)} layers"
    case.hear("forward", says, f"{layers} run with {tokens} tokens: each token uses {often} of the experts")
    for group in groups:
        usage = relevant.get(group.path)
        if usage is None:
            continue
        if usage.uses_all:
            which = "its one expert" if group.num_experts == 1 else f"all {group.num_experts} experts"
            case.contradictions.append(f"every token uses {which} of {group.path}: it costs what a dense layer does")
        elif not usage.depends_on_token:
            case.contradictions.append(f"all tokens use the same {usage.per_token[0]} experts of {group.path}")
        claimed = next(one.top_k for one in found if one.path == group.path) or words.top_k
        if not usage.varies and claimed is not None and usage.per_token[0] != min(claimed, group.num_experts):
            case.contradictions.append(
                f"k is said to be {claimed}, but each token uses {usage.per_token[0]} experts of {group.path}"
            )


def judge_weights(
    case: Case,
    weights: Weights,
    words: Words,
    groups: tuple[ExpertGroup, ...],
    stacks: tuple[Stack, ...],
    anatomy: Anatomy,
    has_modules: bool,
) -> tuple[tuple[ExpertGroup, ...], tuple[Stack, ...], Anatomy]:
    """What counts in the end: the modules where the weights agree with them, else the weights."""
    mine = tuple(_group(one, {}, words) for one in weights.found)
    case.hear("weights", kind_of(mine, weights.stacks, False), f"{weights.where}: {_in_words(mine)}{weights.remark}")
    if not has_modules:
        return mine, weights.stacks, weights.anatomy()
    if weights.num_params and not weights.is_packed and not _close(weights.num_params, anatomy.total_params):
        case.contradictions.append(
            f"the configuration makes {anatomy.total_params:,} parameters, the files have {weights.num_params:,}"
        )
    if _numbers(mine) == _numbers(groups) or weights.names_only:
        return groups, stacks, anatomy
    case.contradictions.append(
        f"the configuration describes {_in_words(groups)}, and the weights have {_in_words(mine)}: the weights count"
    )
    case.usages = {}
    case.evidence = [one for one in case.evidence if one.source != "forward"]
    own = weights.anatomy()
    costs = replace(own, kv_bytes_per_token=anatomy.kv_bytes_per_token, attention_width=anatomy.attention_width)
    return mine, weights.stacks, costs


def verdict(case: Case, groups: Sequence[ExpertGroup], stacks: Sequence[Stack]) -> tuple[Kind, str]:
    """The kind, and the most trusted witness that says so."""
    kind = kind_of(groups, stacks, case.varies)
    for source in ("forward", "weights", "modules", "configuration"):
        for one in case.evidence:
            if one.source == source and one.says == kind:
                case.contradictions.extend(_against(case, kind))
                return kind, source
    case.contradictions.extend(_against(case, kind))
    return kind, "modules"


def _against(case: Case, kind: Kind) -> list[str]:
    """Witnesses that call a dense model a mixture, or the other way round. (Some cannot see k or patterns.)"""
    return [
        f"the {one.source} by itself says {KIND_NAMES[one.says]}: {one.text}"
        for one in case.evidence
        if one.says is not None and (one.says == "dense") != (kind == "dense")
    ]


def _group(one: Found, usages: dict[str, Usage], words: Words) -> ExpertGroup:
    usage = usages.get(one.path)
    top_k: float | None = one.top_k or words.top_k
    if usage is not None:
        top_k = sum(usage.per_token) / len(usage.per_token)
    elif usages and any(each.varies for each in usages.values()):
        counts = [k for each in usages.values() for k in each.per_token]
        top_k = sum(counts) / len(counts)
    elif one.num_experts == 1:
        top_k = 1
    return ExpertGroup(
        path=one.path,
        num_experts=one.num_experts,
        expert_params=one.expert_params,
        top_k=None if top_k is None else min(top_k, one.num_experts),
        hidden_size=one.hidden_size,
        num_shared=words.num_shared or one.num_shared if one.num_shared else 0,
        shared_params=one.shared_params,
        unused_params=one.unused_params,
    )


def _in_words(groups: Sequence[ExpertGroup]) -> str:
    if not groups:
        return "no routed experts"
    numbers = sorted({group.num_experts for group in groups})
    many = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    groups_text = "1 group" if len(groups) == 1 else f"{len(groups)} groups"
    return f"{groups_text} of {many} routed expert{'s' if many != '1' else ''}"


def _numbers(groups: Sequence[ExpertGroup]) -> list[tuple[str, int]]:
    """What can be compared under different names: the number of each layer, and of its experts."""
    return sorted(((re.findall(r"\d+", group.path) or [""])[0], group.num_experts) for group in groups)


def _close(one: int, other: int) -> bool:
    return abs(one - other) <= 0.001 * max(one, other)
