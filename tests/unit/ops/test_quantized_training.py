"""Experts that are trained in 8 bits: what a step is, that small updates are not lost, and what comes out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ray_moe import MoELayer
from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.models.experts import drop_parameters, experts_modules, install
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.ops.quantized_training import Int8Training, bring_home, train_in_8_bits
from tests import tiny_models
from tests.unit.ops.methods.network import Network, loss_of, rows

COMPENSATIONS = ["none", "int8", "bfloat16"]
every = pytest.mark.parametrize("compensation", COMPENSATIONS)
ADAM = OptimizerSettings(lr=1e-2, weight_decay=0.1)


def small_network(**options: Any) -> Any:
    return Network(**options)


def loss(model: nn.Module, step: int) -> torch.Tensor:
    x = rows(step).float()
    return nn.functional.mse_loss(model(x), x.sum(-1, keepdim=True).sin())


def rounded(exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (as floats) and scales of the rows of [.., out, in], one row after the other."""
    codes, scales = torch.zeros_like(exact), torch.zeros(*exact.shape[:-1], 1)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in exact.shape[:-1])).tolist():
        row = exact[tuple(place)]
        scales[tuple(place)] = row.abs().max() / 127
        codes[tuple(place)] = (row / scales[tuple(place)]).round()
    return codes, scales


@every
def test_steps_are_those_of_a_float_copy_whose_weights_are_rounded(compensation: Any) -> None:
    """Against a plain loop: gradients of rounded weights move the exact ones, which are then rounded again."""
    model, plain = small_network(bias=True), small_network(bias=True)
    training = train_in_8_bits(model, ADAM, compensation)
    rest, plain_rest = (
        torch.optim.SGD([p for n, p in each.named_parameters() if "experts" not in n], lr=0.05)
        for each in (model, plain)
    )
    stacks = {name: p for name, p in plain.named_parameters() if "experts" in name}
    exact = {name: nn.Parameter(p.detach().clone()) for name, p in stacks.items()}
    adam = torch.optim.AdamW(
        [
            {"params": [p for n, p in exact.items() if p.ndim == 3]},
            {"params": [p for n, p in exact.items() if p.ndim == 2]},
        ],
        lr=1e-2,
        weight_decay=0.1,
    )
    for step in range(4):
        for name, p in stacks.items():
            if p.ndim == 3:
                codes, scales = rounded(exact[name].detach())
                p.data.copy_(codes * scales)
                lost = exact[name].detach() - codes * scales
                if compensation == "none":
                    lost = torch.zeros_like(lost)
                elif compensation == "int8":
                    lost = (lost / scales * 254).round() * scales / 254
                else:
                    lost = lost.bfloat16().float()
                exact[name].data.copy_(codes * scales + lost)
            else:
                p.data.copy_(exact[name])
        wanted, given = loss(plain, step), loss(model, step)
        torch.testing.assert_close(given, wanted)
        wanted.backward()
        given.backward()
        norm = sum(float(p.grad.square().sum()) for p in stacks.values() if p.grad is not None) ** 0.5
        assert training.grad_norm() == pytest.approx(norm, rel=1e-4)
        for name, p in stacks.items():
            exact[name].grad = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for each in (rest, plain_rest, adam, training):
            each.step()
        rest.zero_grad()
        plain.zero_grad()


def test_gradients_of_all_else_are_those_of_the_rounded_weights() -> None:
    model = small_network()
    training = train_in_8_bits(model, ADAM)
    plain = copy.deepcopy(model)
    bring_home(plain, training)
    assert not [name for name, _ in model.named_parameters() if "experts" in name]
    for each in (model, plain):
        loss(each, 0).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain.get_parameter(name).grad)
    for path, layer in training.layers.items():
        for name, stack in layer.stacks.items():
            torch.testing.assert_close(stack.grad, plain.get_parameter(f"{path}.experts.{name}").grad)


def test_what_is_accumulated_is_the_sum_and_can_be_forgotten() -> None:
    model = small_network()
    training = train_in_8_bits(model, ADAM)

    def gradients() -> dict[tuple[str, str], Any]:
        return {(path, n): stack.grad for path, layer in training.layers.items() for n, stack in layer.stacks.items()}

    loss(model, 0).backward()
    first = gradients()
    training.zero_grad()
    loss(model, 1).backward()
    second = gradients()
    training.zero_grad()
    assert training.grad_norm() == 0
    loss(model, 0).backward()
    loss(model, 1).backward()
    for name, given in gradients().items():
        torch.testing.assert_close(given, first[name] + second[name])


