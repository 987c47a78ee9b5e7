"""Training as a service, without Ray: clients' micro-batches into steps, against one process of PyTorch."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_moe.errors import HostLost, InvalidCheckpoint, InvalidRequest, NotFound, StepInterrupted, StepRefused
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.training.archive import DiskArchive
from ray_moe.training.export import export_running
from ray_moe.training.session import Session
from ray_moe.training.settings import StepSettings
from ray_moe.types import GenerateRequest, MicroBatch, StepOptions, StepResult
from tests.tiny_models import build, save
from tests.training_cluster import Cluster

LR = 3e-3


def micro(number: int, weight: float = 1.0, name: str = "") -> MicroBatch:
    ids = np.random.default_rng(number).integers(3, 96, (2, 7))
    labels = ids.copy()
    labels[0, : 1 + number % 3] = -100
    return MicroBatch(name or f"m{number}", ids, labels, weight)


class Oracle:
    """One process of PyTorch. (`transformers` computes losses in float32, whatever the model's dtype.)"""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model)
        self.model.set_experts_implementation("eager")  # the default knows no float64
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.01)

    def step(self, micros: Sequence[MicroBatch], clip_norm: float = 1.0) -> tuple[float, float]:
        """Loss and gradient norm of the weighted mean."""
        self._optimizer.zero_grad()
        total = sum(each.weight for each in micros)
        losses = []
        for each in micros:
            batch = {"input_ids": torch.tensor(each.input_ids), "labels": torch.tensor(each.labels)}
            loss = self.model(**batch).loss
            (loss * each.weight / total).backward()
            losses.append(loss.item() * each.weight / total)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
        self._optimizer.step()
        return sum(losses), float(norm)


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral", torch.float64)


def cluster(model: Any, **changes: Any) -> Cluster:
    return Cluster(
        model,
        changes.pop("num_hosts", 3),
        optimizer=OptimizerSettings(lr=LR, weight_decay=0.01),
        settings=changes.pop("settings", StepSettings()),
        **changes,
    )


def session(made: Cluster) -> Session:
    begun = Session(made.trainers[0])
    begun.start()
    return begun


def options(step: int | None = None, **more: Any) -> StepOptions:
    return StepOptions(more.pop("op_id", f"op-{step}"), step, **more)


def agree(result: StepResult, theirs: tuple[float, float]) -> None:
    loss, norm = theirs
    assert result.loss == pytest.approx(loss, rel=1e-7)
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)


def same_weights(made: Cluster, oracle: Oracle) -> None:
    made.trainees = {host_id: made.trainees[host_id] for host_id in made.control.local}
    ours = dict(made.trainers[0].model.named_parameters()) | made.experts()
    for path, parameter in oracle.model.named_parameters():
        torch.testing.assert_close(ours[path].detach(), parameter.detach(), rtol=1e-3, atol=1e-6)


def dying(made: Cluster, host_id: str, nth: int) -> None:
    """The host dies just before the `nth` order or call from now on."""
    order, submit, seen = made.control.order, made.transport.connect, [0]

    def tick() -> None:
        seen[0] += 1
        if seen[0] == nth and host_id in made.control.local:
            made.kill(host_id)

    def ordering(*arguments: Any) -> Any:
        tick()
        return order(*arguments)

    def connecting(address: Any) -> Any:
        tick()
        return submit(address)

    made.control.order = ordering  # type: ignore[assignment, method-assign]
    made.transport.connect = connecting  # type: ignore[method-assign]


@pytest.mark.parametrize("weights", [(1,), (1, 1), (1, 1, 1), (1, 1, 1, 1), (2, 0.5, 1)], ids=str)
def test_steps_are_those_of_the_weighted_mean_in_one_process(model: Any, weights: tuple[float, ...]) -> None:
    made, oracle = cluster(model), Oracle(model)
    service = session(made)
    for step in (1, 2, 3):
        micros = [micro(10 * step + n, weight) for n, weight in enumerate(weights)]
        reports = [service.forward_backward(each) for each in micros]
        assert [report.step for report in reports] == [step] * len(micros)
        agree(service.optim_step(options(step)), oracle.step(micros))
    same_weights(made, oracle)


