"""Writing a new MoE checkpoint out of dense ones, expert by expert.

Decides names, dtypes and files first, then reads, makes and writes one network after the other, so that a model larger
than the memory can be made. What the experts are is for the caller to say (`Contents`). Called by `models/upcycle.py`
and `models/merge.py`.

Shape legend: D model width, F expert width, E experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch

from ray_moe.errors import InvalidConfig
from ray_moe.models.checkpoint import CONFIG, Reader
from ray_moe.models.dense import Dense, ffn_names
from ray_moe.models.ffn import FFN
from ray_moe.models.huggingface import Checkpoint
from ray_moe.models.loading import return_free_memory
from ray_moe.models.moe_targets import CORRECTION, Blueprint, Pairing
from ray_moe.models.sharded import MAX_FILE_BYTES, OnWritten, ShardPlan, ShardWriter, copy_other_files, free_target
from ray_moe.models.writing import NewFolder, TensorSpec, check_room, write_file

ROW_ALIGNMENT = 16
"""Bytes, of which rows of the experts' matrices must be a multiple: `torch._grouped_mm` takes no others."""

Readers = Sequence[Reader]
"""The open files of each dense model, in the order in which they were given."""


class Contents(Protocol):
    """What is in the tensors of a new MoE model. Each is asked for once."""

    @property
    def same_function(self) -> bool:
        """Whether the model computes what the first dense model computes, but for rounding."""
        ...

    def backbone(self, name: str, readers: Readers) -> torch.Tensor:
        """The tensor of this name, which the dense model has too."""
        ...

    def gate(self, layer: int) -> torch.Tensor:
        """[E, D]."""
        ...

    def expert(self, layer: int, number: int, readers: Readers) -> FFN: ...

    @property
    def shared(self) -> Callable[[int, Readers], FFN] | None:
        """What makes the shared expert of a layer; None for contents that have none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where and how the new model is written."""

    folder: str | Path
    dtype: torch.dtype | None = None
    """Of all weights; None keeps the dense model's."""
    overwrite: bool = False
    """Whether there may be a checkpoint in `folder`, to be replaced once all is written."""
    max_file_bytes: int = MAX_FILE_BYTES
    on_progress: OnWritten | None = None


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many weights a model has; of tied ones, one is counted."""

    total: int
    active: int
    """Those that a token meets: all but the experts that are not chosen for it."""


@dataclass(frozen=True, slots=True)
class NewMoE:
    """What has been made."""

    folder: Path
    model_type: str
    blueprint: Blueprint
    before: Parameters
    """Of the dense model, the first if there were several."""
    after: Parameters
    num_bytes: int
    """Of the weights on disk."""
    same_function: bool
    """Whether it computes what the dense model computes, but for rounding."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tensors that are made together."""

    layer: int
    """-1 for what is in none."""
    specs: Mapping[str, TensorSpec]
    make: Callable[[Readers], Sequence[torch.Tensor]]
    is_expert: bool = False


def write_moe(
    sources: Sequence[Dense], pairing: Pairing, plan: Blueprint, contents: Contents, output: Output
) -> NewMoE:
    """Write the model; its folder is there whole or not at all. Tokenizer and the like are the first source's.

    Before the folder gets its name, the checkpoint in it is opened as `ray-moe serve` opens it.

    Raises:
        InvalidConfig: the folder is taken or cannot be written, or the experts are of a width that does not compute.
        InsufficientResources: the disk is full.
        InvalidCheckpoint: a file of the sources has changed.
        UnsupportedModel: a setting of the dense model has no place in the new one.
    """
    first = sources[0]
    for source in sources:
        target = free_target(source.files.folder, output.folder, output.overwrite)
    _check_rows(first, plan, output.dtype)
    config = pairing.config(first.config, plan)
    config.dtype = output.dtype or first.config.dtype or first.dtype
    pieces = list(_pieces(first, pairing, plan, contents, output.dtype))
    files = ShardPlan({name: spec for piece in pieces for name, spec in piece.specs.items()}, output.max_file_bytes)
    with NewFolder(target) as partial:
        check_room(partial, files.num_bytes)
        copy_other_files(first.files.folder, partial)
        write_file(partial / CONFIG, config.to_json_string().encode())
        with closing(ShardWriter(files, partial, output.on_progress)) as weights:
            # A file is open, and its pages count as this process's memory, no longer than its layer needs it.
            for _, group in groupby(pieces, lambda piece: piece.layer):
                with ExitStack() as stack:
                    readers = [stack.enter_context(source.files.reader()) for source in sources]
                    for piece in group:
                        weights.put(dict(zip(piece.specs, piece.make(readers), strict=True)))
                return_free_memory()
        files.write_index(partial)
        Checkpoint.open(partial)
    num_dense = first.num_parameters
    after = _parameters(pieces, plan, config.tie_word_embeddings)
    return NewMoE(
        folder=target,
        model_type=config.model_type,
        blueprint=plan,
        before=Parameters(num_dense, num_dense),
        after=after,
        num_bytes=files.num_bytes,
        same_function=contents.same_function,
    )


