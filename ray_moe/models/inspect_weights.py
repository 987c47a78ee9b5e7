"""Where a checkpoint has experts, by the names and shapes of its tensors alone.

What names say is a place, not a meaning: experts are tensors that repeat E times, or have E slices, beside a matrix
with E outputs, the gate. The word "expert" counts only where a tensor's shape has been changed by packing. How many
experts a token uses is in no tensor. Called by `models/inspect_headers.py`.

Shape legend: D model width, F expert width, E experts.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from ray_moe.models.inspect_module import Found, gate_width

Shapes = Mapping[str, tuple[int, ...]]

_NUMBERED = re.compile(r"(?:(.*)_)?(\d+)")
_FEED_FORWARD = re.compile(r"(^|[._])(mlp|ffn|feed_?forward|ff|fc[12]|c_fc|intermediate|wi(_\d)?)([._]|$)")
_GATE_DEPTH = 4
_MAX_MATRICES = 3


def find(shapes: Shapes) -> list[Found]:
    """The groups of experts among tensors in `torch`'s order of dimensions, in order of their names on disk."""
    scopes = _scopes(shapes)
    return sorted(_joined([*_banks(shapes, scopes), *_stacked(shapes, scopes)]), key=lambda one: natural(one.path))


def stacks(shapes: Shapes, groups: Sequence[Found]) -> list[tuple[str, str]]:
    """(path, pattern) of each outermost numbered sequence of layers; see `anatomy.Stack`."""
    layers: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in shapes:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is not None:
            layers[".".join(parts[:at])][int(parts[at])].append(".".join(parts[at + 1 :]))
    experts = {name for group in groups for expert in group.experts for name, _, _ in expert}
    out = []
    for prefix, numbered in layers.items():
        if any(group.path == prefix for group in groups):
            continue
        letters = [
            "M"
            if any(f"{prefix}.{number}.{name}" in experts for name in numbered.get(number, ()))
            else "D"
            if any(_FEED_FORWARD.search(name) for name in numbered.get(number, ()))
            else "."
            for number in range(max(numbered) + 1)
        ]
        if set(letters) != {"."}:
            out.append((prefix, "".join(letters)))
    return out


def lookup_params(shapes: Shapes) -> int:
    """Parameters of the embedding, where there is a matrix of the same shape for the output beside it."""
    tables = [
        shape
        for name, shape in shapes.items()
        if re.search(r"(^|\.)(embed_tokens|wte|token_embd|word_embeddings|shared)\.weight$", name)
    ]
    heads = [shape for name, shape in shapes.items() if re.search(r"(^|\.)(lm_head|embed_out|output)\.weight$", name)]
    return math.prod(tables[0]) if tables and tables[0] in heads else 0


def talks_of_experts(shapes: Shapes) -> list[str]:
    """Names with the word in them."""
    return [name for name in shapes if "expert" in name.lower()]


# --- Two ways to have experts on disk --------------------------------------------------------------------------------
def _banks(shapes: Shapes, scopes: Mapping[str, list[str]]) -> list[Found]:
    """Tensors that are there once for each expert: ``experts.3.w1.weight``, ``experts.expert_3.wi.weight``."""
    banks: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in shapes:
        parts = name.split(".")
        for at, part in enumerate(parts):
            numbered = _NUMBERED.fullmatch(part)
            if numbered:
                banks[".".join([*parts[:at], numbered[1] or ""])][int(numbered[2])][".".join(parts[at + 1 :])] = name
    found = []
    for key, numbered_names in banks.items():
        path = key.rpartition(".")[0]
        number, first = len(numbered_names), numbered_names.get(0, {})
        if sorted(numbered_names) != list(range(number)) or not first:
            continue
        inner = {suffix: shapes[name] for suffix, name in first.items()}
        if any({s: shapes[n] for s, n in each.items()} != inner for each in numbered_names.values()):
            continue
        parent = path.rpartition(".")[0]
        beside = [shapes[n] for n in scopes.get(parent, ()) if len(shapes[n]) == 2 and not n.startswith(f"{path}.")]
        width = _gate(path, beside, number, [shape for shape in inner.values() if len(shape) == 2])
        if width and (number > 1 or path.endswith("experts")) and ("expert" in path or _is_feed_forward(inner)):
            experts = [[(n, 0, -1) for n in numbered_names[e].values()] for e in range(number)]
            found.append(Found(path, "gated", experts, sum(map(math.prod, inner.values())), width))
    return found


