"""`ray-moe bench`: ours beside what a user would pick instead, in one run.

The benchmarks are scripts in the folder `benchmarks` of a checkout, which wheels do not have: they need what tests
need, and peers in environments of their own. A command here finds its script and becomes it, so that signals, output
and the exit code are its own. It measures nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import ray_moe
from ray_moe.cli.terminal import Debug, told
from ray_moe.errors import InvalidConfig

bench = typer.Typer(
    help="Measure ours beside others, side by side in one run (from a checkout).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A script of `benchmarks/`."""

    file: str
    about: str


BENCHMARKS = {
    "dispatch": Benchmark("dispatch.py", "One MoE layer and a bare way there and back, by every transport."),
    "layer": Benchmark("layer.py", "One MoE layer, beside one process, hivemind, Ray Serve and plain actors."),
    "serve": Benchmark("serving.py", "Completions over HTTP, beside the same engine in process and `transformers`."),
    "decode": Benchmark("decode.py", "Decoding of a small model, with and without the router's cache of experts."),
    "train": Benchmark("train_step.py", "A training step of one layer, beside all_to_all and DeepSpeed."),
    "start": Benchmark("start.py", "How long a service and one more actor take to start, and what an actor weighs."),
    "failover": Benchmark("elastic.py", "Skewed traffic, and how long streams stall when processes die."),
    "profile": Benchmark("profile_step.py", "Where each microsecond of a decode step and of a training step goes."),
    "balance": Benchmark("balance.py", "Placements and splits, beside the balancers of others."),
    "scale": Benchmark("scale.py", "What dispatch, plans and the controller cost as hosts go from 2 to 1,000."),
    "memory": Benchmark("memory.py", "What options save of memory."),
    "compression": Benchmark("compression.py", "What options save of traffic in training, and what the loss says."),
    "quantization": Benchmark("quantization.py", "Experts in 8 bits: size, time and loss."),
    "collapse": Benchmark("collapse.py", "Gates that have collapsed, and what brings them back."),
    "overlap": Benchmark("overlap.py", "Two batches at once against one, training and serving."),
    "dense": Benchmark("compare_dense.py", "An MoE model beside a dense one, at several sizes."),
    "gpu": Benchmark("gpu.py", "One MoE layer on one GPU, beside one process that does it all."),
    "train-serve": Benchmark("train_serve.py", "Training that publishes versions while clients are served."),
    "soak": Benchmark("soak.py", "A service at saturation, with cancels, malformed calls and killed actors."),
}

Rounds = Annotated[int | None, typer.Option(min=1, help="Rounds, where the benchmark has rounds.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small and short, to see that it runs; no results are written.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there, too.")]


def script(file: str) -> Path:
    """In the checkout that this package is of, else in the working directory. Raises: `InvalidConfig`."""
    for root in (Path(ray_moe.__file__).parents[1], Path.cwd()):
        if (root / "benchmarks" / "report.py").is_file():
            return root / "benchmarks" / file
    raise InvalidConfig(
        "the benchmarks are not part of the installed package; expected the folder benchmarks/ beside ray_moe/ or in "
        "the working directory: clone the repository and run ray-moe bench there"
    )


def become(file: str, options: list[str]) -> None:
    """Run the script in the place of this process. Raises: `InvalidConfig`."""
    path = script(file)
    if not path.is_file():
        raise InvalidConfig(f"{path} is not there; expected a checkout of the version {ray_moe.__version__}")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(path), *options])


def _command(benchmark: Benchmark) -> Callable[..., None]:
    def run(
        context: typer.Context,
        rounds: Rounds = None,
        quick: Quick = False,
        json_file: JsonFile = None,
        debug: Debug = False,
    ) -> None:
        options = [*context.args]
        options += [] if rounds is None else ["--rounds", str(rounds)]
        options += ["--quick"] if quick else []
        options += [] if json_file is None else ["--json", str(json_file)]
        with told(debug):
            become(benchmark.file, options)

    run.__doc__ = f"{benchmark.about}\n\n`-- --help` shows the options of its own, which may be given as well."
    return run


for name, each in BENCHMARKS.items():
    own = {"allow_extra_args": True, "ignore_unknown_options": True}
    bench.command(name, context_settings=own)(_command(each))


@bench.command()
def pages(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 when a page is not as it should be.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Make the pages of results anew of their JSON."""
    with told(debug):
        become("report.py", ["--check"] if check else [])
