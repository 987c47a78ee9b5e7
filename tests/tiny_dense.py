"""Tiny random dense models, one of each family that can become an MoE model: test material in no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.tiny_models import randomize

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}

DENSE: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-3, "rope_parameters": _LLAMA3_ROPE},
    "mistral": {"sliding_window": 4},
    "qwen2": {"rms_norm_eps": 1e-4, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "attention_bias": False},
    "olmo2": {"rms_norm_eps": 1e-4},
}
"""model_type -> what its configuration has besides; nothing that a family takes is left at its default everywhere."""


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """Write a random dense model as a checkpoint; returns it as it is loaded, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**_COMMON, **DENSE.get(family, {}), **changes}))
    randomize(model, seed)
    model.to(dtype).save_pretrained(folder)
    return load(folder)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


PROMPT = torch.tensor([[5, 17, 3, 42, 8, 11, 60, 23, 9, 31, 77, 4], [9, 2, 77, 13, 64, 1, 8, 90, 33, 5, 7, 21]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of `PROMPT`: [2, 12, vocabulary]. Its rows are longer than the windows above."""
    scores: torch.Tensor = model(PROMPT).logits
    return scores
