"""Has what a `Cluster` sends travel as it would between processes, and counts the bytes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ray_moe.errors import RayMoEError
from ray_moe.transport import codec
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.wire import tensors
from tests.training_cluster import Cluster


class Gradients:
    """Of weights: from replicas to owners, and from the first worker to the others."""

    def __init__(self, made: Cluster) -> None:
        self.replicas = self.workers = 0
        order, gather, add = made.control.order, made.trainers[0]._group.gather, made.trainers[0]._group.sum

        def ordered(host_id: str, method: str, *arguments: Any) -> Any:
            if method == "add_gradients":
                layers = arguments[2].values()
                self.replicas += sum(a.nbytes for layer in layers for e in layer.values() for _, a in e.values())
            return order(host_id, method, *arguments)

        def gathered(value: Any) -> list[Any]:
            if isinstance(value, tuple):
                self.workers += len(pickle.dumps([tensor.numpy() for tensor in value]))
            return gather(value)

        def added(tensors: Sequence[torch.Tensor]) -> None:
            self.workers += sum(tensor.nbytes for tensor in tensors)
            add(tensors)

        made.control.order = ordered  # type: ignore[method-assign]
        made.trainers[0]._group.gather, made.trainers[0]._group.sum = gathered, added  # type: ignore[method-assign]


class Rows:
    """Calls and replies of experts."""

    def __init__(self, made: Cluster) -> None:
        self.num_bytes = 0
        self.dtypes: set[torch.dtype] = set()
        for host in made.transport.hosts.values():
            host.run = self._through(host.run)  # type: ignore[method-assign]

    def _through(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def sent(calls: Sequence[ExpertCall]) -> list[ExpertReply | RayMoEError]:
            (call,) = calls
            specs = codec.call_specs(call)
            views = tensors.tensors_in(bytearray(tensors.region_bytes(specs)), specs)
            codec.write_call(call, views)
            fields = [list(each) if isinstance(each, tuple) else each for each in codec.call_fields(call)]
            (answer,) = run([codec.read_call(fields, specs, views)])
            self.num_bytes += sum(spec.num_bytes for spec in specs if spec is not None)
            if isinstance(answer, ExpertReply):
                spec = tensors.make_spec(answer.rows.dtype, tuple(answer.rows.shape))
                codec.read_reply([codec.ROWS_FOLLOW], [spec], codec.wanted(call))
                self.num_bytes += spec.num_bytes
                self.dtypes.add(answer.rows.dtype)
            return [answer]

        return sent
