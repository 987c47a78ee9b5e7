"""The page of `benchmarks/compare_dense.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import report
from ray_moe.models.compare import CompareSettings, Comparison, Measured, expert_sizes

FLOPS_PER_WEIGHT = 6
"""Of a token in training: two forward, four backward."""
BYTES_PER_WEIGHT = 4


def page(data: report.Data) -> str:
    """Made of `results/compare_dense.json`."""
    runs = {size: (CompareSettings(**each["settings"]), _made(each)) for size, each in data["sizes"].items()}
    losses = [_made(each) for each in data["losses"]]
    base = next(iter(runs.values()))[0]
    sizes = size_page(runs, data["limits"])
    return whole_page(
        base, sizes, loss_page(losses, CompareSettings(**data["to_learn"]), data["seeds"]), data["limits"]
    )


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
    new_tokens = next(iter(runs.values()))[0].new_tokens
    prompts = sorted({settings.prompt for settings, _ in runs.values()})
    sizes = ["weights", "active"]
    training = [*sizes, "tokens", "s, step + update", "of the FLOPs", "as fast as dense", "without update"]
    asking = [*sizes, "read", "ms a token", "of the bandwidth", "of dense", "ms to the first", "of dense"]
    return f"""## Training

{report.table(training, trained)}

## Answers

A prompt of {" or ".join(str(prompt) for prompt in prompts)} tokens, and {new_tokens} more one by one.

{report.table(asking, asked)}"""


def loss_page(runs: Sequence[Comparison], settings: CompareSettings, seeds: Sequence[int]) -> str:
    rows = {}
    for seed, made in zip(seeds, runs, strict=True):
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


def whole_page(base: CompareSettings, sizes: str, losses: str, limit: Mapping[str, float]) -> str:
    return f"""# Beside a dense model

`ray-moe compare-dense` at several sizes, one thread, float32. *Dense* is the model to compare with; *MoE* has
{base.active} of its active weights and {base.total} times its weights, {base.top_k} experts for each token, and
{base.shape} of its layers and its width, as a model of 7 billion weights beside one of 13; *small* is dense, with the
layers, the width and the active weights of the MoE model, so that what is left between them is the price of choosing.
Models take turns; a ratio is the median of its turns (least-most). Times are those of the process on its core, which
others shared with it; on a machine of its own they are those of the clock. The published pattern: training 1.75 times
as fast, and answers in 0.51 of the time.

At its best, one thread of this machine reads weights for a token at {limit["bytes_per_s"] / 1e9:.1f} GB/s and
multiplies matrices at {limit["flops_per_s"] / 1e9:.0f} GFLOP/s. Of these, a model uses what its active weights need: 4
bytes each for a token of an answer, 6 FLOPs each for a token of training. If they alone took time, training would be
{1 / base.active:.2f} times as fast, and a token would take {base.active:.2f} of the time.

{sizes}

{losses}"""


def _made(known: Mapping[str, Any]) -> Comparison:
    """A comparison as it was written."""
    return Comparison(*(Measured(**known[name]) for name in ("dense", "small", "moe")))