@every
def test_small_updates_add_up_unless_they_are_lost(compensation: Any) -> None:
    """A constant gradient moves one weight by 1/50 of a code each step, next to one that is large and stays."""
    layer = MoELayer(2, 1, 1, 1, gated=False, activation=lambda x: x, seed=0)
    layer.experts.up_proj.data[:] = torch.tensor([[[127.0, 10.0]]])
    layer.experts.down_proj.data[:] = torch.tensor([[[1.0], [0.0]]])
    training = train_in_8_bits(layer, OptimizerSettings(kind="sgd", lr=0.02), compensation)
    hidden = torch.tensor([[0.0, 1.0]])
    for _ in range(200):
        layer(hidden)[0, 0].backward()
        training.layers[""].stacks["down_proj"].grad = None  # only the first matrix moves
        training.step()
    moved = 10 - float(training.weights("")["up_proj"][0, 0, 1])
    # 200 updates of 0.02 are 4 codes of 1; kept in 1/254 of a code, an update of 0.02 is 0.01969.
    assert moved == pytest.approx(0 if compensation == "none" else 4, abs=0.2)


@every
def test_weights_have_one_two_or_three_bytes(compensation: Any) -> None:
    layer = MoELayer(256, 128, 2)
    whole = sum(p.numel() for p in layer.experts.parameters())
    training = train_in_8_bits(layer, ADAM, compensation)
    each = {"none": 1, "int8": 2, "bfloat16": 3}[compensation]
    assert each * whole < training.nbytes < 1.05 * each * whole
    layer(torch.randn(8, 256)).sum().backward()
    training.step()
    assert each * whole < training.nbytes < 1.05 * each * whole
    assert all(not stack.parameter.numel() for stack in training.layers[""].stacks.values())


@every
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_training_goes_on_from_what_was_saved(compensation: Any, kind: Any) -> None:
    settings = OptimizerSettings(kind=kind, lr=1e-2, momentum=0.9 if kind == "sgd" else 0.0)
    model = small_network(bias=True)
    training = train_in_8_bits(model, settings, compensation)

    def steps(model: nn.Module, training: Int8Training, some: range) -> list[float]:
        losses = []
        for step in some:
            value = loss(model, step)
            value.backward()
            training.step()
            losses.append(float(value.detach()))
        return losses

    steps(model, training, range(3))
    saved = {name: tensor.clone() for name, tensor in training.state_dict().items()}
    wanted = steps(model, training, range(3, 6))
    other = small_network(bias=True)
    again = train_in_8_bits(other, settings, compensation)
    steps(other, again, range(5, 7))
    again.load_state_dict(saved)
    assert steps(other, again, range(3, 6)) == wanted
    with pytest.raises(InvalidConfig, match="no layer for"):
        again.load_state_dict({**saved, "elsewhere.x": torch.zeros(1)})
    with pytest.raises(InvalidConfig, match="missing or of another shape"):
        again.load_state_dict({name: tensor for name, tensor in saved.items() if not name.endswith("down_proj.codes")})
    with pytest.raises(InvalidConfig, match="belongs to no weight"):
        again.load_state_dict({**saved, f"{next(iter(training.layers))}.other.codes": torch.zeros(1)})


def test_what_was_trained_is_served_with_the_same_codes() -> None:
    model = small_network(bias=True)
    training = train_in_8_bits(model, ADAM)
    for step in range(3):
        loss(model, step).backward()
        training.step()
    for path, layer in training.layers.items():
        group = training.group(path)
        for name, stack in layer.stacks.items():
            assert torch.equal(group.tensors(range(5))[0][name], stack.small.codes)
    hidden = torch.randn(7, 6)
    path, moe = next(iter(zip(training.layers, model.layers, strict=True)))
    index = torch.full((7, 1), 2)
    with torch.no_grad():
        wanted = moe.experts(hidden, index, torch.ones(7, 1))
        torch.testing.assert_close(training.group(path).run(hidden, [2], [7]), wanted)
    x = rows(9).float()
    wanted = model(x)
    bring_home(model, training)
    torch.testing.assert_close(model(x), wanted)
    assert model.layers[0].experts.gate_up_proj.requires_grad


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_model_of_transformers_learns_in_8_bits(family: str) -> None:
    model = tiny_models.build(family).train()
    training = Int8Training(experts_modules(model), OptimizerSettings(lr=3e-3))
    drop_parameters(model)
    install(model, training)
    rest = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.arange(24).reshape(2, 12)
    losses = []
    for _ in range(12):
        value = model(tokens, labels=tokens).loss
        value.backward()
        rest.step()
        training.step()
        rest.zero_grad()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(training.group(path).nbytes for path in training.layers)


