"""Tensors made smaller for the wire: activations in 8 bits, and gradients in one bit or a few.

One bit for each number loses most of a gradient, but what is lost is added to the next one (error feedback: Seide et
al., "1-bit stochastic gradient descent", 2014; Karimireddy et al., "Error feedback fixes SignSGD", 2019), so that the
sum over many steps is right. What is late is noise until then, and there is more of it the more numbers that share a
magnitude differ. So each row and each column of a matrix has a magnitude; they are coarse, since what rounding them
changes is made good as well. Pure: what carries the tensors is `transport/`, and who remembers what is lost across a
step that is done again is the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from ray_moe.errors import InvalidRequest, WireError
from ray_moe.ops.quantization import ScaledTensor, quantize

SCALES_PER_OCTAVE = 4
LARGEST_SCALE = 2.0**24
"""A magnitude is one of 255 from this one down (the least is 1e-12), each 1.19 times the next, or zero."""

_MAGNITUDES = torch.tensor([0.0, *(LARGEST_SCALE * 2.0 ** ((s - 255) / SCALES_PER_OCTAVE) for s in range(1, 256))])

GRIDS = {1: 2.0, 2: 1.25, 4: 0.42}
"""Bits of a number -> the step of its grid, as a part of its magnitude: about the best for numbers that are normally
distributed, whose mean size is the magnitude."""

SCALE_BYTES = 4
"""At the end of each packed row."""


def pack_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[n, D] in 8 bits, as one tensor that can be gathered and cut like any other: uint8 [n, D + 4], each row its int8
    codes and the bytes of its float32 scale.

    Raises: `InvalidRequest` for a number that is not finite.
    """
    small = quantize(tensor)
    return torch.cat([small.codes.view(torch.uint8), small.scale.contiguous().view(torch.uint8)], -1)


