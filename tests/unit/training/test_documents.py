"""What there is to read, as tokens, and what of it is kept for validation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ray_moe.errors import InvalidConfig
from ray_moe.models.byte_level import END, byte_tokenizer
from ray_moe.training.documents import byte_tokens, documents, read_corpus, read_rows, tokens_of
from tests.tiny_models import save_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {"b.txt": "bee", "a.md": "é", "deep/c.txt": "sea", "deep/empty.txt": "", ".hidden": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "d.jsonl").write_text('{"text": "first"}\n\n{"text": "second", "label": 3}\n{"text": ""}\n')
    return tmp_path


def contents(*sources: str | Path) -> list[str]:
    return [document.content.decode() for document in documents([str(source) for source in sources])]


def test_a_folder_has_its_files_by_name_without_hidden_and_empty_ones(folder) -> None:
    assert contents(folder) == ["é", "bee", "first", "second", "sea"]


def test_globs_files_and_lists_of_them_are_sources(folder) -> None:
    assert contents(folder / "*.txt") == ["bee"]
    assert contents(folder / "**/*.txt") == ["bee", "sea"]
    assert contents(folder / "d.jsonl", folder / "b.txt") == ["first", "second", "bee"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path) -> None:
    (tmp_path / "a[1].txt").write_text("here")
    assert contents(tmp_path / "a[1].txt") == ["here"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text"', r"x.jsonl, line 2, is not JSON"),
        ("x.jsonl", '{"words": "a"}', r'x.jsonl, line 1, has no text; each line must be like {"text": "..."}'),
        ("x.jsonl", "[1]", "x.jsonl, line 1, has no text"),
        ("x.txt", "", "has no text; give a file, a folder, a glob"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, said) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidConfig, match=said.replace("{", r"\{").replace("[", r"\[")):
        contents(tmp_path / name)


def test_a_source_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidConfig, match="the data 'nowhere/\\*' has no text"):
        contents("nowhere/*")


def test_a_file_that_is_no_text_is_named_where_it_has_to_be_one(tmp_path) -> None:
    (tmp_path / "x").write_bytes(b"ab\xff")
    assert read_corpus([str(tmp_path)], byte_tokens, 0).train.tolist() == [97, 98, 255, END]
    with pytest.raises(InvalidConfig, match="x is not UTF-8"):
        read_corpus([str(tmp_path)], tokens_of(save_tokenizer(tmp_path / "tokenizer")))


def test_a_document_ends_with_the_token_that_the_tokenizer_has_for_it(tmp_path) -> None:
    other = save_tokenizer(tmp_path)
    assert tokens_of(byte_tokenizer())("é".encode()).tolist() == [195, 169, END]
    tokens = tokens_of(AutoTokenizer.from_pretrained(tmp_path))("é<eos".encode())
    assert other.decode(tokens[:-1]) == "é<eos"
    assert tokens[-1] == other.eos_token_id
    other.eos_token = None
    assert other.decode(tokens_of(other)("é".encode())) == "é"


# --- Training and validation ---------------------------------------------------------------------------------
def write(folder: Path, numbers: range) -> None:
    for number in numbers:
        (folder / f"{number:03}").write_text(f"text number {number}, ")


def texts(tokens: np.ndarray) -> set[str]:
    return {part for part in "".join(chr(t) if t < END else "|" for t in tokens.tolist()).split("|") if part}


def test_documents_stay_on_their_side_when_others_come(tmp_path) -> None:
    write(tmp_path, range(100))
    before = read_corpus([str(tmp_path)], byte_tokens, 0.2)
    write(tmp_path, range(100, 200))
    (tmp_path / "copy").write_text("text number 7, ")
    after = read_corpus([str(tmp_path)], byte_tokens, 0.2)
    assert texts(before.train) <= texts(after.train)
    assert texts(before.validation) <= texts(after.validation)
    assert not texts(after.train) & texts(after.validation)
    assert len(texts(after.train) | texts(after.validation)) == 200
    assert 20 <= len(texts(after.validation)) <= 60


def test_of_a_single_document_validation_has_the_end(tmp_path) -> None:
    (tmp_path / "one.txt").write_text("0123456789" * 10)
    corpus = read_corpus([str(tmp_path / "one.txt")], byte_tokens, 0.1)
    assert (len(corpus.train), len(corpus.validation)) == (91, 10)
    assert corpus.validation[-1] == END


def test_pythons_own_library_is_there_and_divided() -> None:
    corpus = read_corpus(["stdlib"], byte_tokens)
    assert len(corpus.train) > 10 * len(corpus.validation) > 100_000
    assert b"import " in bytes(token for token in corpus.train[:100_000].tolist() if token < END)


ROWS = st.lists(st.text(max_size=20) | st.lists(st.integers(0, 256), max_size=20), min_size=1, max_size=20)


@given(ROWS, st.randoms(), st.floats(0, 1))
def test_the_same_rows_in_any_order_and_form_are_the_same_corpus(rows, rng, share) -> None:
    if not any(rows):
        rows = [*rows, "something"]
    forms = [({"text": row} if isinstance(row, str) else {"input_ids": np.array(row, int)}) for row in rows]
    shuffled = rng.sample(forms, len(forms))
    one, other = read_rows(rows, byte_tokens, share), read_rows(iter(shuffled), byte_tokens, share)
    assert one.train.tolist() == other.train.tolist()
    assert one.validation.tolist() == other.validation.tolist()
    texts = [byte_tokens(row.encode()).tolist() if isinstance(row, str) else row for row in rows if row]
    assert sorted([*one.train, *one.validation]) == sorted(token for text in texts for token in text)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (3, "row 1 of the data is a int; it must be a text, or a list of token ids"),
        ([0.5], "row 1 of the data is a list"),
        ([-1], "row 1 of the data is a list"),
        ([2**40], "row 1 of the data is a list"),
        ([[1], [1, 2]], "row 1 of the data is a list"),
        (None, "row 1 of the data is a NoneType"),
        ({"words": "a"}, "row 1 of the data has the columns words; it must have one of text and input_ids"),
        ({"text": "a", "input_ids": [1]}, "row 1 of the data has the columns text, input_ids"),
    ],
)
def test_a_row_that_is_no_text_is_named(row, said) -> None:
    with pytest.raises(InvalidConfig, match=said):
        read_rows(["a text", row], byte_tokens)


def test_rows_with_nothing_in_them_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="no rows with anything in them"):
        read_rows(["", [], {"text": ""}], byte_tokens)
