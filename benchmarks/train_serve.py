"""Training while serving: does any request fail, and is every answer that of one published version, never a mixture?

`python benchmarks/train_serve.py [--steps 200] [--publish-every 10] [--clients 8]`. One service serves a tiny model of
bytes while its own expert actors are trained; every few steps the weights are published, and the clients, which stream
greedily all the while, are answered with them from then on. Each answer is compared with what `transformers` generates
from each published folder. Results go to `benchmarks/results/train_serve.{json,md}`; exit status 1 when
a request failed, an answer was of no version, or a client was taken back to an older one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.progress import Progress as Bar
from transformers import AutoModelForCausalLM

import ray_moe
from benchmarks import report
from ray_moe.client.sync import Client
from ray_moe.models.byte_level import ByteModel, write_new
from ray_moe.service.composition import Service
from ray_moe.training.loop import Progress
from tests.ray.support import all_ready, await_status, greedy, make_config, prompts

NUM_TOKENS = 24
"""Of an answer."""
LAST_S = 60.0
"""By then after the end of the training somebody must have been answered with the last version."""

Answer = tuple[int, ...]


@dataclass(slots=True)
class Asking:
    """Clients that ask, each the same question again and again, and what they were answered."""

    address: str
    questions: Sequence[Sequence[int]]
    answers: list[list[Answer]] = field(default_factory=list)
    """Of each client, in order."""
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """When a token came (`time.time`), and how long after the one before it, over all streams."""
    failures: list[str] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        self.answers = [[] for _ in self.questions]
        threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(len(self.questions))]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join()

    def _ask(self, number: int) -> None:
        with Client(self.address) as client:
            while not self._ended.is_set():
                try:
                    self.answers[number].append(self._answer(client, self.questions[number]))
                except Exception as error:
                    self.failures.append(repr(error))

    def _answer(self, client: Client, question: Sequence[int]) -> Answer:
        tokens: list[int] = []
        last_s = 0.0
        for chunk in client.stream(token_ids=list(question), max_new_tokens=NUM_TOKENS, ignore_eos=True):
            now_s = time.time()
            if tokens:
                self.gaps.append((now_s, now_s - last_s))
            tokens.extend(chunk.token_ids)
            last_s = now_s
        return tuple(tokens)


@dataclass(slots=True)
class References:
    """What each published version answers to each question, as `transformers` says."""

    questions: Sequence[Sequence[int]]
    of_step: dict[int, list[Answer]] = field(default_factory=dict)

    def add(self, step: int, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        self.of_step[step] = greedy(model, self.questions, NUM_TOKENS)

    def steps_of(self, number: int, answer: Answer) -> list[int]:
        """The versions that answer question `number` like that, by their step; none for a mixture."""
        return [step for step, answers in sorted(self.of_step.items()) if answers[number] == answer]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of it."""

    num_requests: int
    failures: list[str]
    num_mixed: int
    num_backward: int
    """Answers of an older version than the same client had been answered with before."""
    seen: dict[int, int]
    """Answers that only this version gives, by its step."""
    num_shared: int
    """Answers that several versions give: learning has not changed them."""


def judge(asking: Asking, references: References) -> Verdict:
    seen: Counter[int] = Counter()
    mixed = backward = shared = 0
    for number, answers in enumerate(asking.answers):
        reached = 0
        for answer in answers:
            steps = references.steps_of(number, answer)
            if not steps:
                mixed += 1
                continue
            backward += steps[-1] < reached
            reached = max(reached, min((step for step in steps if step >= reached), default=reached))
            if len(steps) == 1:
                seen[steps[0]] += 1
            else:
                shared += 1
    total = sum(map(len, asking.answers)) + len(asking.failures)
    return Verdict(total, asking.failures, mixed, backward, dict(sorted(seen.items())), shared)


def settings(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "data": [str(folder / "text")],
        "steps": arguments.steps,
        "batch_size": 2,
        "micro_batches": 2,
        "sequence_length": 24,
        "num_cpus": 0.1,
        "parallel": {"data": arguments.workers},
        "optimizer": {"lr": 3e-3, "weight_decay": 0.01},
        "serve": True,
        "publish_every": arguments.publish_every,
        "publish_folder": str(folder / "published"),
        "report_every": 1,
    }


