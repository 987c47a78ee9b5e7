"""Tensors on disk that are not read until they are asked for, in the form `transformers`' conversion takes them.

Around the real thing (a safetensors slice, which reads views of the mapped file) there are a copy of it and the rows
of a few experts; a tensor with a shape and no data stands in for it when a conversion is only tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ray_moe.errors import InvalidCheckpoint
from ray_moe.models.checkpoint import TensorHeader


class LazyTensor(Protocol):
    """What `transformers` needs of a tensor that is still on disk."""

    def get_shape(self) -> Sequence[int]: ...

    def get_dtype(self) -> str:
        """safetensors' name of the dtype."""
        ...

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Read it: ``[...]`` all of it, ``[a:b]`` some rows."""
        ...


class TensorSource(Protocol):
    """Gives lazy tensors by their name on disk."""

    def slice(self, name: str) -> LazyTensor: ...


class OwnTensor:
    """A tensor that is copied when it is read, so that the file may be replaced afterwards."""

    def __init__(self, tensor: LazyTensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> Sequence[int]:
        return self._tensor.get_shape()

    def get_dtype(self) -> str:
        return self._tensor.get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index].clone()


class ExpertRows:
    """The rows of the experts `ids` (ascending) out of a tensor that holds all experts one after the other. A copy."""

    def __init__(self, tensor: LazyTensor, ids: Sequence[int], rows_per_expert: int) -> None:
        self._tensor = tensor
        self._ids = ids
        self._rows = rows_per_expert

    def get_shape(self) -> Sequence[int]:
        return [len(self._ids) * self._rows, *self._tensor.get_shape()[1:]]

    def get_dtype(self) -> str:
        return self._tensor.get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.cat([self._tensor[i * self._rows : (i + 1) * self._rows] for i in self._ids])[index]


class BlankTensor:
    """A tensor of the right shape and dtype on the meta device."""

    def __init__(self, header: TensorHeader) -> None:
        self._header = header

    def get_shape(self) -> Sequence[int]:
        return self._header.shape

    def get_dtype(self) -> str:
        return self._header.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        dtype = TORCH_DTYPES.get(self._header.dtype)
        if dtype is None:
            raise InvalidCheckpoint(f"{self._header.file} has a tensor of dtype {self._header.dtype}, unknown here.")
        return torch.empty(self._header.shape, dtype=dtype, device="meta")[index]


class BlankTensors:
    """A `TensorSource` that reads nothing."""

    def __init__(self, headers: Mapping[str, TensorHeader]) -> None:
        self._headers = headers

    def slice(self, name: str) -> LazyTensor:
        return BlankTensor(self._headers[name])


TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
