"""Trying a checkpoint's whole load without data, on the meta device: what does not fit shows before anything is read.

It also tells what the weights are once loaded, in bytes, exactly. Called by `models/huggingface.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ray_moe.models.checkpoint import TensorHeader
from ray_moe.models.experts import is_per_expert
from ray_moe.models.layout import Layout
from ray_moe.models.lazy import BlankTensors
from ray_moe.models.loading import fill, fill_experts, refuse_missing
from ray_moe.models.skeleton import Skeleton
from ray_moe.types import LayerPath, LayerSpec


def try_backbone(skeleton: Skeleton, layout: Layout, headers: Mapping[str, TensorHeader]) -> int:
    """Bytes of the backbone.

    Raises:
        InvalidCheckpoint: tensors are missing or have the wrong shape.
    """
    model = skeleton.model
    source = BlankTensors(headers)
    missing = fill(skeleton, {name: source.slice(name) for group in layout.backbone for name in group}, "meta")
    tied: dict[str, str] = model.all_tied_weights_keys
    for name, origin in tied.items():
        if name not in missing or origin not in missing:
            missing -= {name, origin}
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    inside_experts = tuple(f"{path}." for path in skeleton.experts)
    refuse_missing(
        {
            name
            for name in missing
            if not name.startswith(inside_experts) and not any(pattern.search(name) for pattern in optional)
        }
    )
    return sum(
        tensor.nbytes
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if name not in tied and not name.startswith(inside_experts)
    )


def try_experts(
    skeleton: Skeleton, layout: Layout, headers: Mapping[str, TensorHeader]
) -> tuple[dict[LayerPath, LayerSpec], dict[LayerPath, int]]:
    """What each layer's experts are, and the bytes that each shard of it holds beside its experts.

    Raises:
        InvalidCheckpoint: tensors are missing or have the wrong shape.
    """
    source = BlankTensors(headers)
    specs: dict[LayerPath, LayerSpec] = {}
    shared_bytes: dict[LayerPath, int] = {}
    for path, experts in skeleton.experts.items():
        # The layout has made sure that all experts of a layer have the same shapes.
        sample = fill_experts(skeleton, path, layout.experts[path], [0], source, "meta")
        specs[path] = _spec(path, experts, sample)
        shared_bytes[path] = num_bytes(sample) - specs[path].expert_bytes
    return specs, shared_bytes


def num_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _spec(path: LayerPath, experts: Any, sample: Any) -> LayerSpec:
    """What a layer's experts are, from the whole module and a shard of it with one expert."""
    up = sample._parameters["gate_up_proj" if sample.has_gate else "up_proj"]
    down = sample._parameters["down_proj"]
    # [1, out, in], or [1, in, out] when transposed.
    into, out = (1, 2) if sample.is_transposed else (2, 1)
    return LayerSpec(
        path=path,
        num_experts=experts.num_experts,
        hidden_size=up.shape[into],
        output_size=down.shape[out],
        dtype=str(down.dtype).removeprefix("torch."),
        expert_bytes=sum(p.nbytes for name, p in sample._parameters.items() if is_per_expert(sample, name)),
    )
