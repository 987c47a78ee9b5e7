"""Where a network has experts, by its modules and the shapes of their parameters; names are the last thing believed.

Three ways to have E experts: a list of E modules of the same shapes, parameters with E slices, or flat ones with E
blocks of rows. How sure it is is the *standing* of what was found. Runs nothing and changes nothing; works on the
meta device. Called by `models/inspect.py`.

Shape legend: D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

Standing = Literal["declared", "gated", "bare"]
"""``declared``: the module says how many experts it has. ``gated``: beside it there is a matrix with an output for each
of them. ``bare``: only the repetition; most lists of layers are such, so that only a measurement can make them experts.
"""

Slice = tuple[str, int, int]
"""Of an expert: name of a parameter of the model, first row, number of rows; -1 rows are all."""

_COUNTS = ("num_experts", "num_routed_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOP_KS = ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "num_selected_experts", "k")
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|^ff$|^fc[12]$|intermediate|densereludense", re.IGNORECASE)
_GATE_DEPTH = 3
_MIN_NEURONS = 8
"""Of a layer that repetition alone may make an expert: with fewer, a ReLU would now and then silence all of it."""


@dataclass(slots=True)
class Found:
    """A group of experts, or what looks like one."""

    path: str
    standing: Standing
    experts: list[list[Slice]] = field(repr=False)
    """What each consists of."""
    expert_params: int
    hidden_size: int
    top_k: int | None = None
    num_shared: int = 0
    shared_params: int = 0
    unused_params: int = 0

    @property
    def num_experts(self) -> int:
        return len(self.experts)


def find(model: nn.Module) -> list[Found]:
    """All groups, in model order; of lists within lists only the inner ones."""
    found: list[Found] = []
    for path, module in model.named_modules():
        one = _bank(model, path, module) or _stacked(model, path, module)
        if one is not None:
            _join(found, one)
    inner = [one for one in found if not any(_is_inside(other.path, one.path) for other in found)]
    for one in inner:
        _describe(model, one)
    return inner


def stacks(model: nn.Module, groups: Sequence[str]) -> list[tuple[str, str]]:
    """(path, pattern) of each outermost list of layers (`anatomy.Stack`), given the paths of the groups that count."""
    out: list[tuple[str, str]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or any(_is_inside(path, outer) for outer, _ in out):
            continue
        if path in groups or not any(True for _ in module.parameters()):
            continue
        pattern = "".join(_letter(layer, f"{path}.{number}", groups) for number, layer in enumerate(module))
        if pattern.strip("."):
            out.append((path, pattern))
    return out


def _letter(layer: nn.Module, path: str, groups: Sequence[str]) -> str:
    if any(group == path or _is_inside(group, path) for group in groups):
        return "M"
    for name, module in layer.named_modules():
        if _FEED_FORWARD.search(name.rpartition(".")[2]) or _FEED_FORWARD.search(type(module).__name__):
            return "D"
    return "."


# --- Three ways to have experts --------------------------------------------------------------------------------------
def _bank(model: nn.Module, path: str, module: nn.Module) -> Found | None:
    """A list of modules alike."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return None
    children = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    shapes = [sorted((name, tuple(p.shape)) for name, p in child.named_parameters()) for child in children.values()]
    if not shapes or not shapes[0] or any(each != shapes[0] for each in shapes):
        return None
    matrices = [shape for _, shape in shapes[0] if len(shape) == 2]
    gate = gate_width(_around(model, path), len(children), matrices)
    declared = _declared(module) == len(children)
    if not gate and not declared and any(min(matrix) < _MIN_NEURONS for matrix in matrices):
        return None
    if len(children) == 1 and not declared and not (gate and path.rpartition(".")[2] == "experts"):
        return None
    named = [[(f"{path}.{name}.{inner}", 0, -1) for inner, _ in shapes[0]] for name in children]
    params = sum(p.numel() for p in next(iter(children.values())).parameters())
    return Found(path, _standing(declared or len(children) == 1, gate), named, params, gate or _width(matrices))


def _stacked(model: nn.Module, path: str, module: nn.Module) -> Found | None:
    """Parameters with a slice, or a block of rows, for each expert."""
    if isinstance(module, _ConvNd):
        return None
    own: dict[str, torch.Tensor] = dict(module.named_parameters(recurse=False))
    declared = _declared(module)
    num_experts = declared or next((len(p) for p in own.values() if p.ndim == 3 and min(p.shape[1:]) > 1), 0)
    deep = [p for p in own.values() if p.ndim >= 3 and len(p) >= num_experts]
    flat = not deep and declared is not None
    rows: dict[str, int] = {}
    for name, p in own.items():
        if not num_experts or not p.ndim:
            continue
        if flat and p.ndim == 2 and len(p) > num_experts and len(p) % num_experts == 0:
            rows[name] = len(p) // num_experts
        elif deep and (len(p) == num_experts or (p.ndim >= 3 and len(p) > num_experts and declared)):
            rows[name] = 1
    if declared and not rows:
        rows, own = _tables(module, num_experts)
    if not rows or (num_experts < 2 and declared is None):
        return None
    matrices = [tuple(own[name].shape[-2:]) for name in rows if own[name].ndim >= (2 if flat else 3)]
    gate = gate_width(_around(model, path, own), num_experts, matrices)
    prefix = f"{path}." if path else ""
    experts = [[(prefix + name, e * number, number) for name, number in rows.items()] for e in range(num_experts)]
    params = sum(own[name][0].numel() * number for name, number in rows.items())
    unused = sum(own[name].numel() for name in rows) - num_experts * params
    standing = _standing(declared is not None, gate)
    return Found(path, standing, experts, params, gate or _width(matrices), unused_params=unused)


