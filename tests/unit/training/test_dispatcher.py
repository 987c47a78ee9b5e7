"""Rows out and gradients back, for one layer: as autograd of the plain loop, whatever happens to the calls."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch

from ray_moe.errors import HostLost, InvalidRequest, StepInterrupted
from ray_moe.training import dispatcher
from ray_moe.training.settings import ExchangeSettings
from ray_moe.transport.base import ExpertReply
from ray_moe.transport.local import Fault, FaultPlan
from tests.toy import LAYER, ToyExperts, random_routing
from tests.unit.training.toy import Toy

WAYS = list(itertools.product((1, 3), (1, 2), (False, True)))
"""Hosts, replicas, recompute."""


def agree(toy: Toy, module: ToyExperts, within: float = 1e-10, num_tokens: int = 23) -> None:
    """Two micro-batches through both; every gradient is the same."""
    dtype = module.down_proj.dtype
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 8, generator=generator).to(dtype)
    index, weight = random_routing(num_tokens, 6, 2, seed=num_tokens, sentinels=True)
    weight = weight.to(dtype)
    ours, theirs = [(hidden.clone().requires_grad_(), weight.clone().requires_grad_()) for _ in range(2)]
    for _ in range(2):
        toy.dispatcher.forward(LAYER, ours[0], index, ours[1]).square().sum().backward()
        module.oracle(theirs[0], index, theirs[1]).square().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=within, atol=within)
    sums = toy.gradients(module)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(sums[name], parameter.grad, rtol=within, atol=within)


@pytest.mark.parametrize(("num_hosts", "num_replicas", "recompute"), WAYS)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_gradients_equal_autograd_of_the_plain_loop(
    num_hosts: int, num_replicas: int, recompute: bool, dtype: torch.dtype, within: float
) -> None:
    module = ToyExperts(dtype=dtype)
    agree(Toy(module, num_hosts, num_replicas, ExchangeSettings(recompute=recompute)), module, within)


@pytest.mark.parametrize("max_rows", [1, 3, 7])
@pytest.mark.parametrize("recompute", [False, True])
def test_cutting_changes_no_gradient(monkeypatch: pytest.MonkeyPatch, max_rows: int, recompute: bool) -> None:
    monkeypatch.setattr(dispatcher, "MAX_ROWS_PER_CALL", max_rows)
    module = ToyExperts(dtype=torch.float64)
    agree(Toy(module, 2, 2, ExchangeSettings(recompute=recompute)), module)


def test_experts_learn_although_the_tokens_need_no_gradient() -> None:
    module = ToyExperts(dtype=torch.float64)
    toy = Toy(module, 2)
    hidden = torch.randn(9, 8, dtype=torch.float64)
    index, weight = random_routing(9, 6, 2)
    toy.dispatcher.forward(LAYER, hidden, index, weight).sum().backward()
    module.oracle(hidden, index, weight).sum().backward()
    for name, grad in toy.gradients(module).items():
        torch.testing.assert_close(grad, getattr(module, name).grad)


@pytest.mark.parametrize("nth", range(1, 5))
@pytest.mark.parametrize("recompute", [False, True])
def test_a_call_delivered_twice_counts_once(nth: int, recompute: bool) -> None:
    module = ToyExperts(dtype=torch.float64)
    faults = FaultPlan((Fault("duplicate", "expert-0", nth),))
    agree(Toy(module, 1, exchange=ExchangeSettings(recompute=recompute), faults=faults), module)


def break_the_line(toy: Toy, nth: int) -> None:
    """The answer to the `nth` call to any host is lost, because the line to the host breaks. The host lives."""
    seen = itertools.count(1)
    for host_id, host in toy.transport.hosts.items():
        original = host.run

        def run(calls: Any, host_id: str = host_id, original: Any = original) -> Any:
            outcomes = original(calls)
            if next(seen) == nth:
                for connection in list(toy.transport._open):
                    if connection.address.host_id == host_id:
                        connection.close()
            return outcomes

        host.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize("nth", range(1, 9))
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_when_a_line_breaks_and_the_host_lives_calls_are_sent_again_and_count_once(nth: int, recompute: bool) -> None:
    module = ToyExperts(dtype=torch.float64)
    toy = Toy(module, 2, 2, ExchangeSettings(recompute=recompute))
    break_the_line(toy, nth)
    agree(toy, module)
    counted = {name: len(trainees._attempt.counted) for name, trainees in toy.trainees.items()}
    assert counted == dict(toy.dispatcher.num_backward_calls)


@pytest.mark.parametrize("nth", range(5, 9))
def test_an_answer_that_is_no_longer_remembered_is_computed_again_and_counts_once(
    monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    monkeypatch.setattr("ray_moe.training.attempt.REMEMBERED_BYTES", 0)
    module = ToyExperts(dtype=torch.float64)
    toy = Toy(module, 2, exchange=ExchangeSettings(recompute=True))
    break_the_line(toy, nth)
    agree(toy, module)


def test_a_host_that_is_gone_interrupts_the_step() -> None:
    toy = Toy(ToyExperts(), 2)
    toy.transport.kill("expert-1")
    with pytest.raises(HostLost, match="expert-1"):
        toy.dispatcher.forward(LAYER, torch.randn(20, 8), *random_routing(20, 6, 2))


@pytest.mark.parametrize("nth", [1, 2], ids=["forward", "backward"])
def test_a_host_that_hangs_is_given_up(nth: int) -> None:
    faults = FaultPlan((Fault("drop", "expert-0", nth),))
    toy = Toy(ToyExperts(), 1, exchange=ExchangeSettings(call_timeout_s=0.2), faults=faults)
    begin_s = time.monotonic()
    with pytest.raises(StepInterrupted, match=r"expert-0 has answered nothing for 0\.2 s"):
        toy.dispatcher.forward(LAYER, torch.randn(20, 8), *random_routing(20, 6, 2)).sum().backward()
    assert time.monotonic() - begin_s < 10


def test_a_layer_or_an_expert_that_nobody_trains_is_named() -> None:
    toy = Toy(ToyExperts(), 2)
    batch = torch.randn(3, 8), *random_routing(3, 6, 2)
    with pytest.raises(StepInterrupted, match="elsewhere"):
        toy.dispatcher.forward("elsewhere", *batch)
    toy.trainees["expert-1"].drop({LAYER: [5]})
    with pytest.raises(Exception, match=r"does not train experts \[5\]"):
        toy.dispatcher.forward(LAYER, batch[0], torch.full((3, 1), 5), torch.ones(3, 1))


def test_nothing_and_nobody_are_tokens_too() -> None:
    toy = Toy(ToyExperts(), 2)
    for index in (torch.zeros(0, 2, dtype=torch.int64), torch.full((3, 2), 6)):
        hidden = torch.randn(len(index), 8, requires_grad=True)
        out = toy.dispatcher.forward(LAYER, hidden, index, torch.ones(len(index), 2))
        out.sum().backward()
        assert hidden.grad is not None and not hidden.grad.any() and not out.any()
    assert not toy.dispatcher.num_backward_calls


def test_answers_that_nobody_waits_for_any_more_are_let_go() -> None:
    """After an error the arenas of lines that live on must not fill up."""
    toy = Toy(ToyExperts(), 3)
    released: list[int] = []
    answered: list[int] = []
    for host in toy.transport.hosts.values():
        original = host.run

        def run(calls: Any, original: Any = original) -> Any:
            (reply,) = original(calls)
            answered.append(1)
            return [ExpertReply(reply.rows, lambda: released.append(1))]

        host.run = run  # type: ignore[method-assign]
    hidden, routing = torch.randn(40, 8), random_routing(40, 6, 2)
    toy.dispatcher.forward(LAYER, hidden, *routing)
    assert len(answered) == len(released) == 3
    toy.transport.kill("expert-0")
    for _ in range(4):
        with pytest.raises(HostLost):
            toy.dispatcher.forward(LAYER, hidden, *routing)
    give_up_s = time.monotonic() + 10
    while len(released) < 3 + 4 * 2 and time.monotonic() < give_up_s:
        time.sleep(0.01)
    assert len(released) == len(answered) == 3 + 4 * 2


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_computed_once(recompute: bool) -> None:
    toy = Toy(ToyExperts(), 1, exchange=ExchangeSettings(recompute=recompute))
    loss = toy.dispatcher.forward(LAYER, torch.randn(9, 8), *random_routing(9, 6, 2)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(InvalidRequest, match="computed once"):
        loss.backward()
