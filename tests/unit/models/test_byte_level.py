"""The byte-level model: a tokenizer that loses nothing, and a checkpoint to start from."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_moe.models.byte_level import (
    END,
    END_TEXT,
    ByteModel,
    byte_tokenizer,
    is_byte_tokenizer,
    library_files,
    new_model,
    write_new,
)
from tests.tiny_models import save_tokenizer

TOKENIZER = byte_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back_and_its_tokens_are_its_bytes(text: str) -> None:
    if END_TEXT in text:
        return
    tokens = TOKENIZER(text)["input_ids"]
    assert tokens == list(text.encode())
    assert TOKENIZER.decode(tokens) == text


def test_blanks_and_punctuation_are_left_alone() -> None:
    text = "  def f( x ) :\n\n\treturn 'don ' t' , n't .  \r\n\u00a0é漢🙂\x00"
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_the_end_is_one_token() -> None:
    assert TOKENIZER(f"a{END_TEXT}b")["input_ids"] == [97, END, 98]
    assert TOKENIZER.decode([97, END], skip_special_tokens=True) == "a"
    assert TOKENIZER.eos_token_id == END


def test_it_is_known_where_tokens_are_bytes(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    assert is_byte_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "bytes"))
    save_tokenizer(tmp_path / "other")
    assert not is_byte_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "other"))


def test_a_new_checkpoint_is_decided_by_its_settings(tmp_path: Path) -> None:
    settings = ByteModel(hidden_size=16, num_layers=1, num_heads=2, num_experts=4, expert_width=8, top_k=3, seed=2)
    before = torch.get_rng_state()
    write_new(tmp_path, settings)
    assert torch.equal(torch.get_rng_state(), before)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (4, 3)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path)) == END + 1
    for name, parameter in new_model(settings).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_the_library_is_read_without_its_tests() -> None:
    files = library_files()
    assert any(file.name == "argparse.py" for file in files)
    assert not any("test" in file.parts for file in files)
    assert files == sorted(files)
