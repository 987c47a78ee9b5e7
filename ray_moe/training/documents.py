"""Texts as tokens: what there is to read, and what of it is kept for validation.

A source is a file, a folder, a glob, a JSON Lines file with a ``text`` in each line, or ``stdlib``: the sources of
Python's own library, which are always there. Texts, or tokens, may also come as rows from anywhere (`read_rows`).
`training/data.py` cuts the tokens into windows.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_moe.errors import InvalidConfig
from ray_moe.models.byte_level import END, is_byte_tokenizer, library_files

STDLIB = "stdlib"
Tokens = npt.NDArray[np.int32]
Tokenize = Callable[[bytes], Tokens]
"""The tokens of a document, its end included. Raises `UnicodeDecodeError` for bytes that are no text."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text."""

    content: bytes
    origin: str
    """Where it came from, for messages."""

    @property
    def place(self) -> float:
        """A number in [0, 1) that only the content decides."""
        return _placed(self.content)[0]


@dataclass(frozen=True, slots=True)
class Corpus:
    """All tokens, document after document."""

    train: Tokens
    validation: Tokens


def read_corpus(sources: Sequence[str], tokenize: Tokenize, validation_share: float = 0.05) -> Corpus:
    """The tokens of all documents of `sources`, in an order that only their names decide.

    A document is wholly in one of the two parts, by a hash of its content: so it stays where it is when others come or
    go, and a copy of it is never on the other side. If there is but one, validation has its end.

    Raises: `InvalidConfig` for a source that has no documents, or one that is no text.
    """

    def read() -> Iterator[tuple[float, Tokens]]:
        for document in documents(sources):
            try:
                yield document.place, tokenize(document.content)
            except UnicodeDecodeError as error:
                raise InvalidConfig(
                    f"{document.origin} is not UTF-8 ({error}); leave it out, for example with a glob of the files "
                    "meant"
                ) from error

    return _divided(read(), validation_share)


def read_rows(rows: Iterable[Any], tokenize: Tokenize, validation_share: float = 0.05) -> Corpus:
    """The tokens of all rows, in an order that only their contents decide: however they come (several processes that
    read them, a shuffle), the same rows are the same corpus. As in `read_corpus`, each is wholly in one of the parts.

    Args: rows: each a text, or the token ids of one, which are taken as they are; or a mapping that has either, as
        ``text`` or as ``input_ids``. Read once.

    Raises: `InvalidConfig` for a row that is none of these, naming it, and when there is none.
    """
    found = sorted(
        ((*_placed(tokens.tobytes()), tokens) for tokens in _tokens_of_rows(rows, tokenize)), key=lambda row: row[:2]
    )
    if not found:
        raise InvalidConfig("the data has no rows with anything in them; give texts or token ids")
    return _divided(((place, tokens) for place, _, tokens in found), validation_share)


def _tokens_of_rows(rows: Iterable[Any], tokenize: Tokenize) -> Iterator[Tokens]:
    for number, row in enumerate(rows):
        value = row
        if isinstance(row, Mapping):
            names = [name for name in ("text", "input_ids") if name in row]
            if len(names) != 1:
                raise InvalidConfig(
                    f"row {number} of the data has the columns {', '.join(map(str, row)) or 'none'}; it must have one "
                    "of text and input_ids: rename what is meant"
                )
            value = row[names[0]]
        if isinstance(value, str):
            tokens = tokenize(value.encode()) if value else np.zeros(0, np.int32)
        else:
            tokens = _token_ids(value, number)
        if len(tokens):
            yield tokens


def _token_ids(value: Any, number: int) -> Tokens:
    try:
        array = np.asarray(value)
    except ValueError:  # of lists of different lengths
        array = np.zeros((0, 0))
    if array.ndim == 1 and not array.size:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise InvalidConfig(
            f"row {number} of the data is a {type(value).__name__}; it must be a text, or a list of token ids"
        )
    return array.astype(np.int32)


def _placed(content: bytes) -> tuple[float, bytes]:
    """A number in [0, 1), and what to sort by; only the content decides both."""
    digest = hashlib.sha256(content).digest()
    return int.from_bytes(digest[:6], "big") / 2**48, digest


def _divided(documents: Iterable[tuple[float, Tokens]], validation_share: float) -> Corpus:
    """Args: documents: their places in [0, 1) and tokens, in order."""
    parts: dict[bool, list[Tokens]] = {True: [], False: []}
    for place, tokens in documents:
        parts[place < validation_share].append(tokens)
    nothing = np.zeros(0, dtype=np.int32)
    train, validation = (np.concatenate([nothing, *parts[side]]) for side in (False, True))
    if len(parts[False]) + len(parts[True]) == 1:
        whole = np.concatenate([train, validation])
        begin = round(len(whole) * (1 - validation_share))
        train, validation = whole[:begin], whole[begin:]
    return Corpus(train, validation)


def documents(sources: Sequence[str]) -> Iterator[Document]:
    """What `sources` name, in order; the files of each sorted by name. Empty documents are left out."""
    for source in sources:
        num_documents = 0
        for file in _files(source):
            for document in _read(file):
                num_documents += 1
                yield document
        if not num_documents:
            raise InvalidConfig(
                f"the data {source!r} has no text; give a file, a folder, a glob, a .jsonl file, {STDLIB!r}, or "
                "module:function"
            )


def check_sources(sources: Sequence[str]) -> None:
    """Raises: `InvalidConfig` for a source that names no file; reads none."""
    for source in sources:
        if not _files(source):
            raise InvalidConfig(f"there is nothing to read in {source!r}: it has no files")


def _files(source: str) -> list[Path]:
    if source == STDLIB:
        return library_files()
    path = Path(source).expanduser()
    if path.is_dir():
        inside = (file for file in path.rglob("*") if file.is_file())
        return sorted(f for f in inside if not any(part.startswith(".") for part in f.relative_to(path).parts))
    if path.is_file():
        return [path]
    return sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())


def _read(file: Path) -> Iterator[Document]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InvalidConfig(f"cannot read {file}: {error.strerror}") from error
    if file.suffix != ".jsonl":
        if content:
            yield Document(content, str(file))
        return
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InvalidConfig(f"{file}, line {number}, is not JSON: {error}") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InvalidConfig(f'{file}, line {number}, has no text; each line must be like {{"text": "..."}}')
        if text:
            yield Document(text.encode(), f"{file}, line {number}")


def byte_tokens(content: bytes) -> Tokens:
    """The bytes themselves, and the end."""
    return np.append(np.frombuffer(content, np.uint8).astype(np.int32), np.int32(END))


def tokens_of(tokenizer: Any) -> Tokenize:
    """How a checkpoint's tokenizer reads a document: without special tokens, but for its end where it has one."""
    if is_byte_tokenizer(tokenizer):
        return byte_tokens
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(content: bytes) -> Tokens:
        ids = tokenizer(content.decode(), add_special_tokens=False, verbose=False)["input_ids"]
        return np.array([*ids, *end], dtype=np.int32)

    return tokenize
