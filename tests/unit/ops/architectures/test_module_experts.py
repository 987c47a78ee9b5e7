"""Experts that are any module: of rows and of items, of one kind and of many, here and on hosts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from ray_moe import MoELayer
from ray_moe.errors import InvalidConfig, InvalidRequest, UnsupportedModel
from ray_moe.models.experts import drop_parameters, experts_modules, install, make_shard, without_experts
from ray_moe.ops.architectures.items import ItemMoELayer, mean_of_image
from ray_moe.ops.architectures.module_experts import SeparateModules, StackedModules, module_experts
from ray_moe.ops.experts import StackedExperts
from ray_moe.ops.lora import ExpertAdapters
from ray_moe.policy.placement import place_by_index
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.training.network import whole_state_dict
from ray_moe.training.settings import ExchangeSettings
from ray_moe.transport.local import LocalTransport
from ray_moe.types import RoutingTable
from tests.unit.ops.architectures.elsewhere import Network, loss_of, regression, same_elsewhere, trainer_of

WIDTH, EXPERTS = 6, 4


class Perceptron(nn.Module):
    """Of one row, with what the package's own experts do not have: a norm, a bias, a skip and a scale of its own."""

    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3), nn.LeakyReLU(slope), nn.Linear(3, WIDTH))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = rows + self.scale * self.net(rows)
        return out


class Conv(nn.Module):
    """Of a sequence [n, S, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(items.transpose(1, 2)).transpose(1, 2)
        return out


class Attention(nn.Module):
    """Of a sequence [n, S, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.attention(items, items, items, need_weights=False)[0]
        return out


def seeded(kind: Any) -> list[Any]:
    torch.manual_seed(1)
    return [kind() for _ in range(EXPERTS)]


MIXED = (Perceptron, lambda: nn.Linear(WIDTH, WIDTH), nn.Identity, lambda: nn.Sequential(nn.BatchNorm1d(WIDTH)).eval())


def mixed() -> list[Any]:
    torch.manual_seed(1)
    return [make() for make in MIXED]


def loop(layer: MoELayer, modules: list[Any], items: torch.Tensor) -> torch.Tensor:
    """One item and one choice after the other, from what the gate has just chosen."""
    assert layer.routing is not None
    outs = []
    for item, choices, weights in zip(items, layer.routing.index.tolist(), layer.routing.weight, strict=True):
        terms = [weight * modules[expert](item[None])[0] for expert, weight in zip(choices, weights, strict=True)]
        outs.append(sum(terms, torch.zeros_like(item)))
    return torch.stack(outs)


def compare(layer: Any, modules: list[Any], items: torch.Tensor) -> None:
    """Outputs, and gradients of the items, the gate and each expert."""
    items = items.requires_grad_()
    out = layer(items)
    wanted = loop(layer, modules, items)
    torch.testing.assert_close(out, wanted)
    slope = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    inputs = [items, layer.gate.weight]
    learned = [*inputs, *layer.experts.parameters()]
    ours = torch.autograd.grad((out * slope).sum(), learned, allow_unused=True, retain_graph=True)  # of the gate, again
    every = [parameter for module in modules for parameter in module.parameters()]
    theirs = torch.autograd.grad((wanted * slope).sum(), [*inputs, *every], allow_unused=True)
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine, other)
    wanted_of = {id(p): torch.zeros_like(p) if g is None else g for p, g in zip(every, theirs[2:], strict=True)}
    for (name, parameter), grad in zip(layer.experts.named_parameters(), ours[2:], strict=True):
        if isinstance(layer.experts, StackedModules):
            theirs_of_name = [wanted_of[id(module.get_parameter(name.replace(":", ".")))] for module in modules]
            torch.testing.assert_close(grad, torch.stack(theirs_of_name))
        else:
            torch.testing.assert_close(torch.zeros_like(parameter) if grad is None else grad, wanted_of[id(parameter)])


# --- Rows ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [lambda: seeded(Perceptron), mixed], ids=["one kind", "mixed"])
def test_rows_and_gradients_are_those_of_the_modules(make) -> None:
    modules = [module.double() for module in make()]
    layer = MoELayer(WIDTH, None, EXPERTS, 2, experts=modules, seed=0).double()
    assert isinstance(layer.experts, SeparateModules if make is mixed else StackedModules)
    compare(layer, modules, torch.randn(9, WIDTH, dtype=torch.float64))
    hidden = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(layer(hidden).view(6, -1), layer(hidden.view(6, -1)))