def test_learning_rate_and_clipping_can_be_given(model: Any) -> None:
    made, oracle = cluster(model), Oracle(model)
    service = session(made)
    result = service.train_step([micro(1), micro(2)], options(1, lr=LR, clip_norm=0.01))
    agree(result, oracle.step([micro(1), micro(2)], 0.01))
    result = service.train_step([micro(3)], options(2, clip_norm=math.inf))
    agree(result, oracle.step([micro(3)], math.inf))
    same_weights(made, oracle)
    before = made.experts()
    assert service.train_step([micro(4)], options(3, lr=0.0)).lr == 0.0
    for name, stack in made.experts().items():
        torch.testing.assert_close(stack, before[name])


def test_what_comes_again_counts_once(model: Any) -> None:
    made, oracle = cluster(model), Oracle(model)
    service = session(made)
    first = service.forward_backward(micro(1))
    assert service.forward_backward(micro(1)) == first
    with pytest.raises(InvalidRequest, match="another micro-batch has come as 'm1'"):
        service.forward_backward(micro(2, name="m1"))
    service.forward_backward(micro(2))
    result = service.optim_step(options(1))
    agree(result, oracle.step([micro(1), micro(2)]))
    assert service.optim_step(options(1)) == result
    late = service.forward_backward(micro(1))  # its answer was lost, and meanwhile another client has made the step
    assert (late.step, late.loss) == (1, first.loss)
    assert service.state().micro_batches == ()
    again = service.train_step([micro(3)], options(2))
    assert service.train_step([micro(3)], options(2)) == again
    assert (service.state().step, [each.step for each in service.state().history]) == (2, [1, 2])


def test_steps_out_of_order_or_of_nothing_are_refused(model: Any) -> None:
    service = session(cluster(model))
    with pytest.raises(StepRefused, match="no micro-batch in step 1"):
        service.optim_step(options(1))
    service.train_step([micro(1)], options(1))
    service.forward_backward(micro(2))
    for step in (1, 3):
        with pytest.raises(StepRefused, match="the next one is 2"):
            service.optim_step(options(step, op_id="another"))
        with pytest.raises(StepRefused, match="the next one is 2"):
            service.train_step([micro(3)], options(step, op_id="another"))
    assert service.state().micro_batches == ("m2",)
    assert service.optim_step(options()).step == 2


def test_discarded_micro_batches_are_no_part_of_the_step(model: Any) -> None:
    made, oracle = cluster(model), Oracle(model)
    service = session(made)
    for number in range(4):
        service.forward_backward(micro(number))
    assert service.discard(["m0", "m2", "nobody"]) == ("m0", "m2")
    agree(service.optim_step(options(1)), oracle.step([micro(1), micro(3)]))
    service.forward_backward(micro(5))
    assert service.discard([]) == ("m5",)
    assert service.state().micro_batches == ()


@pytest.mark.parametrize("nth", range(1, 40, 3))
def test_a_host_that_dies_anywhere_in_a_step_is_not_noticed(model: Any, nth: int) -> None:
    made, oracle = cluster(model), Oracle(model)
    service = session(made)
    micros = [micro(n) for n in range(3)]
    agree(service.train_step([micro(9)], options(1)), oracle.step([micro(9)]))
    service.forward_backward(micros[0])
    dying(made, "expert-1", nth)
    for each in micros[1:]:
        service.forward_backward(each)
    agree(service.optim_step(options(2)), oracle.step(micros))
    agree(service.train_step([micro(4)], options(3)), oracle.step([micro(4)]))
    same_weights(made, oracle)


def test_steps_since_a_rare_snapshot_are_made_again(model: Any) -> None:
    made, oracle = cluster(model, settings=StepSettings(snapshot_every=3)), Oracle(model)
    service = session(made)
    for step in range(1, 6):
        agree(service.train_step([micro(step)], options(step)), oracle.step([micro(step)]))
    service.forward_backward(micro(6))
    made.kill("expert-2")
    agree(service.train_step([micro(7)], options(6)), oracle.step([micro(6), micro(7)]))
    same_weights(made, oracle)


def test_steps_that_nobody_knows_any_more_are_told_of(model: Any) -> None:
    made = cluster(model, num_hosts=1)
    service = session(made)
    for step in range(1, 5):
        service.train_step([micro(step)], options(step))
    service.forward_backward(micro(5))
    made.kill("expert-0")
    made.revive("expert-0")
    with pytest.raises(StepRefused, match="the steps 1 to 4 are lost"):
        service.forward_backward(micro(6))
    assert (service.state().step, service.state().micro_batches, service.state().history) == (0, (), ())
    oracle = Oracle(model)
    agree(service.train_step([micro(1)], options(1)), oracle.step([micro(1)]))
    same_weights(made, oracle)


