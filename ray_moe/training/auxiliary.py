"""The loss of a causal language model with the auxiliary losses of its gates.

A `training.trainer.Loss`. Made by `actors/training.py` where the configuration names auxiliary losses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ray_moe.models.gates import RoutingRecorder
from ray_moe.ops.losses import AuxiliaryLosses
from ray_moe.training.trainer import Batch, causal_lm_loss


class LossWithAuxiliary:
    """What `causal_lm_loss` is, and in training mode the auxiliary losses of all layers."""

    def __init__(self, model: nn.Module, coefficients: Mapping[str, float]) -> None:
        """
        Args:
            model: of `transformers`, whose loss will be asked for; its routers are listened to from now on.
            coefficients: of losses that have no state, by name (`ops/losses.py`), for each layer.

        Raises: `UnsupportedModel` for a router of another form than (logits, weight, index); `InvalidConfig` for no
            coefficients.
        """
        self._recorder = RoutingRecorder(model)
        self._losses = {
            path: AuxiliaryLosses(coefficients, number) for path, number in self._recorder.num_experts.items()
        }

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The mean loss of a micro-batch, a scalar."""
        if not model.training:
            return causal_lm_loss(model, batch)
        with self._recorder.recording() as routings:
            loss = causal_lm_loss(model, batch)
        mask = batch.get("attention_mask")
        for path, routing in routings.items():
            for value in self._losses[path](routing, mask).values():
                loss = loss + value
        return loss
