"""A trained model in this process, whole, with the gate that it was trained with: `ray_moe.load_trained`.

For what no checkpoint of `transformers` can say (`training/gating.py: check_writable`), and to look at any other run.
Loads all of it: what is to be served is exported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ray_moe.models.huggingface import Checkpoint
from ray_moe.training.export import check_origin, find, trained_weights
from ray_moe.training.gating import place_gates


def load_trained(folder: str | Path, model: str | Path | None = None) -> nn.Module:
    """The model after a checkpoint of training, in evaluation mode and the dtype of the checkpoint that it began with.

    Args:
        folder: a checkpoint of training, or the folder they are in (then the latest).
        model: what the training began with, where it is no longer where it was.

    Returns: a model of `transformers`, with its experts in it.

    Raises: `NotFound`, `InvalidCheckpoint` for folders that are none, or damaged; as `Checkpoint.open`.
    """
    trained = find(Path(folder).expanduser())
    checkpoint = Checkpoint.open(model or trained.manifest.stamp.model)
    check_origin(trained, checkpoint)
    trained.check_hashes()
    network: Any = checkpoint.load_backbone()
    backbone, experts = trained_weights(trained, checkpoint)
    for path, layer in checkpoint.layers.items():
        module = checkpoint.load_experts({path: range(layer.num_experts)})[path]
        module.load_state_dict({name: tensor.to(checkpoint.dtype) for name, tensor in experts(path).items()})
        network.set_submodule(path, module)
    gate = trained.manifest.gate
    if gate is not None:
        for path in place_gates(network, gate):
            if hasattr(network.get_submodule(path), "anneal"):
                network.get_submodule(path).anneal(max(trained.manifest.stamp.step - 1, 0))
    own: dict[str, torch.Tensor] = network.state_dict()
    network.load_state_dict({name: tensor for name, tensor in backbone.items() if name in own}, strict=False)
    whole: nn.Module = network.eval()
    return whole
