"""Families whose experts `transformers` does not put on its experts interface, brought onto it; and those refused.

An adapter works on one model, right after it is built: it swaps blocks for subclasses whose experts answer through the
interface, and adds the rules by which the weights on disk become theirs. No class of `transformers` is changed, so
other models of the process stay as they are.

Shape legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

UNSUPPORTED: dict[str, str] = {
    "nllb-moe": "in transformers 5.23 only the first two experts ever act, so there is nothing to be equal to.",
}


def adapt(model: Any) -> None: ...
def extra_conversions(model: Any) -> list[Any]:
    return []
