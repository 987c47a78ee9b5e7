"""Shared experts that a router computes while the chosen ones are on their way.

Most families (DeepSeek, GLM, dots.llm ...) ask a block's chosen experts first and then its shared experts, about the
same tokens: what the second answer will be can be computed while the first is waited for. Which blocks do so is seen in
their first pass; the others (Qwen2-MoE asks the shared expert first) stay as they are. Called by `runtime/engine.py`.

Shape legend: T tokens, D model width.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from ray_moe.models.experts import experts_modules
from ray_moe.types import LayerPath

NAMES = ("shared_experts", "shared_expert", "shared_mlp")
"""What families of `transformers` call them."""


class _Pass(threading.local):
    """One pass through a block, of one thread."""

    given: torch.Tensor | None = None
    """What the block was given."""
    has_asked_chosen = False
    answer: torch.Tensor | None = None
    """Of the shared experts, if it is there already."""


class SharedAhead:
    """The shared experts of one block. Thread-safe."""

    def __init__(self, block: nn.Module, shared: nn.Module) -> None:
        """From now on `run` may answer for `shared` what `block` will ask it."""
        self._pass = _Pass()
        self._fits: bool | None = None
        """Whether the block asks them after the chosen ones, about what it was given; None before it was seen."""
        self._compute = shared.forward
        block.register_forward_pre_hook(self._enter)
        block.register_forward_hook(self._leave, always_call=True)
        whole: Any = shared
        whole.forward = self._ask

    def run(self) -> None:
        """Compute their answer now, if the block will ask for it. Called between asking the chosen experts and waiting
        for them."""
        now = self._pass
        now.has_asked_chosen = True
        if self._fits and now.given is not None:
            now.answer = self._compute(now.given)

    def _enter(self, block: nn.Module, given: tuple[Any, ...]) -> None:
        now = self._pass
        now.given, now.has_asked_chosen, now.answer = (given[0] if given else None), False, None

    def _leave(self, block: nn.Module, given: tuple[Any, ...], out: object) -> None:
        self._pass.given = self._pass.answer = None

    def _ask(self, hidden: torch.Tensor, *others: Any, **named: Any) -> Any:
        now = self._pass
        is_same = hidden is now.given and not others and not named
        answer, now.answer = now.answer, None
        if answer is not None and is_same:
            return answer
        if now.given is not None and self._fits is not False:
            self._fits = is_same and now.has_asked_chosen
        return self._compute(hidden, *others, **named)


def compute_ahead(model: nn.Module) -> dict[LayerPath, SharedAhead]:
    """The shared experts of each block that has some, by the path of its chosen ones."""
    found = {}
    for path in experts_modules(model):
        block = model.get_submodule(path.rpartition(".")[0])
        shared = next((child for name in NAMES if isinstance(child := getattr(block, name, None), nn.Module)), None)
        if shared is not None:
            found[path] = SharedAhead(block, shared)
    return found
