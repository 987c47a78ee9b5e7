"""`ray_moe.MoELayer`: what it computes and learns, with experts here and elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from ray_moe import MoELayer
from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.models.experts import drop_parameters, experts_modules, install, make_shard
from ray_moe.ops.experts import StackedExperts
from ray_moe.ops.gates.base import Routing, TokenInfo
from ray_moe.ops.gates.topk import TopKGate, TopKSettings
from ray_moe.ops.routed_experts import ACTIVATIONS, Experts
from ray_moe.policy.placement import place_by_index
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.transport.local import LocalTransport
from ray_moe.types import RoutingTable
from tests.toy import random_routing

KINDS = [
    {"gated": gated, "bias": bias, "activation": activation}
    for gated, bias, activation in [
        (True, False, "silu"),
        (True, True, "gelu"),
        (False, False, "relu"),
        (False, True, "gelu_tanh"),
    ]
]


def loop(experts: Experts, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The contract, one token and one choice after the other; written without any of the package's mathematics."""
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    outs = []
    for token, choices, weights in zip(hidden, index.tolist(), weight, strict=True):
        out = torch.zeros_like(token)
        for expert, share in zip(choices, weights, strict=True):
            if expert == experts.num_experts:
                continue
            up = experts.get_parameter(up_name)[expert] @ token
            if experts.has_bias:
                up = up + experts.get_parameter(f"{up_name}_bias")[expert]
            gate, factor = (up[: len(up) // 2], up[len(up) // 2 :]) if experts.has_gate else (up, 1)
            inner = experts.act_fn(gate) * factor
            down = experts.down_proj[expert] @ inner
            if experts.has_bias:
                down = down + experts.get_parameter("down_proj_bias")[expert]
            out = out + share * down
        outs.append(out)
    return torch.stack(outs) if outs else hidden.clone()


def gradients(module: nn.Module, out: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor | None]:
    """Of a loss in which every number counts differently."""
    loss = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum()
    return list(torch.autograd.grad(loss, [*inputs, *module.parameters()], allow_unused=True))


# --- Local experts -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "width", "inner", "within"),
    [
        (torch.float64, 8, 5, 1e-12),
        (torch.float32, 8, 5, 1e-5),
        (torch.float32, 16, 8, 1e-5),  # where torch's grouped product takes them
    ],
)
def test_experts_and_their_gradients_equal_the_plain_loop(kind, dtype, width, inner, within) -> None:
    torch.manual_seed(1)
    experts = Experts(width, inner, 6, **kind).to(dtype)
    index, weight = random_routing(13, 6, 3, seed=1, sentinels=True)
    index[index == 4] = 6  # an expert without a token
    hidden = torch.randn(13, width, dtype=dtype, requires_grad=True)
    weight = weight.to(dtype).requires_grad_()
    ours, theirs = experts(hidden, index, weight), loop(experts, hidden, index, weight)
    torch.testing.assert_close(ours, theirs, rtol=within, atol=within)
    for mine, other in zip(
        gradients(experts, ours, hidden, weight), gradients(experts, theirs, hidden, weight), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=within, atol=within)


@given(
    st.integers(0, 9), st.integers(1, 5), st.integers(1, 4), st.randoms(use_true_random=False), st.sampled_from(KINDS)
)
def test_any_routing_is_computed_as_by_the_plain_loop(num_tokens, num_experts, top_k, random, kind) -> None:
    torch.manual_seed(random.randrange(2**31))
    experts = Experts(4, 3, num_experts, **kind).double()
    index = torch.randint(0, num_experts + 1, (num_tokens, top_k))
    hidden, weight = torch.randn(num_tokens, 4).double(), torch.randn(num_tokens, top_k).double()
    torch.testing.assert_close(experts(hidden, index, weight), loop(experts, hidden, index, weight))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_the_whole_layer_passes_gradcheck(kind) -> None:
    layer = MoELayer(4, 3, 4, 2, seed=5, **kind).double()
    hidden = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(tokens: torch.Tensor, *parameters: torch.Tensor) -> Any:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (tokens,))

    assert torch.autograd.gradcheck(run, (hidden, *layer.parameters()))


@pytest.mark.parametrize(("width", "inner"), [(16, 8), (10, 6)])
def test_a_plain_sum_of_rows_goes_backward_too(width, inner) -> None:
    experts = Experts(width, inner, 3)
    rows = torch.randn(4, width, requires_grad=True)
    StackedExperts(experts).run(rows, [0, 2], [3, 1]).sum().backward()
    index = torch.tensor([[0], [0], [0], [2]])
    (expected,) = torch.autograd.grad(loop(experts, rows, index, torch.ones(4, 1)).sum(), rows)
    torch.testing.assert_close(rows.grad, expected)


def test_tokens_that_go_nowhere_get_zeros_and_no_gradient() -> None:
    experts = Experts(4, 3, 2)
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.ones(3, 1, requires_grad=True)
    out = experts(hidden, torch.full((3, 1), 2), weight)
    out.sum().backward()
    assert not out.any()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_expert_that_is_not_there_is_named(wrong) -> None:
    experts = Experts(4, 3, 4)
    with pytest.raises(InvalidRequest, match=f"sent to expert {wrong}; there are 0 to 3, and 4 for"):
        experts(torch.zeros(2, 4), torch.tensor([[0], [wrong]]), torch.ones(2, 1))


