"""Text to tokens, by the checkpoint's own tokenizer and chat template, in a thread of its own: long texts take time.

Called by `engine.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ray_moe.errors import InvalidRequest

T = TypeVar("T")


class Texts:
    """Of one checkpoint."""

    def __init__(self, tokenizer: Any | None) -> None:
        self.tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    async def tokenize(self, text: str) -> tuple[int, ...]:
        """The tokens of a text as a prompt. Raises: `InvalidRequest` without a tokenizer."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise InvalidRequest("this checkpoint has no tokenizer; send token_ids instead of text")
        return await self._apart(lambda: tuple(tokenizer(text)["input_ids"]))

    async def tokenize_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """The prompt that the chat template makes of a conversation, up to where the answer begins.

        Raises: `InvalidRequest` without a template, and for what the template refuses.
        """
        tokenizer = self.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise InvalidRequest("this checkpoint has no chat template; send a prompt to complete instead of messages")

        def render() -> tuple[int, ...]:
            try:
                rendered = tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
                )
            except Exception as error:  # whatever the template raises is about the messages
                raise InvalidRequest(f"the checkpoint's chat template refuses these messages: {error}") from error
            return tuple(rendered["input_ids"])

        return await self._apart(render)

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself; empty without a tokenizer."""
        return "" if self.tokenizer is None else str(self.tokenizer.decode([token_id]))

    async def _apart(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        self._thread.shutdown(wait=False)