def test_another_session_goes_on_with_the_open_step(model: Any) -> None:
    made, oracle = cluster(model), Oracle(model)
    service = session(made)
    first = service.train_step([micro(1)], options(1))
    agree(first, oracle.step([micro(1)]))
    service.forward_backward(micro(2))
    service.forward_backward(micro(3))
    service.discard(["m2"])
    again = cluster(model)
    again.control, again.transport, again.trainees = made.control, made.transport, made.trainees
    again.trainers[0].coordinator = made.coordinator()
    again.trainers[0].dispatcher._transport = made.transport
    successor = session(again)
    assert (successor.state().step, successor.state().micro_batches) == (1, ("m3",))
    assert successor.optim_step(options(1)) == first  # its answer was lost with the process
    assert successor.forward_backward(micro(1)).step == 1
    successor.forward_backward(micro(3))
    successor.forward_backward(micro(4))
    agree(successor.optim_step(options(2)), oracle.step([micro(3), micro(4)]))
    same_weights(again, oracle)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_two_clients_do_and_whoever_dies_the_weights_are_those_of_one_process(model: Any, seed: int) -> None:
    chance = random.Random(seed)
    made, oracle = cluster(model, settings=StepSettings(snapshot_every=chance.choice([1, 2]))), Oracle(model)
    service, opened, step = session(made), [], 0
    for number in range(14):
        match chance.choice(["add", "add", "again", "make", "lose", "sample"]):
            case "add":
                opened.append(micro(number, chance.choice([0.5, 1.0]), f"client-{number % 2}-{number}"))
                service.forward_backward(opened[-1])
            case "again" if opened:
                service.forward_backward(chance.choice(opened))
            case "make" if opened:
                step += 1
                agree(service.optim_step(options(step)), oracle.step(opened))
                opened = []
            case "lose" if len(made.control.local) == 3:
                made.kill(chance.choice(list(made.control.local)))
            case "sample":
                service.sample(GenerateRequest(token_ids=(5, 6), max_new_tokens=2))
            case _:
                lost = set(made.trainees) - set(made.control.local)
                for host_id in lost:
                    made.revive(host_id)
    opened.append(micro(99))
    agree(service.train_step([opened[-1]], options(step + 1)), oracle.step(opened))
    same_weights(made, oracle)


def test_a_gradient_that_is_not_finite_is_refused_and_its_micro_batches_are_dropped(model: Any) -> None:
    made, oracle = cluster(model), Oracle(model)
    service = session(made)
    agree(service.train_step([micro(1)], options(1)), oracle.step([micro(1)]))
    service.forward_backward(micro(2))
    trainees = made.trainees["expert-1"]
    layer, (expert, *_) = next(iter(trainees.report().owned.items()))
    for parameter in trainees._experts.layers[layer].experts[expert].values():
        parameter.grad = torch.full_like(parameter, math.nan)
    with pytest.raises(StepRefused, match=f"expert {expert} of {layer} is not finite.*were dropped"):
        service.optim_step(options(2))
    assert (service.state().step, service.state().micro_batches) == (1, ())
    same_weights(made, oracle)
    agree(service.train_step([micro(3)], options(2)), oracle.step([micro(3)]))


def test_a_loss_that_is_not_finite_is_refused_and_the_others_stay(model: Any) -> None:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        value: torch.Tensor = model(**batch).loss
        return value * math.nan if batch["input_ids"][0, 0] == 1 else value

    made, oracle = cluster(model, loss=loss), Oracle(model)
    service = session(made)
    bad = MicroBatch("bad", np.ones((1, 4), np.int64), np.ones((1, 4), np.int64))
    service.forward_backward(micro(1))
    for call in (lambda: service.forward_backward(bad), lambda: service.train_step([micro(2), bad], options(1))):
        with pytest.raises(StepRefused, match="loss of step 1 is nan"):
            call()
        assert service.state().micro_batches == ("m1",)
    agree(service.optim_step(options(1)), oracle.step([micro(1)]))


def test_a_fault_in_a_micro_batch_leaves_the_others(model: Any) -> None:
    made, oracle = cluster(model), Oracle(model)
    service = session(made)
    service.forward_backward(micro(1))
    wrong = MicroBatch("wrong", np.array([[3, 1000, 4]]), np.array([[3, 1000, 4]]))  # the front door would refuse it
    with pytest.raises(IndexError):
        service.forward_backward(wrong)
    service.forward_backward(micro(2))
    agree(service.optim_step(options(1)), oracle.step([micro(1), micro(2)]))


