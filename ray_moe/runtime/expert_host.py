"""What a host of experts does with the calls it gets. Runs without Ray, sockets or an event loop.

It holds groups of experts by layer, computes forward calls (several at once where they wait for the same layer),
and accumulates parameter gradients in backward calls, each call counted once. It never steps an optimizer and never
decides which experts it should hold. Called by `runtime/host_loop.py`, `transport/local.py`, and the actor around it.

Shape legend: t tokens of a call, n rows (token, expert), D model width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from ray_moe.errors import ExpertFailed, RayMoEError, StaleRouting, WireError
from ray_moe.ops.experts import ExpertGroup
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.types import HostId, LayerPath

Outcome = ExpertReply | RayMoEError


@dataclass(slots=True)
class _Held:
    """The experts of one layer on this host: a group, and the local number of each global index."""

    group: ExpertGroup
    local: dict[int, int]


class ExpertHost:
    """The experts of one host. Not thread-safe: one `run` at a time."""

    def __init__(self, host_id: HostId) -> None:
        self.host_id = host_id
        self.num_calls = 0
        self.num_rows = 0
        self._layers: dict[LayerPath, _Held] = {}
        self._counted: set[str] = set()

    def hold(self, layer: LayerPath, experts: Sequence[int], group: ExpertGroup) -> None:
        """Serve `experts` (global indices; the group's local number is the position in the list) of `layer`."""
        self._layers[layer] = _Held(group, {expert: local for local, expert in enumerate(experts)})

    @property
    def held(self) -> Mapping[LayerPath, list[int]]:
        """Global indices of the experts held, by layer."""
        return {layer: list(held.local) for layer, held in self._layers.items()}

    def flops(self, call: ExpertCall) -> int:
        """Floating-point operations of a forward call (three times that for a backward call); 0 if not held."""
        held = self._layers.get(call.layer)
        return 0 if held is None else held.group.flops_per_row * call.num_rows * (1 if call.grad is None else 3)

    def run(self, calls: Sequence[ExpertCall]) -> list[Outcome]:
        """Compute `calls`; forward calls of one layer are computed together. One outcome per call, in order.

        Outcomes that are errors: `StaleRouting` for an expert that is not held, `WireError` for rows that do not
        fit the experts, `ExpertFailed` when the computation raised. One call's error never touches another's.
        """
        outcomes: dict[int, Outcome] = {}
        together: defaultdict[tuple[LayerPath, torch.dtype], list[int]] = defaultdict(list)
        for position, call in enumerate(calls):
            self.num_calls += 1
            if call.grad is not None:
                outcomes[position] = self._guarded([call], backward=True)[0]
            else:
                together[call.layer, call.hidden.dtype].append(position)
        for positions in together.values():
            results = self._guarded([calls[position] for position in positions])
            outcomes.update(zip(positions, results, strict=True))
        return [outcomes[position] for position in range(len(calls))]

    def _guarded(self, calls: list[ExpertCall], backward: bool = False) -> list[Outcome]:
        """Compute calls of one layer; when computing them together fails, find the one to blame."""
        try:
            held = self._check(calls)
            with torch.set_grad_enabled(backward):
                return [self._backward(held, calls[0])] if backward else self._forward(held, calls)
        except RayMoEError as error:
            outcome: RayMoEError = error
        except Exception as error:
            outcome = ExpertFailed(f"host {self.host_id}, layer {calls[0].layer}: {type(error).__name__}: {error}")
        if len(calls) == 1:
            return [outcome]
        return [self._guarded([call])[0] for call in calls]

    def _check(self, calls: list[ExpertCall]) -> _Held:
        """The layer's experts, if every call asks for held ones with rows that add up."""
        layer, epoch = calls[0].layer, calls[0].epoch
        held = self._layers.get(layer)
        if held is None:
            raise StaleRouting(f"host {self.host_id} holds no expert of layer {layer!r} (asked in epoch {epoch})")
        for call in calls:
            missing = [expert for expert in call.experts if expert not in held.local]
            if missing:
                raise StaleRouting(
                    f"host {self.host_id} does not hold experts {missing} of layer {layer!r} (asked in epoch {epoch}); "
                    f"it holds {sorted(held.local)}"
                )
            given = call.num_tokens if call.token is None else len(call.token)
            if given != call.num_rows or len(call.experts) != len(call.counts):
                raise WireError(f"counts add up to {call.num_rows} rows but {given} rows are named")
        return held

    def _rows(self, call: ExpertCall, tokens: torch.Tensor) -> torch.Tensor:
        return tokens if call.token is None else tokens.index_select(0, call.token)

    def _forward(self, held: _Held, calls: list[ExpertCall]) -> list[Outcome]:
        rows = [self._rows(call, call.tokens()) for call in calls]
        for call in calls:
            self.num_rows += call.num_rows
        if len(calls) == 1:
            call = calls[0]
            outs = [held.group.run(rows[0], [held.local[expert] for expert in call.experts], call.counts)]
        else:
            outs = _run_together(held, calls, rows)
        return [ExpertReply(_weigh(call, out)) for call, out in zip(calls, outs, strict=True)]

    def _backward(self, held: _Held, call: ExpertCall) -> ExpertReply:
        """Recompute the rows and push `call.grad` back through them: [t, D], the gradient in each token.

        An expert's gradients take each of its groups of rows once: for what was delivered before, only the reply is
        computed again.
        """
        tokens = call.tokens().detach().requires_grad_(True)
        rows = self._rows(call, tokens)
        out = held.group.run(rows, [held.local[expert] for expert in call.experts], call.counts)
        names = _names_of_rows(call)
        fresh = [position for position, name in enumerate(names) if not name or name not in self._counted]
        parameters = held.group.parameters()
        grads: Sequence[torch.Tensor | None]
        if len(fresh) == len(names):
            grad_tokens, *grads = torch.autograd.grad(out, [tokens, *parameters], call.grad, allow_unused=True)
        else:
            grad_tokens = torch.autograd.grad(out, [tokens], call.grad, allow_unused=True)[0]
            grads = self._parameter_grads(held, call, rows.detach(), fresh) if fresh else []
        for parameter, grad in zip(parameters, grads, strict=False):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        self._counted.update(names[position] for position in fresh)
        self.num_rows += call.num_rows
        return ExpertReply(torch.zeros_like(tokens) if grad_tokens is None else grad_tokens)

    def _parameter_grads(
        self, held: _Held, call: ExpertCall, rows: torch.Tensor, groups: list[int]
    ) -> list[torch.Tensor | None]:
        """Gradients of the parameters from only some of the call's groups of rows."""
        some_rows, some_grads = rows.split(call.counts), cast(torch.Tensor, call.grad).split(call.counts)
        out = held.group.run(
            torch.cat([some_rows[group] for group in groups]),
            [held.local[call.experts[group]] for group in groups],
            [call.counts[group] for group in groups],
        )
        into = torch.cat([some_grads[group] for group in groups])
        return list(torch.autograd.grad(out, held.group.parameters(), into, allow_unused=True))

    def zero_grad(self) -> None:
        """Forget the accumulated gradients and what was counted in them."""
        for held in self._layers.values():
            for parameter in held.group.parameters():
                parameter.grad = None
        self._counted.clear()


def _names_of_rows(call: ExpertCall) -> list[str]:
    """A name for the rows of each expert in a backward call; empty where the call has no id."""
    if not call.call_id:
        return [""] * len(call.experts)
    base, _, marks = call.call_id.rpartition(":")
    each = marks.split(",")
    if not base or len(each) != len(call.experts):
        raise WireError(f"a call id names the rows of each of {len(call.experts)} experts, not {call.call_id[:80]!r}")
    return [f"{base}:{call.layer}:{expert}:{mark}" for expert, mark in zip(call.experts, each, strict=True)]


def _run_together(held: _Held, calls: list[ExpertCall], rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Rows of several calls through one grouped product: every expert is read from memory once for all of them."""
    pieces: defaultdict[int, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for number, (call, rows_of_call) in enumerate(zip(calls, rows, strict=True)):
        for expert, part in zip(call.experts, rows_of_call.split(call.counts), strict=True):
            pieces[expert].append((number, part))
    experts = sorted(pieces)
    counts = [sum(len(part) for _, part in pieces[expert]) for expert in experts]
    merged = torch.cat([part for expert in experts for _, part in pieces[expert]])
    out = held.group.run(merged, [held.local[expert] for expert in experts], counts)
    outs: list[list[torch.Tensor]] = [[] for _ in calls]
    parts = iter(out.split([len(part) for expert in experts for _, part in pieces[expert]]))
    for expert in experts:
        for number, _ in pieces[expert]:
            outs[number].append(next(parts))
    return [torch.cat(parts_of_call) for parts_of_call in outs]


def _weigh(call: ExpertCall, out: torch.Tensor) -> torch.Tensor:
    """Unweighted rows [n, D], or the weighted partial sum of each token [t, D] when the call carries weights."""
    if call.weight is None:
        return out
    weighted = out * call.weight.unsqueeze(-1)
    if call.token is None:
        return weighted.to(out.dtype)
    sums = weighted.new_zeros(call.num_tokens, out.shape[-1])
    return sums.index_add_(0, call.token, weighted).to(out.dtype)
