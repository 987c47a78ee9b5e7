"""Training experts whose weights are int8, with what rounding takes away kept for the next step.

Weights are int8 codes with a scale for each output channel, and nothing wider outlives a step: what is trained is what
`QuantizedExperts` would serve. Most updates are smaller than half a code, and plain rounding loses them. With a
compensation what was rounded away is kept (error feedback, arXiv:1901.09847, here on the weights), in 8 bits itself or
in bfloat16, and added before the next update; so small updates add up until they are a code. Products never see it.

`Int8Training` answers for experts as a host would (`ops/layer.py: Handler`): ``train_in_8_bits(model, ...)`` for the
`MoELayer`s of a network, and ``install(model, Int8Training(experts_modules(model), ...))`` for a model of
`transformers` (`models/experts.py`). Hosts keep each matrix of their experts as a `Rounded` (`training/rounding.py`).

Shape legend: T tokens, D model width, E experts, K experts per token, N = T*K slots, n rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ray_moe.errors import InvalidConfig
from ray_moe.ops.experts import SeparateExperts, mapped_module
from ray_moe.ops.layer import moe_layers
from ray_moe.ops.optimizers import Optimizer, OptimizerSettings
from ray_moe.ops.quantization import QuantizedExperts, ScaledTensor, quantize
from ray_moe.ops.routed_experts import run_slots
from ray_moe.types import LayerPath

Compensation = Literal["none", "int8", "bfloat16"]
"""What is kept of what rounding takes away: nothing, a byte or two bytes for each weight."""

FINE = 254
"""An int8 compensation has this many steps to one code: half a code is its greatest, 127."""


class Int8Training:
    """The experts of a network in 8 bits, and their optimizer. Not safe for use by several threads at once."""

    def __init__(
        self,
        modules: Mapping[LayerPath, nn.Module],
        optimizer: OptimizerSettings | None = None,
        compensation: Compensation = "int8",
    ) -> None:
        """
        Args:
            modules: of `transformers`' experts interface (`MoELayer.experts` is one) by path, with their weights, which
                are copied.
            optimizer: what steps them, in float32; its state is beside the codes (`adamw8bit` keeps that small, too).
            compensation: what is kept of what rounding takes away.

        Raises: `InvalidConfig` for options that cannot be, and for modules without weights.
        """
        self.settings = optimizer or OptimizerSettings()
        if compensation not in get_args(Compensation):
            raise InvalidConfig(f"compensation is {compensation!r}; give one of {', '.join(get_args(Compensation))}")
        if self.settings.offload != "none":
            raise InvalidConfig(f"optimizer.offload is {self.settings.offload}; training in 8 bits has none")
        self.compensation = compensation
        self.layers = {path: _Layer(module, self.settings, compensation) for path, module in modules.items()}

    def __call__(
        self, path: LayerPath, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """As `Experts.forward`. Its backward adds to the gradients of the experts that were asked, and computes their
        rows again: no weight in float is kept between the two."""
        return self.layers[path].forward(hidden, index, weight)

    def step(self, lr: float | None = None, *, grads_scale: float = 1.0) -> None:
        """Change all weights by their gradients, which it uses up; a stack without any is stepped as with zeros.

        Args: as of `Optimizer.step`.
        """
        for layer in self.layers.values():
            layer.step(lr, grads_scale)

    def grad_norm(self) -> float:
        """Of all gradients together, for clipping by ``step(grads_scale=...)``."""
        squares = (float(grad.float().square().sum()) for layer in self.layers.values() for grad in layer.grads())
        return math.sqrt(math.fsum(squares))

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for layer in self.layers.values():
            for stack in layer.stacks.values():
                stack.grad = None
            layer.others.zero_grad()

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and compensations, between steps; without the optimizer's state."""
        return sum(layer.nbytes for layer in self.layers.values())

    def weights(self, path: LayerPath) -> dict[str, torch.Tensor]:
        """What a layer computes with, as the `state_dict` of its experts module, in its own dtype."""
        return self.layers[path].weights()

    def group(self, path: LayerPath) -> QuantizedExperts:
        """A layer's experts to serve, of the same codes: nothing is rounded again."""
        return self.layers[path].group()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that training goes on from, as plain tensors; these are the ones in use."""
        return {
            f"{path}.{name}": tensor for path, layer in self.layers.items() for name, tensor in layer.state().items()
        }

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what `state_dict` returned with the same settings.

        Raises: `InvalidConfig` where something is missing, of another shape, or does not belong; some may have been
            loaded by then.
        """
        left = dict(tensors)
        for path, layer in self.layers.items():
            names = [name for name in left if name.startswith(f"{path}.")]
            layer.load({name.removeprefix(f"{path}."): left.pop(name) for name in names})
        if left:
            raise InvalidConfig(f"there is no layer for {min(left)}; there are {', '.join(self.layers)}")


