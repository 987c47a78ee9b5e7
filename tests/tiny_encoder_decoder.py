"""A tiny random Switch Transformers model: the one family with an encoder whose experts can be elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, SwitchTransformersConfig

from tests import tiny_models

LAYERS = ["encoder.block.1.layer.1.mlp.experts", "decoder.block.1.layer.2.mlp.experts"]


def build(capacity: int = 64, seed: int = 0, **changes: Any) -> Any:
    """In evaluation mode. Args: capacity: tokens of a sequence that an expert takes; the others none computes."""
    config = SwitchTransformersConfig(
        **{
            "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2,
            "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 5,
            "expert_capacity": capacity, "dropout_rate": 0.0, "router_jitter_noise": 0.0,
            "decoder_start_token_id": 0, **changes,
        }
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(config)
    tiny_models.randomize(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("classifier.weight"):
                parameter.mul_(4)  # or the gate's probabilities would be all alike
    return model.eval()


def save(folder: str | Path, capacity: int = 64, seed: int = 0, **changes: Any) -> Any:
    """Write one as a checkpoint; returns the model."""
    model = build(capacity, seed, **changes)
    model.save_pretrained(folder)
    return model
