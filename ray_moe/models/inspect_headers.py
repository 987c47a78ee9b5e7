"""What a checkpoint's headers tell all in all: its experts, its size, and where GGUF says it, what generation keeps.

Reads no tensor. Called by `models/inspect.py`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_moe.errors import InvalidCheckpoint
from ray_moe.models.checkpoint import TensorHeader
from ray_moe.models.gguf import GGUFHeader
from ray_moe.models.inspect_files import Files
from ray_moe.models.inspect_module import Found
from ray_moe.models.inspect_weights import Shapes, find, lookup_params, natural, stacks, talks_of_experts
from ray_moe.policy.anatomy import Anatomy, Stack

_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
"""Of an element, by safetensors' name of the dtype; 8 for the others."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a checkpoint as its files tell of them."""

    where: str
    found: list[Found]
    stacks: tuple[Stack, ...]
    num_params: int
    """0 where only names are known."""
    num_bytes: int
    dtype: str
    is_packed: bool
    """Whether several numbers share an element, so that elements are not parameters."""
    lookup: int = 0
    kv_bytes_per_token: int | None = None
    attention_width: int | None = None
    remark: str = ""
    names_only: bool = False

    @property
    def bytes_per_param(self) -> float:
        return self.num_bytes / self.num_params if self.num_params else 0.0

    def anatomy(self) -> Anatomy:
        """What they tell by themselves, without the groups."""
        return Anatomy(
            total_params=self.num_params,
            weight_bytes=self.num_bytes,
            lookup_params=self.lookup,
            kv_bytes_per_token=self.kv_bytes_per_token,
            attention_width=self.attention_width,
        )


def read_weights(files: Files) -> Weights | None:
    """From the headers of `files`; None where it has no weights."""
    if files.tensors is not None:
        return _of_safetensors(files.tensors)
    if files.gguf is not None:
        return _of_gguf(files.gguf, files.gguf_bytes)
    return None if files.index is None else _of_index(files.index)


def _of_safetensors(headers: Mapping[str, TensorHeader]) -> Weights:
    shapes = {name: header.shape for name, header in headers.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    num_bytes = sum(number * _BITS.get(headers[name].dtype, 8) // 8 for name, number in sizes.items())
    most = max(sizes, key=sizes.__getitem__, default=None)
    packed = any(headers[name].dtype in ("U8", "I32", "F4", "F8_E8M0") for name in sizes if sizes[name] > 2**12)
    dtype = "" if most is None else headers[most].dtype
    return _weights("safetensors", shapes, num_bytes, dtype, is_packed=packed)


def _weights(where: str, shapes: Shapes, num_bytes: int, dtype: str, **more: Any) -> Weights:
    found = find(shapes)
    named = [] if found else talks_of_experts(shapes)
    remark = f"; {len(named)} tensors have the word expert in their names, but no gate beside them" if named else ""
    return Weights(
        where=f"{len(shapes)} tensors ({where})",
        found=found,
        stacks=tuple(Stack(path, pattern) for path, pattern in stacks(shapes, found)),
        num_params=sum(map(math.prod, shapes.values())),
        num_bytes=num_bytes,
        dtype=dtype,
        lookup=lookup_params(shapes),
        remark=remark,
        **more,
    )


def _of_gguf(header: GGUFHeader, num_bytes: int) -> Weights:
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    known = [tensor.num_bytes for tensor in header.tensors.values()]
    exact = sum(size for size in known if size is not None) if None not in known else num_bytes
    kinds = header.metadata.get("general.file_type")
    layers, heads, width = (header.get(key) for key in ("block_count", "attention.head_count", "embedding_length"))
    kv, attention = None, None
    if all(isinstance(n, int) and n > 0 for n in (layers, heads, width)):
        kv_heads = header.get("attention.head_count_kv") or heads
        per_layer = kv_heads if isinstance(kv_heads, list) else [kv_heads] * layers
        keys = header.get("attention.key_length") or width // heads
        values = header.get("attention.value_length") or width // heads
        kv, attention = 2 * sum(per_layer) * (keys + values), sum(map(bool, per_layer)) * heads * keys
    dtype = f"GGUF file type {kinds}" if kinds is not None else "GGUF"
    return _weights("GGUF", shapes, exact, dtype, is_packed=False, kv_bytes_per_token=kv, attention_width=attention)


def _of_index(index: Mapping[str, Any]) -> Weights:
    """Names only: experts are what is numbered below the word, beside something that is called gate or router."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpoint("the index has no weight_map from tensor names to files. Fetch it again.")
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in weight_map:
        if (match := re.match(r"(.*\.experts)\.(?:expert_)?(\d+)\.", name)) is not None:
            numbers[match[1]].add(int(match[2]))
    found = [
        Found(path, "gated", [[] for _ in range(max(held) + 1)], 0, 0)
        for path, held in sorted(numbers.items(), key=lambda item: natural(item[0]))
        if any(re.match(re.escape(path.rpartition(".")[0]) + r"\.(gate|router)\b", name) for name in weight_map)
    ]
    total = (index.get("metadata") or {}).get("total_size")
    shapes: Shapes = dict.fromkeys(weight_map, ())
    return Weights(
        where=f"{len(weight_map)} names of tensors (index)",
        found=found,
        stacks=tuple(Stack(path, pattern) for path, pattern in _stacks_by_name(shapes, found)),
        num_params=0,
        num_bytes=int(total) if isinstance(total, int | float) else 0,
        dtype="",
        is_packed=True,
        remark="; shapes are in files that are not here",
        names_only=True,
    )


def _stacks_by_name(shapes: Shapes, found: Sequence[Found]) -> list[tuple[str, str]]:
    """As `stacks`, of groups of which only the path is known."""
    paths = [f"{one.path}." for one in found]
    named = [
        Found(one.path, "gated", [[(name, 0, -1)] for name in shapes if name.startswith(path)], 0, 0)
        for one, path in zip(found, paths, strict=True)
    ]
    return stacks(shapes, named)
