"""Computing rows through a group of experts: a grouped matrix product over the experts that are touched.

Works on any experts module of `transformers`' experts interface (a stack of weights `[E, out, in]` with the flags
`has_gate`, `has_bias`, `is_transposed`, `has_post_expert_norm`), whatever the family, because only the flags and the
family's own `_apply_gate` are used. Called by `runtime/expert_host.py`; knows nothing of hosts or routing.

Shape legend: n rows, D model width, F expert width, E experts held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn


class ExpertGroup(Protocol):
    """Some experts of one layer, able to compute rows that are already grouped by expert."""

    flops_per_row: int
    """Multiply-adds of one row, times two."""

    def run(self, rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """[n, D] -> [n, D]: the first ``counts[0]`` rows through local expert ``experts[0]``, and so on.

        The result is unweighted, in the dtype and on the device of `rows`.
        """
        ...

    def parameters(self) -> list[torch.Tensor]:
        """The parameters a gradient is accumulated in."""
        ...


class StackedExperts:
    """An `ExpertGroup` over a module of `transformers`' experts interface."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.flops_per_row = 2 * sum(p.numel() // p.shape[0] for p in module.parameters() if p.ndim == 3)

    def run(self, rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        module = self.module
        up_name = "gate_up_proj" if module.has_gate else "up_proj"
        up: torch.Tensor = getattr(module, up_name)
        hidden = _grouped_linear(rows.to(up.device, up.dtype), module, up_name, experts, counts)
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        out = _grouped_linear(hidden, module, "down_proj", experts, counts)
        if module.has_post_expert_norm:
            out = module.post_expert_norm(out)
        return out.to(rows.device, rows.dtype)

    def parameters(self) -> list[torch.Tensor]:
        return [p for p in self.module.parameters() if p.requires_grad]


def _grouped_linear(
    rows: torch.Tensor, module: Any, name: str, experts: Sequence[int], counts: Sequence[int]
) -> torch.Tensor:
    """[n, in] -> [n, out] through the weights `module.<name>` of each row's expert.

    The bias is added after the product has been rounded, as `transformers` does: fusing them would change bf16 bits.
    """
    weight: torch.Tensor = getattr(module, name)
    if not module.is_transposed:
        weight = weight.transpose(-2, -1)  # [E, in, out]
    if weight.device.type == "cuda" and weight.dtype is torch.bfloat16:  # the dtype the kernel is made for
        sizes = torch.zeros(weight.shape[0], dtype=torch.int32)
        sizes[torch.tensor(experts)] = torch.tensor(counts, dtype=torch.int32)
        offsets = torch.cumsum(sizes, 0, dtype=torch.int32).to(weight.device)
        out = torch.nn.functional.grouped_mm(rows, weight, offs=offsets)
    else:
        parts = rows.split(list(counts))
        if torch.is_grad_enabled():
            out = torch.cat([part @ weight[expert] for part, expert in zip(parts, experts, strict=True)])
        else:
            # torch's own grouped product on the CPU is this loop, over all experts instead of those touched.
            out = rows.new_empty(len(rows), weight.shape[-1])
            for part, expert, into in zip(parts, experts, out.split(list(counts)), strict=True):
                torch.mm(part, weight[expert], out=into)
    if module.has_bias:
        bias: torch.Tensor = getattr(module, f"{name}_bias")
        expert_of_row = torch.tensor(experts, device=bias.device).repeat_interleave(
            torch.tensor(counts, device=bias.device)
        )
        out = out + bias[expert_of_row]
    return out