def test_modules_of_one_kind_are_copied_and_their_names_stay_readable() -> None:
    modules = seeded(Perceptron)
    layer = MoELayer(WIDTH, None, EXPERTS, experts=modules)
    assert [name for name, _ in layer.experts.named_parameters()] == [
        "scale",
        *(f"net:{number}:{name}" for number in (0, 1, 3) for name in ("weight", "bias")),
    ]
    assert torch.equal(layer.experts.get_parameter("net:1:weight")[2], modules[2].net[1].weight)
    with torch.no_grad():
        modules[2].net[1].weight.zero_()
    assert layer.experts.get_parameter("net:1:weight")[2].any()
    again = MoELayer(WIDTH, None, EXPERTS, experts=nn.ModuleList(seeded(Perceptron)))
    again.load_state_dict(layer.state_dict())
    hidden = torch.randn(5, WIDTH)
    torch.testing.assert_close(copy.deepcopy(again)(hidden), layer(hidden))


@pytest.mark.parametrize(
    ("modules", "one_kind"),
    [
        ([nn.Linear(2, 2), nn.Linear(2, 2)], True),
        ([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)], False),
        ([nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 3, padding=1)], True),
        ([nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")], False),
        ([Perceptron(0.1), Perceptron(0.1)], True),
        ([Perceptron(0.1), Perceptron(0.2)], False),  # an option that no weight shows
        ([nn.BatchNorm1d(2), nn.BatchNorm1d(2)], False),  # buffers
        ([nn.Identity(), nn.Identity()], False),  # nothing to hold
        ([nn.Linear(2, 2), nn.Linear(2, 2).double()], False),
        ([nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)], False),
        ([nn.GRU(2, 2), nn.GRU(2, 2)], False),  # keeps its weights in a list beside
        ([nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2)], True),
        ([nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 1)], False),
    ],
)
def test_one_kind_is_what_differs_in_its_weights_alone(modules, one_kind) -> None:
    assert isinstance(module_experts(modules), StackedModules if one_kind else SeparateModules)


def test_a_function_makes_the_expert_with_a_number() -> None:
    made: list[int] = []
    experts = module_experts(lambda number: made.append(number) or nn.Linear(2, 2), 3)  # type: ignore[func-returns-value]
    assert made == [0, 1, 2] and experts.num_experts == 3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: module_experts([]), r"one at least; got \[\]"),
        (lambda: module_experts([nn.Identity(), len]), r"one at least; got \['Identity', 'builtin"),  # type: ignore[list-item]
        (lambda: module_experts([nn.Linear(2, 2)] * 2), "there twice"),
        (lambda: module_experts(lambda n: nn.Identity()), "num_experts is None"),
        (lambda: module_experts([nn.Identity()], 2), "num_experts is 2, and there are 1"),
        (lambda: module_experts([nn.Identity()], item_shape=(-1, -1)), r"item_shape is \(-1, -1\)"),
        (lambda: MoELayer(2, None, 3, experts=[nn.Identity()]), "are 1 modules; num_experts is 3"),
        (lambda: MoELayer(2, 4, 1, experts=[nn.Identity()]), "expert_size is 4 and has to be None"),
        (lambda: MoELayer(2, None, 3), "expert_size is None, which is for experts that are modules"),
        (lambda: module_experts(seeded(Perceptron)).reset_parameters(), "came with their weights"),
    ],
)
def test_what_cannot_be_is_refused(make, said) -> None:
    with pytest.raises(InvalidConfig, match=said):
        make()


def test_an_expert_that_changes_the_shape_is_named_for_it() -> None:
    layer = MoELayer(4, None, 2, 1, experts=[nn.Linear(4, 3), nn.Linear(4, 3)])
    with pytest.raises(InvalidRequest, match=r"answered \[\d, 3\]; it must keep the shape"):
        layer(torch.randn(2, 4))
    items = ItemMoELayer(4, [nn.Linear(4, 4)], top_k=1, item_shape=(3, 4))
    with pytest.raises(InvalidRequest, match=r"a row of 8 numbers is no item of the shape \[3, 4\]"):
        items(torch.randn(5, 2, 4))


# --- Items ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [Conv, Attention])
def test_whole_sequences_are_routed_and_seen_whole(kind) -> None:
    modules = [module.double() for module in seeded(kind)]
    layer = ItemMoELayer(WIDTH, modules, top_k=2, item_shape=(-1, WIDTH), seed=0).double()
    assert isinstance(layer.experts, StackedModules)
    for length in (5, 3):  # of any length, from call to call
        compare(layer, modules, torch.randn(7, length, WIDTH, dtype=torch.float64))
    items = torch.randn(7, 5, WIDTH, dtype=torch.float64)
    layer(items)
    expected = (items.sum(1) / 5) @ layer.gate.weight.t()
    torch.testing.assert_close(layer.routing.logits, expected)  # type: ignore[union-attr]


def test_whole_images_are_routed_to_experts_of_different_kinds() -> None:
    torch.manual_seed(1)
    modules = [nn.Conv2d(3, 3, 3, padding=1).double(), nn.Identity(), nn.Conv2d(3, 3, 1).double()]
    layer = ItemMoELayer(3, modules, top_k=2, item_shape=(3, 4, 5), summary=mean_of_image, seed=0).double()
    assert isinstance(layer.experts, SeparateModules)
    compare(layer, modules, torch.randn(6, 3, 4, 5, dtype=torch.float64))


