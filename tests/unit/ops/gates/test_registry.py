"""What every gate of the registry promises, and what is said about names and options that are not there."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ray_moe import MoELayer
from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.ops.gates.base import TokenInfo, takes_info
from ray_moe.ops.gates.registry import GATES, GateChoice, make_gate, make_settings
from tests.unit.ops.gates.gates import (
    EXPERTS,
    INFO,
    OPTIONS,
    RANDOM,
    TOKENS,
    WIDTH,
    ask,
    gate_of,
    settings_of,
    spread,
    tokens,
)

every = pytest.mark.parametrize("kind", OPTIONS)


def test_no_gate_is_left_out() -> None:
    assert {name for name, _ in OPTIONS.values()} == set(GATES)


@every
@pytest.mark.parametrize("training", [True, False])
def test_a_routing_keeps_to_the_contract(kind: str, training: bool) -> None:
    gate = gate_of(kind).train(training)
    torch.manual_seed(0)
    routing = ask(gate, tokens())
    assert routing.index.shape == routing.weight.shape and len(routing.index) == TOKENS
    assert routing.logits.shape == (TOKENS, EXPERTS)
    assert not routing.index.is_floating_point()
    assert int(routing.index.min()) >= 0 and int(routing.index.max()) <= EXPERTS
    assert not routing.weight[routing.index == EXPERTS].any()
    assert bool((routing.weight >= 0).all())
    for row in routing.index.tolist():
        chosen = [expert for expert in row if expert < EXPERTS]
        assert len(set(chosen)) == len(chosen)
    assert all(loss.ndim == 0 and loss.isfinite() for loss in routing.losses.values())


# Straight-through gradients are those of another function: `test_gumbel.py`.
@pytest.mark.parametrize("kind", sorted(OPTIONS.keys() - {"gumbel, hard"}))
def test_weights_and_losses_have_the_gradients_of_finite_differences(kind: str) -> None:
    gate = gate_of(kind)
    names = [name for name, _ in gate.named_parameters()]

    def run(hidden: torch.Tensor, *parameters: torch.Tensor) -> Any:
        torch.manual_seed(4)
        given = (hidden, INFO) if takes_info(gate) else (hidden,)
        routing = torch.func.functional_call(gate, dict(zip(names, parameters, strict=True)), given)
        outs = [spread(routing), *routing.losses.values()]
        return tuple(out for out in outs if out.requires_grad) or hidden * 1

    for training in (True, False):
        gate.train(training)
        assert torch.autograd.gradcheck(run, (tokens().requires_grad_(), *gate.parameters()))


@every
def test_outside_training_nothing_is_random_and_in_training_the_seed_decides(kind: str) -> None:
    gate = gate_of(kind)
    torch.manual_seed(1)
    first, second = ask(gate, tokens()), ask(gate, tokens())
    torch.manual_seed(1)
    again = ask(gate, tokens())
    assert torch.equal(spread(first), spread(again)) and torch.equal(first.logits, again.logits)
    same = torch.equal(spread(first), spread(second))
    # What is random may be left out by chance, or be drawn alike.
    assert kind in RANDOM or same
    gate.eval()
    state = torch.get_rng_state()
    assert torch.equal(spread(ask(gate, tokens())), spread(ask(gate, tokens())))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", sorted(RANDOM))
def test_what_is_random_is_drawn_anew_for_each_batch(kind: str) -> None:
    gate = gate_of(kind)
    torch.manual_seed(1)
    drawn = [spread(ask(gate, tokens())) for _ in range(20)]
    assert not all(torch.equal(each, drawn[0]) for each in drawn)


@every
def test_a_layer_that_is_computed_again_for_its_gradients_routes_the_same(kind: str) -> None:
    layer = MoELayer(WIDTH, 4, EXPERTS, gate=gate_of(kind), seed=0).double()
    hidden, seen = tokens().requires_grad_(), []
    layer.gate.register_forward_hook(lambda module, given, routing: seen.append(routing))

    def gradients(out: torch.Tensor) -> list[torch.Tensor | None]:
        return list(torch.autograd.grad(out.square().sum(), [hidden, *layer.parameters()], allow_unused=True))

    torch.manual_seed(2)
    plain = gradients(layer(hidden, INFO))
    torch.manual_seed(2)
    out = checkpoint(layer, hidden, INFO, use_reentrant=False)
    torch.manual_seed(9)  # others draw before it goes backward
    for mine, other in zip(gradients(out), plain, strict=True):
        torch.testing.assert_close(mine, other)
    assert len(seen) == 3 and len({str(routing.index.tolist()) for routing in seen}) == 1


@every
@pytest.mark.parametrize("training", [True, False])
def test_no_tokens_are_no_trouble(kind: str, training: bool) -> None:
    layer = MoELayer(WIDTH, 4, EXPERTS, gate=settings_of(kind), seed=0).train(training)
    nobody = torch.zeros(0, dtype=torch.long)
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    out = layer(hidden, TokenInfo(nobody, nobody, nobody))
    assert layer.routing is not None and len(layer.routing.index) == 0
    if out.requires_grad:
        (out.sum() + sum(layer.routing.losses.values())).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in layer.parameters())


@every
def test_bfloat16_is_computed_in_float32_also_under_autocast(kind: str) -> None:
    gate = gate_of(kind, torch.bfloat16).eval()
    exact = copy.deepcopy(gate).float()
    hidden = tokens(torch.bfloat16)
    narrow, wide = ask(gate, hidden), ask(exact, hidden.float())
    assert narrow.weight.dtype is narrow.logits.dtype is torch.float32
    torch.testing.assert_close(spread(narrow), spread(wide))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(spread(ask(exact, hidden.float())), spread(wide))


@pytest.mark.parametrize("kind", [kind for kind in OPTIONS if "upcast" in dir(settings_of(kind))])
def test_without_upcast_logits_are_what_the_dtype_makes_of_them(kind: str) -> None:
    narrow = dataclasses.replace(settings_of(kind), upcast=False)  # type: ignore[type-var]
    gate = gate_of(kind, torch.bfloat16)
    gate.load_state_dict(make_gate(narrow, WIDTH, EXPERTS).bfloat16().state_dict() | gate.state_dict())
    gate.settings = narrow
    routing = ask(gate.eval(), tokens(torch.bfloat16))
    assert routing.weight.dtype is torch.float32
    assert "Hier" in str(narrow) or torch.equal(routing.logits, routing.logits.bfloat16().to(routing.logits.dtype))


@every
def test_a_gate_is_copied_saved_and_seeded_like_any_module(kind: str) -> None:
    gate = gate_of(kind).eval()
    other = make_gate(settings_of(kind), WIDTH, EXPERTS).double().eval()
    other.load_state_dict(gate.state_dict())
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate)), other):
        assert torch.equal(spread(ask(twin, tokens())), spread(ask(gate, tokens())))
    one, same = (MoELayer(WIDTH, 4, EXPERTS, gate=settings_of(kind), seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    with torch.no_grad():
        routing = ask(gate, tokens())
    assert torch.equal(spread(copy.deepcopy(routing)), spread(routing))


@every
def test_a_gate_can_be_planned_without_memory(kind: str) -> None:
    with torch.device("meta"):
        gate = make_gate(settings_of(kind), WIDTH, EXPERTS)
    assert all(tensor.is_meta for tensor in gate.parameters())


@every
def test_settings_are_values(kind: str) -> None:
    settings = settings_of(kind)
    assert settings == settings_of(kind)
    assert hash(settings) == hash(settings_of(kind))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, dataclasses.fields(settings)[0].name, 3)  # type: ignore[arg-type]


def test_a_layer_reads_well() -> None:
    layer = MoELayer(64, 128, 8, gate="expert_choice")
    assert layer(torch.randn(2, 8, 64)).shape == (2, 8, 64)
    assert layer.routing is not None and layer.routing.index.shape[0] == 16
    assert "ExpertChoiceGate(64, 8, ExpertChoiceSettings(capacity_factor=2.0" in repr(layer).replace("\n", "")
    assert MoELayer(64, 128, 8, 3, gate="noisy_topk").gate.settings.top_k == 3


def test_a_gate_of_somebodys_own_is_found_by_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_gates.py").write_text(
        "from dataclasses import dataclass\n"
        "from ray_moe.ops.gates.topk import TopKSettings\n"
        "@dataclass(frozen=True)\n"
        "class Mine:\n"
        "    top_k: int = 1\n"
        "    def build(self, hidden_size, num_experts):\n"
        "        return TopKSettings(self.top_k).build(hidden_size, num_experts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert MoELayer(64, 128, 8, gate="their_gates:Mine").gate.settings.top_k == 1
    assert GateChoice("their_gates:Mine").settings(3) == make_settings("their_gates:Mine", top_k=3)  # K of the model
    for wrong in ("their_gates:Yours", "their_gates:TopKSettings.build", "no_such_gates:Mine"):
        with pytest.raises(InvalidConfig, match=f"cannot import the gate '{wrong}'"):
            MoELayer(64, 128, 8, gate=wrong)
    with pytest.raises(InvalidConfig, match="has no option 'k'; it has top_k"):
        make_settings("their_gates:Mine", k=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"gate": "expert-choice"}, f"unknown gate 'expert-choice'; give one of {', '.join(GATES)}, settings"),
        ({"gate": "switch", "top_k": 2}, "gate 'switch' has no option 'top_k'; it has jitter, upcast"),
        ({"gate": "multi_task"}, r"gate 'multi_task' needs num_tasks: give MultiTaskSettings\(num_tasks=\.\.\.\)"),
        *(({"gate": name, "top_k": 9}, "top_k is 9; with 8 experts it can be 1 to 8") for name in ("topk", "hash")),
        ({"gate": "noisy_topk", "top_k": 9}, "top_k is 9; with 8 experts it can be 1 to 8"),
        ({"gate": "topk_random", "top_k": 8}, "top_k is 8; with 7 experts beside a random one it can be 1 to 7"),
        ({"gate": "hierarchical", "top_k": 5}, "top_k is 5; with 4 experts in a group"),
        ({"gate": "sigmoid", "top_k": 9}, "top_k is 9; with 8 experts in a token's groups"),
        ({"gate": "modality", "top_k": 7}, "top_k is 7; with 6 experts for a modality it can be 1 to 6"),
        ({"gate": "sigmoid", "top_k": 0}, "top_k is 1 or more; got SigmoidSettings"),
    ],
)
def test_names_options_and_numbers_that_cannot_be_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        MoELayer(64, 128, 8, **arguments)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("switch", {"jitter": 1.0}, r"jitter is in \[0, 1\)"),
        ("noisy_topk", {"top_k": 0}, "top_k"),
        ("noisy_topk", {"least_noise": 0.0}, "least_noise"),
        ("topk_random", {"top_k": 0}, "top_k"),
        ("topk_random", {"draw": "any"}, "draw is one of probability, uniform, next"),
        ("topk_random", {"dispatch": "any"}, "dispatch is one of always, by_weight"),
        ("expert_choice", {"capacity_factor": 0.0}, "capacity_factor is finite"),
        ("expert_choice", {"capacity_factor": float("nan")}, "capacity_factor is finite"),
        ("expert_choice", {"capacity_factor": 7.0}, "capacity_factor is at most 6"),
        ("dynamic_k", {"threshold": 0.0}, "threshold"),
        ("dynamic_k", {"threshold": 1.1}, "threshold"),
        ("dynamic_k", {"max_k": 0}, "max_k"),
        ("dynamic_k", {"max_k": 7}, "top_k is 7"),
        ("gumbel", {"max_k": 0}, "max_k"),
        ("gumbel", {"max_k": 7}, "top_k is 7"),
        ("gumbel", {"target": 0.0}, "target"),
        ("gumbel", {"final_temperature": 2.0}, "final_temperature"),
        ("gumbel", {"anneal_steps": 0}, "anneal_steps"),
        ("sigmoid", {"num_groups": 0}, "num_groups"),
        ("sigmoid", {"num_groups": 4}, "num_groups divides 6"),
        ("sigmoid", {"top_groups": 2}, "top_groups"),
        ("sigmoid", {"num_groups": 3, "top_k": 3}, "top_k is 3; with 2 experts in a token's groups"),
        ("sigmoid", {"scale": 0.0}, "scale"),
        ("sigmoid", {"bias_rate": -1.0}, "bias_rate"),
        ("hierarchical", {"num_groups": 0}, "num_groups"),
        ("hierarchical", {"num_groups": 4}, "num_groups divides 6"),
        ("hierarchical", {"top_groups": 3}, "top_groups"),
        ("hierarchical", {"top_k": 0}, "top_k"),
        ("hash", {"top_k": 0}, "top_k"),
        ("hash", {"seed": -1}, "seed"),
        ("multi_task", {"num_tasks": 0}, "num_tasks"),
        ("multi_task", {"num_tasks": 1, "top_k": 0}, "top_k"),
        ("multi_task", {"num_tasks": 1, "top_k": 7}, "top_k is 7"),
        ("modality", {"own": ()}, "own has a number"),
        ("modality", {"own": (-1, 2)}, "own has numbers"),
        ("modality", {"own": (4, 3)}, "own sums to at most 6"),
        ("modality", {"own": (0, 5), "top_k": 2}, "top_k is 2; with 1 experts"),
        ("modality", {"top_k": 0}, "top_k"),
    ],
)
def test_options_that_cannot_be_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        make_gate(make_settings(name, **options), WIDTH, EXPERTS)


@pytest.mark.parametrize(("name", "options"), [("multi_task", {"num_tasks": 2}), ("modality", {})])
def test_a_gate_that_must_know_more_says_so(name: str, options: dict[str, Any]) -> None:
    layer = MoELayer(WIDTH, 4, EXPERTS, gate=make_settings(name, **options))
    field = {"multi_task": "task"}.get(name, name)
    for info in (None, TokenInfo(ids=torch.zeros(2, dtype=torch.long))):
        with pytest.raises(InvalidRequest, match=rf"know the {field} of each token; give TokenInfo\({field}="):
            layer(torch.zeros(2, WIDTH), info)
    for wrong in (-1, 2):
        with pytest.raises(InvalidRequest, match=f"a token has the {field} {wrong}; there are 0 to 1"):
            layer(torch.zeros(2, WIDTH), TokenInfo(**{field: torch.tensor([0, wrong])}))
