"""Methods on any network: what they do to a step, that they do it once, and that they can be taken away."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ray_moe
from ray_moe import Methods, MoELayer
from ray_moe.errors import InvalidConfig, UnsupportedModel
from ray_moe.ops.gates.base import Routing
from ray_moe.ops.methods.base import Method, Ramp
from ray_moe.ops.methods.curriculum import ActiveExperts, Anneal
from ray_moe.ops.methods.dropout import ExpertDropout, InnerDropout
from ray_moe.ops.methods.warmup import FreezeGate, RandomRouting
from tests import tiny_models
from tests.unit.ops.methods.network import EXPERTS, WIDTH, adam, loss_of, network, rows, train

SEVERAL = (ActiveExperts(Ramp(4, 1, steps=6)), RandomRouting(2, seed=3), ExpertDropout(0.4, seed=5), FreezeGate(1, 5))


def test_the_driver_is_at_the_root() -> None:
    assert ray_moe.Methods is Methods


def test_a_step_that_is_made_again_is_the_same_again() -> None:
    once, again = network(), network()
    first, second = adam(once), adam(again)
    wanted = train(once, first, Methods(once, SEVERAL, first), range(8))
    methods = Methods(again, SEVERAL, second)
    given = train(again, second, methods, range(4))
    state, moments = copy.deepcopy(again.state_dict()), copy.deepcopy(second.state_dict())
    train(again, second, methods, range(4, 7))  # lost, and made again by a loop that knows nothing of them
    again.load_state_dict(state)
    second.load_state_dict(moments)
    for _ in range(3):
        methods.remove()
        methods = Methods(again, SEVERAL, second)
        methods.apply(4)
    assert given + train(again, second, methods, range(4, 8)) == wanted


def test_a_forward_pass_that_is_computed_again_is_the_same_again() -> None:
    model = network()
    Methods(model, SEVERAL[1:3]).apply(1)
    wanted = torch.autograd.grad(model(rows(0)).square().sum(), list(model.parameters()), allow_unused=True)
    out = checkpoint(model, rows(0), use_reentrant=False)
    torch.manual_seed(7)
    given = torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)
    for mine, other in zip(given, wanted, strict=True):
        assert (mine is None) == (other is None) and (mine is None or torch.equal(mine, other))


def test_without_methods_a_network_is_what_it_was() -> None:
    model, plain = network(), network()
    methods = Methods(model, [*SEVERAL[1:], InnerDropout(0.5)])
    assert torch.equal(model(rows(0)), plain(rows(0)))  # nothing is done before the first step
    methods.apply(0)
    assert not torch.equal(model(rows(0)), plain(rows(0)))
    assert model.state_dict().keys() == plain.state_dict().keys()
    methods.remove()
    assert torch.equal(model(rows(0)), plain(rows(0)))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.layers[0].experts.act_fn is plain.layers[0].experts.act_fn


def test_outside_training_nothing_is_dropped_or_random() -> None:
    model, plain = network().eval(), network().eval()
    Methods(model, [*SEVERAL[1:], InnerDropout(0.5)]).apply(0)
    assert torch.equal(model(rows(0)), plain(rows(0)))


@pytest.mark.parametrize("gate", ["topk", "noisy_topk", "sigmoid", "topk_random", "hard_concrete", "hash"])
def test_k_follows_its_schedule(gate: str) -> None:
    model = network(gate=gate)
    more = gate == "topk_random"
    methods = Methods(model, [ActiveExperts(Ramp(1, 4, steps=6, begin=2))])
    seen = []
    for step in [0, 2, 3, 4, 5, 6, 7, 8, 20, 0]:
        methods.apply(step)
        model(rows(0))
        seen.append({layer.routing.index.shape[1] - more for layer in model.layers})
    assert seen == [{1}, {1}, {2}, {2}, {3}, {3}, {4}, {4}, {4}, {1}]


def test_k_of_routers_of_transformers_follows_its_schedule() -> None:
    model = tiny_models.build("mixtral")
    tokens = torch.arange(8)[None]
    asked: list[int] = []
    for path, module in model.named_modules():
        if path.endswith("experts"):
            module.register_forward_pre_hook(lambda module, given: asked.append(given[1].shape[1]))
    methods = Methods(model, [ActiveExperts(Ramp(1, 3, steps=2))])
    for step in range(3):
        methods.apply(step)
        model(tokens)
    assert asked == [1, 1, 2, 2, 3, 3]


def test_experts_of_transformers_are_dropped() -> None:
    model = tiny_models.build("mixtral").train()
    dropout = ExpertDropout(0.5, seed=1)
    methods = Methods(model, [dropout, FreezeGate(before=1)])
    methods.apply(0)
    seen: dict[str, set[int]] = {}
    for path, module in model.named_modules():
        if path.endswith("experts"):
            module.register_forward_pre_hook(
                lambda module, given, path=path: seen.update({path: set(given[1].flatten().tolist())})
            )
    loss = model(torch.randint(0, 96, (2, 40)), labels=torch.randint(0, 96, (2, 40))).loss
    loss.backward()
    out = [set(dropout.dropped(site, 0)) for site in methods.network.sites]
    assert any(out)
    for dropped, chosen in zip(out, seen.values(), strict=True):
        assert not chosen & dropped and (6 in chosen) == bool(dropped)
    routers = [p for name, p in model.named_parameters() if name.endswith("gate.weight")]
    assert routers and all(p.grad is None for p in routers)


def test_a_frozen_gate_is_left_as_it_is_and_goes_on_later() -> None:
    model = network()
    optimizer = adam(model)
    methods = Methods(model, [FreezeGate(before=3, after=6)])
    moved = []
    for step in range(9):
        before = [layer.gate.weight.detach().clone() for layer in model.layers]
        train(model, optimizer, methods, range(step, step + 1))
        pairs = zip(before, model.layers, strict=True)
        moved.append([not torch.equal(old, layer.gate.weight) for old, layer in pairs])
    assert moved == [[False] * 2] * 3 + [[True] * 2] * 3 + [[False] * 2] * 3


def test_what_was_frozen_before_stays_frozen() -> None:
    model = network()
    model.layers[0].gate.weight.requires_grad_(False)
    with pytest.raises(InvalidConfig, match=r"the gate of layers\.0 has nothing to freeze"):
        Methods(model, [FreezeGate(before=3)])


class Two(nn.Module):
    """A gate that sends each token to experts 0 and 1 + (its number mod 3), and the third to nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(EXPERTS, WIDTH))

    def forward(self, hidden: torch.Tensor) -> Routing:
        number = torch.arange(len(hidden))
        index = torch.stack([torch.zeros_like(number), 1 + number % 3, torch.full_like(number, EXPERTS)], dim=1)
        weight = torch.tensor([[0.5, 0.25, 0.0]], dtype=hidden.dtype).expand(len(hidden), 3)
        return Routing(index, weight, hidden @ self.weight.t())