def _is_feed_forward(inner: Shapes) -> bool:
    """Whether these could be one expert, and not a whole layer: few matrices, no convolution, no norm."""
    sizes = [len(shape) for shape in inner.values()]
    norms = [name for name, shape in inner.items() if len(shape) == 1 and name.endswith("weight")]
    return max(sizes) <= 2 and sizes.count(2) <= _MAX_MATRICES and not norms


def _stacked(shapes: Shapes, scopes: Mapping[str, list[str]]) -> list[Found]:
    """Tensors with all experts in them: [E, ...], or [E·F, D] below the word ``experts``."""
    found = []
    for name, shape in shapes.items():
        container = re.sub(r"\.(weight|bias)$", "", name).rpartition(".")[0]
        parents = [container, container.rpartition(".")[0]]
        beside = [shapes[n] for p in parents for n in scopes.get(p, ()) if n != name and len(shapes[n]) == 2]
        if len(shape) >= 3 and shape[0] > 1 and min(shape[1:]) > 1:
            width, rows, number = _gate(name, beside, shape[0], [shape[1:]]), 1, shape[0]
        elif len(shape) == 2 and re.search(r"(^|\.)experts\.(?!(.*\.)?\d+(\.|$))", name):
            above = name[: name.rindex("experts.")].rstrip(".")
            gates = [shapes[n] for n in scopes.get(above, ()) if "experts." not in n and len(shapes[n]) == 2]
            fits = [each for each in gates if shape[0] > each[0] > 1 and shape[0] % each[0] == 0 and each[1] in shape]
            if not fits:
                continue
            width, number, rows = fits[0][1], fits[0][0], shape[0] // fits[0][0]
        else:
            continue
        if width:
            experts = [[(name, e * rows, rows)] for e in range(number)]
            params = math.prod(shape) // number
            for bias in _biases(shapes, name, number):
                experts = [[*parts, (bias, e, 1)] for e, parts in enumerate(experts)]
                params += math.prod(shapes[bias]) // number
            found.append(Found(container, "gated", experts, params, width))
    return found


def _biases(shapes: Shapes, name: str, number: int) -> list[str]:
    """Of the stacked matrices `name`: [E, F], under one of the two names that they have."""
    stem = name.removesuffix(".weight")
    return [bias for bias in (f"{stem}_bias", f"{stem}.bias") if shapes.get(bias, ())[:1] == (number,)]


def _gate(path: str, beside: Sequence[tuple[int, ...]], number: int, matrices: Sequence[tuple[int, ...]]) -> int:
    """D of the gate; where weights are packed or have scales, the word "expert" stands for their shape."""
    width = gate_width(beside, number, matrices)
    if not width and "expert" in path:
        width = next((shape[1] for shape in beside if shape[0] == number and shape[1] > 1), 0)
    return width


def _joined(found: Sequence[Found]) -> list[Found]:
    """Groups beside each other with as many experts are one: their matrices are kept apart on disk."""
    joined: dict[tuple[str, int], Found] = {}
    for one in found:
        stem = one.path if one.experts[0][0][2] != -1 or one.path.endswith("experts") else one.path.rpartition(".")[0]
        other = joined.setdefault((stem, one.num_experts), one)
        if other is not one:
            other.path = stem
            other.experts = [mine + more for mine, more in zip(other.experts, one.experts, strict=True)]
            other.expert_params += one.expert_params
    return list(joined.values())


def _scopes(shapes: Shapes) -> dict[str, list[str]]:
    """Path -> the names a few levels below it, on the way to which nothing is numbered."""
    scopes: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        parts = name.split(".")[:-1]
        for depth in range(min(_GATE_DEPTH, len(parts)) + 1):
            below = parts[len(parts) - depth :]
            if any(part.isdecimal() for part in below):
                break
            scopes[".".join(parts[: len(parts) - depth])].append(name)
    return scopes


def natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]
