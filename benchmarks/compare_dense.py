"""What sparse weights buy on this machine: a dense and an MoE model, trained and asked in turns.

`python benchmarks/compare_dense.py [--quick] [--only times|losses]`. It is `ray-moe compare-dense` at several sizes,
beside what this machine can do at best: how fast it reads weights for one token, and how fast it multiplies matrices.
Where nothing but weights and multiplications took time, both ratios would be that of the active weights. Losses after
the same time are those of a model small enough to be trained for hundreds of steps, with several seeds. Results go to
`benchmarks/results/compare_dense.{json,md}`; what is not measured anew is taken from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import report
from ray_moe.models.compare import CompareSettings, Comparison, Measured, compare, expert_sizes

BASE = CompareSettings(steps=5, answers=9)
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

FLOPS_PER_WEIGHT = 6
"""Of a token in training: two forward, four backward."""
BYTES_PER_WEIGHT = 4


def limits(settings: CompareSettings) -> dict[str, float]:
    """Bytes and FLOPs in a second of one thread, through matrices of the dense model's shape."""
    weights = [torch.randn(settings.dense_width, settings.hidden_size) for _ in range(_copies(settings))]
    row, rows = torch.randn(1, settings.hidden_size), torch.randn(2048, settings.hidden_size)
    num_weights = sum(matrix.numel() for matrix in weights)

    def through(tokens: torch.Tensor, matrices: Sequence[torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for matrix in matrices:
                torch.nn.functional.linear(tokens, matrix)

        return run

    with torch.inference_mode():
        reading_s, multiplying_s = _least_s(through(row, weights)), _least_s(through(rows, weights[:1]))
    return {
        "bytes_per_s": BYTES_PER_WEIGHT * num_weights / reading_s,
        "flops_per_s": 2 * len(rows) * weights[0].numel() / multiplying_s,
    }


def size_page(runs: Mapping[str, tuple[CompareSettings, Comparison]], limit: Mapping[str, float]) -> str:
    trained, asked = {}, {}
    for size, (settings, made) in runs.items():
        width, number = expert_sizes(settings)
        for each in made.models:
            name = f"{size}: {each.name}" + (f" ({number} experts of {width})" if each is made.moe else "")
            sizes = [f"{each.total / 1e6:.1f} M", f"{each.active / 1e6:.1f} M ({each.active / made.dense.active:.2f}×)"]
            if each.step_s:
                tokens = settings.batch * settings.window
                flops = FLOPS_PER_WEIGHT * each.active * tokens
                trained[name] = [
                    *sizes,
                    f"{tokens}",
                    f"{statistics.median(each.gradient_s):.2f} + {statistics.median(each.update_s):.2f}",
                    f"{flops / statistics.median(each.gradient_s) / limit['flops_per_s']:.0%}",
                    str(made.speedup(each)),
                    str(made.speedup(each, with_update=False)),
                ]
            if each.token_s:
                read = BYTES_PER_WEIGHT * each.active
                token_s = statistics.median(each.token_s)
                asked[name] = [
                    *sizes,
                    f"{read / 1e6:.0f} MB",
                    f"{1000 * token_s:.2f}",
                    f"{read / token_s / limit['bytes_per_s']:.0%}",
                    str(made.latency(each)),
                    f"{1000 * statistics.median(each.prompt_s):.0f}",
                    str(made.first_token(each)),
                ]
    prompts = sorted({settings.prompt for settings, _ in runs.values()})
    sizes = ["weights", "active"]
    training = [*sizes, "tokens", "s, step + update", "of the FLOPs", "as fast as dense", "without update"]
    asking = [*sizes, "read", "ms a token", "of the bandwidth", "of dense", "ms to the first", "of dense"]
    return f"""## Training

{report.table(training, trained)}

## Answers

A prompt of {" or ".join(str(prompt) for prompt in prompts)} tokens, and {BASE.new_tokens} more one by one.

{report.table(asking, asked)}"""


def loss_page(runs: Sequence[Comparison], settings: CompareSettings) -> str:
    rows = {}
    for seed, made in zip(SEEDS, runs, strict=False):
        losses = made.losses_after_the_same_time()
        if losses is not None:
            rows[f"seed {seed}"] = [*(f"{loss:.3f}" for loss in losses), str(made.speedup(made.moe))]
    first = runs[0]
    about = ", ".join(
        f"{each.name} {each.total / 1e6:.2f} M ({each.active / 1e6:.2f} M active)" for each in first.models
    )
    return f"""## Loss after the same time

Nats a byte on batches that are new to the model, when the fastest has done {settings.steps} steps of
{settings.batch * settings.window} tokens: the mean of the tenth of the steps before. Weights: {about}.

{report.table([*(each.name for each in first.models), "MoE trains as fast as dense"], rows)}"""


def page(sizes: str, losses: str, limit: Mapping[str, float]) -> str:
    return f"""# Beside a dense model

`ray-moe compare-dense` at several sizes, one thread, float32. *Dense* is the model to compare with; *MoE* has
{BASE.active} of its active weights and {BASE.total} times its weights, {BASE.top_k} experts for each token, and
{BASE.shape} of its layers and its width, as a model of 7 billion weights beside one of 13; *small* is dense, with the
layers, the width and the active weights of the MoE model, so that what is left between them is the price of choosing.
Models take turns; a ratio is the median of its turns (least-most). Times are those of the process on its core, which
others shared with it; on a machine of its own they are those of the clock. The published pattern: training 1.75 times
as fast, and answers in 0.51 of the time.

At its best, one thread of this machine reads weights for a token at {limit["bytes_per_s"] / 1e9:.1f} GB/s and
multiplies matrices at {limit["flops_per_s"] / 1e9:.0f} GFLOP/s. Of these, a model uses what its active weights need: 4
bytes each for a token of an answer, 6 FLOPs each for a token of training. If they alone took time, training would be
{1 / BASE.active:.2f} times as fast, and a token would take {BASE.active:.2f} of the time.

{sizes}

{losses}"""


def _copies(settings: CompareSettings) -> int:
    """As many matrices as are beyond the caches: 1.2 GB of them."""
    return max(1_200_000_000 // (BYTES_PER_WEIGHT * settings.dense_width * settings.hidden_size), 1)


def _least_s(run: Callable[[], None], rounds: int = 9) -> float:
    taken_s = []
    for _ in range(rounds):
        started_s = time.process_time()
        run()
        taken_s.append(time.process_time() - started_s)
    return min(taken_s)


def _say(what: str) -> Callable[[str, int, int], None]:
    def say(stage: str, done: int, total: int) -> None:
        print(f"{what}: {stage}, {done} of {total}", file=sys.stderr, flush=True)

    return say


def _known() -> dict[str, Any]:
    known: dict[str, Any] = json.loads((report.RESULTS / "compare_dense.json").read_text())
    return known


def _made(known: Mapping[str, Any]) -> Comparison:
    """A comparison as it was written."""
    return Comparison(*(Measured(**known[name]) for name in ("dense", "small", "moe")))


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
    return {"to_learn": asdict(settings), "losses": [asdict(each) for each in made]}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true", help="tiny models, to see that it runs; nothing is written")
    arguments.add_argument("--only", choices=["times", "losses"], help="the rest is what was measured last")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    data = _known() if given.only and not given.quick else {}
    if given.only != "losses" or given.quick:
        data |= measured_times({"tiny": QUICK} if given.quick else SIZES, QUICK if given.quick else BASE)
    if given.only != "times" or given.quick:
        learning = (replace(QUICK, steps=100, answers=0), SEEDS[:1]) if given.quick else (LOSSES, SEEDS)
        data |= measured_losses(*learning)
    runs = {size: (CompareSettings(**each["settings"]), _made(each)) for size, each in data["sizes"].items()}
    losses = [_made(each) for each in data["losses"]]
    text = page(size_page(runs, data["limits"]), loss_page(losses, CompareSettings(**data["to_learn"])), data["limits"])
    print(text)
    if not given.quick:
        report.write("compare_dense", text, {key: each for key, each in data.items() if key != "machine"})


if __name__ == "__main__":
    main()
