"""What `benchmarks/serving.py` has served: a random model, a tokenizer of words, and the requests of each round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving_load import Job


@dataclass(frozen=True, slots=True)
class Settings:
    """What is served, and to whom."""

    hidden: int = 512
    expert_width: int = 512
    layers: int = 6
    experts: int = 16
    top_k: int = 4
    vocabulary: int = 4096
    actors: int = 2
    cores: int = 2
    clients: int = 16
    requests: int = 48
    """Of a round."""
    min_prompt: int = 32
    """Tokens. Prompts are spread evenly by the logarithm of their length, outputs by their length."""
    max_prompt: int = 512
    min_output: int = 32
    max_output: int = 192
    seed: int = 0

    @property
    def max_tokens(self) -> int:
        """Of a request and its answer together."""
        return self.max_prompt + self.max_output


def write_model(folder: Path, settings: Settings, change: Callable[[Any], None] = lambda model: None) -> None:
    """A random Qwen3-MoE that never ends by itself, and a tokenizer of `vocabulary` words, each one token.

    Args: change: what is done with the model before it is written.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.expert_width,
        moe_intermediate_size=settings.expert_width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden // 64,
        num_key_value_heads=max(1, settings.hidden // 128),
        head_dim=64,
        num_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        norm_topk_prob=True,
        initializer_range=0.05,
        max_position_embeddings=settings.max_tokens,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(settings.seed)
    model: Any = Qwen3MoeForCausalLM(config).eval()
    change(model)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({_word(token): token for token in range(settings.vocabulary)}, _word(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False).save_pretrained(folder)


def _word(token: int) -> str:
    return f"w{token}"


def make_jobs(settings: Settings, number: int) -> list[Job]:
    """Those of a round: of the same lengths in all, but with new prompts, so that no server knows how they begin."""
    lengths, words = np.random.default_rng(settings.seed), np.random.default_rng([settings.seed, number])
    logs = lengths.uniform(np.log(settings.min_prompt), np.log(settings.max_prompt), settings.requests)
    outputs = lengths.integers(settings.min_output, settings.max_output, settings.requests, endpoint=True)
    return [
        Job(" ".join(map(_word, words.integers(0, settings.vocabulary, prompt))), int(prompt), int(output))
        for prompt, output in zip(np.exp(logs).round().astype(int), outputs, strict=True)
    ]
