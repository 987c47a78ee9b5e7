"""Loss-free balancing: the rules as the paper has them, and what the biases do to a gate that prefers one expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ray_moe import MoELayer
from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.ops.balancing import LossFreeBalancing, selection_bias
from ray_moe.ops.gates.base import Routing
from ray_moe.ops.gates.sigmoid import bias_update
from ray_moe.ops.losses import expert_load


class BiasedGate(nn.Module):
    """Sigmoid scores; the bias takes part in the choice alone."""

    bias: torch.Tensor

    def __init__(self, num_experts: int = 4, width: int = 8, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.randn(num_experts, width) * width**-0.5)
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, hidden: torch.Tensor) -> Routing:
        logits = hidden @ self.weight.t()
        index = (logits.sigmoid() + self.bias).topk(self.top_k).indices
        return Routing(index, logits.sigmoid().gather(1, index), logits)


def test_the_sign_rule_is_the_papers() -> None:
    load = [5, 0, 3, 4]
    update = bias_update(torch.tensor(load), 0.01)
    for expert, number in enumerate(load):
        error = sum(load) / 4 - number
        assert float(update[expert]) == pytest.approx(0.01 * ((error > 0) - (error < 0)))


def test_the_proportional_rule_is_relative_to_the_mean_and_to_no_number_of_tokens() -> None:
    update = bias_update(torch.tensor([5.0, 0, 3, 4]), 0.01, "proportional")
    torch.testing.assert_close(update, 0.01 * torch.tensor([-2.0, 3, 0, -1]) / 3)
    torch.testing.assert_close(update, bias_update(torch.tensor([50, 0, 30, 40]), 0.01, "proportional"))


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_no_tokens_and_an_even_load_move_nothing(rule) -> None:
    for load in (torch.zeros(4), torch.full((4,), 7)):
        assert not bias_update(load, 0.1, rule).any()


@pytest.mark.parametrize(("rule", "rate"), [("sign", 0.02), ("proportional", 0.05)])
def test_it_evens_out_a_gate_without_a_gradient(rule, rate) -> None:
    layer = MoELayer(8, 4, 4, gate=BiasedGate(), seed=0)
    with torch.no_grad():
        layer.gate.weight[1] += 0.5
    weight = layer.gate.weight.clone()
    balancing, hidden = LossFreeBalancing(layer, rate, rule), torch.randn(400, 8) + 0.5
    largest = []
    for _ in range(60):
        layer(hidden)
        assert layer.routing is not None
        largest.append(int(expert_load(layer.routing).max()))
        balancing.observe()
        balancing.step()
    assert largest[0] > 330
    assert largest[-1] < 230  # 200 is even
    assert torch.equal(layer.gate.weight, weight)


def test_micro_batches_and_workers_are_added_up_before_the_step() -> None:
    torch.manual_seed(0)
    first, second = BiasedGate(), BiasedGate()
    second.load_state_dict(first.state_dict())
    one, other = (nn.Sequential(MoELayer(8, 4, 4, gate=gate, seed=0)) for gate in (first, second))
    whole = torch.randn(60, 8)
    together, parts = LossFreeBalancing(one, 0.1, "proportional"), LossFreeBalancing(other, 0.1, "proportional")
    one(whole)
    together.observe()
    total = together.loads["0"].clone()
    for part in whole[:40].split(20):  # two micro-batches here, the third on another worker
        other(part)
        parts.observe()
    mine = parts.loads["0"].clone()
    together.step()
    parts.step(reduce=lambda load: load + (total - mine))
    torch.testing.assert_close(first.bias, second.bias)
    assert first.bias.any()


def test_padding_does_not_count() -> None:
    layer = MoELayer(8, 4, 4, gate=BiasedGate(), seed=0)
    balancing, mask = LossFreeBalancing(layer), torch.tensor([[1, 1, 0], [1, 0, 0]])
    layer(torch.randn(2, 3, 8))
    balancing.observe(mask)
    assert float(balancing.loads[""].sum()) == 2 * 3
    balancing.step()
    with pytest.raises(InvalidRequest, match="call observe"):
        balancing.step()


def test_only_gates_with_a_bias_that_is_a_buffer_are_balanced() -> None:
    class Learned(nn.Linear):
        """Its bias is learned: moving it is the optimizer's."""

        def forward(self, hidden: torch.Tensor) -> Any:
            logits = super().forward(hidden)
            return Routing(logits.topk(1).indices, logits.topk(1).values, logits)

    learned, plain = MoELayer(8, 4, 4, gate=Learned(8, 4)), MoELayer(8, 4, 4)
    biased = MoELayer(8, 4, 4, gate=BiasedGate())
    assert selection_bias(learned) is None and selection_bias(plain) is None and selection_bias(biased) is not None
    assert list(LossFreeBalancing(nn.Sequential(learned, plain, biased)).layers) == ["2"]
    with pytest.raises(InvalidConfig, match=r"no gate here has a selection bias, .* \(Learned, TopKGate\)"):
        LossFreeBalancing(nn.Sequential(learned, plain))
    with pytest.raises(InvalidConfig, match="no MoE layers"):
        LossFreeBalancing(nn.Linear(2, 2))
    with pytest.raises(InvalidConfig, match="unknown rule 'pid'"):
        LossFreeBalancing(biased, rule="pid")  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="rate is 0"):
        LossFreeBalancing(biased, rate=0)