def test_random_routing_sends_as_many_tokens_with_the_same_weight_to_anyone() -> None:
    layer: Any = MoELayer(WIDTH, 4, EXPERTS, gate=Two(), seed=0).double()
    methods = Methods(layer, [RandomRouting(steps=2, seed=1)])
    hidden = torch.randn(500, WIDTH, dtype=torch.float64)
    drawn = []
    for step in (0, 1, 2):
        methods.apply(step)
        layer(hidden)
        drawn.append(layer.routing)
    assert torch.equal(drawn[2].index, Two()(hidden.float()).index)
    assert not torch.equal(drawn[0].index, drawn[1].index)
    for routing in drawn[:2]:
        for chosen, weights in zip(routing.index.tolist(), routing.weight.tolist(), strict=True):
            assert len(set(chosen[:2])) == 2 and max(chosen[:2]) < EXPERTS and chosen[2] == EXPERTS
            assert weights == pytest.approx([0.375, 0.375, 0.0])
        share = torch.bincount(routing.index[:, :2].flatten(), minlength=EXPERTS) / 1000
        assert share.min() > 0.15 and share.max() < 0.25  # 0.2 ± 4 standard deviations of a count of 1,000


def test_dropped_experts_answer_nobody_and_the_others_make_up_for_it() -> None:
    layer: Any = MoELayer(WIDTH, 4, EXPERTS, gate=Two(), seed=0).double()
    dropout = ExpertDropout(0.5, seed=2)
    methods = Methods(layer, [dropout])
    hidden = torch.randn(30, WIDTH, dtype=torch.float64)
    (site,) = methods.network.sites
    seen = set()
    for step in range(12):
        methods.apply(step)
        layer(hidden)
        out = dropout.dropped(site, step)
        seen.add(tuple(out))
        assert len(out) < EXPERTS
        for token, (chosen, weights) in enumerate(
            zip(layer.routing.index.tolist(), layer.routing.weight.tolist(), strict=True)
        ):
            left = {expert: share for expert, share in ((0, 0.5), (1 + token % 3, 0.25)) if expert not in out}
            wanted = {expert: share * 0.75 / sum(left.values()) for expert, share in left.items()}
            given = {expert: share for expert, share in zip(chosen, weights, strict=True) if expert < EXPERTS}
            assert given == pytest.approx(wanted)
    assert len(seen) > 4


