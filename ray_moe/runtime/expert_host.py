"""What a host of experts does with the calls it gets. Runs without Ray, sockets or an event loop.

It holds groups of experts by version of the weights and layer, takes in, copies and lets go of single experts, and
computes calls (several at once where they wait for the same layer). Those of training it hands to the `Trainees`. It
never decides which experts it should hold. Called by `runtime/host_loop.py`,
`transport/local.py`, `runtime/own_experts.py`, and the actor around it.

Shape legend: t tokens of a call, n rows (token, expert), D model width.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch

from ray_moe.errors import ExpertFailed, InvalidRequest, NotFound, RayMoEError, StaleRouting, WireError
from ray_moe.ops.experts import ExpertArrays, ExpertGroup, JoinedExperts, SeparableGroup, pack
from ray_moe.transport.base import TRAINING, ExpertCall, ExpertReply
from ray_moe.types import HostId, LayerPath

Outcome = ExpertReply | RayMoEError


class Trainees(Protocol):
    """The experts that are being trained on a host: `training/trainees.py`."""

    def run(self, call: ExpertCall) -> Outcome: ...

    def flops(self, call: ExpertCall) -> int: ...


class _Held:
    """The experts of one layer, in one version, on this host.

    Never changed: who is computing goes on with what it began with. Versions that have an expert in common may share
    its group.
    """

    def __init__(self, place: Mapping[int, tuple[ExpertGroup, int]]) -> None:
        self.place = place
        """Global index -> its group, and its local number there."""
        self.first = next(iter(place.values()))[0]
        """One of the groups; of all of them it has the device."""
        self.device = self.first.device
        self._joined = JoinedExperts.of(place)

    @property
    def groups(self) -> tuple[ExpertGroup, ...]:
        return tuple({id(group): group for group, _ in self.place.values()}.values())

    def run(self, rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """[n, D] -> [n, D] through global `experts`, ``counts[i]`` rows each."""
        if not experts:
            return self.first.run(rows, [], [])
        if self._joined is not None:
            return self._joined.run(rows, experts, counts)
        places = [self.place[expert] for expert in experts]
        first = places[0][0]
        if all(group is first for group, _ in places):
            return first.run(rows, [local for _, local in places], counts)
        parts = rows.split(list(counts))
        outs: list[torch.Tensor] = [rows] * len(places)
        for one in {id(group): group for group, _ in places}.values():
            mine = [position for position, (group, _) in enumerate(places) if group is one]
            sizes = [counts[position] for position in mine]
            merged = torch.cat([parts[position] for position in mine])
            out = one.run(merged, [places[position][1] for position in mine], sizes)
            for position, part in zip(mine, out.split(sizes), strict=True):
                outs[position] = part
        return torch.cat(outs)


def _separable(layer: LayerPath, group: ExpertGroup) -> SeparableGroup:
    if not isinstance(group, SeparableGroup):
        raise InvalidRequest(f"the experts of {layer} are a {type(group).__name__}, which cannot be taken apart")
    return group


class ExpertHost:
    """The experts of one host. Thread-safe.

    Experts come and go while calls are computed: a call goes on with what was held when it began.
    """

    def __init__(self, host_id: HostId, trainees: Trainees | None = None) -> None:
        self.host_id = host_id
        self.trainees = trainees
        """Who computes the calls of `TRAINING`."""
        self.num_calls = 0
        self.num_rows = 0
        self._layers: dict[tuple[int, LayerPath], _Held] = {}
        """By version."""
        self._counting = threading.Lock()
        self._changing = threading.Lock()

    # --- what is held --------------------------------------------------------------------------------------
    def hold(self, layer: LayerPath, experts: Sequence[int], group: ExpertGroup, version: int = 0) -> None:
        """Serve `experts` of `layer` too; one that was held already in this version is replaced.

        Args:
            experts: global indices; the group's local number is the position in the list.
            group: how they are computed.
        """
        if not experts:
            return
        with self._changing:
            place = self._without(layer, experts, (version,))[version]
            place.update({expert: (group, local) for local, expert in enumerate(experts)})
            self._layers[version, layer] = _Held(place)

    def share(self, layer: LayerPath, experts: Collection[int], version: int, of: int) -> None:
        """Serve `experts`, which are held in the version `of`, in `version` too: they are the same, in one memory."""
        with self._changing:
            theirs, mine = self._layers[of, layer].place, self._layers.get((version, layer))
            place = {} if mine is None else dict(mine.place)
            self._layers[version, layer] = _Held(place | {expert: theirs[expert] for expert in experts})

    def drop(self, layer: LayerPath, experts: Sequence[int], versions: Collection[int] = (0,)) -> None:
        """Serve `experts` of `layer` no more in these versions, and free their memory once no running batch uses it.

        Experts that are not held are passed over. For a moment a group that loses some of its experts takes its memory
        twice.
        """
        with self._changing:
            for version, place in self._without(layer, experts, versions).items():
                if place:
                    self._layers[version, layer] = _Held(place)
                else:
                    self._layers.pop((version, layer), None)

    def _without(
        self, layer: LayerPath, experts: Collection[int], versions: Collection[int]
    ) -> dict[int, dict[int, tuple[ExpertGroup, int]]]:
        """What is left in each version of the layer when `experts` leave `versions`; groups that lose some are new."""
        leaving = set(experts)
        every = {version: held.place for (version, path), held in self._layers.items() if path == layer}
        left = {
            version: {expert: at for expert, at in every.get(version, {}).items() if expert not in leaving}
            for version in versions
        }
        rest = {version: dict(place) for version, place in every.items()} | left
        moved: dict[tuple[int, int], tuple[ExpertGroup, int]] = {}
        for group in {id(group): group for place in every.values() for group, _ in place.values()}.values():
            used, stays = ({n for p in them.values() for g, n in p.values() if g is group} for them in (every, rest))
            if stays and len(stays) < len(used):
                locals_ = sorted(stays)
                smaller = _separable(layer, group).select(locals_)
                moved |= {(id(group), local): (smaller, place) for place, local in enumerate(locals_)}
        changed = {
            version: {expert: moved.get((id(at[0]), at[1]), at) for expert, at in place.items()}
            for version, place in rest.items()
        }
        for version, place in changed.items():  # others share what has moved
            if version not in left:
                self._layers[version, layer] = _Held(place)
        return {version: changed[version] for version in left}

    def forget(self, version: int) -> None:
        """Serve nothing of a version any more."""
        for layer, experts in self.held(version).items():
            self.drop(layer, experts, (version,))

    def export(self, layer: LayerPath, experts: Sequence[int], version: int = 0) -> ExpertArrays:
        """A copy of what `experts` are, ascending, for a host that will hold them too; computing goes on meanwhile.

        Raises: `NotFound` for an expert that is not held.
        """
        held = self._layers.get((version, layer))
        wanted = sorted(set(experts))
        missing = wanted if held is None else [expert for expert in wanted if expert not in held.place]
        if held is None or missing or not wanted:
            raise NotFound(
                f"host {self.host_id} cannot copy experts {missing} of {layer!r}, version {version}: it does not hold "
                "them"
            )
        own: dict[str, list[torch.Tensor]] = {}
        shared: dict[str, torch.Tensor] = {}
        for expert in wanted:
            group, local = held.place[expert]
            rows, common = _separable(layer, group).tensors([local])
            shared.update(common)
            for name, tensor in rows.items():
                own.setdefault(name, []).append(tensor)
        return pack({name: torch.cat(tensors) for name, tensors in own.items()} | shared)

    @property
    def versions(self) -> list[int]:
        """Of which anything is held, ascending."""
        return sorted({version for version, _ in list(self._layers)})

    def held(self, version: int = 0) -> dict[LayerPath, list[int]]:
        """Ascending global indices of the experts held in a version, by layer."""
        return {layer: sorted(held.place) for (each, layer), held in list(self._layers.items()) if each == version}

    def is_on_gpu(self, call: ExpertCall) -> bool:
        """Whether a GPU computes `call`."""
        held = self._layers.get((call.version, call.layer))
        return held is not None and held.device.type == "cuda"

    def flops(self, call: ExpertCall) -> int:
        """Floating-point operations of `call`; 0 if not held."""
        if call.version == TRAINING:
            return 0 if self.trainees is None else self.trainees.flops(call)
        held = self._layers.get((call.version, call.layer))
        return 0 if held is None else held.first.flops_per_row * call.num_rows

    def run(self, calls: Sequence[ExpertCall]) -> list[Outcome]:
        """Compute `calls`, those of one layer and version together. One outcome per call, in order.

        Outcomes that are errors: `StaleRouting` for an expert that is not held, `WireError` for rows that do not
        fit the experts, `InvalidRequest` for a gradient that is not one of training, `ExpertFailed` when the
        computation raised. One call's error never touches another's.
        """
        with self._counting:
            self.num_calls += len(calls)
        outcomes: dict[int, Outcome] = {}
        together: defaultdict[tuple[int, LayerPath, torch.dtype], list[int]] = defaultdict(list)
        for position, call in enumerate(calls):
            if call.version == TRAINING:
                outcomes[position] = self._train(call)
            elif call.grad is not None:
                outcomes[position] = InvalidRequest(
                    f"host {self.host_id} has a gradient for version {call.version} of {call.layer!r}, which serves; "
                    "only weights in training learn"
                )
            else:
                together[call.version, call.layer, call.hidden.dtype].append(position)
        for positions in together.values():
            results = self._guarded([calls[position] for position in positions])
            outcomes.update(zip(positions, results, strict=True))
        return [outcomes[position] for position in range(len(calls))]

    def _train(self, call: ExpertCall) -> Outcome:
        if self.trainees is None:
            return StaleRouting(f"host {self.host_id} trains no experts")
        return self.trainees.run(call)

    def _guarded(self, calls: list[ExpertCall]) -> list[Outcome]:
        """Compute calls of one layer; when computing them together fails, find the one to blame."""
        try:
            with torch.no_grad():
                return self._forward(self._check(calls), calls)
        except RayMoEError as error:
            outcome: RayMoEError = error
        except Exception as error:
            outcome = ExpertFailed(f"host {self.host_id}, layer {calls[0].layer}: {type(error).__name__}: {error}")
        if len(calls) == 1:
            return [outcome]
        return [self._guarded([call])[0] for call in calls]

    def _check(self, calls: list[ExpertCall]) -> _Held:
        """The layer's experts, if every call asks for held ones with rows that add up."""
        layer, epoch, version = calls[0].layer, calls[0].epoch, calls[0].version
        held = self._layers.get((version, layer))
        if held is None:
            raise StaleRouting(
                f"host {self.host_id} holds no expert of layer {layer!r}, version {version} (asked in epoch {epoch})"
            )
        for call in calls:
            missing = [expert for expert in call.experts if expert not in held.place]
            if missing:
                raise StaleRouting(
                    f"host {self.host_id} does not hold experts {missing} of layer {layer!r}, version {version} (asked "
                    f"in epoch {epoch}); it holds {sorted(held.place)}"
                )
            given = call.num_tokens if call.token is None else len(call.token)
            if given != call.num_rows or len(call.experts) != len(call.counts):
                raise WireError(f"counts add up to {call.num_rows} rows but {given} rows are named")
        return held

    def _rows(self, call: ExpertCall, tokens: torch.Tensor) -> torch.Tensor:
        if call.token is None:
            return tokens
        if call.token.is_cuda:  # not checked when it was read, and one that is wrong would end the whole process
            return tokens.index_select(0, call.token.clamp(0, max(0, len(tokens) - 1)))
        return tokens.index_select(0, call.token.to(tokens.device))

    def _forward(self, held: _Held, calls: list[ExpertCall]) -> list[Outcome]:
        if held.device.type == "cuda":  # makes its context this thread's, which not every first kernel would do
            torch.cuda.current_stream(held.device).query()
        rows = [self._rows(call, call.tokens().to(held.device)) for call in calls]
        with self._counting:
            self.num_rows += sum(call.num_rows for call in calls)
        if len(calls) == 1:
            outs = [held.run(rows[0], calls[0].experts, calls[0].counts)]
        else:
            outs = _run_together(held, calls, rows)
        replies = [_leave(call, _weigh(call, out)) for call, out in zip(calls, outs, strict=True)]
        if held.device.type == "cuda":  # now, and not where the rows are sent: an error there is an error of these rows
            torch.cuda.current_stream(held.device).synchronize()
        return [ExpertReply(reply) for reply in replies]


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


def _leave(call: ExpertCall, rows: torch.Tensor) -> torch.Tensor:
    """The rows on the device of the call's tokens, and there where the router reads them, if it said where."""
    room = call.room
    if room is None or rows.device != room.device or rows.nbytes > len(room):
        return rows.to(call.hidden.device)
    return room[: rows.nbytes].view(rows.dtype).view(rows.shape).copy_(rows)


def _weigh(call: ExpertCall, out: torch.Tensor) -> torch.Tensor:
    """Unweighted rows [n, D], or the weighted partial sum of each token [t, D] when the call carries weights."""
    if call.weight is None:
        return out
    weighted = out * call.weight.to(out.device).unsqueeze(-1)
    if call.token is None:
        return weighted.to(out.dtype)
    sums = weighted.new_zeros(call.num_tokens, out.shape[-1])
    if out.is_cuda:  # there index_add_ adds in any order, and no two sums would have the same bits
        return sums.index_put_((call.token.to(out.device),), weighted, accumulate=True).to(out.dtype)
    return sums.index_add_(0, call.token, weighted).to(out.dtype)
