"""A batch on a GPU whose hosts compute on the same card: put where all of them see it, and split where it lies.

The tokens are written once, for all hosts; which of them are whose is sorted on the GPU. What is left for each host is
a message of some hundred bytes. Called by `runtime/moe_layer.py`; what is sent again, because a host was lost or late,
goes as any other batch.

Shape legend: T tokens, K experts per token, N = T*K slots, E experts, D model width, n rows of one host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ray_moe.ops.dispatch import HostShare, Ints
from ray_moe.runtime.lines import Lines
from ray_moe.runtime.routing import LayerRoutes, View
from ray_moe.transport.base import ExpertCall
from ray_moe.transport.device_memory import DeviceArena, DeviceSheet, DeviceSlot, finish
from ray_moe.types import LayerPath
from ray_moe.wire.tensors import make_spec


@dataclass(frozen=True, slots=True, eq=False)
class DeviceBatch:
    """The shares of one batch, and where each of them lies."""

    view: View
    """By which it was split."""
    _sheet: DeviceSheet
    _parts: Sequence[tuple[HostShare, DeviceSlot, torch.Tensor]]
    """Each share, its slot, and int32 [n] the token of each of its rows."""

    @property
    def shares(self) -> list[HostShare]:
        return [share for share, _, _ in self._parts]

    @classmethod
    def put(
        cls,
        lines: Lines,
        view: View,
        routes: LayerRoutes,
        hidden: torch.Tensor,
        index: torch.Tensor,
        slots: Ints,
        tokens_per_expert: Ints,
    ) -> DeviceBatch | None:
        """Put a batch there; None where it has to go another way.

        Args:
            lines: to the hosts.
            view: where experts are.
            routes: the same for the batch's layer.
            hidden: [T, D].
            index: [T, K] on the same device; E means "no expert".
            slots: [N] the same, on the CPU.
            tokens_per_expert: [E] slots of each.
        """
        if index.device != hidden.device or not len(slots):
            return None
        arena = _shared(lines, view, routes)
        if arena is None or arena.device != hidden.device:
            return None
        order_of = routes.order_on(hidden.device)
        sheet = None if order_of is None else arena.sheet(make_spec(hidden.dtype, tuple(hidden.shape)), len(slots))
        if order_of is None or sheet is None:
            return None
        sheet.hidden.copy_(hidden)
        order, on_cpu = order_of.sort(index.reshape(-1), slots)
        sheet.token.copy_(order.div(index.shape[1], rounding_mode="floor"))
        parts, begin = [], 0
        for share in order_of.split(tokens_per_expert, order, on_cpu):
            end = begin + len(share.slot)
            parts.append((share, sheet.part(begin, end), sheet.token[begin:end]))
            begin = end
        finish(hidden.device)
        return cls(view, sheet, parts)

    def call(self, share: HostShare, layer: LayerPath, epoch: int, version: int) -> ExpertCall | None:
        """The call for one of `shares`; None for one that was made later."""
        for mine, place, token in self._parts:
            if mine is share:
                return ExpertCall(
                    layer=layer,
                    epoch=epoch,
                    hidden=self._sheet.hidden,
                    gather=None,
                    token=token,
                    experts=share.experts,
                    counts=share.counts,
                    version=version,
                    place=place,
                )
        return None


def _shared(lines: Lines, view: View, routes: LayerRoutes) -> DeviceArena | None:
    """The memory that all hosts of a layer share with this router; None where one of them does not."""
    found: DeviceArena | None = None
    for number in routes.numbers:
        peer = None if number == view.here else lines.peer(view.hosts[number])
        arena = None if peer is None else peer.device_arena
        if arena is None or (found is not None and arena is not found):
            return None
        found = arena
    return found
