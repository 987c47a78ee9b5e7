"""What sparse weights buy on this machine: a dense and an MoE model, trained and asked in turns.

`python benchmarks/compare_dense.py [--quick] [--only times|losses]`. It is `ray-moe compare-dense` at several sizes,
beside what this machine can do at best: how fast it reads weights for one token, and how fast it multiplies matrices.
Where nothing but weights and multiplications took time, both ratios would be that of the active weights. Losses after
the same time are those of a model small enough to be trained for hundreds of steps, with several seeds. Results go to
`benchmarks/results/compare_dense.{json,md}`; what is not measured anew is taken from there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import report
from benchmarks.floor import measure_rates
from ray_moe.models.compare import CompareSettings, compare

BASE = CompareSettings(steps=11, answers=9)
LARGE = replace(BASE, hidden_size=1920, dense_width=7680, steps=0, answers=5, prompt=512)
SIZES = {
    "medium": BASE,
    "large": LARGE,
    "large, 0.514 active": replace(LARGE, active=0.514),
}
"""The last has of its dense model what LLaMA 7B has of 13B when embeddings that are looked up are left out."""
LOSSES = replace(BASE, hidden_size=320, dense_width=1280, batch=8, window=128, steps=100, answers=0)
SEEDS = (0, 1, 2)
QUICK = replace(BASE, hidden_size=64, dense_width=512, batch=2, window=32, steps=2, answers=2)


def limits(settings: CompareSettings) -> dict[str, float]:
    """Bytes and FLOPs in a second of one thread, through matrices of the dense model's shape."""
    rates = measure_rates(settings.hidden_size, settings.dense_width, time.process_time)
    return {"bytes_per_s": rates.read_bytes_per_s, "flops_per_s": rates.flops_per_s}


def _say(what: str) -> Callable[[str, int, int], None]:
    def say(stage: str, done: int, total: int) -> None:
        print(f"{what}: {stage}, {done} of {total}", file=sys.stderr, flush=True)

    return say


def _known() -> dict[str, Any]:
    known: dict[str, Any] = json.loads((report.RESULTS / "compare_dense.json").read_text())
    return known


def measured_times(sizes: Mapping[str, CompareSettings], shape: CompareSettings) -> dict[str, Any]:
    limit = limits(shape)
    made = {size: compare(settings, _say(size), time.process_time) for size, settings in sizes.items()}
    after = limits(shape)
    return {
        "limits": {key: max(rate, after[key]) for key, rate in limit.items()},  # others may have been at work
        "sizes": {size: {"settings": asdict(sizes[size]), **asdict(each)} for size, each in made.items()},
    }


def measured_losses(settings: CompareSettings, seeds: Sequence[int]) -> dict[str, Any]:
    made = [compare(replace(settings, seed=seed), _say(f"seed {seed}"), time.process_time) for seed in seeds]
    return {"seeds": seeds, "to_learn": asdict(settings), "losses": [asdict(each) for each in made]}


def main(argv: list[str] | None = None) -> None:
    arguments = report.options(__doc__)
    arguments.add_argument("--only", choices=["times", "losses"], help="the rest is what was measured last")
    given = arguments.parse_args(argv)
    torch.set_num_threads(1)
    data = _known() if given.only and not given.quick else {}
    if given.only != "losses" or given.quick:
        data |= measured_times({"tiny": QUICK} if given.quick else SIZES, QUICK if given.quick else BASE)
    if given.only != "times" or given.quick:
        learning = (replace(QUICK, steps=100, answers=0), SEEDS[:1]) if given.quick else (LOSSES, SEEDS)
        data |= measured_losses(*learning)
    report.finish("compare_dense", {key: each for key, each in data.items() if key != "machine"}, given)


if __name__ == "__main__":
    main()