def test_a_weight_in_float32_beside_tokens_in_bfloat16_gives_bfloat16() -> None:
    layer = MoELayer(16, 8, 4, seed=0).bfloat16()
    out = layer(torch.randn(2, 5, 16).bfloat16())
    assert out.dtype is torch.bfloat16
    assert layer.routing is not None and layer.routing.weight.dtype is torch.float32
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


# --- The layer -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (0, 16), (2, 0, 16)])
def test_any_leading_shape_is_kept(shape) -> None:
    layer = MoELayer(16, 8, 4, seed=0)
    hidden = torch.randn(shape)
    out = layer(hidden)
    assert out.shape == hidden.shape
    torch.testing.assert_close(out.reshape(-1, 16), layer(hidden.reshape(-1, 16)))


def test_the_last_routing_is_told_and_has_a_history() -> None:
    assert MoELayer(16, 8, 4).routing is None
    layer = MoELayer(16, 8, 4, top_k=3, seed=0)
    layer(torch.randn(2, 5, 16))
    assert layer.routing is not None
    assert (layer.routing.index.shape, layer.routing.weight.shape) == ((10, 3), (10, 3))
    assert layer.routing.logits.shape == (10, 4)
    layer.routing.logits.logsumexp(-1).sum().backward()
    assert layer.gate.weight.grad is not None


def test_a_layer_can_be_copied_after_it_was_used() -> None:
    layer = MoELayer(16, 8, 4, seed=0)
    hidden = torch.randn(3, 16)
    out = layer(hidden)
    twin = copy.deepcopy(layer)
    assert twin.routing is None
    torch.testing.assert_close(twin(hidden), out)


def test_a_seed_decides_the_first_weights_and_leaves_torch_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = MoELayer(16, 8, 4, seed=1, bias=True), MoELayer(16, 8, 4, seed=1, bias=True), MoELayer(16, 8, 4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.experts.down_proj, other.experts.down_proj)
    assert not torch.equal(torch.get_rng_state(), before)  # `other` has drawn from it


def test_first_weights_are_those_of_a_linear_layer() -> None:
    layer = MoELayer(64, 16, 8, seed=0, bias=True)
    for name, parameter in layer.named_parameters():
        bound = (16 if "down" in name else 64) ** -0.5
        assert 0.9 * bound < float(parameter.detach().abs().max()) <= bound, name


def test_a_gate_of_ones_own_is_asked() -> None:
    class First(nn.Module):
        def forward(self, hidden: torch.Tensor) -> Routing:
            nought = torch.zeros(len(hidden), 1)
            return Routing(nought.long(), nought + 2, nought.expand(-1, 4))

    layer = MoELayer(8, 3, 4, gate=First(), seed=0)
    hidden = torch.randn(5, 8)
    twice = torch.full((5, 1), 2.0)
    torch.testing.assert_close(layer(hidden), loop(layer.experts, hidden, torch.zeros(5, 1).long(), twice))
    assert [name for name, _ in layer.named_parameters()] == ["experts.gate_up_proj", "experts.down_proj"]


# torch's own, about itself, when a compiled network goes on after what is not compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_network_around_it_can_be_compiled_and_checkpointed() -> None:
    layer = MoELayer(16, 8, 4, seed=0)
    hidden = torch.randn(6, 16)
    compiled = torch.compile(layer, backend="eager")
    for part in (hidden, hidden[:5], hidden[:2]):  # other batches, other rows for each expert
        torch.testing.assert_close(compiled(part), layer(part))
    tokens = hidden.clone().requires_grad_()
    checkpoint(layer, tokens, use_reentrant=False).square().sum().backward()
    (plain,) = torch.autograd.grad(layer(hidden.requires_grad_()).square().sum(), hidden)
    torch.testing.assert_close(tokens.grad, plain)


@pytest.mark.parametrize(("width", "inner"), [(16, 8), (10, 6)])
def test_it_takes_part_in_autocast(width, inner) -> None:
    layer = MoELayer(width, inner, 4, seed=0, bias=True)
    hidden = torch.randn(6, width)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(hidden)
    torch.testing.assert_close(out, layer(hidden), rtol=0.05, atol=0.05)
    out.sum().backward()
    assert layer.gate.weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_experts": -1}, "num_experts is -1"),
        ({"top_k": 5}, "top_k is 5; with 4 experts it can be 1 to 4"),
        ({"top_k": 0}, "top_k is 0"),
        ({"gate": "topk2"}, "unknown gate 'topk2'; give one of topk, "),
        ({"gate": TopKSettings(2), "top_k": 2}, r"top_k is 2 beside gate=TopKSettings\(top_k=2"),
        ({"gate": TopKSettings}, "give a name, settings \\(not their class\\), or a module"),
        ({"gate": 3}, "gate is 3"),
        ({"activation": "swish2"}, f"unknown activation 'swish2'; give one of {', '.join(ACTIVATIONS)}"),
    ],
)
def test_what_cannot_be_is_refused(arguments, said) -> None:
    with pytest.raises(InvalidConfig, match=said):
        MoELayer(**({"hidden_size": 8, "expert_size": 3, "num_experts": 4} | arguments))


