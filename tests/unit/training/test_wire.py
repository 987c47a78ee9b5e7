"""What rows are sent as: how much it costs in exactness, and how many bytes it saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ray_moe.errors import WireError
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.training.settings import ExchangeSettings, StepSettings
from ray_moe.transport.base import ExpertReply
from tests.tiny_models import build
from tests.training_cluster import Cluster
from tests.training_traffic import Rows

RATE = 4096.0
"""So large that the gradient is seen in the weights after one step."""


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral")


def batches(step: int, rank: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(3, 60, (8, 1), generator=generator) + torch.arange(12)
    return [{"input_ids": ids, "labels": ids}]


def one_step(model: Any, **exchange: Any) -> tuple[float, dict[str, torch.Tensor], Rows]:
    """The loss, every gradient, and what travelled."""
    made = Cluster(
        model,
        optimizer=OptimizerSettings(kind="sgd", lr=RATE),
        settings=StepSettings(clip_norm=None),
        exchange=ExchangeSettings(**exchange),
    )
    wire = Rows(made)
    made.start()
    before = {**made.trainers[0].state(), **made.experts()}
    (report,) = made.train(1, batches)
    after = {**made.trainers[0].state(), **made.experts()}
    return report.loss, {name: (before[name] - after[name]) / RATE for name in before if "/" not in name}, wire


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize(
    ("wire", "within", "dtype"),
    [("bfloat16", 0.02, torch.bfloat16), ("float16", 0.002, torch.float16), ("int8", 0.03, torch.uint8)],
)
def test_gradients_in_fewer_bits_are_close(
    model: Any, wire: str, within: float, dtype: torch.dtype, recompute: bool
) -> None:
    exact_loss, exact, exact_wire = one_step(model)
    loss, gradients, small_wire = one_step(model, wire=wire, recompute=recompute)
    assert loss == pytest.approx(exact_loss, rel=within / 10)
    for name, gradient in exact.items():
        assert (gradients[name] - gradient).norm() <= within * gradient.norm(), name
    assert (exact_wire.dtypes, small_wire.dtypes) == ({torch.float32}, {dtype})


def test_eight_bits_are_a_fourth_of_the_bytes_of_float32(model: Any) -> None:
    """And a little more for a model as narrow as this: 36 bytes for each 128, and the numbers of the tokens."""
    _, _, exact = one_step(model)
    _, _, small = one_step(model, wire="int8")
    assert small.num_bytes < 0.31 * exact.num_bytes


def test_training_in_eight_bits_follows_the_curve(model: Any) -> None:
    last = {}
    for wire in ("same", "int8"):
        made = Cluster(model, optimizer=OptimizerSettings(lr=3e-3), exchange=ExchangeSettings(wire=wire))
        made.start()
        reports = made.train(30, batches)
        last[wire] = sum(report.loss for report in reports[-5:]) / 5
    assert last["same"] < 0.8 * reports[0].loss
    assert last["int8"] == pytest.approx(last["same"], rel=0.01)


def test_numbers_that_cannot_be_sent_are_refused_and_nothing_changes(model: Any) -> None:
    made = Cluster(model, exchange=ExchangeSettings(wire="int8"))
    made.start()
    made.train(1, batches)
    before = made.trainers[0].state()
    embedding: Any = made.trainers[0].model.get_submodule("model.embed_tokens")
    hook = embedding.register_forward_hook(lambda module, given, out: out * float("inf"))
    (report,) = made.train(2, batches)
    assert report.outcome == "refused"
    assert "not finite" in report.error or "inf or nan" in report.error
    after = made.trainers[0].state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    hook.remove()
    assert made.train(2, batches)[-1].outcome == "made"


def test_rows_that_a_host_cannot_send_are_refused(model: Any) -> None:
    made = Cluster(model, exchange=ExchangeSettings(wire="int8"))
    made.start()
    for trainees in made.trainees.values():
        for layer, experts in trainees.report().owned.items():
            for expert in experts:
                trainees._experts.layers[layer].experts[expert]["down_proj"].data.fill_(float("nan"))
    (report,) = made.train(1, batches)
    assert report.outcome == "refused"
    assert "coming from" in report.error


def test_an_answer_in_another_format_is_refused(model: Any) -> None:
    made = Cluster(model, exchange=ExchangeSettings(wire="int8"))
    made.start()
    for host in made.transport.hosts.values():
        host.run = lambda calls: [ExpertReply(torch.zeros(calls[0].num_rows, 32))]  # type: ignore[method-assign]
    with pytest.raises(WireError, match="float32 were answered"):
        made.train(1, batches)
