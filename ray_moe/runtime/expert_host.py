"""What a host of experts does with the calls it gets. Runs without Ray, sockets or an event loop.

It holds groups of experts by layer, takes in, copies and lets go of single experts, computes forward calls (several at
once where they wait for the same layer), and accumulates parameter gradients in backward calls, each call counted once.
It never steps an optimizer and never decides which experts it should hold. Called by `runtime/host_loop.py`,
`transport/local.py`, `runtime/own_experts.py`, and the actor around it.

Shape legend: t tokens of a call, n rows (token, expert), D model width.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from ray_moe.errors import ExpertFailed, InvalidRequest, NotFound, RayMoEError, StaleRouting, WireError
from ray_moe.ops.experts import ExpertArrays, ExpertGroup, SeparableGroup, pack
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.types import HostId, LayerPath

Outcome = ExpertReply | RayMoEError


@dataclass(frozen=True, slots=True)
class _Held:
    """The experts of one layer on this host. Never changed: who is computing goes on with what it began with."""

    groups: tuple[ExpertGroup, ...]
    place: Mapping[int, tuple[int, int]]
    """Global index -> (number of its group, local number there)."""

    def run(self, rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """[n, D] -> [n, D] through global `experts`, ``counts[i]`` rows each."""
        places = [self.place[expert] for expert in experts]
        first = places[0][0] if places else 0
        if all(group == first for group, _ in places):
            return self.groups[first].run(rows, [local for _, local in places], counts)
        parts = rows.split(list(counts))
        outs: list[torch.Tensor] = [rows] * len(places)
        for number in sorted({group for group, _ in places}):
            mine = [position for position, (group, _) in enumerate(places) if group == number]
            sizes = [counts[position] for position in mine]
            merged = torch.cat([parts[position] for position in mine])
            out = self.groups[number].run(merged, [places[position][1] for position in mine], sizes)
            for position, part in zip(mine, out.split(sizes), strict=True):
                outs[position] = part
        return torch.cat(outs)

    def parameters(self, experts: Sequence[int]) -> list[torch.Tensor]:
        """Those of the groups that hold `experts`."""
        numbers = sorted({self.place[expert][0] for expert in experts})
        return [parameter for number in numbers for parameter in self.groups[number].parameters()]

    def without(self, layer: LayerPath, experts: Sequence[int]) -> _Held | None:
        """The same but for `experts`, those groups that lose some anew; None when nothing is left."""
        leaving = set(experts)
        groups: list[ExpertGroup] = []
        place: dict[int, tuple[int, int]] = {}
        for number, group in enumerate(self.groups):
            local_of = {expert: local for expert, (home, local) in self.place.items() if home == number}
            staying = sorted(local_of.keys() - leaving)
            if not staying:
                continue
            if len(staying) < len(local_of):
                group = _separable(layer, group).select([local_of[expert] for expert in staying])  # noqa: PLW2901
                local_of = {expert: local for local, expert in enumerate(staying)}
            place.update({expert: (len(groups), local_of[expert]) for expert in staying})
            groups.append(group)
        return _Held(tuple(groups), place) if groups else None


def _separable(layer: LayerPath, group: ExpertGroup) -> SeparableGroup:
    if not isinstance(group, SeparableGroup):
        raise InvalidRequest(f"the experts of {layer} are a {type(group).__name__}, which cannot be taken apart")
    return group


class ExpertHost:
    """The experts of one host. Thread-safe.

    Experts come and go while calls are computed: a call goes on with what was held when it began. Backward calls and
    changes take turns, so that no gradient is lost.
    """

    def __init__(self, host_id: HostId) -> None:
        self.host_id = host_id
        self.num_calls = 0
        self.num_rows = 0
        self._layers: dict[LayerPath, _Held] = {}
        self._counted: set[str] = set()
        self._counting = threading.Lock()
        self._changing = threading.RLock()

    # --- what is held --------------------------------------------------------------------------------------
    def hold(self, layer: LayerPath, experts: Sequence[int], group: ExpertGroup) -> None:
        """Serve `experts` of `layer` too; one that was held already is replaced.

        Args:
            experts: global indices; the group's local number is the position in the list.
            group: how they are computed.
        """
        with self._changing:
            before = self._layers.get(layer)
            kept = None if before is None else before.without(layer, experts)
            groups = () if kept is None else kept.groups
            place = {} if kept is None else dict(kept.place)
            place.update({expert: (len(groups), local) for local, expert in enumerate(experts)})
            self._layers[layer] = _Held((*groups, group), place)

    def drop(self, layer: LayerPath, experts: Sequence[int]) -> None:
        """Serve `experts` of `layer` no more, and free their memory once no running batch uses it.

        Experts that are not held are passed over. For a moment a group that loses some of its experts takes its memory
        twice.
        """
        with self._changing:
            before = self._layers.get(layer)
            if before is None or before.place.keys().isdisjoint(experts):
                return
            kept = before.without(layer, experts)
            if kept is None:
                del self._layers[layer]
            else:
                self._layers[layer] = kept

    def export(self, layer: LayerPath, experts: Sequence[int]) -> ExpertArrays:
        """A copy of what `experts` are, ascending, for a host that will hold them too; computing goes on meanwhile.

        Raises: `NotFound` for an expert that is not held.
        """
        held = self._layers.get(layer)
        wanted = sorted(set(experts))
        missing = wanted if held is None else [expert for expert in wanted if expert not in held.place]
        if held is None or missing or not wanted:
            raise NotFound(f"host {self.host_id} cannot copy experts {missing} of {layer!r}: it does not hold them")
        own: dict[str, list[torch.Tensor]] = {}
        shared: dict[str, torch.Tensor] = {}
        for expert in wanted:
            number, local = held.place[expert]
            rows, common = _separable(layer, held.groups[number]).tensors([local])
            shared.update(common)
            for name, tensor in rows.items():
                own.setdefault(name, []).append(tensor)
        return pack({name: torch.cat(tensors) for name, tensors in own.items()} | shared)

    @property
    def held(self) -> Mapping[LayerPath, list[int]]:
        """Ascending global indices of the experts held, by layer."""
        return {layer: sorted(held.place) for layer, held in list(self._layers.items())}

    def flops(self, call: ExpertCall) -> int:
        """Floating-point operations of a forward call (three times that for a backward call); 0 if not held."""
        held = self._layers.get(call.layer)
        return 0 if held is None else held.groups[0].flops_per_row * call.num_rows * (1 if call.grad is None else 3)

    def run(self, calls: Sequence[ExpertCall]) -> list[Outcome]:
        """Compute `calls`; forward calls of one layer are computed together. One outcome per call, in order.

        Outcomes that are errors: `StaleRouting` for an expert that is not held, `WireError` for rows that do not
        fit the experts, `ExpertFailed` when the computation raised. One call's error never touches another's.
        """
        with self._counting:
            self.num_calls += len(calls)
        outcomes: dict[int, Outcome] = {}
        together: defaultdict[tuple[LayerPath, torch.dtype], list[int]] = defaultdict(list)
        for position, call in enumerate(calls):
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
            if not backward:
                with torch.no_grad():
                    return self._forward(self._check(calls), calls)
            with self._changing, torch.enable_grad():
                return [self._backward(self._check(calls), calls[0])]
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
            missing = [expert for expert in call.experts if expert not in held.place]
            if missing:
                raise StaleRouting(
                    f"host {self.host_id} does not hold experts {missing} of layer {layer!r} (asked in epoch {epoch}); "
                    f"it holds {sorted(held.place)}"
                )
            given = call.num_tokens if call.token is None else len(call.token)
            if given != call.num_rows or len(call.experts) != len(call.counts):
                raise WireError(f"counts add up to {call.num_rows} rows but {given} rows are named")
        return held

    def _rows(self, call: ExpertCall, tokens: torch.Tensor) -> torch.Tensor:
        return tokens if call.token is None else tokens.index_select(0, call.token)

    def _forward(self, held: _Held, calls: list[ExpertCall]) -> list[Outcome]:
        rows = [self._rows(call, call.tokens()) for call in calls]
        with self._counting:
            self.num_rows += sum(call.num_rows for call in calls)
        if len(calls) == 1:
            outs = [held.run(rows[0], calls[0].experts, calls[0].counts)]
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
        out = held.run(rows, call.experts, call.counts)
        names = _names_of_rows(call)
        fresh = [position for position, name in enumerate(names) if not name or name not in self._counted]
        parameters = held.parameters(call.experts)
        grads: Sequence[torch.Tensor | None]
        if len(fresh) == len(names):
            grad_tokens, *grads = torch.autograd.grad(out, [tokens, *parameters], call.grad, allow_unused=True)
        else:
            grad_tokens = torch.autograd.grad(out, [tokens], call.grad, allow_unused=True)[0]
            grads = _parameter_grads(held, call, rows.detach(), fresh, parameters) if fresh else []
        for parameter, grad in zip(parameters, grads, strict=False):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        self._counted.update(names[position] for position in fresh)
        with self._counting:
            self.num_rows += call.num_rows
        return ExpertReply(torch.zeros_like(tokens) if grad_tokens is None else grad_tokens)

    def zero_grad(self) -> None:
        """Forget the accumulated gradients and what was counted in them."""
        with self._changing:
            for held in self._layers.values():
                for parameter in held.parameters(list(held.place)):
                    parameter.grad = None
            self._counted.clear()


def _parameter_grads(
    held: _Held, call: ExpertCall, rows: torch.Tensor, fresh: list[int], parameters: list[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Gradients of the parameters from only some of the call's groups of rows."""
    some_rows, some_grads = rows.split(call.counts), cast(torch.Tensor, call.grad).split(call.counts)
    out = held.run(
        torch.cat([some_rows[position] for position in fresh]),
        [call.experts[position] for position in fresh],
        [call.counts[position] for position in fresh],
    )
    into = torch.cat([some_grads[position] for position in fresh])
    return list(torch.autograd.grad(out, parameters, into, allow_unused=True))


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
    out = held.run(merged, experts, counts)
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