def test_optimizer_state_can_be_in_8_bits_too() -> None:
    """A matrix of 4,096 numbers or more has its moments in bytes."""
    torch.manual_seed(0)
    layer = MoELayer(64, 64, 2, 1, seed=0)
    training = train_in_8_bits(layer, OptimizerSettings(kind="adamw8bit", lr=3e-3))
    hidden, wanted = torch.randn(32, 64), torch.randn(32, 64)
    losses = []
    for step in range(20):
        value = nn.functional.mse_loss(layer(hidden), wanted)
        value.backward()
        training.step()
        losses.append(float(value.detach()))
        if step == 9:
            saved = {name: tensor.clone() for name, tensor in training.state_dict().items()}
    assert losses[-1] < 0.97 * losses[0]
    assert saved[".gate_up_proj.exp_avg"].dtype is torch.uint8
    training.load_state_dict(saved)
    again = [float(nn.functional.mse_loss(layer(hidden), wanted).detach())]
    assert again == losses[10:11]


def test_tokens_that_go_to_nobody_are_zero_and_wrong_ones_refused() -> None:
    layer = MoELayer(4, 4, 3, seed=0)
    training = train_in_8_bits(layer, ADAM)
    nobody = layer.experts(torch.randn(2, 4), torch.full((2, 2), 3), torch.ones(2, 2))
    assert torch.equal(nobody, torch.zeros(2, 4))
    assert layer(torch.zeros(0, 4)).shape == (0, 4)
    with pytest.raises(InvalidRequest, match="sent to expert 4"):
        training("", torch.zeros(1, 4), torch.tensor([[4]]), torch.ones(1, 1))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: train_in_8_bits(nn.Linear(2, 2)), "no ray_moe.MoELayer"),
        (lambda: train_in_8_bits(MoELayer(4, 4, 2), compensation="fp4"), "none, int8, bfloat16"),  # type: ignore[arg-type]
        (lambda: train_in_8_bits(MoELayer(4, 4, 2), OptimizerSettings(offload="cpu")), "offload is cpu"),
        (lambda: train_in_8_bits(MoELayer(4, 4, 2, experts=lambda path, h, i, w: h)), "elsewhere"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        make()


def test_with_compensation_a_network_comes_closer_to_what_it_learns_in_float() -> None:
    """Late in training updates are small: as much is learned in float as with compensation, and less without."""
    last = {}
    for compensation in ["float", *COMPENSATIONS]:
        model = small_network(num_experts=3)
        experts: Any = None
        settings = OptimizerSettings(lr=2e-3)
        if compensation != "float":
            experts = train_in_8_bits(model, settings, compensation)  # type: ignore[arg-type]
        rest = (
            torch.optim.AdamW([p for n, p in model.named_parameters() if "experts" in n], lr=2e-3, weight_decay=0)
            if experts is None
            else None
        )
        for step in range(120):
            value = loss(model, step % 4)
            value.backward()
            (rest or experts).step()
            model.zero_grad()
        with torch.no_grad():
            last[compensation] = sum(float(loss(model, step)) for step in range(4)) / 4
    assert last["int8"] == pytest.approx(last["float"], rel=0.01)
    assert last["bfloat16"] == pytest.approx(last["float"], rel=0.01)
    assert last["none"] > 1.1 * last["float"]


def test_double_networks_are_computed_in_double() -> None:
    model = small_network().double()
    training = train_in_8_bits(model, ADAM)
    value = loss_of(model, 0)
    assert value.dtype is torch.float64
    value.backward()
    training.step()
    assert training.weights(next(iter(training.layers)))["down_proj"].dtype is torch.float64
