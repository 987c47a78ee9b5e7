"""Shared experts are computed while the chosen ones are waited for, where the block asks in that order; never twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ray_moe.models.experts import experts_modules, install
from ray_moe.models.shared_ahead import SharedAhead, compute_ahead
from ray_moe.ops.experts import StackedExperts
from ray_moe.ops.routed_experts import run_slots
from tests.tiny_models import build

PROMPT = torch.tensor([[5, 17, 3, 42, 8]])


class Watched:
    """A model whose experts are answered for; what happens in a pass, in order."""

    def __init__(self, name: str) -> None:
        self.events: list[str] = []
        model: Any = build(name).eval()
        with torch.no_grad():
            self.expected = model(PROMPT).logits
        modules: dict[str, Any] = dict(experts_modules(model))
        for block in {path.rpartition(".")[0] for path in modules}:
            shared = next(
                (
                    child
                    for each, child in model.get_submodule(block).named_children()
                    if each.startswith("shared_expert") and not each.endswith("gate")
                ),
                None,
            )
            if shared is not None:
                self._watch(shared)
        self.ahead = compute_ahead(model)

        def handler(path: str, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            self.events.append("asked")
            if path in self.ahead:
                self.ahead[path].run()
            self.events.append("answered")
            experts = modules[path]
            return run_slots(StackedExperts(experts).run, hidden, index, weight, experts.num_experts)

        install(model, handler)
        self.model = model

    def _watch(self, shared: nn.Module) -> None:
        compute: Callable[..., Any] = shared.forward

        def forward(*given: Any) -> Any:
            self.events.append("shared")
            return compute(*given)

        whole: Any = shared
        whole.forward = forward

    @torch.no_grad()
    def run(self, tokens: torch.Tensor = PROMPT) -> tuple[list[str], torch.Tensor]:
        """What happened in the first block, and the logits."""
        self.events.clear()
        logits = self.model(tokens).logits
        return self.events[: len(self.events) // max(1, len(self.ahead))], logits


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_from_the_second_pass_on_they_are_computed_meanwhile(name: str) -> None:
    watched = Watched(name)
    first, logits = watched.run()
    assert first == ["asked", "answered", "shared"]
    assert torch.equal(logits, watched.expected)
    for _ in range(2):
        then, logits = watched.run()
        assert then == ["asked", "shared", "answered"]
        assert torch.equal(logits, watched.expected)
    _, other = watched.run(PROMPT + 1)
    assert not torch.equal(other, watched.expected)


def test_a_block_that_asks_them_first_stays_as_it_is() -> None:
    watched = Watched("qwen2_moe")
    for _ in range(3):
        events, logits = watched.run()
        assert events == ["shared", "asked", "answered"]
        assert torch.equal(logits, watched.expected)


class Block(nn.Module):
    """Its chosen experts are `ask`; its shared ones double."""

    def __init__(self, ask: Callable[[], None]) -> None:
        super().__init__()
        self.shared_experts = nn.Linear(2, 2, bias=False)
        nn.init.constant_(self.shared_experts.weight, 1.0)
        self.ask = ask
        self.other: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.ask()
        answer: torch.Tensor = self.shared_experts(hidden if self.other is None else self.other)
        return answer


def test_what_was_computed_is_for_what_the_block_was_given_alone() -> None:
    ahead: list[SharedAhead] = []
    block = Block(lambda: ahead[0].run())
    ahead.append(SharedAhead(block, block.shared_experts))
    one, two = torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 5.0]])
    for _ in range(2):
        assert block(one).tolist() == [[3.0, 3.0]]
    block.other = two
    for _ in range(2):
        assert block(one).tolist() == [[10.0, 10.0]]
    block.other = None
    assert block(two).tolist() == [[10.0, 10.0]]
    assert block.shared_experts(one).tolist() == [[3.0, 3.0]]  # by itself


def test_a_pass_that_breaks_off_leaves_nothing_behind() -> None:
    def ask() -> None:
        ahead.run()
        if breaks:
            raise RuntimeError("as asked for")

    breaks = False
    block = Block(ask)
    ahead = SharedAhead(block, block.shared_experts)
    one = torch.tensor([[1.0, 2.0]])
    block(one)
    breaks = True
    with pytest.raises(RuntimeError):
        block(one)
    assert ahead._pass.answer is None
    assert ahead._pass.given is None


def test_a_model_without_shared_experts_has_none() -> None:
    assert compute_ahead(build("mixtral")) == {}