def train_in_8_bits(
    model: nn.Module, optimizer: OptimizerSettings | None = None, compensation: Compensation = "int8"
) -> Int8Training:
    """Take the experts out of the `MoELayer`s of a network and train them in 8 bits.

    ::

        experts = train_in_8_bits(model, OptimizerSettings(lr=1e-3))
        rest = torch.optim.AdamW(model.parameters(), lr=1e-3)  # after it: of all but the experts
        ...
        loss.backward()
        rest.step()
        experts.step()

    `bring_home` puts them back.

    Raises: `InvalidConfig` as `Int8Training`, and for a network without a `MoELayer`.
    """
    layers = moe_layers(model)
    if not layers:
        raise InvalidConfig("the network has no ray_moe.MoELayer whose experts could be trained in 8 bits")
    training = Int8Training({path: layer.experts for path, layer in layers.items()}, optimizer, compensation)
    for path, layer in layers.items():
        layer.experts.answer_with(training, path)
    return training


def bring_home(model: nn.Module, training: Int8Training) -> None:
    """Give the `MoELayer`s of a network their experts back, as they compute, in float."""
    for path, layer in moe_layers(model).items():
        layer.experts.__dict__["_ray_moe_handler"] = None
        for name, tensor in training.weights(path).items():
            layer.experts.register_parameter(name, nn.Parameter(tensor))


class Rounded:
    """A tensor of weights as int8 codes, and what rounding took away: a `Store` of an `Optimizer`."""

    small: ScaledTensor
    lost: torch.Tensor | None = None
    """What rounding took away: int8, in parts of a code, or bfloat16."""

    def __init__(self, exact: torch.Tensor, inputs: int, compensation: Compensation) -> None:
        """
        Args:
            exact: [..., out, in], or with the last two the other way round.
            inputs: the dimension of the inputs, -1 or -2: all that differs in it alone has one scale.
            compensation: what is kept.
        """
        self.inputs, self.compensation = inputs, compensation
        self.dtype, self.shape = exact.dtype, exact.shape
        self.write(exact.detach().float())

    def write(self, exact: torch.Tensor) -> None:
        """Round, and keep what that takes away."""
        self.small = quantize(exact, self.inputs)
        if self.compensation != "none":
            lost = exact - self.small.dequantize()
            if self.compensation == "bfloat16":
                self.lost = lost.bfloat16()
            else:
                scale = self.small.scale
                fine = lost * FINE / torch.where(scale == 0, 1, scale)
                self.lost = fine.round_().clamp_(-FINE / 2, FINE / 2).to(torch.int8)

    def read(self) -> torch.Tensor:
        """In float32, with what was kept."""
        exact = self.small.dequantize()
        if self.lost is None:
            return exact
        if self.compensation == "bfloat16":
            return exact.add_(self.lost)
        return exact.add_(self.lost * (self.small.scale / FINE))

    def value(self) -> torch.Tensor:
        """What products see."""
        return self.small.dequantize(self.dtype)

    @property
    def nbytes(self) -> int:
        return self.small.nbytes + (0 if self.lost is None else self.lost.nbytes)


class _Stack(Rounded):
    """A matrix for each expert, in 8 bits. `parameter` is empty but while it is stepped."""

    grad: torch.Tensor | None = None

    def __init__(
        self, name: str, exact: torch.Tensor, inputs: int, compensation: Compensation, settings: OptimizerSettings
    ) -> None:
        super().__init__(exact, inputs, compensation)
        self.name = name
        self.parameter = nn.Parameter(exact.new_empty(0, dtype=torch.float32))
        self.optimizer = Optimizer(settings, {name: self.parameter})

    def row(self, expert: int) -> torch.Tensor:
        """What one expert computes with."""
        return self.small[expert].dequantize(self.dtype)

    def accumulate(self, expert: int, grad: torch.Tensor) -> None:
        if self.grad is None:
            self.grad = torch.zeros(self.shape, dtype=torch.float32, device=grad.device)
        self.grad[expert] += grad

    @torch.no_grad()
    def step(self, lr: float | None, grads_scale: float) -> None:
        self.parameter.data, self.parameter.grad = self.read(), self.grad
        self.grad = None
        self.optimizer.step(lr, grads_scale=grads_scale, missing_as_zero=True)
        self.write(self.parameter.detach())
        self.parameter.data = self.parameter.data.new_empty(0)

    def state(self) -> dict[str, torch.Tensor]:
        tensors = {"codes": self.small.codes, "scale": self.small.scale}
        if self.lost is not None:
            tensors["lost"] = self.lost
        moments = self.optimizer.state_of(self.name)
        return tensors | {name: tensor for name, tensor in moments.items() if name != "master"}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        given, own = dict(tensors), self.state()
        for name in ("codes", "scale", "lost"):
            if name in own and (name not in given or given[name].shape != own[name].shape):
                raise InvalidConfig(f"{name} of a stack {list(self.shape)} is missing or of another shape")
        small = ScaledTensor(given.pop("codes").clone(), given.pop("scale").clone())
        lost = given.pop("lost").clone() if self.lost is not None else None
        self.parameter.data = small.codes.new_zeros(self.shape, dtype=torch.float32)
        try:
            self.optimizer.load_state(self.name, given)
        finally:
            self.parameter.data = self.parameter.data.new_empty(0)
        self.small, self.lost, self.grad = small, lost, None