def unpack_rows(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows [n, D] that `pack_rows` was given, as far as 8 bits keep them, in `dtype`.

    Raises: `WireError` for what it never makes.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[-1] < SCALE_BYTES:
        raise WireError(f"rows in 8 bits are uint8 [n, D + {SCALE_BYTES}], got {_described([packed])}")
    scale = packed[:, -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    if not ((scale >= 0) & torch.isfinite(scale)).all():
        raise WireError("a row in 8 bits has a scale that is negative or not finite")
    return ScaledTensor(packed[:, :-SCALE_BYTES].view(torch.int8), scale).dequantize(dtype)


@dataclass(frozen=True, slots=True)
class Compressed:
    """A gradient in few bits a number. As a matrix whose columns are the last dimension (a vector is one row), number
    (i, j) is a step of a grid times the magnitudes of its row and of its column: R by C numbers have R + C bytes of
    magnitudes."""

    codes: torch.Tensor
    """uint8 [numel * num_bits / 8, rounded up]: the lowest bits of a byte are those of its first number. Code c of b
    bits stands for ``(c - (2**b - 1) / 2) * GRIDS[b]``: with one bit for -1 and 1."""
    scale: torch.Tensor
    """uint8 [R + C], of the rows and then of the columns: s stands for
    ``LARGEST_SCALE * 2 ** ((s - 255) / SCALES_PER_OCTAVE)``, and 0 for zero."""
    shape: tuple[int, ...]
    num_bits: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


class GradientQuantizer:
    """Compresses gradients by name, and remembers of each what was lost."""

    def __init__(self, num_bits: int) -> None:
        """Args: num_bits: of each number, one of `GRIDS`."""
        self.num_bits = num_bits
        self._lost: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def compress(self, name: str, gradient: torch.Tensor) -> Compressed:
        """(gradient + what was lost so far), as closely as the bits can say.

        Raises:
            InvalidRequest: a number is not finite, or the shape is another than before; nothing was remembered.
        """
        before = self._lost.get(name)
        if before is None:
            before = torch.zeros(gradient.shape)
        if before.shape != gradient.shape:
            raise InvalidRequest(f"{name} is {list(gradient.shape)} and was {list(before.shape)}: forget it first")
        whole = gradient.float() + before.to(gradient.device)
        matrix = whole.reshape(matrix_shape(gradient.shape))
        sizes = matrix.abs()
        if not torch.isfinite(sizes.sum()):
            raise InvalidRequest(f"the gradient of {name} has numbers that are not finite: leave out this step's batch")
        scale = _fitted(sizes)
        codes = _coded(matrix, scale, self.num_bits)
        self._lost[name] = whole - _decoded(codes, scale, self.num_bits).view(gradient.shape)
        return Compressed(_packed(codes, self.num_bits), scale, tuple(gradient.shape), self.num_bits)

    def forget(self, name: str) -> None:
        """Start anew with what is named so: it went elsewhere, or was never seen."""
        self._lost.pop(name, None)

    def state(self) -> dict[str, torch.Tensor]:
        """What was lost, by name (float32, shaped like the gradients). `compress` never changes these tensors."""
        return dict(self._lost)

    def load_state(self, lost: Mapping[str, torch.Tensor]) -> None:
        """Take what `state` returned, for all names: a step that is done again must lose the same again."""
        self._lost = dict(lost)


def decompress(small: Compressed) -> torch.Tensor:
    """The gradient that arrives, float32.

    Raises:
        WireError: sizes or dtypes do not belong together.
    """
    rows, columns = matrix_shape(small.shape)
    sizes = (packed_bytes(small.shape, small.num_bits),), (rows + columns,)
    dtypes = {small.codes.dtype, small.scale.dtype}
    if (small.codes.shape, small.scale.shape) != sizes or dtypes != {torch.uint8}:
        got = _described([small.codes, small.scale])
        raise WireError(f"{list(small.shape)} in {small.num_bits} bits got {got}, expected uint8 {sizes}")
    codes = _unpacked(small.codes, small.num_bits)[: rows * columns].view(rows, columns)
    return _decoded(codes, small.scale, small.num_bits).view(small.shape)


def packed_bytes(shape: Sequence[int], num_bits: int) -> int:
    """Of the codes of a gradient of this shape."""
    return -(-prod(shape) * num_bits // 8)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The rows and columns of a gradient of this shape."""
    return prod(shape[:-1]), prod(shape[-1:])


def _fitted(sizes: torch.Tensor) -> torch.Tensor:
    """uint8 [R + C]: the scales of numbers of these sizes [R, C].

    Of columns the mean, as a part of that of all; of rows what comes closest then, so that no more is lost than is
    there.
    """
    columns = _nearest(sizes.mean(0) / sizes.mean())
    shares = _MAGNITUDES.to(sizes.device)[columns.int()]
    return torch.cat([_nearest(sizes @ shares / shares.square().sum()), columns])


def _nearest(magnitudes: torch.Tensor) -> torch.Tensor:
    """As scales, uint8; what is 0 / 0 is zero."""
    octaves = torch.log2(magnitudes.nan_to_num(0.0) / LARGEST_SCALE)  # of zero: -inf, which is clamped
    return octaves.mul_(SCALES_PER_OCTAVE).round_().add_(255).clamp_(0, 255).to(torch.uint8)


def _coded(matrix: torch.Tensor, scale: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[R, C] numbers as codes, uint8."""
    if num_bits == 1:
        return (matrix >= 0).view(torch.uint8)
    rows, columns = _magnitudes(scale, matrix.shape[0])
    half = 2 ** (num_bits - 1)
    unit = (rows * columns).mul_(GRIDS[num_bits]).clamp_(min=torch.finfo(torch.float32).tiny)
    return (matrix / unit).floor_().clamp_(-half, half - 1).add_(half).to(torch.uint8)


def _decoded(codes: torch.Tensor, scale: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[R, C] codes and [R + C] scales as numbers."""
    rows, columns = _magnitudes(scale, codes.shape[0])
    steps = codes.float().sub_((2**num_bits - 1) / 2).mul_(GRIDS[num_bits])
    return steps.mul_(rows).mul_(columns)


def _magnitudes(scale: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows [R, 1] and of columns [C]."""
    magnitudes = _MAGNITUDES.to(scale.device)[scale.int()]
    return magnitudes[:num_rows, None], magnitudes[num_rows:]


def _packed(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Codes as bits of bytes, the last of which may have some to spare."""
    in_byte = 8 // num_bits
    flat = codes.reshape(-1)
    bytes_of_codes = torch.nn.functional.pad(flat, (0, -flat.numel() % in_byte)).view(-1, in_byte)
    packed = bytes_of_codes[:, 0].clone()
    for place in range(1, in_byte):
        packed |= bytes_of_codes[:, place] << (place * num_bits)
    return packed


def _unpacked(packed: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The codes that `_packed` was given, and what it had to spare."""
    places = torch.arange(0, 8, num_bits, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] >> places).bitwise_and_(2**num_bits - 1).view(-1)


def _described(tensors: Sequence[torch.Tensor]) -> str:
    return ", ".join(f"{tensor.dtype}{list(tensor.shape)}" for tensor in tensors) or "nothing"
