"""One MoE layer, gate and experts, with its experts apart: ours beside one process, hivemind, Ray Serve and Ray actors.

`python benchmarks/layer.py [--rounds 5] [--hivemind-python PYTHON] [--quick]`, or `ray-moe bench layer`. All have the
same weights and tokens and the same cores, and take turns in rotating order; what they compute is compared before
anything is measured. Results go to `benchmarks/results/layer.{json,md}`.

hivemind runs in an environment of its own:

    python -m venv DIR
    DIR/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    DIR/bin/pip install hivemind==1.1.12 "setuptools<81"
    python benchmarks/layer.py --hivemind-python DIR/bin/python

Without it, that part is left out, and the page says so.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import report
from benchmarks.floor import measure_rates
from benchmarks.pages.layer import ACTORS, CACHED, GROUPED, HIVEMIND, ONE, OURS, SERVE
from benchmarks.processes import Processes
from benchmarks.train_step_work import Problem

PEERS, OF_HIVEMIND = (Path(__file__).with_name(name) for name in ("layer_peers.py", "layer_hivemind.py"))
SIZES = (1, 64, 256, 1024, 4096)
QUICK_SIZES = (1, 64)


# --- Contestants ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Way:
    """A contestant's way to run the layer."""

    name: str
    processes: Processes
    way: str
    sizes: Mapping[str, Sequence[int]]
    """Tokens, forward and in training: beyond them somebody takes minutes, or cannot."""

    def ask(self, what: str, tokens: int, block_s: float) -> dict[str, Any]:
        (answer,) = self.processes.ask({"way": self.way, "what": what, "tokens": tokens, "block_s": block_s})
        return answer


def make_ways(problem: Problem, cores: int, hivemind_python: str | None, logs: Path) -> list[Way]:
    """Not started."""

    def processes(kind: str, about: str) -> Processes:
        command = (sys.executable, str(PEERS), kind, json.dumps(asdict(problem)), str(cores), str(cores))
        return Processes(kind, about, [command], logs / f"{kind}.log")

    hosts = f"{cores} expert hosts of one thread each, processes of their own"
    ours = processes(
        "ours",
        f"a gate and dispatcher in a process of {cores} threads, and {hosts}, over the sockets and shared memory that "
        "routers and expert actors use.",
    )
    every = {"forward": SIZES, "train": SIZES}
    ways = [
        Way(ONE, processes("one", f"`transformers`' grouped_mm and autograd, {cores} threads."), "layer", every),
        Way(OURS, ours, "layer", every),
        Way(CACHED, ours, "cached", {"forward": SIZES}),
        Way(
            SERVE,
            processes(
                "serve", "Ray Serve, a deployment of one replica and one thread for each expert; calls by handle."
            ),
            "layer",
            {"forward": (1, 64)},
        ),
        Way(
            ACTORS,
            processes("actors", "a plain Ray actor of one thread for each expert; a call for each that is touched."),
            "layer",
            {"forward": (1, 64, 1024)},
        ),
    ]
    if hivemind_python is not None:
        command = (hivemind_python, str(OF_HIVEMIND), json.dumps(asdict(problem)), str(cores))
        about = f"hivemind 1.1.12, a server and a client of {cores} threads each, on the same cores."
        hivemind = Processes("hivemind", about, [command], logs / "hivemind.log")
        few = (1, 64, 256)
        ways += [
            Way(GROUPED, hivemind, "grouped", {"forward": (64, 1024), "train": (64, 1024)}),
            Way(HIVEMIND, hivemind, "layer", {"forward": few, "train": few}),
        ]
    return ways


# --- Rounds --------------------------------------------------------------------------------------------------
def compare(ways: Sequence[Way], what: str, tokens: int) -> None:
    """Raises SystemExit unless all compute the same. It warms them up, too."""
    sums = {way.name: way.ask(what, tokens, 0.0)["sums"] for way in ways}
    expected = sums[ONE]
    for name, mine in sums.items():
        different = [key for key in expected if abs(mine[key] - expected[key]) > 1e-3 * max(1, abs(expected[key]))]
        if different:
            raise SystemExit(f"{name} computes something else ({what}, {tokens} tokens): {mine}, but {ONE} {expected}")


def measure(ways: Sequence[Way], what: str, tokens: int, rounds: int, block_s: float) -> dict[str, list[float]]:
    """Median seconds of each in each round."""
    compare(ways, what, tokens)
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for number in range(rounds):
        shift = number % len(ways)
        for way in [*ways[shift:], *ways[:shift]]:
            seconds[way.name].append(way.ask(what, tokens, block_s)["s"])
    told = ", ".join(f"{name} {min(each) * 1000:.2f} ms" for name, each in seconds.items())
    print(f"{what}, {tokens} tokens: {told}", file=sys.stderr, flush=True)
    return seconds


def touched(problem: Problem, tokens: int) -> int:
    """Experts that a batch goes to."""
    hidden, _ = problem.batch(tokens, 0, 1)
    return len((hidden @ problem.gate().T).topk(problem.top_k).indices.unique())


def main(argv: list[str] | None = None) -> None:
    parser = report.options(__doc__, rounds=5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--gated", action="store_true", help="SwiGLU experts instead of plain ones")
    parser.add_argument("--block-s", type=float, default=0.5, help="seconds of a turn")
    parser.add_argument("--hivemind-python", metavar="PYTHON", help="of an environment with hivemind")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what the contestants write")
    given = parser.parse_args(argv)
    problem = Problem(**({"width": 128, "inner": 512} if given.quick else {}), gated=given.gated)
    sizes, rounds, block_s = (QUICK_SIZES, 2, 0.05) if given.quick else (SIZES, given.rounds, given.block_s)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])  # inherited by all contestants
    import torch

    torch.set_num_threads(given.cores)
    seconds: dict[str, dict[int, dict[str, list[float]]]] = {}
    rates = measure_rates(problem.width, problem.inner)
    with ExitStack() as ending:
        logs = given.logs or Path(ending.enter_context(tempfile.TemporaryDirectory()))
        logs.mkdir(parents=True, exist_ok=True)
        ways = make_ways(problem, given.cores, given.hivemind_python, logs)
        for processes in {id(way.processes): way.processes for way in ways}.values():
            ending.callback(processes.close)
            processes.start()
        for what in ("forward", "train"):
            seconds[what] = {
                tokens: measure([w for w in ways if tokens in w.sizes.get(what, ())], what, tokens, rounds, block_s)
                for tokens in sizes
            }
    measured = {
        "problem": asdict(problem),
        "cores": given.cores,
        "contestants": {way.name: way.processes.about for way in ways},
        "touched": {tokens: touched(problem, tokens) for tokens in sizes},
        "rates": asdict(rates.best(measure_rates(problem.width, problem.inner))),
        "seconds": seconds,
    }
    report.finish("layer_gated" if given.gated else "layer", measured, given)


if __name__ == "__main__":
    main()