class _Weight(torch.autograd.Function):
    """An expert's matrix, dequantised; its gradient goes to the stack. `anchor` makes autograd ask for it."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, stack: _Stack, expert: int) -> torch.Tensor:
        ctx.stack, ctx.expert = stack, expert
        return stack.row(expert)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        ctx.stack.accumulate(ctx.expert, grads[0])
        return None, None, None


_weight = cast("Callable[[torch.Tensor, _Stack, int], torch.Tensor]", _Weight.apply)


class _Layer:
    """The experts of one layer."""

    def __init__(self, module: Any, settings: OptimizerSettings, compensation: Compensation) -> None:
        if not list(module.parameters()):
            raise InvalidConfig("these experts are elsewhere, so they cannot be trained in 8 bits here")
        self.num_experts = int(module.num_experts)
        inputs = -2 if module.is_transposed else -1
        mine = {n: p for n, p in module._parameters.items() if p is not None and p.ndim == 3}
        self.stacks = {name: _Stack(name, p, inputs, compensation, settings) for name, p in mine.items()}
        self.frame: Any = mapped_module(module, partial(torch.empty_like, device="meta"))
        """How they compute, and of what dtypes and shapes they are."""
        self.others: Any = copy.copy(module)
        """The same with what is not in 8 bits: biases, norms."""
        self.others._parameters = {
            name: None if p is None else nn.Parameter(p.detach().clone())
            for name, p in module._parameters.items()
            if name not in mine
        }
        self.others._modules = {name: copy.deepcopy(child) for name, child in module._modules.items()}
        self.optimizer = Optimizer(settings, dict(self.others.named_parameters()))
        self.anchor = next(iter(mine.values())).new_zeros(()).requires_grad_()

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return run_slots(self._run_again, hidden, index, weight, self.num_experts)

    def _run_again(self, rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """[n, D] -> [n, D]: the first ``counts[0]`` rows through ``experts[0]``, and so on; again going backward."""
        if not torch.is_grad_enabled():
            return self._run(rows, self.anchor, experts, counts)
        out: Any = checkpoint(self._run, rows, self.anchor, experts, counts, use_reentrant=False)
        return cast(torch.Tensor, out)

    def _run(
        self, rows: torch.Tensor, anchor: torch.Tensor, experts: Sequence[int], counts: Sequence[int]
    ) -> torch.Tensor:
        others = {n: p for n, p in self.others._parameters.items() if p is not None}
        matrices = [
            {name: _weight(anchor, stack, expert) for name, stack in self.stacks.items()}
            | {name: other[expert] for name, other in others.items()}
            for expert in experts
        ]
        return SeparateExperts(self.others, matrices).run(rows, list(counts))

    def grads(self) -> list[torch.Tensor]:
        of_stacks = [stack.grad for stack in self.stacks.values()]
        return [g for g in [*of_stacks, *(p.grad for p in self.others.parameters())] if g is not None]

    def step(self, lr: float | None, grads_scale: float) -> None:
        for stack in self.stacks.values():
            stack.step(lr, grads_scale)
        self.optimizer.step(lr, grads_scale=grads_scale, missing_as_zero=True)

    @property
    def nbytes(self) -> int:
        others: int = sum(p.nbytes for p in self.others.parameters())
        return others + sum(stack.nbytes for stack in self.stacks.values())

    def weights(self) -> dict[str, torch.Tensor]:
        whole = {name: stack.small.dequantize(stack.dtype) for name, stack in self.stacks.items()}
        others = {name: tensor.detach().clone() for name, tensor in self.others.state_dict().items()}
        return {name: (whole | others)[name] for name in self.frame.state_dict()}

    def group(self) -> QuantizedExperts:
        tensors = {name: tensor.detach() for name, tensor in self.others.state_dict().items()}
        for name, stack in self.stacks.items():
            tensors |= {name: stack.small.codes, f"{name}.scale": stack.small.scale}
        return QuantizedExperts.from_tensors(self.frame, tensors)

    def state(self) -> dict[str, torch.Tensor]:
        tensors = {f"{n}.{key}": t for n, stack in self.stacks.items() for key, t in stack.state().items()}
        for name in self.optimizer.names:
            tensors |= {f"{name}.{key}": tensor for key, tensor in self.optimizer.state_of(name).items()}
        return tensors

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in [*self.stacks, *self.optimizer.names]}
        for full, tensor in tensors.items():
            name, _, key = full.rpartition(".")
            if name not in parts:
                raise InvalidConfig(f"{full} belongs to no weight of these experts; there are {', '.join(parts)}")
            parts[name][key] = tensor
        for name, stack in self.stacks.items():
            stack.load(parts[name])
        for name in self.optimizer.names:
            self.optimizer.load_state(name, parts[name])
