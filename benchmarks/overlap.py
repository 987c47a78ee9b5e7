"""Two batches at once against one: while the rows of one are with the experts, the backbone computes the other.

`python benchmarks/overlap.py [--rounds 3]`, on a Ray of its own, one thread for each process. Training: runs of
`ray_moe.train` with `in_flight` 1 and 2 take turns on one expert actor. Serving: two services of a router and an expert
actor each, with `router.overlap_min_tokens` and without, take turns with the same prompts. Results go to
`benchmarks/results/overlap.{json,md}`.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ray_moe
from benchmarks import report
from ray_moe.client.sync import Client
from ray_moe.config import Config
from ray_moe.models.byte_level import ByteModel, write_new
from ray_moe.service.composition import Service
from ray_moe.training.loop import Progress

STEPS, SETTLED = 7, 2
"""Of a run; so many first ones are not measured."""
MICRO_BATCHES, WINDOWS, WINDOW = 4, 4, 128
IN_FLIGHT = (1, 2)
MODEL = ByteModel(hidden_size=256, num_layers=4, num_heads=8, expert_width=512)


OVERLAP_MIN_TOKENS, MAX_STEP_TOKENS = 16, 2048


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that come together."""

    requests: int
    prompt: int
    """Tokens of each."""
    answer: int

    @property
    def tokens(self) -> int:
        """That are computed."""
        return self.requests * (self.prompt + self.answer - 1)


LOADS = {"prompts": Load(32, 128, 1), "long prompts": Load(16, 512, 1), "answers": Load(64, 8, 64)}


def base(model: Path, name: str) -> dict[str, Any]:
    return {
        "model": str(model),
        "service_name": name,
        "experts": {"num_actors": 1, "num_cpus": 0.5},
        "router": {"num_cpus": 0.1},
        "server": {"port": 0, "http_port": None, "grace_s": 1},
    }


def settings(model: Path, num_steps: int) -> dict[str, Any]:
    """Of training."""
    return base(model, "overlap") | {
        "train": {
            "data": "stdlib",
            "steps": num_steps,
            "micro_batches": MICRO_BATCHES,
            "batch_size": WINDOWS,
            "sequence_length": WINDOW,
            "snapshot_every": 0,
            "num_cpus": 0.5,
        },
    }


def serving_settings(model: Path, overlap_min_tokens: int | None) -> dict[str, Any]:
    router = {
        "num_cpus": 0.1,
        "reuse_prefixes": False,
        "max_step_tokens": MAX_STEP_TOKENS,
        "max_concurrent_requests": max(load.requests for load in LOADS.values()),
        "overlap_min_tokens": overlap_min_tokens,
    }
    return base(model, f"serving-{overlap_min_tokens or 0}") | {"router": router}


def run(config: Config, number: int, in_flight: int) -> tuple[float, list[float]]:
    """Tokens per second of the median step, and the losses, of a new run on the service."""
    told: list[Progress] = []
    train = config.train.model_copy(update={"in_flight": in_flight, "run_id": f"run-{number}"})
    ray_moe.train(config.model_copy(update={"train": train}), told.append, service_name=config.service_name)
    steps = [progress for progress in told if progress.tokens_per_s > 0]
    return statistics.median(p.tokens_per_s for p in steps[SETTLED:]), [p.loss for p in steps]


def measure(config: Config, rounds: int) -> dict[int, list[float]]:
    """Tokens per second of each round, by micro-batches in flight. Raises SystemExit when losses differ."""
    speeds: dict[int, list[float]] = {in_flight: [] for in_flight in IN_FLIGHT}
    expected: list[float] = []
    number = 0
    for turn in range(rounds):
        for in_flight in IN_FLIGHT if turn % 2 == 0 else reversed(IN_FLIGHT):
            speed, losses = run(config, number, in_flight)
            number += 1
            expected = expected or losses
            if any(abs(mine - theirs) > 1e-5 * theirs for mine, theirs in zip(losses, expected, strict=True)):
                raise SystemExit(f"in_flight {in_flight} learns something else: {losses}, and before {expected}")
            speeds[in_flight].append(speed)
            print(f"round {turn + 1}, in_flight {in_flight}: {speed:,.0f} tokens/s", file=sys.stderr)
    return speeds


def serve_once(client: Client, load: Load, number: int) -> tuple[float, list[tuple[int, ...]]]:
    """Tokens per second of requests that come together, and their answers."""
    draw = random.Random(number)
    prompts = [[draw.randrange(256) for _ in range(load.prompt)] for _ in range(load.requests)]

    def ask(prompt: list[int]) -> tuple[int, ...]:
        answer = client.generate(token_ids=prompt, max_new_tokens=load.answer, ignore_eos=True, temperature=0)
        return answer.token_ids

    with ThreadPoolExecutor(load.requests) as together:
        began_s = time.perf_counter()
        answers = list(together.map(ask, prompts))
        return load.tokens / (time.perf_counter() - began_s), answers


def serve(model: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Tokens per second by load, of each round with overlap and without. Raises SystemExit when answers differ."""
    speeds: dict[str, dict[str, list[float]]] = {name: {"off": [], "on": []} for name in LOADS}
    with ExitStack() as ending:
        clients = {}
        for name, least in (("off", None), ("on", OVERLAP_MIN_TOKENS)):
            service = ending.enter_context(Service(Config.model_validate(serving_settings(model, least))))
            clients[name] = ending.enter_context(Client(service.address))
        for turn in range(-1, rounds):  # the first warms up
            for kind, load in LOADS.items():
                answers = {}
                for name in ("off", "on") if turn % 2 else ("on", "off"):
                    speed, answers[name] = serve_once(clients[name], load, turn)
                    if turn >= 0:
                        speeds[kind][name].append(speed)
                        print(f"round {turn + 1}, {kind}, overlap {name}: {speed:,.0f} tokens/s", file=sys.stderr)
                if answers["on"] != answers["off"]:
                    raise SystemExit(f"with overlap, {kind} get other answers")
    return speeds


def main(argv: list[str] | None = None) -> None:
    given = report.options(__doc__, rounds=5).parse_args(argv)
    rounds = 1 if given.quick else given.rounds
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        write_new(model, MODEL)
        serving = serve(model, rounds)
        config = Config.model_validate(settings(model, STEPS))
        with Service(config, keep_routers=False):
            speeds = measure(config, rounds)
    measured = {
        "model": asdict(MODEL),
        "micro_batches": MICRO_BATCHES,
        "windows": WINDOWS,
        "window": WINDOW,
        "tokens_per_s": speeds,
        "loads": {name: asdict(load) for name, load in LOADS.items()},
        "overlap_min_tokens": OVERLAP_MIN_TOKENS,
        "max_step_tokens": MAX_STEP_TOKENS,
        "serving_tokens_per_s": serving,
    }
    report.finish("overlap", measured, given)


if __name__ == "__main__":
    main()
