"""`ray-moe generate`: a continuation on standard output, piece by piece as it comes."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from ray_moe.cli.target import Target
from ray_moe.client.sync import Client
from ray_moe.errors import InvalidRequest

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ray_moe.client.requests import GenerateOptions


def run(to: Target, prompt: str, as_token_ids: bool, timeout_s: float, **options: Unpack[GenerateOptions]) -> None:
    """Write the continuation of `prompt` (text, or token numbers in words) to standard output."""
    if prompt == "-":
        prompt = sys.stdin.read()
    text: str | None = prompt
    if as_token_ids:
        text, options["token_ids"] = None, parse_token_ids(prompt)
    with Client(to.server, timeout_s, **to.access) as client:
        for chunk in client.stream(text, **options):
            sys.stdout.write("".join(f"{token} " for token in chunk.token_ids) if as_token_ids else chunk.text)
            sys.stdout.flush()
    sys.stdout.write("\n")


def parse_token_ids(prompt: str) -> list[int]:
    """`1, 2 3` -> [1, 2, 3]."""
    words = re.split(r"[\s,]+", prompt.strip().strip("[]"))
    if not all(re.fullmatch(r"\d+", word) for word in words):
        raise InvalidRequest(f"with --token-ids the prompt is numbers, such as '12 7 801', not {prompt[:80]!r}")
    return [int(word) for word in words]