def test_how_many_are_dropped_is_what_the_rate_says() -> None:
    methods = Methods(MoELayer(WIDTH, 4, 64), [])
    (site,) = methods.network.sites
    ramp = ExpertDropout(Ramp(0.0, 0.5, steps=100))
    assert ramp.dropped(site, 0) == []
    number = sum(len(ramp.dropped(site, step)) for step in range(100, 200)) / 6400
    assert number == pytest.approx(0.5, abs=0.03)
    assert len(ExpertDropout(0.99).dropped(site, 0)) < 64


@pytest.mark.parametrize("gated", [True, False])
def test_units_within_experts_are_dropped_and_the_mean_stays(gated: bool) -> None:
    layer: Any = MoELayer(WIDTH, 4, 2, 2, gated=gated, seed=0).double()
    plain = copy.deepcopy(layer)
    Methods(layer, [InnerDropout(0.25)]).apply(0)
    hidden = torch.randn(1, WIDTH, dtype=torch.float64).expand(4000, WIDTH)
    torch.manual_seed(0)
    given, wanted = layer(hidden), plain(hidden)
    assert len({round(value, 9) for value in given[:, 0].tolist()}) > 10
    torch.testing.assert_close(given.mean(0), wanted[0], atol=0.01, rtol=0.05)


def test_inner_dropout_of_transformers_comes_and_goes() -> None:
    model = tiny_models.build("mixtral").train()
    tokens = torch.arange(8)[None]
    wanted = model(tokens).logits
    methods = Methods(model, [InnerDropout(Ramp(0.0, 0.5, steps=1))])
    methods.apply(0)
    assert torch.equal(model(tokens).logits, wanted)
    methods.apply(1)
    assert not torch.equal(model(tokens).logits, wanted)
    methods.remove()
    assert torch.equal(model(tokens).logits, wanted)


def test_gates_with_a_temperature_are_told_the_step() -> None:
    model = network(gate="gumbel")
    methods = Methods(model, [Anneal(begin=100)])
    for step, wanted in ((0, 1.0), (100, 1.0), (5100, 0.1**0.5), (100_000, 0.1)):
        methods.apply(step)
        assert float(model.layers[1].gate.temperature) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("shape", "wanted"), [("linear", [8, 8, 5, 2, 2]), ("cosine", [8, 8, 5, 2, 2]), ("exponential", [8, 8, 4, 2, 2])]
)
def test_a_ramp_is_a_function_of_the_step(shape: Any, wanted: list[float]) -> None:
    ramp = Ramp(8, 2, steps=10, begin=5, shape=shape)
    assert [ramp.at(step) for step in (0, 5, 10, 15, 99)] == pytest.approx(wanted)
    falling = [ramp.at(step) for step in range(5, 16)]
    assert falling == sorted(falling, reverse=True)


