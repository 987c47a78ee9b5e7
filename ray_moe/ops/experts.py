"""Computing rows through a group of experts: a grouped matrix product over the experts that are touched.

Works on any experts module of `transformers`' experts interface (a stack of weights `[E, out, in]` with the flags
`has_gate`, `has_bias`, `is_transposed`, `has_post_expert_norm`), whatever the family, because only the flags and the
family's own `_apply_gate` are used; or on a `ComputesRows`, whose experts are no feed-forward networks. Called by
`runtime/expert_host.py`; knows nothing of hosts or routing.

Shape legend: n rows, D model width, F expert width, E experts held.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ray_moe.errors import WireError
from ray_moe.ops.expert_backward import DTYPES, Touched, through_experts

ExpertArrays = dict[str, tuple[str, npt.NDArray[Any]]]
"""Tensors of some experts by name, ready to travel without torch: (name of the torch dtype, array). What numpy has no
dtype for (bfloat16, float8) is an array of its bits."""


Change = Callable[[torch.Tensor], torch.Tensor]


class ExpertGroup(Protocol):
    """Some experts of one layer, able to compute rows that are already grouped by expert."""

    @property
    def flops_per_row(self) -> int:
        """Multiply-adds of one row, times two."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def run(self, rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """[n, D] -> [n, D]: the first ``counts[0]`` rows through local expert ``experts[0]``, and so on.

        The result is unweighted, in the dtype and on the device of `rows`.
        """
        ...


@runtime_checkable
class SeparableGroup(ExpertGroup, Protocol):
    """A group whose experts can be taken out of it one by one."""

    def select(self, experts: Sequence[int]) -> SeparableGroup:
        """A group of its own memory with only these local experts, in this order."""
        ...

    def tensors(self, experts: Sequence[int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What these local experts are, by name: a row for each of them, and what all experts share."""
        ...


class MovableGroup(SeparableGroup, Protocol):
    """One whose memory can be another."""

    def select(self, experts: Sequence[int]) -> MovableGroup: ...

    def mapped(self, change: Change) -> MovableGroup:
        """The same experts in what `change` makes of each of their tensors: a copy elsewhere."""
        ...

    def warm_up(self) -> None:
        """Compute a row of zeros: a GPU loads its kernels when they are first used, and then the first call is late."""
        ...


class ComputesRows(Protocol):
    """A module with experts of another kind, that says itself what they do. All its own parameters are stacks."""

    def compute_rows(self, rows: torch.Tensor, counts: Sequence[int], weights: Weights) -> torch.Tensor:
        """[n, D] -> [n, D]: ``counts[0]`` rows through the first of the experts that `weights` gives, and so on."""
        ...


def computes_rows(module: nn.Module) -> bool:
    """Whether it is a `ComputesRows`. (Its class is asked: a module looks long for what it does not have.)"""
    return hasattr(type(module), "compute_rows")


