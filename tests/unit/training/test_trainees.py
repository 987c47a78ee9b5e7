"""The experts of one host, and orders and calls that come twice, late, for others, or make no sense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_moe.errors import (
    ExpertFailed,
    InvalidConfig,
    InvalidRequest,
    NotFound,
    RayMoEError,
    StaleRouting,
    StepInterrupted,
    StepRefused,
)
from ray_moe.ops.experts import pack
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.training.control import obey
from ray_moe.training.trainees import Trainees
from ray_moe.transport.base import TRAINING, ExpertCall, ExpertReply
from tests.toy import LAYER, ToyExperts

SETTINGS = OptimizerSettings(kind="adamw", lr=0.1)
EXPERTS = {LAYER: [1, 3]}


def rows(module: ToyExperts, expert: int) -> dict[str, torch.Tensor]:
    return {name: parameter.detach()[expert].clone() for name, parameter in module.named_parameters()}


@pytest.fixture
def module() -> ToyExperts:
    return ToyExperts(dtype=torch.float64)


@pytest.fixture
def trainees(module: ToyExperts) -> Trainees:
    made = Trainees("expert-0")
    made.open("run", "a", SETTINGS, 0)
    made.hold(LAYER, module, {expert: rows(module, expert) for expert in (1, 3)}, owned=[1, 3])
    made.begin("1.a.1")
    return made


def call(name: str = "1.a.1/0.0", seed: int = 0, **changes: Any) -> ExpertCall:
    hidden = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    made = ExpertCall(LAYER, 0, hidden, None, None, [1, 3], [2, 3], call_id=name, version=TRAINING)
    return replace(made, **changes)


def backward(name: str = "1.a.1/0.0", seed: int = 0, **changes: Any) -> ExpertCall:
    grad = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 100))
    return call(name, seed, **{"grad": grad, **changes})


def learn(trainees: Trainees, attempt: str, seed: int = 0) -> None:
    """One step."""
    trainees.begin(attempt)
    assert isinstance(trainees.run(backward(f"{attempt}/0.0", seed)), ExpertReply)
    trainees.apply(attempt, 1.0, 0.1)


def weights(trainees: Trainees) -> torch.Tensor:
    """All that the experts are, optimizer and all, as one vector."""
    tensors = [trainees.expert_tensors(LAYER, expert) for expert in (1, 3)]
    return torch.cat([each[name].double().reshape(-1) for each in tensors for name in sorted(each)])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_calls_in_any_order_and_number_count_once(calls: list[tuple[int, int]]) -> None:
    module = ToyExperts(dtype=torch.float64)
    sums: list[Any] = []
    for repeat in (True, False):
        made = Trainees("expert-0")
        made.open("run", "a", SETTINGS, 0)
        made.hold(LAYER, module, {expert: rows(module, expert) for expert in (1, 3)}, owned=[1, 3])
        made.begin("1.a.1")
        for number, times in calls if repeat else dict(calls).items():
            for _ in range(times if repeat else 1):
                made.run(backward(f"1.a.1/0.{number}", number))
        sums.append(made.sums("1.a.1"))
    assert sums[0][0] == sums[1][0] == len(dict(calls))
    for expert, value in sums[0][1][LAYER].items():
        assert value == pytest.approx(sums[1][1][LAYER][expert])


@pytest.mark.parametrize("name", ["", "1.a.1", "1.a.2/0.0", "2.a.1/0.0", "1.b.1/0.0", "/", "nonsense"])
def test_a_call_of_another_attempt_is_refused_and_counts_nowhere(trainees: Trainees, name: str) -> None:
    outcomes = [trainees.run(call(name, keep=True)), trainees.run(backward(name))]
    kinds = {type(outcome) for outcome in outcomes}
    assert kinds == ({ExpertReply} if name == "1.a.1" else {StepInterrupted})
    assert trainees.sums("1.a.1")[0] == (name == "1.a.1")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (call(experts=[1, 2]), StaleRouting),
        (call(layer="elsewhere"), StaleRouting),
        (call(hidden=torch.randn(5, 7, dtype=torch.float64)), ExpertFailed),
        (call(counts=[2, 4]), ExpertFailed),
        (backward(kept=True), StepInterrupted),
        (backward(grad=torch.randn(4, 8, dtype=torch.float64)), ExpertFailed),
        (call(token=torch.tensor([0, 1, 2, 3, 9], dtype=torch.int32)), ExpertFailed),
    ],
)
def test_a_call_that_cannot_be_computed_is_named_and_counts_nowhere(
    trainees: Trainees, wrong: ExpertCall, error: type[RayMoEError]
) -> None:
    outcome = trainees.run(wrong)
    assert isinstance(outcome, error)
    assert "expert-0" in str(outcome)
    assert trainees.sums("1.a.1")[0] == 0
    assert isinstance(trainees.run(backward()), ExpertReply)


def test_backward_before_forward_or_for_other_experts_than_were_kept_is_refused(trainees: Trainees) -> None:
    trainees.run(call(keep=True))
    other = backward(kept=True, experts=[1], counts=[5])
    assert isinstance(trainees.run(other), StepInterrupted)
    assert isinstance(trainees.run(backward("1.a.1/0.1", kept=True)), StepInterrupted)


def test_an_attempt_begun_again_forgets_nothing_and_another_one_forgets_all(trainees: Trainees) -> None:
    trainees.run(backward())
    trainees.begin("1.a.1")
    assert trainees.sums("1.a.1")[0] == 1
    trainees.begin("1.a.2")
    counted, squares = trainees.sums("1.a.2")
    assert counted == 0
    assert set(squares[LAYER].values()) == {0.0}


@pytest.mark.parametrize(
    "order",
    [
        lambda t: t.gradients("1.a.9", EXPERTS),
        lambda t: t.add_gradients("1.a.9", "expert-1", {}),
        lambda t: t.sums("1.a.9"),
        lambda t: t.apply("1.a.9", 1.0, 0.1),
        lambda t: t.begin("1.b.1"),
    ],
)
def test_orders_of_another_attempt_or_coordinator_are_refused(trainees: Trainees, order: Any) -> None:
    trainees.run(backward())
    before = trainees.sums("1.a.1")
    with pytest.raises(StepInterrupted):
        order(trainees)
    assert trainees.sums("1.a.1") == before
    assert trainees.report().step == 0


def test_a_step_is_made_once_and_in_its_turn(trainees: Trainees) -> None:
    learn(trainees, "1.a.1")
    once = weights(trainees)
    trainees.apply("1.a.1", 1.0, 0.1)
    assert torch.equal(weights(trainees), once)
    for attempt in ("3.a.1", "0.a.1"):
        trainees.begin(attempt)
        with pytest.raises(StepRefused, match="has made step 1"):
            trainees.apply(attempt, 1.0, 0.1)
    assert torch.equal(weights(trainees), once)


def test_gradients_of_a_replica_are_added_once(trainees: Trainees) -> None:
    trainees.run(backward())
    sent = trainees.gradients("1.a.1", EXPERTS)
    for _ in range(2):
        trainees.add_gradients("1.a.1", "expert-1", sent)
    _, squares = trainees.sums("1.a.1")
    trainees.begin("1.a.2")
    trainees.run(backward("1.a.2/0.0"))
    _, single = trainees.sums("1.a.2")
    assert squares[LAYER][3] == pytest.approx(4 * single[LAYER][3])
    with pytest.raises(NotFound, match="does not train expert 0"):
        trainees.add_gradients("1.a.2", "expert-2", {LAYER: {0: sent[LAYER][1]}})


def test_a_newer_coordinator_of_the_run_takes_the_host_over_with_all_it_knows(trainees: Trainees) -> None:
    learn(trainees, "1.a.1")
    trainees.snapshot(1)
    once = weights(trainees)
    trainees.begin("2.a.2")
    trainees.open("run", "b", SETTINGS, 1)
    report = trainees.report()
    assert (report.life, report.step, list(report.snapshots)) == ("b", 1, [1])
    assert isinstance(trainees.run(call("2.a.2/0.0")), StepInterrupted)
    with pytest.raises(StepInterrupted, match="another coordinator's"):
        trainees.begin("2.a.3")
    trainees.begin("2.b.1")
    assert torch.equal(weights(trainees), once)


def test_another_run_begins_with_nothing_and_closing_one_that_is_over_changes_nothing(trainees: Trainees) -> None:
    trainees.snapshot(0)
    trainees.open("another", "a", SETTINGS, 0)
    report = trainees.report()
    assert (report.run_id, report.held, report.snapshots, report.num_bytes) == ("another", {}, {}, 0)
    trainees.close("run")
    assert trainees.report().run_id == "another"
    trainees.close("another")
    assert trainees.report().run_id == ""


@pytest.mark.parametrize("step", [0, 2])
def test_only_the_step_just_made_can_be_remembered(trainees: Trainees, step: int) -> None:
    learn(trainees, "1.a.1")
    with pytest.raises(StepRefused, match="at step 1"):
        trainees.snapshot(step)
    assert trainees.report().snapshots == {}


def test_going_back_is_exact(trainees: Trainees, module: ToyExperts) -> None:
    learn(trainees, "1.a.1")
    trainees.snapshot(1)
    learn(trainees, "2.a.1", seed=1)
    there = weights(trainees)
    trainees.restore(1, {}, EXPERTS, {})
    learn(trainees, "2.a.2", seed=1)
    assert torch.equal(weights(trainees), there)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((1, {}, {LAYER: [1, 2]}, {}), NotFound),
        ((7, {}, EXPERTS, {}), NotFound),
        ((1, {}, {"elsewhere": [0]}, {"elsewhere": {0: pack({"down_proj": torch.ones(2, 2)})}}), InvalidRequest),
        (
            (1, {}, EXPERTS, {LAYER: {1: pack({"down_proj": torch.ones(2), "momentum.down_proj": torch.ones(2)})}}),
            InvalidConfig,
        ),
    ],
    ids=["expert", "step", "layer", "optimizer"],
)
def test_what_cannot_be_gone_back_to_changes_nothing(
    trainees: Trainees, arguments: Any, error: type[RayMoEError]
) -> None:
    learn(trainees, "1.a.1")
    trainees.snapshot(1)
    learn(trainees, "2.a.1", seed=1)
    before, report = weights(trainees), trainees.report()
    with pytest.raises(error):
        trainees.restore(*arguments)
    assert torch.equal(weights(trainees), before)
    assert trainees.report() == report
    learn(trainees, "3.a.1", seed=2)


def test_other_settings_of_the_optimizer_count_from_where_it_goes_on(trainees: Trainees) -> None:
    learn(trainees, "1.a.1")
    trainees.snapshot(1)
    sizes = []
    for life, decay in (("b", 0.9), ("c", 0.0)):
        trainees.open("run", life, replace(SETTINGS, weight_decay=decay), 1)
        trainees.restore(1, {}, EXPERTS, {})
        learn(trainees, f"2.{life}.1")
        sizes.append(float(trainees.expert_tensors(LAYER, 1)["down_proj"].norm()))
    assert sizes[0] < sizes[1]


def test_what_no_host_can_be_told_is_refused(trainees: Trainees) -> None:
    with pytest.raises(InvalidRequest, match="run_away"):
        obey(trainees, _none, _none, "run_away", ())
    with pytest.raises(InvalidRequest, match="_clear"):
        obey(trainees, _none, _none, "_clear", ("", SETTINGS))


def _none(*_: Any) -> Any:
    return None
