"""The workers of one run among themselves: sums over all of them, and what the first one has decided.

`Alone` is a worker by itself; `TorchGroup` are processes of `torch.distributed`, which Ray Train sets up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed


class Group(Protocol):
    """All workers call each method in the same order, and none returns before all have called it."""

    rank: int
    size: int

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all workers, with the same bits everywhere."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """What every worker has given, by rank."""
        ...

    def share(self, value: Any) -> Any:
        """What the first worker has given."""
        ...


class Alone:
    """One worker."""

    rank, size = 0, 1

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """They are the sums already."""

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def share(self, value: Any) -> Any:
        return value


class TorchGroup:
    """The processes of `torch.distributed`'s default group."""

    def __init__(self, bucket_bytes: int = 2**25) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()
        self._bucket_bytes = bucket_bytes

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        bucket: list[torch.Tensor] = []
        for tensor in tensors:
            if bucket and (bucket[0].dtype, bucket[0].device) != (tensor.dtype, tensor.device):
                self._sum_bucket(bucket)
                bucket = []
            bucket.append(tensor)
            if sum(each.nbytes for each in bucket) >= self._bucket_bytes:
                self._sum_bucket(bucket)
                bucket = []
        self._sum_bucket(bucket)

    @staticmethod
    def _sum_bucket(bucket: Sequence[torch.Tensor]) -> None:
        if not bucket:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]
