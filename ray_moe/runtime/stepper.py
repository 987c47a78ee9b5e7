"""One step of a model: the new tokens of some sequences in, the logits behind each of them out.

What differs between models that are a decoder alone and those that have an encoder beside it stands behind one
contract: what a sequence begins with, and how its tokens are computed. The loop (`generation.py`) knows of neither.

Shape legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any, Protocol

import torch
from torch import nn

from ray_moe.models.generation_config import start_token
from ray_moe.runtime.decoder_only import DecoderStepper
from ray_moe.runtime.encoder_decoder import EncoderDecoderStepper
from ray_moe.runtime.kv_cache import KVPool
from ray_moe.runtime.scheduler import Work


class Stepper(Protocol):
    """Of one model. Called by `generation.py`, in one thread."""

    @property
    def in_chunks(self) -> bool:
        """Whether a prompt may be computed in parts, but for what an encoder reads."""

    @property
    def keeps_prefixes(self) -> bool:
        """Whether keys and values of a beginning are good for any sequence that begins the same."""

    def compute(self, work: Work, pool: KVPool) -> torch.Tensor:
        """[number of sequences, V] logits, behind what was computed of each. A failure leaves them to be done again."""


def stepper_of(model: nn.Module, overlap_min_tokens: int | None = None) -> Stepper:
    """That of a model's kind; prepares the model for it.

    Args: overlap_min_tokens: steps of at least so many tokens are computed as two at once, where the model is a decoder
        alone that can be packed; None: none are.
    """
    return EncoderDecoderStepper(model) if has_encoder(model) else DecoderStepper(model, overlap_min_tokens)


def has_encoder(model: nn.Module) -> bool:
    """Whether prompts are what an encoder reads, and not what a decoder continues."""
    config: Any = model.config
    return bool(getattr(config, "is_encoder_decoder", False))


def beginning(model: nn.Module, prompt: Items[int]) -> tuple[list[int], int]:
    """The tokens that the sequence of a prompt begins with, and how many of the first an encoder reads."""
    if not has_encoder(model):
        return list(prompt), 0
    settings: Any = model.generation_config
    return [*prompt, start_token(settings)], len(prompt)