def test_a_gate_is_a_name_or_settings_too_and_learns_from_the_same_first_weights() -> None:
    torch.manual_seed(7)
    own = TopKGate(16, 4, 3, normalize=False)
    layers = [
        MoELayer(16, 8, 4, 3, gate="topk", seed=0),
        MoELayer(16, 8, 4, gate=TopKSettings(3, normalize=False), seed=0),
        MoELayer(16, 8, 4, gate=own, seed=0),
    ]
    assert [layer.gate.settings.top_k for layer in layers] == [3, 3, 3]
    assert torch.equal(layers[0].gate.weight, layers[1].gate.weight)
    assert not torch.equal(layers[0].gate.weight, layers[2].gate.weight)
    hidden = torch.randn(5, 16)
    own.load_state_dict(layers[0].gate.state_dict())
    layers[2].experts.load_state_dict(layers[1].experts.state_dict())
    torch.testing.assert_close(layers[1](hidden), layers[2](hidden))


def test_a_gate_hears_of_the_tokens_what_the_layer_is_told() -> None:
    class ById(nn.Module):
        def forward(self, hidden: torch.Tensor, info: TokenInfo | None = None) -> Routing:
            assert info is not None and info.ids is not None and info.task is None
            return Routing(info.ids[:, None], torch.ones(len(hidden), 1), torch.zeros(len(hidden), 4))

    layer = MoELayer(8, 3, 4, gate=ById(), seed=0)
    hidden, ids = torch.randn(2, 3, 8), torch.tensor([[0, 3, 1], [1, 2, 0]])
    ones = torch.ones(6, 1)
    expected = layer.experts(hidden.view(6, 8), ids.view(6, 1), ones).view(2, 3, 8)
    for each in (ids, ids.flatten()):
        torch.testing.assert_close(layer(hidden, TokenInfo(ids=each)), expected)
    with pytest.raises(InvalidRequest, match=r"ids has the shape \[2, 2\] and is about 4 tokens; there are 6"):
        layer(hidden, TokenInfo(ids=ids[:, :2]))
    with pytest.raises(InvalidRequest, match=r"ids is of torch\.float32; give integers"):
        layer(hidden, TokenInfo(ids=ids.float()))
    MoELayer(8, 3, 4)(hidden, TokenInfo(ids=ids[:, :2]))  # a gate that does not ask is told nothing


# --- Experts elsewhere ---------------------------------------------------------------------------------------
def test_a_handler_gets_every_row_and_the_layer_has_no_experts() -> None:
    asked: list[tuple[str, torch.Size, torch.Size, torch.Size]] = []
    scale = torch.tensor(3.0, requires_grad=True)

    def handler(path: str, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        asked.append((path, hidden.shape, index.shape, weight.shape))
        return hidden * scale * weight.sum(1, keepdim=True)

    layer = MoELayer(10**5, 10**5, 4, gate=TopKGate(10**5, 4, 2), experts=handler, path="block.3")
    assert [name for name, _ in layer.named_parameters()] == ["gate.weight"]
    hidden = torch.randn(2, 3, 10**5, requires_grad=True)
    layer(hidden).sum().backward()
    assert asked == [("block.3", (6, 10**5), (6, 2), (6, 2))]
    assert scale.grad is not None and hidden.grad is not None


def test_a_handler_that_is_a_module_does_not_become_a_part_of_the_layer() -> None:
    class Handler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, path: str, hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return hidden * self.scale

    layer = MoELayer(8, 3, 4, experts=Handler())
    assert list(layer.state_dict()) == ["gate.weight"]


class Network(nn.Module):
    """Somebody's own, with two MoE layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(5, 8), nn.ModuleList([MoELayer(8, 3, 4, seed=n) for n in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden


@torch.no_grad()
def test_the_experts_of_any_network_move_to_hosts_and_compute_there_the_same() -> None:
    torch.manual_seed(0)
    here = Network().double()
    there = copy.deepcopy(here)
    modules = experts_modules(there)
    assert list(modules) == ["blocks.0.experts", "blocks.1.experts"]
    hosts = {name: ExpertHost(name) for name in ("one", "two", "three")}
    placement = place_by_index(dict.fromkeys(modules, 4), list(hosts))
    for name, host in hosts.items():
        for path, held in placement.experts_on(name).items():
            host.hold(path, held, StackedExperts(make_shard(modules[path], held)))
    transport = LocalTransport(hosts)
    dispatcher = ExpertDispatcher(transport)
    dispatcher.update(RoutingTable(1, placement, {name: transport.address(name) for name in hosts}))
    drop_parameters(there)
    install(there, dispatcher.forward)
    x = torch.randn(7, 5).double()
    torch.testing.assert_close(there(x), here(x))
    transport.close()
