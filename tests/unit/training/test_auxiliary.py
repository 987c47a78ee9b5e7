"""Auxiliary losses of a model's routers: what `transformers` makes of them, and with experts elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ray_moe.config_train import TrainConfig
from ray_moe.errors import UnsupportedModel
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.training.auxiliary import LossWithAuxiliary
from ray_moe.training.settings import StepSettings
from ray_moe.training.trainer import causal_lm_loss
from tests.tiny_models import build
from tests.training_cluster import Cluster

COEFFICIENTS = {"load_balancing": 0.3, "router_z": 0.2}
FAMILIES = ["mixtral", "qwen3_moe", "olmoe"]


def batch(seed: int = 0, padding: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 12 - padding :] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def expected(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """By `transformers`' own function, layer by layer, and the formula of ST-MoE."""
    out = model(**given, output_router_logits=True)
    loss = model(**given).loss
    counted = given["attention_mask"].reshape(-1).bool()
    for logits in out.router_logits:
        balance = load_balancing_loss_func(
            (logits,), model.config.num_experts, model.config.num_experts_per_tok, given["attention_mask"]
        )
        loss = loss + 0.3 * balance + 0.2 * logits[counted].logsumexp(-1).square().mean()
    return loss


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradients_are_those_of_transformers_function(family: str, padding: int) -> None:
    model: Any = build(family).double().train()
    model.set_experts_implementation("eager")  # the grouped one knows no float64
    given = batch(padding=padding)
    if family == "mixtral":
        model.config.num_experts = model.config.num_local_experts
    reference = torch.autograd.grad(expected(model, given), list(model.parameters()))
    loss = LossWithAuxiliary(model, COEFFICIENTS)(model, given)
    torch.testing.assert_close(loss, expected(model, given), rtol=1e-7, atol=0)
    assert loss > causal_lm_loss(model, given) + 0.3
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=3e-7)  # softmax is in float32


def test_what_is_validated_has_no_auxiliary_loss() -> None:
    model = build("mixtral").eval()
    assert torch.equal(LossWithAuxiliary(model, COEFFICIENTS)(model, batch()), causal_lm_loss(model, batch()))


def test_a_model_whose_routers_cannot_be_heard_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="answers hidden states with"):
        LossWithAuxiliary(build("gemma4_text"), COEFFICIENTS)


def gradients(model: Any, in_flight: int) -> dict[str, torch.Tensor]:
    """Of the backbone, with the experts on two hosts, of one attempt at a step of three micro-batches."""
    made = Cluster(
        model,
        optimizer=OptimizerSettings(kind="sgd", lr=0.1),
        settings=StepSettings(in_flight=in_flight, clip_norm=None),
    )
    (trainer,) = made.trainers
    trainer._loss = LossWithAuxiliary(trainer.model.train(), COEFFICIENTS)
    made.start()
    trainer.begin()
    share = trainer._share(trainer._accumulate_all(lambda step: [batch(seed, seed) for seed in range(3)], 1))
    assert share.error is None
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_with_the_experts_elsewhere_routers_get_the_same_gradients() -> None:
    model: Any = build("mixtral").double()
    model.set_experts_implementation("eager")
    one, several = gradients(model, 1), gradients(model, 3)
    assert all(torch.equal(one[name], several[name]) for name in one)
    model.train()
    loss = LossWithAuxiliary(model, COEFFICIENTS)
    sum(loss(model, batch(seed, seed)) for seed in range(3)).backward()  # type: ignore[union-attr]
    exact = dict(model.named_parameters())
    routers = [name for name in one if name.endswith("gate.weight")]
    assert len(routers) == model.config.num_hidden_layers
    for name in one:
        torch.testing.assert_close(one[name], exact[name].grad, rtol=1e-8, atol=1e-11)


def test_a_configuration_names_losses_and_coefficients() -> None:
    train = TrainConfig.model_validate({"auxiliary": {"load_balancing": 0.01, "router_z": 0}})
    assert train.auxiliary.coefficients == {"load_balancing": 0.01}
    assert TrainConfig().auxiliary.coefficients == {}
    for wrong in ({"load_balancing": -1}, {"balance": 1}):
        with pytest.raises(ValidationError):
            TrainConfig.model_validate({"auxiliary": wrong})
