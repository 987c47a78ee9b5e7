"""The experts that one host trains, with their optimizer: how they compute, and what each is as tensors by name.

An expert is owned here, so its parameters are stepped here, or a replica of one that is stepped elsewhere. What is
trained may be all of it, adapters on it, or its matrices in 8 bits; what goes to other hosts, into checkpoints and to
those that serve is said here for each. It knows of no run, step or call. Owned by `trainees.py`, whose lock is held.

Shape legend: n rows (token, expert), D model width.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ray_moe.errors import InvalidConfig, NotFound
from ray_moe.ops import norms
from ray_moe.ops.experts import SeparateExperts
from ray_moe.ops.lora import ExpertAdapters, is_adapter
from ray_moe.ops.optimizers import Optimizer, OptimizerSettings, blank, is_blank
from ray_moe.ops.quantized_training import Compensation, Rounded
from ray_moe.training.rounding import KEYS, learned, round_matrices, take_over, to_compute, to_train, values
from ray_moe.training.shelf import DiskShelf
from ray_moe.training.snapshots import Experts
from ray_moe.types import HostId, LayerPath

Tensors = Mapping[str, torch.Tensor]


@dataclass(slots=True)
class TrainedLayer:
    """Those of one layer."""

    module: nn.Module
    """How its experts compute."""
    adapters: ExpertAdapters | None = None
    """What learns of its experts; None: all."""
    experts: dict[int, dict[str, nn.Parameter]] = field(default_factory=dict)
    owned: set[int] = field(default_factory=set)
    """Those that are stepped here; the others are replicas of experts that are stepped elsewhere."""
    rounded: dict[int, dict[str, Rounded]] = field(default_factory=dict)
    """The matrices of those that are trained in 8 bits, whose parameters have no weights."""

    def run(self, rows: torch.Tensor, numbers: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """[n, D], by expert -> [n, D].

        Args:
            numbers: of experts that are here.
            counts: rows of each.
        """
        experts: list[Tensors] = [self.experts[expert] for expert in numbers]
        if self.adapters is not None:
            experts = [self.adapters.merged(expert, self.is_transposed) for expert in experts]
        if self.rounded:
            experts = [
                {name: learned(p, small[name]) if name in small else p for name, p in self.experts[number].items()}
                for number, small in ((number, self.rounded[number]) for number in numbers)
            ]
        return SeparateExperts(self.module, experts).run(rows, counts)

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        for small in (each for expert in self.rounded.values() for each in expert.values()):
            return small.dtype
        dtypes = [parameter.dtype for expert in self.experts.values() for parameter in expert.values()]
        return dtypes[0] if dtypes else torch.float32

    @property
    def is_transposed(self) -> bool:
        """Whether matrices are [in, out]."""
        transposed: Any = self.module.is_transposed
        return bool(transposed)

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations of a row forward."""
        one = next(iter(self.experts.values()), {})
        return 2 * sum(parameter.numel() for parameter in one.values() if parameter.ndim == 2)


