"""Finding the experts of a model, answering for them, and taking some of their rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ray_moe.models.experts import compute_touched, drop_parameters, experts_modules, install, make_shard, moe_block
from ray_moe.models.families import adapt
from tests import tiny_models

TOKENS = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(0))


def test_experts_are_found_by_path_in_model_order() -> None:
    model = tiny_models.build("qwen2_moe")
    assert list(experts_modules(model)) == ["model.layers.0.mlp.experts", "model.layers.2.mlp.experts"]


@torch.no_grad()
def test_the_handler_answers_for_this_model_only() -> None:
    model, other = tiny_models.build("mixtral"), tiny_models.build("mixtral")
    other.config = model.config  # shared on purpose
    for experts in experts_modules(other).values():
        experts.config = model.config
    before = other(TOKENS).logits
    asked: list[tuple[str, torch.Size, torch.Size, torch.Size]] = []

    def handler(path: str, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        asked.append((path, hidden.shape, index.shape, weight.shape))
        return torch.zeros_like(hidden)

    install(model, handler)
    assert not torch.equal(model(TOKENS).logits, before)
    assert torch.equal(other(TOKENS).logits, before)
    paths = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    assert asked == [(path, (9, 32), (9, 2), (9, 2)) for path in paths]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_those_that_are_touched_compute_what_all_do(family: str) -> None:
    model, plain = tiny_models.build(family).double(), tiny_models.build(family).double()  # sums are in other orders
    plain.set_experts_implementation("eager")  # the only one that takes float64
    compute_touched(model)
    for tokens in (TOKENS, TOKENS[:, :1]):
        for each in (model, plain):
            each.zero_grad()
            each(tokens).logits.square().sum().backward()
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_handler_that_is_a_module_does_not_become_a_part_of_the_model() -> None:
    class Handler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, path: str, hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return hidden * self.scale

    model, handler = tiny_models.build("mixtral"), Handler()
    names = set(model.state_dict())
    install(model, handler)
    assert set(model.state_dict()) == names
    # Gradients flow through it nevertheless.
    model(TOKENS).logits.sum().backward()
    assert handler.scale.grad is not None


def test_installing_again_replaces_the_handler() -> None:
    model = tiny_models.build("mixtral")
    install(model, lambda path, hidden, index, weight: pytest.fail("the first handler was asked"))
    install(model, lambda path, hidden, index, weight: hidden)
    model(TOKENS)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_a_shard_has_the_rows_of_its_experts_in_ascending_order(family: str) -> None:
    model = tiny_models.build(family)
    adapt(model)
    for experts in experts_modules(model).values():
        shard = make_shard(experts, [4, 1])
        assert type(shard) is type(experts)
        assert shard.num_experts == 2
        for name, whole in experts.named_parameters():
            part = shard.get_parameter(name)
            assert torch.equal(part, whole[[1, 4]])
            assert not part.requires_grad
            assert part.data_ptr() != whole.data_ptr()


@torch.no_grad()
def test_a_shard_of_a_model_with_a_handler_computes_by_itself() -> None:
    model = tiny_models.build("mixtral")
    experts: Any = experts_modules(model)["model.layers.0.mlp.experts"]
    rows, index, weight = torch.randn(5, 32), torch.tensor([[1], [4], [1], [1], [4]]), torch.ones(5, 1)
    expected = experts(rows, index, weight)
    install(model, lambda path, hidden, index, weight: pytest.fail("the shard asked the handler"))
    shard = make_shard(experts, [1, 4])
    assert torch.equal(shard(rows, (index == 4).long(), weight), expected)


def test_what_is_not_per_expert_is_copied_whole() -> None:
    model = tiny_models.build("mixtral")
    experts: Any = experts_modules(model)["model.layers.0.mlp.experts"]
    experts.scale = nn.Parameter(torch.ones(7))
    experts.post_expert_norm = nn.LayerNorm(32)
    shard: Any = make_shard(experts, [2])
    assert shard.scale.shape == (7,)
    assert shard.post_expert_norm.weight.data_ptr() != experts.post_expert_norm.weight.data_ptr()
    assert "scale" in dict(experts.named_parameters())


@pytest.mark.parametrize("ids", [[], [6], [-1], [0, 99]])
def test_a_shard_of_experts_that_are_not_there(ids: list[int]) -> None:
    experts = experts_modules(tiny_models.build("mixtral"))["model.layers.0.mlp.experts"]
    with pytest.raises(ValueError, match=r"0\.\.5"):
        make_shard(experts, ids)


def test_dropping_the_experts_parameters() -> None:
    model = tiny_models.build("mixtral")
    drop_parameters(model)
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]
    with pytest.raises(AttributeError):
        model(TOKENS)


@pytest.mark.parametrize("family", [name for name in tiny_models.TINY if name != "gemma4_text"])
@torch.no_grad()
def test_the_block_around_the_experts_can_be_called_alone(family: str) -> None:
    model = tiny_models.build(family)
    adapt(model)
    for path in experts_modules(model):
        block = moe_block(model, path)
        assert block is not None
        answer = block(torch.randn(1, 5, 32))
        hidden = answer[0] if isinstance(answer, tuple) else answer
        assert hidden.numel() == 5 * 32


def test_a_gate_that_belongs_to_the_whole_decoder_layer_cannot_be_called_alone() -> None:
    model = tiny_models.build("gemma4_text")
    assert [moe_block(model, path) for path in experts_modules(model)] == [None, None]
