from hypothesis import given
from hypothesis import strategies as st

from ray_moe.runtime.detokenizer import Detokenizer
from tests.tiny_models import save_tokenizer


class Bytes:
    """A byte-level tokenizer: token n is byte n."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


@given(st.text(), st.integers(1, 5))
def test_pieces_add_up_and_cut_no_character(text, step):
    tokens = list(text.encode())
    detokenizer = Detokenizer(Bytes())
    pieces = [
        detokenizer.add(tokens[begin : begin + step], last=begin + step >= len(tokens))
        for begin in range(0, len(tokens), step)
    ]
    assert "".join(pieces) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_an_unfinished_character_is_told_only_at_the_end():
    detokenizer = Detokenizer(Bytes())
    assert detokenizer.add([0xC3]) == ""
    assert detokenizer.add([], last=True) == "\N{REPLACEMENT CHARACTER}"


def test_a_real_tokenizer_skips_its_special_tokens(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    detokenizer = Detokenizer(tokenizer)
    tokens = [1, *tokenizer("é§")["input_ids"], 2]
    assert "".join(detokenizer.add([token]) for token in tokens) == "é§"


def test_no_tokenizer_no_text():
    assert Detokenizer(None).add([1, 2, 3], last=True) == ""