class TrainedExperts:
    """All of them. Not thread-safe."""

    def __init__(
        self,
        host_id: HostId,
        device: torch.device | str,
        settings: OptimizerSettings,
        shelf: DiskShelf | None,
        adapters: ExpertAdapters | None,
        rounding: Compensation | None,
    ) -> None:
        """None yet.

        Args:
            host_id: for messages.
            device: where the experts are, wherever they come from.
            settings: of the optimizer.
            shelf: where it keeps what it keeps on a disk.
            adapters: what learns of the experts; None: all.
            rounding: their matrices are in 8 bits, with this kept of what rounding takes away; None: in float.
        """
        self.host_id = host_id
        self.adapters = adapters
        self.rounding = rounding
        self.layers: dict[LayerPath, TrainedLayer] = {}
        self.optimizer = Optimizer(settings, shelf=shelf)
        self._device = device

    # --- which are here --------------------------------------------------------------------------------------
    def hold(self, layer: LayerPath, module: nn.Module, experts: Mapping[int, Tensors], owned: Collection[int]) -> None:
        """Have `experts` of `layer`, see `Trainees.hold`; those that are here already are replaced."""
        here = self.layers.setdefault(layer, TrainedLayer(module, self.adapters))
        for expert, tensors in experts.items():
            self._release(layer, expert)
            small: dict[str, Rounded] = {}
            if self.rounding is not None:
                small = here.rounded[expert] = round_matrices(
                    tensors, -2 if here.is_transposed else -1, self.rounding, self._device
                )
            weights = {name: t.to(self._device) for name, t in tensors.items() if "." not in name and name not in small}
            weights |= {name: blank(each.shape, self._device) for name, each in small.items()}
            if self.adapters is not None:
                weights = self.adapters.added(weights, here.is_transposed, f"{layer}/{expert}")
            elif any(map(is_adapter, weights)):
                raise InvalidConfig(f"expert {expert} of {layer} has an adapter, and the run is to train it whole")
            here.experts[expert] = {
                name: nn.Parameter(tensor.detach(), requires_grad=self.adapters is None or is_adapter(name))
                for name, tensor in weights.items()
            }
            if expert in owned:
                self._own(layer, expert, tensors)

    def _own(self, layer: LayerPath, expert: int, tensors: Tensors) -> None:
        here = self.layers[layer]
        here.owned.add(expert)
        for name, parameter in here.experts[expert].items():
            if not parameter.requires_grad:
                continue
            full, store = full_name(layer, expert, name), here.rounded.get(expert, {}).get(name)
            self.optimizer.add(full, parameter, store)
            known = {key: tensor for key, tensor in tensors.items() if not key.startswith(KEYS)}
            state = {key.partition(".")[0]: t for key, t in known.items() if key.partition(".")[2] == name}
            if store is not None:
                state.pop("master", None)
            if state:
                self.optimizer.load_state(full, state)

    def _release(self, layer: LayerPath, expert: int) -> None:
        here = self.layers[layer]
        for name, parameter in here.experts.pop(expert, {}).items():
            if expert in here.owned and parameter.requires_grad:
                self.optimizer.remove(full_name(layer, expert, name))
        here.rounded.pop(expert, None)
        here.owned.discard(expert)

    def drop(self, experts: Experts) -> None:
        """Have `experts` no more; those that are not here are passed over."""
        for layer, numbers in experts.items():
            if layer in self.layers:
                for expert in numbers:
                    self._release(layer, expert)
                if not self.layers[layer].experts:
                    del self.layers[layer]

    @property
    def owned(self) -> dict[LayerPath, tuple[int, ...]]:
        """Those that are stepped here."""
        return {layer: tuple(sorted(here.owned)) for layer, here in self.layers.items()}

    @property
    def held(self) -> dict[LayerPath, tuple[int, ...]]:
        """The owned ones and replicas."""
        return {layer: tuple(sorted(here.experts)) for layer, here in self.layers.items()}

    @property
    def num_bytes(self) -> int:
        """Memory of weights, gradients and the optimizer."""
        parameters = [p for here in self.layers.values() for each in here.experts.values() for p in each.values()]
        rounded = [each for here in self.layers.values() for small in here.rounded.values() for each in small.values()]
        tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        for name in self.optimizer.names:
            tensors += self.optimizer.in_memory(name)
        plain = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if not is_blank(tensor)}.values())
        return plain + sum(each.nbytes for each in rounded)

    # --- what they learn -------------------------------------------------------------------------------------
    def parameters(self, layer: LayerPath, expert: int) -> dict[str, nn.Parameter]:
        """Of one, by name. Raises: `NotFound` for an expert that is not here, as all that ask for one."""
        here = self.layers.get(layer)
        if here is None or expert not in here.experts:
            raise NotFound(f"host {self.host_id} does not train expert {expert} of {layer!r}")
        return here.experts[expert]

    def gradients(self, layer: LayerPath, expert: int) -> dict[str, torch.Tensor]:
        """Of one, as far as there are any."""
        return {name: p.grad for name, p in self.parameters(layer, expert).items() if p.grad is not None}

    def forget_gradients(self) -> None:
        for here in self.layers.values():
            for parameters in here.experts.values():
                for parameter in parameters.values():
                    parameter.grad = None

    def squares(self) -> dict[LayerPath, dict[int, float]]:
        """The sum of the squared gradients of each owned expert."""
        return {
            layer: {expert: math.fsum(norms.squares(self.gradients(layer, expert).values())) for expert in numbers}
            for layer, numbers in self.owned.items()
        }

    def replicas(self) -> list[str]:
        """Full names of the parameters that are stepped elsewhere."""
        return [
            full_name(layer, expert, name)
            for layer, here in self.layers.items()
            for expert, parameters in here.experts.items()
            if expert not in here.owned
            for name in parameters
        ]

    # --- what they are ---------------------------------------------------------------------------------------
    def weights(self, layer: LayerPath, expert: int, learned: bool) -> dict[str, torch.Tensor]:
        """Of one, for its replicas; those that can change if `learned`."""
        parameters, small = self.parameters(layer, expert), self._rounded(layer, expert)
        plain = {name: p for name, p in parameters.items() if name not in small and (p.requires_grad or not learned)}
        return {**plain, **to_compute(small)}

    def set_weights(self, layer: LayerPath, expert: int, tensors: dict[str, torch.Tensor]) -> None:
        """Take over the weights of a replica."""
        parameters = self.parameters(layer, expert)
        take_over(self._rounded(layer, expert), tensors, self._device)
        for name, tensor in tensors.items():
            if not name.startswith(KEYS):
                parameters[name].copy_(tensor)

    def merged(self, layer: LayerPath, expert: int) -> dict[str, torch.Tensor]:
        """The weights of one as they are without adapters, to serve from."""
        parameters = self.parameters(layer, expert)
        if self.adapters is not None:
            return self.adapters.merged(parameters, self.layers[layer].is_transposed)
        return {**parameters, **values(self._rounded(layer, expert))}

    def tensors(self, layer: LayerPath, expert: int) -> dict[str, torch.Tensor]:
        """What an owned expert is: weights by name, and the optimizer's ``exp_avg.NAME``, ``master.NAME`` ... What can
        change is copied."""
        parameters, small = self.parameters(layer, expert), self._rounded(layer, expert)
        tensors = to_train(small)
        for name, parameter in parameters.items():
            if not parameter.requires_grad:  # never changes
                tensors[name] = parameter.detach()
                continue
            if name not in small:
                tensors[name] = parameter.detach().clone()
            full = full_name(layer, expert, name)
            for key, value in self.optimizer.state_of(full).items():
                if value.data_ptr() != parameter.data_ptr():  # the weights may be their own master
                    tensors[f"{key}.{name}"] = value.clone()
            self.optimizer.let_go(full)
        return tensors

    def saved_tensors(self, layer: LayerPath, expert: int) -> dict[str, torch.Tensor]:
        """The same with weights that anybody can read."""
        tensors = self.tensors(layer, expert)
        return {**values(self._rounded(layer, expert)), **tensors}

    def _rounded(self, layer: LayerPath, expert: int) -> Mapping[str, Rounded]:
        """The matrices of an expert that is here, where it is trained in 8 bits."""
        return self.layers[layer].rounded.get(expert, {})


def full_name(layer: LayerPath, expert: int, name: str) -> str:
    """Of a parameter, among all of a host."""
    return f"{layer}/{expert}/{name}"