def write_model(folder: Path) -> None:
    """The model, and what it learns from."""
    write_new(folder / "model", ByteModel(hidden_size=32, num_layers=2, expert_width=24))
    (folder / "text").mkdir()
    for number in range(8):
        (folder / "text" / f"{number}.txt").write_text(f"{number}: so many words, and no two of them the same. " * 40)


@dataclass(slots=True)
class Run:
    """What is noted while the training lasts."""

    asking: Asking
    references: References
    windows: dict[str, tuple[float, float]] = field(default_factory=dict)
    """From when to when each version was being published."""
    num_folders: list[int] = field(default_factory=list)
    """Of published versions on the disk, each time one had been added."""
    took_s: float = 0.0


def train(folder: Path, arguments: argparse.Namespace, bar: Bar) -> Run:
    """Train with clients that ask, until somebody is answered with the last version."""
    questions = prompts(arguments.clients)
    references = References(questions)
    references.add(0, folder / "model")
    task = bar.add_task("training", total=arguments.steps)
    served = make_config(folder / "model", {"experts": {"num_actors": 3}})
    with Service(served) as service, Client(service.address) as client:
        await_status(client, all_ready, what="ready")
        run = Run(Asking(service.address, questions), references)

        def hear(progress: Progress) -> None:
            bar.update(task, completed=progress.step)
            if progress.event.startswith("published"):
                references.add(progress.step, Path(progress.event.rpartition(" ")[2]))
                run.num_folders.append(len(list((folder / "published").iterdir())))
                run.windows.update(_windows(client))
            elif progress.event:
                bar.console.print(progress.event, markup=False)

        with run.asking.running():
            begun_s = time.monotonic()
            config = make_config(folder / "model", {"train": settings(folder, arguments)})
            ray_moe.train(config, hear, service_name=service.config.service_name)
            run.took_s = time.monotonic() - begun_s
            last = references.of_step[arguments.steps]
            end_s = time.monotonic() + LAST_S
            while time.monotonic() < end_s:
                if any(each[-1:] == [last[number]] for number, each in enumerate(run.asking.answers)):
                    break
                time.sleep(0.1)
    return run


def main(argv: list[str] | None = None) -> None:
    parser = report.options(__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--publish-every", type=int, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1, help="workers of Ray Train")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.publish_every = 30, 10
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, Bar() as bar:
        write_model(Path(folder))
        run = train(Path(folder), arguments, bar)
    verdict = judge(run.asking, run.references)
    names = ("steps", "publish_every", "clients", "workers")
    settings = {name: getattr(arguments, name) for name in names} | {"num_tokens": NUM_TOKENS}
    report.finish("train_serve", {"settings": settings, "verdict": asdict(verdict), **figures(run)}, arguments)
    is_right = not (verdict.failures or verdict.num_mixed or verdict.num_backward)
    sys.exit(0 if is_right and arguments.steps in verdict.seen else 1)


def _windows(client: Client) -> dict[str, tuple[float, float]]:
    """From when to when each version was being published, as far as the service remembers."""
    began: dict[str, float] = {}
    windows = {}
    for event in client.status().events:
        version = event.text.partition(":")[0]
        if event.kind == "loading":
            began[version] = event.at_s
        elif event.kind == "published" and version in began:
            windows[version] = (began[version], event.at_s)
    return windows


def figures(run: Run) -> dict[str, Any]:
    """Times, in seconds; of those between two tokens the median, 99 % and the longest."""
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for at_s, gap_s in run.asking.gaps:
        gaps[any(begin_s <= at_s <= end_s for begin_s, end_s in run.windows.values())].append(gap_s)
    took_s = [end_s - begin_s for begin_s, end_s in run.windows.values()] or [float("nan")]
    return {
        "versions": len(run.references.of_step) - 1,
        "folders": run.num_folders,
        "between_tokens_s": {
            "while a version was being published": _quantiles(gaps[True]),
            "otherwise": _quantiles(gaps[False]),
        },
        "version_s": {"median": float(np.median(took_s)), "longest": max(took_s)},
        "run_s": run.took_s,
    }


def _quantiles(gaps: Sequence[float]) -> list[float]:
    return [*map(float, np.quantile(gaps, [0.5, 0.99])), max(gaps)] if gaps else []


if __name__ == "__main__":
    main()