def test_without_a_host_the_step_waits(model: Any) -> None:
    made, oracle = cluster(model, num_hosts=2), Oracle(model)
    service = Session(made.trainers[0], max_attempts=2)
    service.start()
    service.forward_backward(micro(1))
    original = made.trainers[0].coordinator.begin  # type: ignore[union-attr]

    def failing(attempt: str) -> None:
        raise StepInterrupted("on purpose")

    made.kill("expert-0")
    made.trainers[0].coordinator.begin = failing  # type: ignore[method-assign, union-attr]
    with pytest.raises(StepInterrupted, match="begun 2 times; at last: on purpose"):
        service.optim_step(options(1))
    made.trainers[0].coordinator.begin = original  # type: ignore[method-assign, union-attr]
    agree(service.optim_step(options(1)), oracle.step([micro(1)]))


def failing_once(made: Cluster, method: str, host_id: str) -> None:
    """The host is not reached by the next order of this kind, and lives."""
    original, left = made.control.order, [host_id]

    def order(to: str, name: str, *arguments: Any) -> Any:
        if name == method and to in left:
            left.remove(to)
            return HostLost("on purpose")
        return original(to, name, *arguments)

    made.control.order = order  # type: ignore[assignment, method-assign]


def test_a_step_that_was_given_up_half_made_is_made_anew_of_what_is_then_in_it(model: Any) -> None:
    made, oracle = cluster(model), Oracle(model)
    service = Session(made.trainers[0], max_attempts=1)
    service.start()
    agree(service.train_step([micro(1)], options(1)), oracle.step([micro(1)]))
    service.forward_backward(micro(2))
    failing_once(made, "apply", "expert-1")
    with pytest.raises(StepInterrupted, match="begun 1 times; at last: on purpose"):
        service.optim_step(options(2))
    service.forward_backward(micro(3))
    agree(service.optim_step(options(2)), oracle.step([micro(2), micro(3)]))
    same_weights(made, oracle)


def test_a_step_after_which_something_went_wrong_is_not_made_twice(model: Any) -> None:
    made, oracle = cluster(model), Oracle(model)
    service = session(made)
    coordinator: Any = made.trainers[0].coordinator
    original = coordinator.rebalance

    def failing() -> bool:
        coordinator.rebalance = original
        raise ValueError("on purpose")

    coordinator.rebalance = failing
    service.forward_backward(micro(1))
    with pytest.raises(ValueError, match="on purpose"):
        service.optim_step(options(1))
    result = service.optim_step(options(1))
    agree(result, oracle.step([micro(1)]))
    assert (service.state().step, service.state().micro_batches) == (1, ())
    agree(service.train_step([micro(2)], options(2)), oracle.step([micro(2)]))
    same_weights(made, oracle)


def test_what_was_answered_stays_when_it_comes_again_in_vain(model: Any) -> None:
    made, oracle = cluster(model), Oracle(model)
    service = Session(made.trainers[0], max_attempts=1)
    service.start()
    service.forward_backward(micro(1))
    service.forward_backward(micro(2))
    service.discard(["m2"])
    failing_once(made, "begin", "expert-0")
    with pytest.raises(StepInterrupted):
        service.forward_backward(micro(1))
    assert service.state().micro_batches == ("m1",)
    agree(service.optim_step(options(1)), oracle.step([micro(1)]))


def test_a_sample_is_what_the_weights_of_the_last_step_say(model: Any) -> None:
    made, oracle = cluster(model), Oracle(model)
    service = session(made)
    for step in range(1, 4):
        agree(service.train_step([micro(step)], options(step, lr=0.03)), oracle_step(oracle, micro(step)))
    service.forward_backward(micro(5))
    chunk = service.sample(GenerateRequest(token_ids=(5, 6, 7), max_new_tokens=8, ignore_eos=True))
    theirs = oracle.model.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False, eos_token_id=[], pad_token_id=0
    )
    assert list(chunk.token_ids) == theirs[0, 3:].tolist()
    assert (chunk.finish_reason, chunk.num_prompt_tokens) == ("length", 3)
    ended = service.sample(GenerateRequest(token_ids=(5, 6, 7), max_new_tokens=8, stop_token_ids=(chunk.token_ids[0],)))
    assert (ended.token_ids, ended.finish_reason) == (chunk.token_ids[:1], "stop")
    assert service.state().micro_batches == ("m5",)


def oracle_step(oracle: Oracle, one: MicroBatch) -> tuple[float, float]:
    for group in oracle._optimizer.param_groups:
        group["lr"] = 0.03
    return oracle.step([one])