# --- Elsewhere -----------------------------------------------------------------------------------------------
def test_modules_of_one_kind_learn_the_same_on_hosts() -> None:
    layer = MoELayer(WIDTH, None, EXPERTS, 2, experts=seeded(Perceptron), seed=0)
    same_elsewhere(Network(WIDTH, layer), loss_of, lambda seed: regression(seed, 4, 3))


@pytest.mark.parametrize("kind", [Conv, Attention])
def test_experts_of_whole_sequences_learn_the_same_on_hosts(kind) -> None:
    layer = ItemMoELayer(WIDTH, seeded(kind), top_k=2, item_shape=(-1, WIDTH), seed=0)
    same_elsewhere(Network(WIDTH, layer), loss_of, lambda seed: regression(seed, 5, 3 + seed % 2, 3))


@pytest.mark.parametrize("kind", [Perceptron, Conv])
def test_modules_of_one_kind_compute_the_same_on_hosts(kind) -> None:
    modules = seeded(kind)
    if kind is Perceptron:
        here: Any = MoELayer(WIDTH, None, EXPERTS, 2, experts=modules, seed=0)
        items = torch.randn(7, WIDTH)
    else:
        here = ItemMoELayer(WIDTH, modules, top_k=2, item_shape=(-1, WIDTH), seed=0)
        items = torch.randn(7, 5, WIDTH)
    there = copy.deepcopy(here)
    hosts = {name: ExpertHost(name) for name in ("one", "two", "three")}
    placement = place_by_index({"experts": EXPERTS}, list(hosts))
    for name, host in hosts.items():
        for path, held in placement.experts_on(name).items():
            group = StackedExperts(make_shard(there.experts, held))
            assert group.device == torch.device("cpu")
            group.warm_up()
            host.hold(path, held, group)
    transport = LocalTransport(hosts)
    dispatcher = ExpertDispatcher(transport)
    dispatcher.update(RoutingTable(1, placement, {name: transport.address(name) for name in hosts}))
    drop_parameters(there)
    install(there, dispatcher.forward)
    assert [name for name, _ in there.named_parameters()] == ["gate.weight"]
    with torch.no_grad():
        torch.testing.assert_close(there(items), here(items))
    transport.close()


def test_adapters_of_modules_change_their_matrices_by_no_more_than_their_rank() -> None:
    model = Network(WIDTH, MoELayer(WIDTH, None, EXPERTS, 2, experts=seeded(Perceptron), seed=0)).double()
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_of(model, loss_of, adapters=ExpertAdapters(rank=1, alpha=2.0))
    trainer.start()
    trainer.make_step(lambda step: [regression(step, 4, 3)])
    trainer.make_step(lambda step: [regression(step, 4, 3)])
    after = whole_state_dict(trainer)
    change = after["layer.experts.net:1:weight"] - before["layer.experts.net:1:weight"]
    assert torch.linalg.matrix_rank(change, rtol=1e-9).max() == 1
    assert torch.equal(after["layer.experts.scale"], before["layer.experts.scale"])


def test_experts_of_different_kinds_stay_with_the_worker_and_learn_there() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            modules = [nn.Linear(WIDTH, WIDTH), nn.Identity(), Perceptron(0.3)]
            self.first, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 1)
            self.here = MoELayer(WIDTH, None, 3, 2, experts=modules, seed=0)
            self.hosted = MoELayer(WIDTH, 4, 3, 2, seed=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            hidden = hidden + self.here(hidden)
            out: torch.Tensor = self.last(hidden + self.hosted(hidden))
            return out

    model = Two()
    assert list(experts_modules(model)) == ["hosted.experts"]
    same_elsewhere(model, loss_of, lambda seed: regression(seed, 4, 3))


def test_what_hosts_cannot_have_is_refused() -> None:
    different = MoELayer(WIDTH, None, 2, experts=[nn.Identity(), Perceptron()])
    with pytest.raises(InvalidConfig, match=r"modules of different kinds \(Identity, Perceptron\)"):
        different.experts.answer_with(lambda *_: torch.zeros(()), "experts")
    with pytest.raises(InvalidConfig, match=r"no experts.*different kinds"):
        trainer_of(Network(WIDTH, different), loss_of)
    same = Network(WIDTH, MoELayer(WIDTH, None, EXPERTS, experts=seeded(Perceptron)))
    with pytest.raises(UnsupportedModel, match="modules of another kind than a feed-forward network"):
        trainer_of(same, loss_of, exchange=ExchangeSettings(num_parts=3))


def test_how_modules_compute_travels_without_their_weights() -> None:
    torch.manual_seed(0)
    experts = module_experts([nn.TransformerEncoderLayer(64, 2, 256, dropout=0.0) for _ in range(2)])
    assert isinstance(experts, StackedModules)
    assert len(pickle.dumps(without_experts(experts))) < 20_000 < sum(p.nbytes for p in experts.parameters())
