"""Experts that are in no checkpoint of the hosts: how they compute, and what they are before the first step.

They are those of somebody's own network. Called by `training/network.py` (made) and `training/coordinator.py` (told to
hosts). Never changed: a run that has lost everything begins with it again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.models.experts import experts_modules, is_per_expert, without_experts
from ray_moe.ops.experts import ExpertArrays, pack
from ray_moe.ops.parts import ExpertParts, axes_of
from ray_moe.policy.parts import whole_of
from ray_moe.training.snapshots import States
from ray_moe.types import LayerPath


class Origin:
    """The experts of a network as they are now. Keeps their weights, wherever the network's own go."""

    def __init__(self, model: nn.Module, num_parts: int = 1) -> None:
        """With `num_parts` each expert is cut into so many, and what the hosts call experts are those.

        Raises: `InvalidConfig` for a network without experts, or whose experts are elsewhere already; as `axes_of`.
        """
        modules = experts_modules(model)
        self._stacks: dict[LayerPath, dict[str, torch.Tensor]] = {
            path: {
                name: p.detach() for name, p in module.named_parameters(recurse=False) if is_per_expert(module, name)
            }
            for path, module in modules.items()
        }
        if not modules:
            raise InvalidConfig(
                "the model has no experts that hosts can hold: no ray_moe.MoELayer, and no experts of transformers "
                "(those of a layer that are modules of different kinds stay where the layer is)"
            )
        if empty := [path for path, stacks in self._stacks.items() if not stacks]:
            raise InvalidConfig(f"the experts {empty} are elsewhere already; give a model whose experts are in it")
        self.modules: Mapping[LayerPath, nn.Module] = {p: without_experts(module) for p, module in modules.items()}
        """How those of each layer compute."""
        cut = modules if num_parts > 1 else {}
        self.parts = ExpertParts(num_parts, {path: axes_of(module, path, num_parts) for path, module in cut.items()})

    @property
    def num_experts(self) -> dict[LayerPath, int]:
        """Of each layer, not cut."""
        return {path: len(next(iter(stacks.values()))) for path, stacks in self._stacks.items()}

    def states(self, experts: Mapping[LayerPath, Collection[int]]) -> States:
        """The weights of some of them, or of their parts."""
        return {path: {number: self._state(path, number) for number in ids} for path, ids in experts.items()}

    def _state(self, path: LayerPath, number: int) -> ExpertArrays:
        expert, part = whole_of(number, self.num_experts[path])
        whole = {name: stack[expert] for name, stack in self._stacks[path].items()}
        return pack(self.parts.cut(path, whole, part))
