"""Training one MoE layer, side by side: forward, backward and the optimizer's step.

`python benchmarks/train_step.py [--rounds 5] [--gated] [--deepspeed-python PYTHON] [--quick]`. All have the same
weights and tokens, the same number of cores, and take turns in rotating order; what they compute is compared before
anything is measured. Results go to `benchmarks/results/train_step.{json,md}`.

DeepSpeed runs in an environment of its own (it compiles a small extension when it first starts):

    python -m venv DIR
    DIR/bin/pip install torch==2.13.0 numpy setuptools --index-url https://download.pytorch.org/whl/cpu
    DS_BUILD_OPS=0 DIR/bin/pip install --no-build-isolation deepspeed==0.19.8
    python benchmarks/train_step.py --deepspeed-python DIR/bin/python

Without it, that part is left out, and the page says so.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import report
from benchmarks.floor import measure_rates
from benchmarks.pages.train_step import ONE as ONE_PROCESS
from benchmarks.pages.train_step import OURS
from benchmarks.processes import Processes
from benchmarks.train_step_work import Problem

TOKENS = (512, 4096)
PEERS, OWN = Path(__file__).with_name("train_step_peers.py"), Path(__file__).with_name("train_step_ours.py")


# --- Contestants ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Turn:
    """What a contestant did in one turn."""

    train_s: list[float]
    """Seconds of forward and backward, step by step: of the slowest process."""
    update_s: list[float]
    """Seconds of the optimizer's step."""
    compute_s: list[float]
    """Of forward and backward, what the slowest host computed; empty for those that have no hosts."""
    sums: dict[str, float]
    """By which contestants are compared: see `train_step_work.answer`."""


class Contestant(Protocol):
    """Somebody who trains the layer. It waits, without using a core, until it is its turn."""

    name: str
    about: str
    same_math: bool
    """Whether it computes what the others compute."""

    def turn(self, tokens: int, steps: int) -> Turn:
        """So many steps of so many tokens, after one that is not measured."""
        ...

    def close(self) -> None: ...


@dataclass
class Trainer(Processes):
    """A contestant of one or more processes that speak the protocol of `train_step_work.answer`."""

    same_math: bool = True

    def turn(self, tokens: int, steps: int) -> Turn:
        answers = self.ask({"tokens": tokens, "steps": steps})
        slowest = {
            key: [max(each) for each in zip(*(answer.get(key, ()) for answer in answers), strict=True)]
            for key in ("train_s", "update_s", "compute_s")
        }
        sums = {key: sum(answer["sums"][key] for answer in answers) for key in answers[0]["sums"]}
        return Turn(slowest["train_s"], slowest["update_s"], slowest["compute_s"], sums)


def peers(problem: Problem, cores: int, deepspeed_python: str | None, logs: Path) -> list[Trainer]:
    """Everybody but ourselves, not started."""

    def processes(name: str, kind: str, python: str, num_ranks: int, about: str, same_math: bool = True) -> Trainer:
        threads = cores // num_ranks
        commands = [
            (python, str(PEERS), kind, json.dumps(asdict(problem)), str(rank), str(num_ranks), str(threads))
            for rank in range(num_ranks)
        ]
        return Trainer(name, about, commands, logs / f"{kind}.log", same_math=same_math)

    each = f"{cores} processes of one thread, each with its part of the tokens and of the experts"
    contestants = [
        processes(ONE_PROCESS, "local", sys.executable, 1, f"`ray_moe.MoELayer` with {cores} threads."),
        processes("all_to_all", "all_to_all", sys.executable, cores, f"{each}; plain `all_to_all_single` over gloo."),
    ]
    if deepspeed_python is not None:
        moe = "`deepspeed.moe.layer.MoE` over gloo"
        contestants += [
            processes("DeepSpeed", "deepspeed", deepspeed_python, cores, f"{each}; {moe}, no token dropped."),
            processes(
                "DeepSpeed, dropping",
                "deepspeed_dropping",
                deepspeed_python,
                cores,
                f"{each}; {moe} with a capacity factor of 1: what an expert gets beyond the mean is dropped.",
                same_math=False,
            ),
        ]
    return contestants


