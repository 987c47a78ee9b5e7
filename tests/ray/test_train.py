"""`ray_moe.train`: workers of Ray Train on the actors of a service, against one process of PyTorch."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.data
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
from typer.testing import CliRunner

import ray_moe
from ray_moe.cli.commands import commands
from ray_moe.client.sync import Client
from ray_moe.errors import NotFound
from ray_moe.models.byte_level import ByteModel, write_new
from ray_moe.training.data import BatchRequest, Data, open_data, windows_of
from ray_moe.training.documents import byte_tokens, read_rows
from ray_moe.training.loop import Progress
from tests.ray.support import greedy, make_config, no_leaks, prompts, serving

STEPS, BATCH, MICRO, WINDOW = 6, 2, 2, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bytes")
    write_new(made / "model", ByteModel(hidden_size=32, num_layers=2, expert_width=24))
    (made / "text").mkdir()
    for number in range(8):
        (made / "text" / f"{number}.txt").write_text(f"{number}: so many words, and no two of them the same. " * 40)
    return made


def settings(folder: Path, **train: Any) -> dict[str, Any]:
    return {
        "data": [str(folder / "text")],
        "steps": STEPS,
        "batch_size": BATCH,
        "micro_batches": MICRO,
        "sequence_length": WINDOW,
        "num_cpus": 0.1,
        "parallel": {"data": 2},
        "optimizer": {"lr": 3e-3, "weight_decay": 0.01, "no_decay": []},
        **train,
    }


@pytest.fixture(scope="module")
def reference(folder: Path) -> tuple[list[float], Any]:
    """One process of PyTorch on the same windows: its losses, and its model."""
    return one_process(folder, open_data([str(folder / "text")], vocab_size=257), STEPS)


def one_process(folder: Path, data: Data, num_steps: int, balancing: float = 0.0) -> tuple[list[float], Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    losses, num = [], 2 * MICRO
    for step in range(num_steps):
        optimizer.zero_grad()
        each = []
        for micro in range(num):
            batch = data.batch(BatchRequest(step, BATCH, WINDOW, micro_batch=micro, num_micro_batches=num))
            loss = model(**batch).loss
            for logits in model(**batch, output_router_logits=True).router_logits if balancing else ():
                loss = loss + balancing * load_balancing_loss_func((logits,), logits.shape[-1], ByteModel().top_k)
            (loss / num).backward()
            each.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(sum(each) / num)
    return losses, model.eval()


def train(folder: Path, on_step: Any = lambda progress: None, rows: Any = None, **more: Any) -> list[Progress]:
    """What is told of a run on expert actors of its own."""
    told: list[Progress] = []

    def hear(progress: Progress) -> None:
        told.append(progress)
        on_step(progress)

    config = make_config(folder / "model", {"train": settings(folder, **more)})
    with no_leaks(config.service_name):
        ray_moe.train(config, hear, data=rows)
    return told


def curve(told: list[Progress]) -> list[float]:
    losses = losses_of(told)
    return [losses[step] for step in sorted(losses)]


def losses_of(told: list[Progress]) -> dict[int, float]:
    return {progress.step: progress.loss for progress in told if progress.step and not math.isnan(progress.loss)}


def test_two_workers_learn_what_one_process_would_and_the_checkpoint_is_its_model(folder: Path, tmp_path: Path) -> None:
    losses, model = one_process(folder, open_data([str(folder / "text")], vocab_size=257), STEPS, balancing=0.05)
    told = train(
        folder,
        checkpoints={"folder": str(tmp_path / "ck"), "every": 4},
        logs=str(tmp_path / "logs"),
        auxiliary={"load_balancing": 0.05},
    )
    assert curve(told) == pytest.approx(losses, rel=1e-5)
    assert told[-1].event == f"saved {tmp_path / 'ck' / f'step-{STEPS:08d}'}"
    assert 0 < told[-1].balancedness <= 1
    assert list((tmp_path / "logs").rglob("events*"))
    out = tmp_path / "out"
    assert CliRunner().invoke(commands, ["export", str(tmp_path / "ck"), str(out)]).exit_code == 0
    trained = AutoModelForCausalLM.from_pretrained(out)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), parameter, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gate", [{"name": "noisy_topk"}, {"name": "dynamic_k", "threshold": 0.6}])
def test_a_gate_is_trained_and_exported_where_transformers_would_compute_it(
    folder: Path, gate: dict[str, Any], tmp_path: Path
) -> None:
    train(
        folder,
        gate=gate,
        auxiliary={"load": 0.01} if gate["name"] == "noisy_topk" else {"entropy": 1e-3},
        methods={"expert_dropout": 0.1},
        checkpoints={"folder": str(tmp_path / "ck")},
    )
    trained: Any = ray_moe.load_trained(tmp_path / "ck")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = trained(ids).logits
        before = AutoModelForCausalLM.from_pretrained(folder / "model")(ids).logits
    assert not torch.allclose(expected, before, atol=1e-3)
    exported = CliRunner().invoke(commands, ["export", str(tmp_path / "ck"), str(tmp_path / "out")])
    if gate["name"] == "dynamic_k":
        assert exported.exit_code != 0 and not (tmp_path / "out").exists()
        return
    assert exported.exit_code == 0
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_experts_in_8_bits_learn_almost_the_same(folder: Path, reference: Any) -> None:
    told = train(folder, quantization="int8", parallel={"data": 2, "replicas": 2})
    assert curve(told) == pytest.approx(reference[0], rel=1e-2)
    assert curve(told) != pytest.approx(reference[0], rel=1e-6)


def test_experts_in_parts_learn_the_same_and_whole_ones_go_on_from_their_checkpoint(
    folder: Path, reference: Any, tmp_path: Path
) -> None:
    checkpoints = {"folder": str(tmp_path / "ck"), "every": 4}
    told = train(folder, steps=4, parallel={"data": 2, "tensor": 2}, checkpoints=checkpoints)
    assert all(progress.expert_utilisation <= 1 for progress in told if progress.step)
    told += train(folder, parallel={"data": 2, "tensor": 1}, checkpoints=checkpoints)
    assert curve(told) == pytest.approx(reference[0], rel=1e-5)


def test_a_killed_worker_costs_no_step(folder: Path, reference: Any) -> None:
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if progress.step == 3 and not killed:
            worker = next(p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in _title(p))
            killed.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)

    told = train(folder, kill, steps=STEPS, parallel={"data": 1}, micro_batches=2 * MICRO)
    assert killed
    assert curve(told) == pytest.approx(reference[0], rel=1e-5)


def test_a_dataset_is_learned_the_same_by_fewer_workers_than_wanted_in_whatever_order_it_comes(folder: Path) -> None:
    """Two workers of 5 CPUs do not fit on the 8 there are; steps are dealt to the one that does."""
    texts = [file.read_text() for file in (folder / "text").iterdir()]
    rows = ray.data.from_items([{"text": text} for text in texts], override_num_blocks=4).random_shuffle()
    expected, _ = one_process(folder, windows_of(read_rows(texts, byte_tokens), 257), STEPS)
    seen: set[int] = set()
    told = train(
        folder,
        lambda progress: seen.add(num_workers()),
        rows,
        data=(),
        num_cpus=5,
        parallel={"data": 2, "min_data": 1},
    )
    assert seen - {0} == {1}
    assert curve(told) == pytest.approx(expected, rel=1e-5)


@pytest.mark.timeout(600)  # Ray takes its time to miss a node
def test_when_a_node_is_lost_fewer_workers_go_on_with_the_same_curve(
    folder: Path, reference: Any, add_node: Any, local_ray: Any
) -> None:
    node = add_node(6)
    time.sleep(21)  # Ray Train 2.60 looks every 20 s which nodes there are

    def lose(progress: Progress) -> None:
        if progress.step == 3 and node in local_ray.worker_nodes:
            local_ray.remove_node(node, allow_graceful=False)

    with watching() as numbers:
        told = train(folder, lose, num_cpus=5, parallel={"data": 2, "min_data": 1})
    assert node not in local_ray.worker_nodes
    assert 2 in numbers
    assert numbers[-1] == 1
    losses = losses_of(told)
    assert losses == pytest.approx(dict(enumerate(reference[0], 1)), rel=1e-5)


def test_adapters_are_trained_and_exported_in_the_weights(folder: Path, tmp_path: Path) -> None:
    """What is exported has the loss that the run had at its end, loaded as any other checkpoint; and what has no
    adapter is as it was."""
    texts = tmp_path / "text"
    texts.mkdir()
    for number in range(100):  # some of them are kept apart for validation
        (texts / f"{number}.txt").write_text(f"{number}: so many words, and no two of them the same. " * 4)
    told = train(
        folder,
        data=[str(texts)],
        lora={"rank": 4, "experts": True},
        checkpoints={"folder": str(tmp_path / "ck")},
        validation_every=STEPS,
        validation_batches=1,
    )
    assert CliRunner().invoke(commands, ["export", str(tmp_path / "ck"), str(tmp_path / "out")]).exit_code == 0
    before, after = (AutoModelForCausalLM.from_pretrained(at) for at in (folder / "model", tmp_path / "out"))
    data = open_data([str(texts)], vocab_size=257)
    batches = [
        data.batch(BatchRequest(0, BATCH, WINDOW, micro_batch=n, num_micro_batches=2, split="validation"))
        for n in range(2)
    ]
    with torch.no_grad():
        first, last = (sum(model(**batch).loss.item() for batch in batches) / 2 for model in (before, after))
    assert told[-1].validation_loss == pytest.approx(last, rel=1e-5)
    assert last < first
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    names = {name for name, _ in after.named_parameters()}
    assert changed == {name for name in names if ".experts." in name or ("self_attn" in name and "norm" not in name)}


@contextmanager
def watching() -> Iterator[list[int]]:
    """How many workers there are, each time it changes, but for the times with none."""
    numbers: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            number = num_workers()
            if number and number != (numbers[-1] if numbers else 0):
                numbers.append(number)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield numbers
    finally:
        over.set()
        thread.join()


def num_workers() -> int:
    return sum("RayTrainWorker" in _title(process) for process in psutil.Process().children(recursive=True))


def _title(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.NoSuchProcess:
        return ""


def test_what_is_served_follows_what_is_published(folder: Path, tmp_path: Path) -> None:
    """Clients generate all the while: every answer is that of one published version, and none fails.

    At length: `benchmarks/train_serve.py`.
    """
    num_steps, every, asked = 10, 2, prompts(3)
    how = settings(
        folder,
        steps=num_steps,
        serve=True,
        publish_every=every,
        publish_folder=str(tmp_path),
        parallel={"data": 1},
        micro_batches=1,
    )
    with serving(folder / "model") as service, Client(service.address) as client:
        answers: list[list[tuple[int, ...]]] = [[] for _ in asked]
        ended = threading.Event()

        def answer(number: int) -> tuple[int, ...]:
            return client.generate(token_ids=asked[number], max_new_tokens=8, ignore_eos=True).token_ids

        def ask(number: int) -> None:
            while not ended.is_set():
                answers[number].append(answer(number))

        asking = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
        for thread in asking:
            thread.start()
        try:
            config = make_config(folder / "model", {"train": how})
            expected = {0: _greedy(folder / "model", asked)}

            def hear(progress: Progress) -> None:
                if progress.event.startswith("published"):
                    expected[progress.step] = _greedy(Path(progress.event.rpartition(" ")[2]), asked)

            ray_moe.train(config, hear, service_name=service.config.service_name)
            last = expected[num_steps]
            give_up_s = time.monotonic() + 30
            while [each[-1] for each in answers] != last and time.monotonic() < give_up_s:
                time.sleep(0.05)
        finally:
            ended.set()
            for thread in asking:
                thread.join()
        assert sorted(expected) == list(range(0, num_steps + 1, every))
        for number, each in enumerate(answers):
            assert set(each) <= {tokens[number] for tokens in expected.values()}
            assert each[-1] == last[number]
        client.rollback()
        assert [answer(number) for number in range(len(asked))] == expected[num_steps - every]
        # The current one, the one to roll back to, and at most one that was on its way out when the last was written.
        assert len(list(tmp_path.iterdir())) <= 3


def _greedy(folder: Path, asked: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return greedy(AutoModelForCausalLM.from_pretrained(folder), asked, 8)


def test_a_service_that_does_not_run_cannot_be_trained_on(folder: Path) -> None:
    with pytest.raises(NotFound, match="no service named 'nobody'"):
        ray_moe.train(make_config(folder / "model", {"train": settings(folder)}), service_name="nobody")
