"""Quantised checkpoints, turned into plain weights while they are loaded.

The arithmetic is `transformers`' own, so the weights have the same bits as those of `from_pretrained`. Called by
`models/skeleton.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AutoHfQuantizer

from ray_moe.errors import UnsupportedModel

METHODS = ("fp8", "mxfp4")
"""Quantisation methods that can be undone one expert at a time."""


def dequantizer(config: Any) -> Any | None:
    """The part of `transformers` that undoes a checkpoint's quantisation; None when it has none.

    Raises:
        UnsupportedModel: it is of a method that cannot be undone here.
    """
    settings = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        settings = settings.to_dict()
    method = settings.get("quant_method")
    if method not in METHODS:
        raise UnsupportedModel(
            f"the checkpoint is quantised with {method!r}, whose weights cannot be loaded one expert at a time. "
            f"Use the checkpoint's unquantised version, or one quantised with {' or '.join(METHODS)}."
        )
    quantizer = AutoHfQuantizer.from_config({**settings, "dequantize": True}, pre_quantized=True)
    if method == "fp8":
        quantizer.get_load_operations = lambda: {"dequantize": RaggedFp8Dequantize}
    return quantizer


class RaggedFp8Dequantize(Fp8Dequantize):
    """Takes matrices that are no whole number of blocks too: their last blocks are cut off at the edge.

    DeepSeek-V3 has them (576 rows in blocks of 128). `transformers` 5.23 refuses them, or takes the blocks to be
    smaller than they are where that happens to divide (192 rows as two blocks of 96).
    """

    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        out: torch.Tensor
        rows, columns = quantized.shape[-2:]
        block_rows, block_columns = self.hf_quantizer.quantization_config.weight_block_size or (rows, columns)
        grid = (-(-rows // block_rows), -(-columns // block_columns))
        is_ragged = rows % block_rows != 0 or columns % block_columns != 0
        if not is_ragged or tuple(scales.shape[-2:]) != grid:
            out = super()._dequantize_one(quantized, scales, output_dtype)
            return out
        # Fill up to whole blocks, scale those, and cut the filling off again.
        filled = quantized.new_zeros(*quantized.shape[:-2], grid[0] * block_rows, grid[1] * block_columns)
        filled[..., :rows, :columns] = quantized
        out = super()._dequantize_one(filled, scales, output_dtype)
        return out[..., :rows, :columns].contiguous()