def _check_rows(dense: Dense, plan: Blueprint, dtype: torch.dtype | None) -> None:
    """Raises: `InvalidConfig`: `transformers` and the hosts could not compute such experts."""
    row_bytes = plan.expert_width * (dtype or dense.dtype).itemsize
    if row_bytes % ROW_ALIGNMENT:
        raise InvalidConfig(
            f"experts of width {plan.expert_width} have rows of {row_bytes} bytes; grouped matrix products need a "
            f"multiple of {ROW_ALIGNMENT}. Choose fewer parts, or a wider dtype"
        )


def _pieces(
    dense: Dense, pairing: Pairing, plan: Blueprint, contents: Contents, dtype: torch.dtype | None
) -> Iterator[_Piece]:
    """All tensors of the new model: those before the layers, the layers, those after them."""
    last = dense.num_layers
    names: dict[int, list[str]] = {layer: [] for layer in (-1, *range(last), last)}
    for name in dense.backbone:
        found = re.match(r"model\.layers\.(\d+)\.", name)
        names[int(found[1]) if found else last if name.startswith(("model.norm", "lm_head")) else -1].append(name)
    for layer, held in names.items():
        dense_ffn = ffn_names(layer) if layer in plan.dense_layers else ()
        for name in (*held, *dense_ffn):
            # `name` of this turn, not of the last one
            spec = _in(dtype, dense.spec(name))
            yield _Piece(layer, {name: spec}, lambda readers, name=name: [contents.backbone(name, readers)])  # type: ignore[misc]
        if layer in plan.layers:
            yield from _moe_pieces(layer, dense, pairing, plan, contents, dtype)


def _moe_pieces(
    layer: int, dense: Dense, pairing: Pairing, plan: Blueprint, contents: Contents, dtype: torch.dtype | None
) -> Iterator[_Piece]:
    target, width = pairing.target, dense.hidden_size
    dtypes = [_in(dtype, dense.spec(name)).dtype for name in ffn_names(layer)]

    def ffn_specs(names: Sequence[str], rows: int) -> dict[str, TensorSpec]:
        shapes = ((rows, width), (rows, width), (width, rows))
        return {name: TensorSpec(*each) for name, *each in zip(names, dtypes, shapes, strict=True)}  # type: ignore[arg-type]

    gate = TensorSpec(dtypes[0], (plan.num_experts, width))
    yield _Piece(layer, {target.gate(layer): gate}, lambda readers: [contents.gate(layer)])
    for name, spec in target.zeros(layer, plan, width, dtypes[0]).items():
        yield _Piece(layer, {name: spec}, lambda readers, spec=spec: [torch.zeros(spec.shape, dtype=spec.dtype)])  # type: ignore[misc]
    if plan.shared and (shared := contents.shared) is not None:
        specs = ffn_specs(target.shared_expert(layer), plan.dense_width)
        yield _Piece(layer, specs, lambda readers: _matrices(shared(layer, readers)))
    for number in range(plan.num_experts):
        specs = ffn_specs(target.expert(layer, number), plan.expert_width)
        yield _Piece(
            layer,
            specs,
            lambda readers, number=number: _matrices(contents.expert(layer, number, readers)),  # type: ignore[misc]
            is_expert=True,
        )


def _matrices(ffn: FFN) -> Sequence[torch.Tensor]:
    return ffn.gate, ffn.up, ffn.down


def _in(dtype: torch.dtype | None, spec: TensorSpec) -> TensorSpec:
    return replace(spec, dtype=dtype) if dtype is not None and spec.dtype.is_floating_point else spec


def _parameters(pieces: Sequence[_Piece], plan: Blueprint, tied: bool) -> Parameters:
    sizes = {name: math.prod(spec.shape) for piece in pieces for name, spec in piece.specs.items()}
    sizes = {name: size for name, size in sizes.items() if not name.endswith(CORRECTION)}  # a buffer
    if tied:
        sizes.pop("lm_head.weight", None)
    routed = sum(sizes[name] for piece in pieces if piece.is_expert for name in piece.specs)
    total = sum(sizes.values())
    return Parameters(total, total - routed + routed * plan.top_k // plan.num_experts)
