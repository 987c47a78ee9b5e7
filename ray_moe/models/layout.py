"""Which tensor on disk belongs to the backbone, and which to which expert.

A tensor's place in the model is what `transformers`' own renaming rules say, so every layout on disk that it can load
is understood: one tensor per expert, or all experts in one tensor. Called by `models/huggingface.py`, and by
`models/naming.py` for the way back.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ray_moe.errors import InvalidCheckpoint
from ray_moe.models.checkpoint import TensorHeader
from ray_moe.models.experts import is_per_expert
from ray_moe.models.lazy import ExpertRows, LazyTensor, OwnTensor, TensorSource
from ray_moe.models.skeleton import Skeleton
from ray_moe.types import LayerPath


@dataclass(slots=True)
class LayerTensors:
    """The names on disk of one layer's experts."""

    single: dict[str, int] = field(default_factory=dict)
    """Tensors of one expert each -> that expert's index."""
    stacked: dict[str, int] = field(default_factory=dict)
    """Tensors that hold all experts one after the other -> rows of one expert."""
    shared: list[str] = field(default_factory=list)
    """Tensors that every shard needs whole."""

    def select(self, ids: Sequence[int], source: TensorSource) -> dict[str, LazyTensor]:
        """The tensors of the experts `ids` (ascending), by name on disk."""
        wanted = set(ids)
        chosen = {name: source.slice(name) for name, expert in self.single.items() if expert in wanted}
        for name, rows in self.stacked.items():
            chosen[name] = ExpertRows(source.slice(name), ids, rows)
        for name in self.shared:
            chosen[name] = OwnTensor(source.slice(name))
        return chosen


@dataclass(slots=True)
class Layout:
    """The names on disk of a checkpoint's tensors, sorted by who loads them."""

    backbone: list[list[str]]
    """In groups, one per decoder layer, in model order."""
    experts: dict[LayerPath, LayerTensors]


def classify(skeleton: Skeleton, tensors: Mapping[str, TensorHeader]) -> Layout:
    """Sort the tensors on disk. Those that the model has no place for are left out.

    Raises:
        InvalidCheckpoint: a layer has another number of experts on disk than its configuration says.
    """
    modules = skeleton.experts
    renamed = Renaming(skeleton)
    backbone: dict[str, list[str]] = defaultdict(list)
    experts = {path: LayerTensors() for path in modules}
    routed: dict[tuple[LayerPath, str, str], list[str]] = defaultdict(list)
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = renamed(name)
        if target not in renamed.places:
            continue
        path = next((parent for parent in _parents(target) if parent in modules), None)
        if path is None:
            number = re.search(r"\.(\d+)\.", target)
            backbone[number[1] if number else ""].append(name)
        elif is_per_expert(modules[path], target[len(path) + 1 :]):
            routed[path, target, pattern or name].append(name)
        else:
            experts[path].shared.append(name)
    for (path, target, _), names in routed.items():
        _assign(experts[path], target, names, modules[path], tensors)
    return Layout(list(backbone.values()), experts)


class Renaming:
    """`transformers`' way from a name on disk to a place in the model."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.places: dict[str, Any] = skeleton.model.state_dict()
        self._prefix: str = skeleton.model.base_model_prefix
        self._renamings = [c for c in skeleton.conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in skeleton.conversions if isinstance(c, WeightConverter)]

    def __call__(self, name: str) -> tuple[str, str | None]:
        """The parameter it becomes (part of), and the pattern of the converter that makes it so, if any."""
        target: str
        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.places)
        if target not in self.places and name in self.places:
            target, pattern = rename_source_key(name, [], [], self._prefix, self.places)
        return target, pattern


def _assign(
    layer: LayerTensors, target: str, names: list[str], experts: Any, tensors: Mapping[str, TensorHeader]
) -> None:
    """Give the tensors that make up `target`, in natural order, to the experts of a layer."""
    num_experts: int = experts.num_experts
    shapes = {tensors[name].shape for name in names}
    rows = tensors[names[0]].shape[:1]
    if len(names) == 1 and rows and rows[0] % num_experts == 0:
        layer.stacked[names[0]] = rows[0] // num_experts
        return
    if len(names) == num_experts and len(shapes) == 1:
        # transformers stacks them in natural order (a copy): the position is the expert.
        layer.single.update({name: expert for expert, name in enumerate(names)})
        return
    if len(names) == 1:
        found = f"{names[0]} has {rows[0] if rows else 0} rows, which cannot be shared out equally"
    elif len(shapes) > 1:
        found = f"{names[0]} and its siblings have different shapes {sorted(shapes)}"
    else:
        found = f"there are tensors for {len(names)} experts ({names[0]} ... {names[-1]})"
    raise InvalidCheckpoint(
        f"the configuration says that {target} has {num_experts} experts, but {found}. "
        "Fetch configuration and weights of one version."
    )


def _parents(target: str) -> Iterator[str]:
    """``a.b.c`` -> ``a.b``, ``a``."""
    while target := target.rpartition(".")[0]:
        yield target