def archive(model: Any, root: Path, run_id: str = "run") -> DiskArchive:
    made = Cluster(model, 1)
    layers = {path: len(next(module.parameters())) for path, module in made.modules.items()}
    return DiskArchive(root, run_id, "tiny", "fingerprint", layers, torch.float64, keep=None)


def test_training_goes_back_to_a_checkpoint_and_on_from_there(model: Any, tmp_path: Path) -> None:
    made, oracle = cluster(model, archive=archive(model, tmp_path)), Oracle(model)
    service = session(made)
    for step in (1, 2):
        agree(service.train_step([micro(step)], options(step)), oracle.step([micro(step)]))
    saved = service.save_state()
    assert (saved.step, saved.folder) == (2, str(tmp_path / "step-00000002"))
    for step in (3, 4):
        service.train_step([micro(40 + step)], options(step))
    service.save_state()
    service.forward_backward(micro(50))
    assert service.state().saved_steps == (2, 4)
    assert service.load_state(2) == saved
    state = service.state()
    assert (state.step, state.micro_batches, state.saved_steps, len(state.history)) == (2, (), (2,), 2)
    agree(service.train_step([micro(3)], options(3)), oracle.step([micro(3)]))
    made.kill("expert-0")
    agree(service.train_step([micro(4)], options(4, op_id="new-4")), oracle.step([micro(4)]))
    same_weights(made, oracle)
    assert service.save_state().step == 4
    assert service.load_state(None).step == 4


def test_a_checkpoint_that_cannot_be_loaded_changes_nothing(model: Any, tmp_path: Path) -> None:
    made, oracle = cluster(model, archive=archive(model, tmp_path)), Oracle(model)
    service = session(made)
    for step in (1, 2, 3):
        agree(service.train_step([micro(step)], options(step)), oracle.step([micro(step)]))
        service.save_state()
    service.forward_backward(micro(4))
    with pytest.raises(NotFound, match="no checkpoint of step 7; there are those of the steps 1, 2, 3"):
        service.load_state(7)
    shard = next((tmp_path / "step-00000001" / "experts").iterdir())
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    next((tmp_path / "step-00000002" / "experts").iterdir()).unlink()
    for step, why in ((1, "is damaged"), (2, "lacks 1 of its files")):
        with pytest.raises(InvalidCheckpoint, match=why):
            service.load_state(step)
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000009")
    with pytest.raises(InvalidCheckpoint):  # it says of itself that it is another step
        service.load_state(9)
    assert service.state().micro_batches == ("m4",)
    agree(service.optim_step(options(4)), oracle.step([micro(4)]))
    same_weights(made, oracle)


def test_what_was_learned_is_written_for_everybody_to_load(tmp_path: Path) -> None:
    model = save("mixtral", tmp_path / "model")
    made, oracle = cluster(model), Oracle(model)
    service = session(made)
    service.train_step([micro(1)], options(1))
    oracle.step([micro(1)])
    checkpoint = Checkpoint.open(tmp_path / "model")

    def write(*held: Path) -> tuple[int, Path]:
        return service.weights(
            lambda step, backbone, weights: export_running(
                checkpoint, tmp_path / "run", step, backbone, weights, [str(folder) for folder in held]
            )
        )

    step, folder = write()
    assert (step, folder.parent) == (1, tmp_path / "run")
    learned = AutoModelForCausalLM.from_pretrained(folder)
    for path, parameter in oracle.model.named_parameters():
        torch.testing.assert_close(learned.get_parameter(path), parameter.detach(), rtol=1e-3, atol=1e-4)
    _, second = write(folder)
    _, third = write(folder)
    assert set((tmp_path / "run").iterdir()) == {folder, third} != {folder, second}


def test_only_what_was_written_to_be_served_is_removed_and_not_what_is_in_use(tmp_path: Path) -> None:
    """Neither checkpoints of training in the same folder, nor what the training began with, by whatever name."""
    model = save("mixtral", tmp_path / "step-00000004-0a1b2c")
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "step-00000001-ffffff").mkdir()
    (tmp_path / "step-00000002-eeeeee").mkdir()
    checkpoint = Checkpoint.open(tmp_path / "link" / "step-00000004-0a1b2c")
    _, folder = session(cluster(model)).weights(
        lambda step, backbone, weights: export_running(
            checkpoint, tmp_path, step, backbone, weights, [str(tmp_path / "link" / "step-00000001-ffffff")]
        )
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "link",
        "step-00000001-ffffff",
        "step-00000003",
        "step-00000004-0a1b2c",
        folder.name,
    }
