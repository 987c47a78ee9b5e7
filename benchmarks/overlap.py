"""Training with several micro-batches in flight: while the rows of one are with the experts, the worker is at another.

`python benchmarks/overlap.py [--rounds 3]`. One worker and one expert actor of one thread each, on a Ray of its own;
runs of `ray_moe.train` with `in_flight` 1 and 2 take turns on the same actor. Results go to
`benchmarks/results/overlap.{json,md}`.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ray_moe
from benchmarks import report
from ray_moe.config import Config
from ray_moe.models.byte_level import ByteModel, write_new
from ray_moe.service.composition import Service
from ray_moe.training.loop import Progress

STEPS, SETTLED = 7, 2
"""Of a run; so many first ones are not measured."""
MICRO_BATCHES, WINDOWS, WINDOW = 4, 4, 128
IN_FLIGHT = (1, 2)
MODEL = ByteModel(hidden_size=256, num_layers=4, num_heads=8, expert_width=512)


def settings(model: Path, num_steps: int) -> dict[str, Any]:
    return {
        "model": str(model),
        "service_name": "overlap",
        "experts": {"num_actors": 1, "num_cpus": 0.5},
        "router": {"num_cpus": 0.1},
        "server": {"port": 0, "http_port": None, "grace_s": 1},
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


def main(argv: list[str] | None = None) -> None:
    given = report.options(__doc__, rounds=3).parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        write_new(model, MODEL)
        config = Config.model_validate(settings(model, STEPS))
        with Service(config, keep_routers=False):
            speeds = measure(config, 1 if given.quick else given.rounds)
    about = {"micro_batches": MICRO_BATCHES, "windows": WINDOWS, "window": WINDOW}
    report.finish("overlap", {"model": asdict(MODEL), **about, "tokens_per_s": speeds}, given)


if __name__ == "__main__":
    main()
