"""A small byte-level Mixture-of-Experts language model: its tokenizer, its first weights, and something to read.

What every machine with Python has, so that a model can be trained without any download: tokens are bytes, and the texts
are the sources of Python's own library. Used by `models/demo.py`, by `training/documents.py`, and by whoever wants a
checkpoint to start from (`write_new`).
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ray_moe.models.quiet import no_progress_bars

END = 256
"""The token after each file; tokens 0 to 255 are the bytes themselves."""
END_TEXT = "<|endoftext|>"
MAX_TOKENS = 1024
"""Positions of the models made here."""


@dataclass(frozen=True, slots=True)
class ByteModel:
    """What the model is: a Qwen3-MoE over bytes."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    expert_width: int = 128
    init_std: float = 0.05
    """At this width and in two minutes, twice the usual spread of first weights saves a fifth of the loss."""
    seed: int = 0


def new_model(settings: ByteModel) -> Any:
    """A `Qwen3MoeForCausalLM` with random weights, in float32; torch's own generator is left as it was."""
    config = Qwen3MoeConfig(
        vocab_size=END + 1,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads // 2,
        head_dim=settings.hidden_size // settings.num_heads,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.top_k,
        moe_intermediate_size=settings.expert_width,
        intermediate_size=settings.expert_width,
        norm_topk_prob=True,
        initializer_range=settings.init_std,
        router_aux_loss_coef=0.01,
        output_router_logits=False,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return Qwen3MoeForCausalLM(config)


def write_new(path: Path, settings: ByteModel | None = None) -> None:
    """A Hugging Face checkpoint folder with random weights and the tokenizer."""
    write(path, new_model(settings or ByteModel()))


def write(path: Path, model: Any) -> None:
    """A Hugging Face checkpoint folder of `model` and the tokenizer."""
    with no_progress_bars():
        model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)


def byte_tokenizer() -> Any:
    """A tokenizer whose token ids are the bytes of UTF-8, so that every text comes back as it was."""
    # Byte-level tokenizers write byte b as one printable character (GPT-2's table): itself if it is printable and
    # no blank, else the next one free above 255.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    blanks = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(blanks)}
    backend = Tokenizer(BPE({letters[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_TEXT, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_TEXT, clean_up_tokenization_spaces=False, model_max_length=MAX_TOKENS
    )


def is_byte_tokenizer(tokenizer: Any) -> bool:
    """Whether the tokens of a text are its bytes, in which case nobody has to ask the tokenizer for them."""
    every = "".join(map(chr, range(0x800))) + "\uffff\U0010ffff"
    return len(tokenizer) == END + 1 and tokenizer(every, verbose=False)["input_ids"] == list(every.encode())


def library_files() -> list[Path]:
    """The sources of Python's standard library without its tests, sorted."""
    library = Path(sysconfig.get_path("stdlib"))
    not_ours = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(file for file in library.rglob("*.py") if not_ours.isdisjoint(file.relative_to(library).parts))
