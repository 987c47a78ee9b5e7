"""Gradients in few bits a number, from where they are computed to where they are added up.

What is left out of one step's gradients is added to those of the next, so it is a part of the training's state: it
counts from the moment the step is made, and a step that is made again leaves out the same. Called by
`training/trainees.py` (replicas of experts) and `training/trainer.py` (workers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ray_moe.errors import InvalidRequest, StepRefused, WireError
from ray_moe.ops.compression import Compressed, GradientQuantizer, decompress, matrix_shape, packed_bytes

Residuals = Mapping[str, torch.Tensor]
"""What has been left out so far, float32, by the name of the gradient. Nobody changes these tensors."""

CODES, SCALE = "codes.", "scale."
"""Before the name of a gradient: its numbers, and the magnitudes of its rows and columns."""

EXPERT_BITS, BACKBONE_BITS = 1, 4
"""Of each number with `gradient_compression: 1bit`. Attention, embeddings and gates are a small part of a mixture, and
three quarters of what one bit costs in the loss."""


class GradientCompressor:
    """One sender's gradients. Not thread-safe."""

    def __init__(self, num_bits: int) -> None:
        """Args: num_bits: of each number."""
        self._quantizer = GradientQuantizer(num_bits)
        self.residuals: Residuals = {}
        """As of the last step that was made."""

    def compress(self, gradients: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
        """Two tensors for each gradient, for `expand` to read. Args: prefix: goes before the names in `residuals`.

        Raises: `StepRefused` for a gradient that is not finite.
        """
        small = {}
        for name, gradient in gradients.items():
            try:
                compressed = self._quantizer.compress(prefix + name, gradient)
            except InvalidRequest as error:
                raise StepRefused(f"{error}; the step was not made and nothing changed") from None
            small[CODES + name], small[SCALE + name] = compressed.codes, compressed.scale
        return small

    def keep(self, names: Sequence[str] | None = None) -> None:
        """The step is made: what it left out counts. Args: names: with the prefix; others are forgotten. None: all."""
        lost = self._quantizer.state()
        self.restore(lost if names is None else {name: lost[name] for name in names if name in lost})

    def restore(self, residuals: Residuals | None = None) -> None:
        """Be as when the residuals were these; None: as after the last step that was made."""
        self.residuals = self.residuals if residuals is None else dict(residuals)
        self._quantizer.load_state(self.residuals)

    @property
    def num_bytes(self) -> int:
        """Memory of the residuals."""
        return sum(residual.nbytes for residual in self.residuals.values())


def expand(
    tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor], num_bits: int
) -> dict[str, torch.Tensor]:
    """The gradients that were sent, whole or compressed.

    Args:
        like: of their names, for shapes, dtypes and devices.
        num_bits: of a number of those that are compressed.

    Raises: `WireError` for what `compress` never makes.
    """
    gradients = {}
    for name, tensor in tensors.items():
        if name.startswith(CODES):
            name = name.removeprefix(CODES)  # noqa: PLW2901
            target, scale = like.get(name), tensors.get(SCALE + name)
            if target is None or scale is None:
                raise WireError(f"a compressed gradient {name!r} came without scales, or belongs to nothing here")
            tensor = decompress(Compressed(tensor, scale, tuple(target.shape), num_bits))  # noqa: PLW2901
        elif name.startswith(SCALE):
            continue
        elif name not in like:
            raise WireError(f"a gradient {name!r} came, which belongs to nothing here")
        gradients[name] = tensor.to(like[name].device, like[name].dtype)
    return gradients


def join(small: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `compress` made of many gradients as two tensors: all codes, all magnitudes."""
    codes = [tensor.cpu() for name, tensor in small.items() if name.startswith(CODES)]
    scales = [tensor.cpu() for name, tensor in small.items() if name.startswith(SCALE)]
    return torch.cat(codes), torch.cat(scales)


def split(
    codes: torch.Tensor, scales: torch.Tensor, like: Mapping[str, torch.Tensor], num_bits: int
) -> dict[str, torch.Tensor]:
    """The opposite of `join`, of gradients that are `like` these, in their order.

    Raises: `WireError` when they are not.
    """
    num_codes = [packed_bytes(tensor.shape, num_bits) for tensor in like.values()]
    num_scales = [sum(matrix_shape(tensor.shape)) for tensor in like.values()]
    if (len(codes), len(scales)) != (sum(num_codes), sum(num_scales)):
        raise WireError(f"{len(codes)} bytes and {len(scales)} scales came for {len(like)} gradients of another size")
    small = {}
    for name, own_codes, own_scales in zip(like, codes.split(num_codes), scales.split(num_scales), strict=True):
        small[CODES + name], small[SCALE + name] = own_codes, own_scales
    return small