def ours(problem: Problem, cores: int, logs: Path) -> Trainer:
    """Not started."""
    return Trainer(
        OURS,
        f"a worker of {cores} threads with the gate, and {cores} expert hosts of one thread each, processes of their "
        "own, over the sockets and shared memory that expert actors use. *With the update* includes the norm of all "
        "gradients, which the others do not take.",
        [(sys.executable, str(OWN), json.dumps(asdict(problem)), str(cores), str(cores))],
        logs / "ours.log",
    )


# --- Rounds --------------------------------------------------------------------------------------------------
def compare(contestants: Sequence[Contestant], tokens: int) -> None:
    """Raises SystemExit unless all that should compute the same do. It warms them up, too."""
    sums = {contestant.name: contestant.turn(tokens, 1).sums for contestant in contestants}
    for contestant in contestants:
        mine, theirs = sums[contestant.name], sums[ONE_PROCESS]
        different = [key for key in theirs if abs(mine[key] - theirs[key]) > 1e-3 * abs(theirs[key])]
        if contestant.same_math and different:
            raise SystemExit(f"{contestant.name} computes something else: {mine}, but {ONE_PROCESS} {theirs}")


Seconds = dict[str, list[float]]
"""Of each contestant, the median step of each round."""


@dataclass(frozen=True, slots=True)
class Results:
    train: Seconds
    """Forward and backward."""
    whole: Seconds
    """And the optimizer's step."""
    between: list[float] = field(default_factory=list)
    """Of ours, round by round: the part of forward and backward in which the slowest host did not compute."""


def measure(contestants: Sequence[Contestant], tokens: int, rounds: int, steps: int) -> Results:
    results = Results({c.name: [] for c in contestants}, {c.name: [] for c in contestants})
    for number in range(rounds):
        shift = number % len(contestants)
        for contestant in [*contestants[shift:], *contestants[:shift]]:
            turn = contestant.turn(tokens, steps)
            whole = [train + update for train, update in zip(turn.train_s, turn.update_s, strict=True)]
            results.train[contestant.name].append(statistics.median(turn.train_s))
            results.whole[contestant.name].append(statistics.median(whole))
            if turn.compute_s:
                parts = [1 - computed / train for computed, train in zip(turn.compute_s, turn.train_s, strict=True)]
                results.between.append(statistics.median(parts))
            took = (
                f"{results.train[contestant.name][-1]:.3f} s, with the update {results.whole[contestant.name][-1]:.3f}"
            )
            print(f"{tokens} tokens, round {number + 1}, {contestant.name}: {took} s", file=sys.stderr)
    return results


def main(argv: list[str] | None = None) -> None:
    parser = report.options(__doc__, rounds=5)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--gated", action="store_true", help="SwiGLU experts instead of plain ones")
    parser.add_argument("--deepspeed-python", metavar="PYTHON", help="of an environment with deepspeed")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what the contestants write")
    arguments = parser.parse_args(argv)
    size = {"width": 128, "inner": 512} if arguments.quick else {}
    problem = Problem(**size, gated=arguments.gated)
    rounds, steps = (1, 1) if arguments.quick else (arguments.rounds, arguments.steps)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])  # inherited by all contestants
    import torch

    torch.set_num_threads(arguments.cores)
    rates = measure_rates(problem.width, problem.inner)
    results: dict[int, Results] = {}
    with ExitStack() as ending:
        logs = arguments.logs or Path(ending.enter_context(tempfile.TemporaryDirectory()))
        logs.mkdir(parents=True, exist_ok=True)
        contestants: list[Contestant] = []
        others = peers(problem, arguments.cores, arguments.deepspeed_python, logs)
        for contestant in [ours(problem, arguments.cores, logs), *others]:
            ending.callback(contestant.close)
            contestant.start()
            contestants.append(contestant)
        for tokens in TOKENS:
            compare(contestants, tokens)
            results[tokens] = measure(contestants, tokens, rounds, steps)
    measured = {
        "problem": asdict(problem),
        "cores": arguments.cores,
        "steps": steps,
        "rates": asdict(rates.best(measure_rates(problem.width, problem.inner))),
        "touched": {tokens: problem.touched(tokens) for tokens in TOKENS},
        "contestants": {each.name: {"about": each.about, "same_math": each.same_math} for each in contestants},
        "seconds": {tokens: asdict(result) for tokens, result in results.items()},
    }
    report.finish("train_step_gated" if arguments.gated else "train_step", measured, arguments)


if __name__ == "__main__":
    main()
