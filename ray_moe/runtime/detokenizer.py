"""Text out of a growing list of tokens, never cutting a character in two. Called by the engine, per stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for a character whose last bytes are still to come."""


class Detokenizer:
    """Decodes one stream. A token may complete no text, some, or (by its context) a space before it."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = 0
        """Tokens before this are out of the window: decoding stays linear in the length of the stream."""
        self._told = 0
        """Tokens before this have been told."""

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that `tokens` complete; with `last`, whatever is left, even an unfinished character."""
        if self._tokenizer is None:
            return ""
        self._tokens.extend(tokens)
        before = self._decode(self._tokens[self._context : self._told])
        now = self._decode(self._tokens[self._context :])
        if now.endswith(UNFINISHED) and not last:
            return ""
        self._context, self._told = self._told, len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True) if self._tokenizer is not None else ""
        return str(text)
