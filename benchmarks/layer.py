"""One MoE layer, gate and experts, with its experts apart: ours beside one process, hivemind, Ray Serve and Ray actors.

`python benchmarks/layer.py [--rounds 5] [--hivemind-python PYTHON] [--quick]`, or `ray-moe bench layer`. All have the
same weights and tokens and the same cores, and take turns in rotating order; what they compute is compared before
anything is measured. Results go to `benchmarks/results/layer.{json,md}`.

hivemind comes with the extra `peers`, or from an environment of its own:

    python -m venv DIR
    DIR/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    DIR/bin/pip install hivemind==1.1.12
    python benchmarks/layer.py --hivemind-python DIR/bin/python

Without either, that part is left out, and the page says so.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
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
class Ask:
    """What everybody is asked to run."""

    what: str
    """``forward``, or ``train``: forward and backward."""
    tokens: int
    block_s: float
    """Seconds of a turn."""


@dataclass(frozen=True, slots=True)
class Way:
    """A contestant's way to run the layer."""

    name: str
    processes: Processes
    way: str
    sizes: Mapping[str, Sequence[int]]
    """Tokens, forward and in training: beyond them somebody takes minutes, or cannot."""
    about: str = ""
    """Where it is more than what its processes are."""

    def takes(self, ask: Ask) -> bool:
        return ask.tokens in self.sizes.get(ask.what, ())

    def turn(self, ask: Ask) -> dict[str, Any]:
        """See `layer_work.answer`."""
        (answer,) = self.processes.ask({"way": self.way, **asdict(ask)})
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
        Way(CACHED, ours, "cached", {"forward": SIZES}, "the same, with room for all experts in its own cache."),
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
        about = (
            f"hivemind 1.1.12, a server and a client of {cores} threads each, which sleep when they are idle, as they "
            "share the cores (OMP_WAIT_POLICY=passive)."
        )
        sleeping = {"OMP_WAIT_POLICY": "passive"}
        hivemind = Processes("hivemind", about, [command], logs / "hivemind.log", sleeping)
        few = (1, 64, 256)
        ways += [
            Way(GROUPED, hivemind, "grouped", {"forward": (64, 1024), "train": (64, 1024)}),
            Way(HIVEMIND, hivemind, "layer", {"forward": few, "train": few}),
        ]
    return ways


# --- Rounds --------------------------------------------------------------------------------------------------
def compare(ways: Sequence[Way], ask: Ask) -> None:
    """Raises SystemExit unless all compute the same. It warms them up, too."""
    once = replace(ask, block_s=0.0)
    sums = {way.name: way.turn(once)["sums"] for way in ways}
    expected = sums[ONE]
    for name, mine in sums.items():
        different = [key for key in expected if abs(mine[key] - expected[key]) > 1e-3 * max(1, abs(expected[key]))]
        if different:
            raise SystemExit(f"{name} computes something else ({once}): {mine}, but {ONE} {expected}")


@dataclass
class Seconds:
    """What was measured at one size."""

    of: dict[str, list[float]]
    """Median seconds of each contestant in each round."""
    others_cores: list[float]
    """Cores that those took who did not have their turn, turn by turn."""


def measure(ways: Sequence[Way], everybody: Sequence[Processes], ask: Ask, rounds: int) -> Seconds:
    """In every round all take their turn, in rotating order."""
    compare(ways, ask)
    found = Seconds({way.name: [] for way in ways}, [])
    for number in range(rounds):
        shift = number % len(ways)
        for way in [*ways[shift:], *ways[:shift]]:
            others = [each for each in everybody if each is not way.processes]
            before_s, began_s = sum(each.cpu_s() for each in others), time.perf_counter()
            found.of[way.name].append(way.turn(ask)["s"])
            took_s = time.perf_counter() - began_s
            found.others_cores.append((sum(each.cpu_s() for each in others) - before_s) / took_s)
    told = ", ".join(f"{name} {min(each) * 1000:.2f} ms" for name, each in found.of.items())
    print(f"{ask.what}, {ask.tokens} tokens: {told}", file=sys.stderr, flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = report.options(__doc__, rounds=5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--gated", action="store_true", help="SwiGLU experts instead of plain ones")
    parser.add_argument("--block-s", type=float, default=0.5, help="seconds of a turn")
    here = sys.executable if find_spec("hivemind") is not None else None
    parser.add_argument("--hivemind-python", metavar="PYTHON", default=here, help="of an environment with hivemind")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what the contestants write")
    given = parser.parse_args(argv)
    problem = Problem(**({"width": 128, "inner": 512} if given.quick else {}), gated=given.gated)
    sizes, rounds, block_s = (QUICK_SIZES, 2, 0.05) if given.quick else (SIZES, given.rounds, given.block_s)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])  # inherited by all contestants
    import torch

    torch.set_num_threads(given.cores)
    found: dict[str, dict[int, Seconds]] = {"forward": {}, "train": {}}
    rates = measure_rates(problem.width, problem.inner)
    with ExitStack() as ending:
        logs = given.logs or Path(ending.enter_context(tempfile.TemporaryDirectory()))
        logs.mkdir(parents=True, exist_ok=True)
        ways = make_ways(problem, given.cores, given.hivemind_python, logs)
        everybody = list({id(way.processes): way.processes for way in ways}.values())
        for processes in everybody:
            ending.callback(processes.close)
            processes.start()
        for what in ("forward", "train"):
            for tokens in sizes:
                ask = Ask(what, tokens, block_s)
                found[what][tokens] = measure([way for way in ways if way.takes(ask)], everybody, ask, rounds)
    measured = {
        "problem": asdict(problem),
        "cores": given.cores,
        "contestants": {way.name: way.about or way.processes.about for way in ways},
        "touched": {tokens: problem.touched(tokens) for tokens in sizes},
        "rates": asdict(rates.best(measure_rates(problem.width, problem.inner))),
        "others_cores": [each for of_size in found.values() for one in of_size.values() for each in one.others_cores],
        "seconds": {what: {size: each.of for size, each in of_size.items()} for what, of_size in found.items()},
    }
    report.finish("layer_gated" if given.gated else "layer", measured, given)


if __name__ == "__main__":
    main()