class StackedExperts:
    """A `MovableGroup` over a module of `transformers`' experts interface."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @cached_property  # layers make a group for each call, and do not ask
    def flops_per_row(self) -> int:
        parameters: list[torch.Tensor] = list(self.module.parameters())
        return 2 * sum(p.numel() // p.shape[0] for p in parameters if p.ndim >= 3)

    @property
    def device(self) -> torch.device:
        return self._stack.device

    @property
    def _stack(self) -> torch.Tensor:
        """One of the stacks."""
        if computes_rows(self.module):
            stacks: dict[str, torch.Tensor] = self.module._parameters
            return next(iter(stacks.values()))
        stack: torch.Tensor = self.module.down_proj
        return stack

    def run(self, rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        return _compute(self.module, rows, counts, lambda name: _Rows(getattr(self.module, name), experts))

    def warm_up(self) -> None:
        if computes_rows(self.module):
            return  # nobody knows how wide its rows are
        down = self.module.down_proj
        width = down.shape[-1 if self.module.is_transposed else -2]
        with torch.no_grad():
            self.run(torch.zeros(1, width, dtype=down.dtype, device=down.device), [0], [1])

    def select(self, experts: Sequence[int]) -> StackedExperts:
        part: Any = copy.copy(self.module)
        rows = torch.tensor(experts, device=self.device)
        part._parameters = {name: self._taken(name, rows) for name in self.module._parameters}
        part._modules = {name: copy.deepcopy(child) for name, child in self.module._modules.items()}
        if hasattr(part, "num_experts"):
            part.num_experts = len(experts)
        return StackedExperts(part)

    def tensors(self, experts: Sequence[int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        rows = torch.tensor(experts, device=self.device)
        own, shared = {}, {}
        for name, tensor in self.module.state_dict().items():
            if self._is_stack(name):
                own[name] = tensor.detach().index_select(0, rows)
            else:
                shared[name] = tensor.detach().clone()
        return own, shared

    def mapped(self, change: Change) -> StackedExperts:
        return StackedExperts(mapped_module(self.module, change))

    def _is_stack(self, name: str) -> bool:
        """Whether the parameter has one row for each expert."""
        parameter = self.module._parameters.get(name)
        return parameter is not None and parameter.ndim > 0 and len(parameter) == len(self._stack)

    def _taken(self, name: str, rows: torch.Tensor) -> nn.Parameter | None:
        parameter = self.module._parameters[name]
        if parameter is None:
            return None
        where = rows if self._is_stack(name) else ...
        return nn.Parameter(parameter.detach()[where].clone(), requires_grad=False)


class JoinedExperts:
    """Experts of one layer, in one group or several, computed as one: on the CPU, where each is a product of its own.

    Experts that came one by one, as copies and those of a cache do, are groups of one each. The views of the weights
    stay: to make them anew takes two fifths of a call with a few rows for each of eight tiny experts.
    """

    def __init__(self, place: Mapping[int, tuple[StackedExperts, int]]) -> None:
        """Args: place: the group of each expert, whatever its number here, and its local number there."""
        self._place = place
        self._module = next(iter(place.values()))[0].module
        turns = not self._module.is_transposed and not computes_rows(self._module)
        self._turned = {"gate_up_proj", "up_proj", "down_proj"} if turns else set[str]()
        self._views: dict[str, dict[int, torch.Tensor]] = {}

    @classmethod
    def of(cls, place: Mapping[int, tuple[ExpertGroup, int]]) -> JoinedExperts | None:
        """None where that is not how they compute."""
        groups = {id(group): group for group, _ in place.values()}.values()
        first = next(iter(groups))
        if (
            isinstance(first, StackedExperts)
            and first.device.type == "cpu"
            and all(type(group) is type(first) and type(group.module) is type(first.module) for group in groups)
        ):
            return cls(cast(Mapping[int, tuple[StackedExperts, int]], place))
        return None

    def run(self, rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """[n, D] -> [n, D]: as `ExpertGroup.run`, without gradients."""
        return _compute(self._module, rows, counts, lambda name: self._weights(name, experts))

    def _weights(self, name: str, experts: Sequence[int]) -> list[torch.Tensor]:
        views = self._views.setdefault(name, {})
        for expert in experts:
            if expert not in views:
                group, local = self._place[expert]
                weight = getattr(group.module, name)[local]
                views[expert] = weight.t() if name in self._turned else weight
        kind = _Turned if name in self._turned else list
        return kind([views[expert] for expert in experts])


class _Turned(list[torch.Tensor]):
    """Matrices as they are multiplied by, [in, out], however they are stored."""


@torch.no_grad()
def mapped_module(module: nn.Module, change: Change) -> nn.Module:
    """A copy of the module with what `change` makes of each of its tensors."""
    made: Any = copy.copy(module)
    made._parameters = {
        name: tensor
        if tensor is None
        else nn.Parameter(change(tensor.detach()), requires_grad=False)
        if isinstance(tensor, nn.Parameter)
        else change(tensor)
        for name, tensor in module._parameters.items()
    }
    made._buffers = {name: None if buffer is None else change(buffer) for name, buffer in module._buffers.items()}
    made._modules = {
        name: None if child is None else mapped_module(child, change) for name, child in module._modules.items()
    }
    return cast(nn.Module, made)


_BITS = {1: np.uint8, 2: np.uint16}
"""What stands in for the dtypes that numpy does not have, by their width in bytes."""


def pack(tensors: Mapping[str, torch.Tensor]) -> ExpertArrays:
    """Tensors as plain arrays; those that are on the CPU already share their memory."""
    packed: ExpertArrays = {}
    for name, tensor in tensors.items():
        here, dtype = tensor.detach().cpu().contiguous(), str(tensor.dtype).removeprefix("torch.")
        if hasattr(np, dtype):
            packed[name] = (dtype, here.numpy())
        else:
            packed[name] = (dtype, here.view(getattr(torch, np.dtype(_BITS[here.itemsize]).name)).numpy())
    return packed


def unpack(arrays: ExpertArrays) -> dict[str, torch.Tensor]:
    """The tensors that `pack` made arrays of, in memory of their own (an array that travelled may be read-only).

    Raises: `WireError` for what it never makes.
    """
    tensors = {}
    for name, (dtype_name, array) in arrays.items():
        dtype = getattr(torch, dtype_name, None)
        if not isinstance(dtype, torch.dtype) or dtype.itemsize != array.itemsize:
            raise WireError(
                f"{name} is said to be {dtype_name!r} and has {array.itemsize} bytes a number; expected the name of a "
                "torch dtype of that width"
            )
        tensors[name] = torch.from_numpy(np.array(array)).view(dtype)
    return tensors


class SeparateExperts:
    """Experts that have parameters of their own, so that each can be trained and moved by itself.

    A stack would get a gradient of its full size for every expert that is touched.
    """

    def __init__(self, module: nn.Module, experts: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """
        Args:
            module: of `transformers`' experts interface, for how it computes; its own stacks are not used.
            experts: of each, its row of each stack, by the stack's name.
        """
        self.module: Any = module
        self.experts = experts

    def run(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """[n, D] -> [n, D]: the first ``counts[0]`` rows through the first expert, and so on."""
        return _compute(self.module, rows, counts, lambda name: [expert[name] for expert in self.experts])


class _Rows(Sequence[torch.Tensor]):
    """Some rows of a stack, and the stack itself, which a kernel may take whole.

    With gradients they come of one `unbind`: that of ``stack[row]`` would be as large as the whole stack, for each row.
    """

    def __init__(self, stack: torch.Tensor, rows: Sequence[int]) -> None:
        self.stack, self.rows = stack, rows
        self._all = stack.unbind() if torch.is_grad_enabled() and stack.requires_grad else stack

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        return self._all[self.rows[position]]


Weights = Callable[[str], Sequence[torch.Tensor]]
"""For the name of a stack, the row of each expert that is touched."""


def _compute(module: Any, rows: torch.Tensor, counts: Sequence[int], weights: Weights) -> torch.Tensor:
    """[n, D] -> [n, D]: ``counts[0]`` rows through the first of the experts that `weights` gives, and so on."""
    if computes_rows(module):
        computed: torch.Tensor = module.compute_rows(rows, counts, weights)
        return computed
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up = weights(up_name)
    first = up.stack if isinstance(up, _Rows) else up[0]
    given = rows.to(first.device, first.dtype)
    if _learns_alone(module, given, up):
        out = _learning(module, given, counts, weights)
    else:
        ends = _Ends(counts)
        hidden = _grouped_linear(given, module, up_name, up, weights, ends)
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        out = _grouped_linear(hidden, module, "down_proj", weights("down_proj"), weights, ends)
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    return out.to(rows.device, rows.dtype)


def _learns_alone(module: Any, rows: torch.Tensor, up: Sequence[torch.Tensor]) -> bool:
    """Whether the backward of `ops/expert_backward.py` is that of these experts.

    Where they learn on the CPU, and nothing between their two products learns or looks at other rows.
    """
    if not torch.is_grad_enabled() or not len(up) or rows.device.type != "cpu" or rows.dtype not in DTYPES:
        return False
    between = [module.act_fn] if isinstance(getattr(module, "act_fn", None), nn.Module) else []
    return set(module._parameters) <= _NAMES and not any(True for child in between for _ in child.parameters())


_NAMES = {f"{name}{end}" for name in ("gate_up_proj", "up_proj", "down_proj") for end in ("", "_bias")}
"""Of the weights of feed-forward experts."""


def _learning(module: Any, rows: torch.Tensor, counts: Sequence[int], weights: Weights) -> torch.Tensor:
    """As `_compute`, with gradients: for experts that `_learns_alone`."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = [up, f"{up}_bias", "down_proj", "down_proj_bias"] if module.has_bias else [up, "", "down_proj", ""]
    kinds = [weights(name) if name else () for name in names]
    touched = Touched(
        counts=list(counts),
        experts=list(kinds[0].rows) if isinstance(kinds[0], _Rows) else None,
        is_transposed=module.is_transposed,
        activation=module._apply_gate if module.has_gate else module.act_fn,
    )
    return through_experts(rows, touched, *([kind.stack] if isinstance(kind, _Rows) else list(kind) for kind in kinds))