def elsewhere(path: str, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden


@pytest.mark.parametrize(
    ("model", "method", "said"),
    [
        (nn.Linear(2, 2), FreezeGate(1), "no MoE layer"),
        (MoELayer(4, 4, 4, gate=lambda hidden: None), FreezeGate(1), "the gate of the layer is a function"),  # type: ignore[arg-type]
        (MoELayer(4, 4, 4, gate="switch"), ActiveExperts(Ramp(1, 2, steps=1)), "SwitchGate of the layer has no top_k"),
        (MoELayer(4, 4, 4), ActiveExperts(Ramp(1, 5, steps=1)), "K becomes 5; the layer has 4 experts"),
        (MoELayer(4, 4, 4, gate="hierarchical"), ActiveExperts(Ramp(3, 1, steps=1)), "2 experts in a group"),
        (MoELayer(4, 4, 4), Anneal(), "no gate here has a temperature"),
        (MoELayer(4, 4, 4, gate="hash"), FreezeGate(1), "nothing to freeze"),
        (MoELayer(4, 4, 4, experts=elsewhere), InnerDropout(0.1), "elsewhere"),
        (MoELayer(4, 4, 4), "freeze", "'freeze' is no method of training"),
    ],
)
def test_what_a_method_cannot_work_on_is_refused(model: nn.Module, method: Method, said: str) -> None:
    before = repr(model)
    with pytest.raises(InvalidConfig, match=said):
        Methods(model, [method])
    assert repr(model) == before


def test_a_refusal_takes_away_what_was_attached_before() -> None:
    model = network()
    function = model.layers[0].experts.act_fn
    with pytest.raises(InvalidConfig):
        Methods(model, [InnerDropout(0.1), Anneal()])
    assert model.layers[0].experts.act_fn is function


class Logits(nn.Module):
    """A router that leaves the choice to its block."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.top_k = nn.Parameter(torch.zeros(6, 32)), 2

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight.t()


def test_routers_that_answer_otherwise_are_refused_before_anything_is_changed() -> None:
    model = tiny_models.build("mixtral")
    path = next(name for name, module in model.named_modules() if name.endswith("gate"))
    model.set_submodule(path, Logits())
    for method in (ExpertDropout(0.1), RandomRouting(2), ActiveExperts(Ramp(1, 2, steps=2))):
        with pytest.raises(UnsupportedModel, match=r"the router of .* does not answer \(logits"):
            Methods(model, [method])
    assert model.get_submodule(path).top_k == 2
    Methods(model, [FreezeGate(1)]).apply(0)
    model.set_submodule(path, nn.Identity())
    with pytest.raises(UnsupportedModel, match="no router of 6 experts beside"):
        Methods(model, [])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Ramp(1, 2, steps=0), "steps"),
        (lambda: Ramp(1, 2, steps=1, begin=-1), "begin"),
        (lambda: Ramp(0, 2, steps=1, shape="exponential"), "positive"),
        (lambda: Ramp(1, 2, steps=1, shape="up"), "linear, cosine, exponential"),  # type: ignore[arg-type]
        (lambda: Ramp(float("inf"), 2, steps=1), "finite"),
        (lambda: FreezeGate(before=5, after=3), "not before"),
        (lambda: RandomRouting(-1), "steps"),
        (lambda: ExpertDropout(1.0), "from 0 to below 1"),
        (lambda: ExpertDropout(Ramp(0.0, 1.0, steps=1)), "from 0 to below 1"),
        (lambda: InnerDropout(-0.1), "from 0 to below 1"),
        (lambda: Methods(network(), []).apply(-1), "step is -1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(make: Any, said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        make()


def test_a_copy_of_a_network_goes_by_the_same_methods() -> None:
    model = network()
    methods = Methods(model, [ExpertDropout(0.6, seed=1)])
    methods.apply(3)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(rows(0)), model(rows(0)))
    assert torch.equal(loss_of(twin, 1), loss_of(model, 1))
