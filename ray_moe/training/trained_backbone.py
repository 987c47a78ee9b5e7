"""The backbone that one worker trains, with its optimizer: its gradients, summed over all workers, and its state.

What is not an expert is the same on every worker, so each makes the same step with the same sums. It knows of no step,
host or coordinator. Owned by `trainer.py`; `trained_experts.py` is the same of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ray_moe.errors import InvalidCheckpoint, StepRefused
from ray_moe.ops.optimizers import Optimizer, OptimizerSettings
from ray_moe.training.gradients import BACKBONE_BITS, GradientCompressor, expand, join, split
from ray_moe.training.group import Group
from ray_moe.training.settings import GradientCompression
from ray_moe.training.shelf import shelf_for


class TrainedBackbone:
    """Of one worker. Not thread-safe."""

    def __init__(self, model: nn.Module, settings: OptimizerSettings) -> None:
        """Args: model: what of it requires a gradient is trained."""
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = Optimizer(settings, shelf=shelf_for(settings))
        for name, parameter in self.parameters.items():
            self.optimizer.add(name, parameter)
        self.compressor = GradientCompressor(BACKBONE_BITS)
        """What this worker sends of its gradients, and has not sent yet."""

    # --- what it learns --------------------------------------------------------------------------------------
    def forget_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @property
    def learned(self) -> frozenset[str]:
        """Parameters that have a gradient."""
        return frozenset(name for name, parameter in self.parameters.items() if parameter.grad is not None)

    def sums(self, learned: frozenset[str], group: Group, compression: GradientCompression) -> dict[str, torch.Tensor]:
        """Replace each gradient by its sum over all workers, and answer them. Called by all workers.

        Args: learned: every parameter that any worker has a gradient of: all must add up the same.

        Raises: `StepRefused`, on every worker, for what cannot be compressed.
        """
        grads = {}
        for name, parameter in self.parameters.items():
            if name in learned:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grads[name] = parameter.grad
        if group.size == 1 or compression == "none" or not grads:
            group.sum(list(grads.values()))
        else:
            self._sum_compressed(grads, group)
        return grads

    def _sum_compressed(self, grads: Mapping[str, torch.Tensor], group: Group) -> None:
        self.compressor.restore()
        try:
            mine: Any = join(self.compressor.compress(grads))
        except StepRefused as error:
            mine = error
        everybody = group.gather(mine)
        for theirs in everybody:
            if isinstance(theirs, StepRefused):
                raise theirs
        for grad in grads.values():
            grad.zero_()
        for codes, scales in everybody:
            for name, grad in expand(split(codes, scales, grads, BACKBONE_BITS), grads, BACKBONE_BITS).items():
                grads[name].add_(grad)

    # --- what it is ------------------------------------------------------------------------------------------
    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all that it has learned: parameters by name, and ``exp_avg/NAME`` ... of the optimizer."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[name] = parameter.detach().clone()
            for key, value in self.optimizer.state_of(name).items():
                if value.data_ptr() != parameter.data_ptr():  # the weights may be their own master
                    tensors[f"{key}/{name}"] = value.clone()
            self.optimizer.let_go(name)
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Be as when `state` was taken. Raises: `InvalidCheckpoint` for that of another model."""
        states: dict[str, dict[str, torch.Tensor]] = {}
        for full, tensor in tensors.items():
            key, _, name = full.rpartition("/")
            states.setdefault(name, {})[key] = tensor
        if missing := self.parameters.keys() - states.keys():
            raise InvalidCheckpoint(
                f"the run has not trained {min(missing)} (and {len(missing) - 1} more): train what it was begun with, "
                "or give this run another name"
            )
        for name, parameter in self.parameters.items():
            state = states[name]
            if state[""].shape != parameter.shape:
                raise InvalidCheckpoint(
                    f"the run has {name} as {list(state[''].shape)}, and here it is {list(parameter.shape)}; train "
                    "with the settings that it was begun with, or give this run another name"
                )
            parameter.copy_(state.pop(""))
            self.optimizer.load_state(name, state)