def _fits_grouped_kernel(weight: torch.Tensor) -> bool:
    """Whether torch's own grouped product is the best way through `weight` [E, in, out].

    On GPUs where it has a kernel for it. On the CPU it is a loop over all experts, touched or not; but its backward
    writes the gradient of the whole stack at once, where any other would gather it from those of single experts.
    """
    if any(width * weight.itemsize % 16 for width in weight.shape[1:]):
        return False
    if weight.is_cuda:
        return weight.dtype is torch.bfloat16 and _capability(weight.device) >= (8, 0)
    learns = torch.is_grad_enabled() and weight.requires_grad
    return learns and weight.is_cpu and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


_capability = lru_cache(torch.cuda.get_device_capability)


class _Ends:
    """How many rows each expert has, and where they end as a grouped product wants it: both products want the same."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = counts
        self._made: torch.Tensor | None = None

    def of(self, matrices: _Rows) -> torch.Tensor:
        """int32 [E] end of the rows of each expert of the stack, which ascend, on its device."""
        if self._made is None:
            sizes = np.zeros(len(matrices.stack), dtype=np.int32)
            sizes[matrices.rows] = self.counts
            self._made = torch.from_numpy(np.cumsum(sizes, dtype=np.int32)).to(matrices.stack.device)
        return self._made


def _grouped_linear(
    rows: torch.Tensor, module: Any, name: str, matrices: Sequence[torch.Tensor], weights: Weights, ends: _Ends
) -> torch.Tensor:
    """[n, in] -> [n, out] through the weights `name` of each row's expert.

    The bias is added after the product has been rounded, as `transformers` does: fusing them would change bf16 bits.
    """
    if isinstance(matrices, _Rows) and _fits_grouped_kernel(matrices.stack):
        stack = matrices.stack if module.is_transposed else matrices.stack.transpose(-2, -1)  # [E, in, out]
        out = torch.nn.functional.grouped_mm(rows, stack, offs=ends.of(matrices))
        if out.requires_grad:
            out.register_hook(torch.Tensor.contiguous)  # its backward refuses a gradient that was expanded, as of a sum
    else:
        counts = list(ends.counts)
        parts = torch.split_with_sizes(rows, counts)
        is_turned = module.is_transposed or isinstance(matrices, _Turned)
        oriented = list(matrices) if is_turned else [matrix.t() for matrix in matrices]  # [in, out]
        if not oriented:
            return rows  # none
        if torch.is_grad_enabled():
            out = torch.cat([part @ matrix for part, matrix in zip(parts, oriented, strict=True)])
        else:
            # torch's own grouped product on the CPU is this loop, over all experts instead of those touched.
            out = rows.new_empty(len(rows), oriented[0].shape[-1])
            for part, matrix, into in zip(parts, oriented, torch.split_with_sizes(out, counts), strict=True):
                torch.mm(part, matrix, out=into)
    if module.has_bias:
        bias = weights(f"{name}_bias")
        repeats = torch.tensor(list(ends.counts), device=out.device)
        if isinstance(bias, _Rows):
            expert_of_row = torch.tensor(bias.rows, device=out.device).repeat_interleave(repeats)
            out = out + bias.stack[expert_of_row]
        else:
            out = out + torch.stack(list(bias)).repeat_interleave(repeats, dim=0)
    return out
