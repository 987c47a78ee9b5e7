"""Balance without a loss: a bias of each expert that decides only who is chosen, and is moved after every step.

Of arXiv:2408.15664 (and DeepSeek-V3, arXiv:2412.19437). For gates that choose by their scores plus a buffer ``bias``
[E] and weight by the scores alone: the gradient of the network's own loss is not bent to keep experts busy. The loads
are plain vectors, which workers can add up before they use them.

Shape legend: E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import nn

from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.ops.gates.sigmoid import Rule, bias_update
from ray_moe.ops.layer import MoELayer, moe_layers
from ray_moe.ops.losses import expert_load


class LossFreeBalancing:
    """Moves the selection biases of a network's gates.

    Call `observe` after each forward pass and `step` after each step of the optimizer::

        balancing = LossFreeBalancing(model, rate=0.001)
        ...
        loss.backward()
        balancing.observe()
        optimizer.step()
        balancing.step()
    """

    def __init__(self, model: nn.Module, rate: float = 0.001, rule: Rule = "sign") -> None:
        """
        Args:
            model: any network with `MoELayer`s; those whose gate has a buffer ``bias`` [E] are balanced.
            rate: of `bias_update`.
            rule: of `bias_update`.

        Raises: `InvalidConfig` when no gate has a bias, or for a rate or a rule that cannot be.
        """
        if rule not in get_args(Rule):
            raise InvalidConfig(f"unknown rule {rule!r}; give one of {', '.join(get_args(Rule))}")
        if not rate > 0:
            raise InvalidConfig(f"rate is {rate}; it must be more than 0")
        self.rate, self.rule = rate, rule
        layers = moe_layers(model)
        self.layers = {path: layer for path, layer in layers.items() if selection_bias(layer) is not None}
        if not self.layers:
            gates = sorted({type(layer.gate).__name__ for layer in layers.values()})
            raise InvalidConfig(
                f"no gate here has a selection bias, a buffer named bias [E] ({', '.join(gates) or 'no MoE layers'}); "
                "use a gate that has one, such as the sigmoid gate"
            )
        self.loads: dict[str, torch.Tensor] = {}
        """[E] by path: the slots that each expert got since the last step."""

    @torch.no_grad()
    def observe(self, mask: torch.Tensor | None = None) -> None:
        """Count what the layers chose in their last call. `mask`: [T], true where a token counts; None for all."""
        for path, layer in self.layers.items():
            if layer.routing is not None:
                load = expert_load(layer.routing, mask)
                self.loads[path] = self.loads[path] + load if path in self.loads else load

    @torch.no_grad()
    def step(self, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        """Move the biases by what was counted, and begin counting anew.

        Args:
            reduce: [E] -> [E], the sum of a load over all workers, which then keep the same biases; None with one. It
                is called for each layer, in the network's order.

        Raises: `InvalidRequest` when nothing has been observed since the last step.
        """
        if not self.loads:
            raise InvalidRequest("no routing was observed since the last step; call observe() after the forward pass")
        for path, layer in self.layers.items():
            bias = selection_bias(layer)
            if bias is None or path not in self.loads:
                continue
            load = self.loads[path] if reduce is None else reduce(self.loads[path])
            bias += bias_update(load.to(bias.device), self.rate, self.rule).to(bias.dtype)
        self.loads = {}


def selection_bias(layer: MoELayer) -> torch.Tensor | None:
    """The buffer [E] of the layer's gate that only the choice is made with; None if it has none."""
    gate: Any = layer.gate
    bias = dict(gate.named_buffers(recurse=False)).get("bias") if isinstance(gate, nn.Module) else None
    return bias if bias is not None and bias.shape == (layer.experts.num_experts,) else None