def _tables(module: nn.Module, num_experts: int) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Experts of one neuron each, as rows of embeddings (PEER, arXiv:2407.04153)."""
    tables: dict[str, torch.Tensor] = {
        f"{name}.weight": child.weight
        for name, child in module.named_children()
        if isinstance(child, nn.Embedding) and child.num_embeddings == num_experts
    }
    return dict.fromkeys(tables, 1), tables


def _join(found: list[Found], one: Found) -> None:
    """Add it, or make it part of the group before: some families keep the two matrices of experts in two modules."""
    last = found[-1] if found else None
    beside = last is not None and last.path.rpartition(".")[0] == one.path.rpartition(".")[0]
    if last is None or not beside or one.num_experts != last.num_experts or one.experts[0][0][2] != 1:
        found.append(one)
        return
    last.experts = [mine + more for mine, more in zip(last.experts, one.experts, strict=True)]
    last.expert_params += one.expert_params
    last.path = last.path.rpartition(".")[0] or last.path


# --- What is beside them ---------------------------------------------------------------------------------------------
def gate_width(beside: Sequence[tuple[int, ...]], num_experts: int, matrices: Sequence[tuple[int, ...]]) -> int:
    """D, if a shape of those `beside` is a gate's, [E, D] or [D, E], and all `matrices` go from or to D; else 0."""
    for shape in beside:
        for width in shape[1:] if shape[0] == num_experts else shape[:1] if shape[1] == num_experts else ():
            if matrices and width > 1 and all(width in matrix for matrix in matrices):
                return width
    return 0


def _around(model: nn.Module, path: str, own: Mapping[str, torch.Tensor] | None = None) -> list[tuple[int, ...]]:
    """Shapes of the matrices that stand near `path`, but are not in it."""
    parent = model.get_submodule(path.rpartition(".")[0]) if path else model
    skipped = path.rpartition(".")[2]
    near = [tuple(p.shape) for name, p in _near(parent, skipped if path else None)]
    return near + [tuple(p.shape) for p in (own or {}).values() if p.ndim == 2]


def _near(parent: nn.Module, skipped: str | None, depth: int = _GATE_DEPTH) -> Iterator[tuple[str, nn.Parameter]]:
    yield from ((name, p) for name, p in parent.named_parameters(recurse=False) if p.ndim == 2)
    for name, child in parent.named_children():
        if depth and name != skipped and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _near(child, None, depth - 1)


def _standing(declared: bool, gate: int) -> Standing:
    return "declared" if declared else "gated" if gate else "bare"


def _declared(module: Any) -> int | None:
    numbers = (getattr(module, name, None) for name in _COUNTS)
    return next((n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


def _width(matrices: Sequence[tuple[int, ...]]) -> int:
    """D of matrices without a gate: what all of them share, if anything."""
    shared = set.intersection(*map(set, matrices)) if matrices else set()
    return max(shared, default=0)


def _describe(model: nn.Module, one: Found) -> None:
    """Fill in K and the shared experts, from the modules around."""
    parents = [one.path, one.path.rpartition(".")[0]]
    for parent in dict.fromkeys(parents):
        module = model.get_submodule(parent)
        near = [module, *(child for name, child in module.named_modules() if name.count(".") < _GATE_DEPTH)]
        one.top_k = one.top_k or next(filter(None, (_top_k(each, one.num_experts) for each in near)), None)
    for above in (parents[1], parents[1].rpartition(".")[0]):
        module = model.get_submodule(above)
        for name, child in module.named_children():
            params = sum(p.numel() for p in child.parameters())
            if "shared" in name and "gate" not in name and params and not _is_inside(one.path, f"{above}.{name}"):
                one.num_shared, one.shared_params = one.num_shared + 1, one.shared_params + params
        if one.num_shared:
            break


def _top_k(module: Any, num_experts: int) -> int | None:
    named = re.search(r"Top(\d+)Router", type(module).__name__)
    numbers = [getattr(module, name, None) for name in _TOP_KS] + [int(named[1]) if named else None]
    return next((n for n in numbers if type(n) is int and 1 <= n <= num_experts), None)


def _is_inside(path: str, outer: str) -> bool:
    return path != outer and (not outer or path.startswith(f"{outer}."))


def lookup_params(model: nn.Module, groups: Sequence[Found]) -> int:
    """Parameters of embeddings that no matrix product uses."""
    inside = {name for group in groups for expert in group.experts for name, _, _ in expert}
    multiplied = {
        id(p)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
    }
    tables: dict[int, torch.Tensor] = {
        id(module.weight): module.weight
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and f"{path}.weight" not in inside
    }
    return sum(table.numel() for number, table in tables.items() if number not in multiplied)
