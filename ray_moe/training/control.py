"""The seam between a coordinator and the hosts of its trainees: orders out, answers back.

Orders are the methods of `Trainees`. What they answer may be large and is often meant for another host, so an answer is
first a *promise*, which can be an argument of the next order without coming here. Implemented by `LocalControl` (hosts
in this process) and by `actors/training.py` (Ray).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ray_moe.errors import HostLost, InvalidRequest, RayMoEError
from ray_moe.ops.experts import unpack
from ray_moe.training.trainees import Trainees
from ray_moe.types import HostAddress, HostId, LayerPath

Promise = Any
"""What an order will answer; only the control that made it knows what it is."""


class Control(Protocol):
    """Gives orders to hosts. Thread-safe."""

    def hosts(self) -> Mapping[HostId, HostAddress]:
        """Those that live and can train, as far as is known."""
        ...

    def examine(self) -> None:
        """Have whoever keeps the hosts look whether one of them hangs, and put that down; returns at once."""
        ...

    def order(self, host_id: HostId, method: str, *arguments: Any) -> Promise:
        """Have the host's trainees do something; returns at once. Promises among the arguments are kept first."""
        ...

    def lend(self, value: Any) -> Promise:
        """Something that several orders need: it travels once."""
        ...

    def answers(self, promises: Sequence[Promise]) -> list[Any]:
        """What the promises answer, in order. An error stands in place of its answer: `HostLost`, or the host's own."""
        ...


def all_of(answers: Sequence[Any]) -> Sequence[Any]:
    """The answers, when none is an error. Raises the first that is."""
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


@dataclass(slots=True)
class LocalHost:
    """A host in this process."""

    trainees: Trainees
    address: HostAddress
    module: Callable[[LayerPath], nn.Module]
    """How the experts of a layer compute."""
    load: Callable[[Mapping[LayerPath, Sequence[int]]], None]
    """Hold, as owned, experts as the model has them at first."""


class LocalControl:
    """Hosts in this process."""

    def __init__(self, hosts: Mapping[HostId, LocalHost]) -> None:
        self.local = dict(hosts)

    def hosts(self) -> Mapping[HostId, HostAddress]:
        return {host_id: host.address for host_id, host in self.local.items()}

    def examine(self) -> None:
        """Nobody keeps them."""

    def order(self, host_id: HostId, method: str, *arguments: Any) -> Promise:
        host = self.local.get(host_id)
        if host is None:
            return HostLost(f"host {host_id} is gone")
        for argument in arguments:
            if isinstance(argument, BaseException):
                return argument
        try:
            return obey(host.trainees, host.module, host.load, method, arguments)
        except RayMoEError as error:
            return error

    def lend(self, value: Any) -> Promise:
        return value

    def answers(self, promises: Sequence[Promise]) -> list[Any]:
        return list(promises)


OF_TRAINEES = frozenset(
    {"open", "close", "describe", "report", "begin", "gradients", "add_gradients", "sums", "apply", "weights", "merged"}
    | {"set_weights", "state", "snapshot", "save", "saved"}
)
OF_SNAPSHOTS = frozenset({"keep", "keep_blob", "blob", "find_blobs", "drop_blobs", "find_all", "forget_before"})
"""What a host can be told, beside ``load``, ``hold``, ``restore`` and ``replicate``."""


def obey(
    trainees: Trainees,
    module: Callable[[LayerPath], nn.Module],
    load: Callable[[Mapping[LayerPath, Sequence[int]]], None],
    method: str,
    arguments: Sequence[Any],
) -> Any:
    """Do what a coordinator orders. Raises what the trainees raise.

    Args: module: how the experts of a layer compute that the run has not described; load: hold such experts.
    """

    def compute(layer: LayerPath) -> nn.Module:
        described = trainees.described.get(layer)
        return module(layer) if described is None else described

    if method == "load":
        return load(*arguments)
    if method in ("hold", "replicate"):
        for layer, experts in arguments[0].items():
            tensors = {expert: unpack(arrays) for expert, arrays in experts.items()}
            trainees.hold(layer, compute(layer), tensors, owned=experts.keys() if method == "hold" else ())
        return None
    if method == "restore":
        step, owned, *states = arguments
        merged: dict[LayerPath, dict[int, Any]] = {}
        for each in states:
            for layer, experts in each.items():
                merged.setdefault(layer, {}).update(experts)
        return trainees.restore(step, {layer: compute(layer) for layer in owned}, owned, merged)
    if method in OF_SNAPSHOTS:
        return getattr(trainees.snapshots, method)(*arguments)
    if method in OF_TRAINEES:
        return getattr(trainees, method)(*arguments)
    raise InvalidRequest(f"a host cannot be told to {method!r}")
