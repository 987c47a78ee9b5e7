"""One stack over tokens of several modalities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ray_moe import MoELayer
from ray_moe.errors import InvalidRequest
from ray_moe.ops.architectures.hybrid import PreNorm, Stack
from ray_moe.ops.architectures.multimodal import MultimodalStack
from ray_moe.ops.gates.modality import ModalitySettings
from ray_moe.ops.layer import moe_layers
from tests.unit.ops.architectures.elsewhere import same_elsewhere

WIDTH, OWN = 8, (2, 1)


def model_of() -> MultimodalStack:
    torch.manual_seed(0)
    gate = ModalitySettings(own=OWN, top_k=2)  # experts 0 and 1 for images, 2 for text, 3 and 4 for both
    stack = Stack(PreNorm(WIDTH, MoELayer(WIDTH, 6, 5, gate=gate, seed=n)) for n in range(2))
    return MultimodalStack(WIDTH, [nn.Linear(3, WIDTH), nn.Embedding(11, WIDTH)], stack)


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 3, generator=generator), torch.randint(0, 11, (2, 6), generator=generator)


def test_tokens_of_each_modality_come_back_and_go_to_experts_that_they_may_see() -> None:
    model = model_of()
    image, text = model(inputs())
    assert (image.shape, text.shape) == ((2, 4, WIDTH), (2, 6, WIDTH))
    for layer in moe_layers(model).values():
        index = layer.routing.index.view(2, 10, 2)  # type: ignore[union-attr]
        assert set(index[:, :4].flatten().tolist()) <= {0, 1, 3, 4}
        assert set(index[:, 4:].flatten().tolist()) <= {2, 3, 4}


def test_each_token_is_computed_as_by_a_plain_loop() -> None:
    model: Any = model_of().double()
    image, text = inputs()
    outs = model((image.double(), text))
    for modality, (given, out) in enumerate(zip((image.double(), text), outs, strict=True)):
        allowed = [n for n in range(5) if n >= 3 or (n < 2) == (modality == 0)]
        for token, result in zip(given.flatten(0, 1), out.flatten(0, 1), strict=True):
            hidden = model.encoders[modality](token) + model.modality[modality]
            for block in model.stack.layers:
                normed = block.norm(hidden)
                experts = block.inner.experts
                share = (block.inner.gate.weight[allowed] @ normed).softmax(0)
                best, which = share.topk(2)
                for weight, number in zip(best / best.sum(), which.tolist(), strict=True):
                    gate, up = (experts.gate_up_proj[allowed[number]] @ normed).chunk(2)
                    inner = gate * torch.sigmoid(gate) * up
                    hidden = hidden + weight * (experts.down_proj[allowed[number]] @ inner)
            torch.testing.assert_close(result, hidden)


def test_a_modality_may_be_absent() -> None:
    model = model_of()
    image, text = inputs()
    both = model((image, text))
    alone, nothing = model((image, None))
    assert nothing is None
    torch.testing.assert_close(alone, both[0])  # these layers look at no other token
    torch.testing.assert_close(model((None, text))[1], both[1])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((None, None), "of one modality at least"),
        ((torch.zeros(1, 2, 3),), "1 modalities are given; there are 2"),
        ((torch.zeros(3, 2, 3), torch.zeros(2, 5).long()), r"one B and D.*\[3, 2, 8\]"),
    ],
)
def test_what_does_not_fit_is_refused(given, said) -> None:
    with pytest.raises(InvalidRequest, match=said):
        model_of()(given)


def test_it_learns_the_same_with_its_experts_elsewhere() -> None:
    def batch_of(seed: int) -> dict[str, torch.Tensor]:
        image, text = inputs(seed)
        return {"image": image.double(), "text": text}

    def loss_of(model: Any, batch: Any) -> torch.Tensor:
        image, text = model((batch["image"], batch["text"]))
        loss: torch.Tensor = (image.mean((1, 2)) - 1).square().mean() + (text.mean((1, 2)) + 1).square().mean()
        return loss

    same_elsewhere(model_of(), loss_of, batch_of)
