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

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import report
from benchmarks.train_step_work import Problem

TOKENS = (512, 4096)
ONE_PROCESS = "one process"
OURS = "ray_moe"
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
class Processes:
    """A contestant of one or more processes that speak the protocol of `train_step_work.answer`."""

    name: str
    about: str
    commands: Sequence[Sequence[str]]
    log: Path
    same_math: bool = True
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self) -> Processes:
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        with self.log.open("w") as log:
            for command in self.commands:
                self._processes.append(
                    subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
                    )
                )
        self._answers()
        return self

    def turn(self, tokens: int, steps: int) -> Turn:
        for process in self._processes:
            _pipe(process.stdin).write(json.dumps({"tokens": tokens, "steps": steps}) + "\n")
            _pipe(process.stdin).flush()
        answers = self._answers()
        slowest = {
            key: [max(each) for each in zip(*(answer.get(key, ()) for answer in answers), strict=True)]
            for key in ("train_s", "update_s", "compute_s")
        }
        sums = {key: sum(answer["sums"][key] for answer in answers) for key in answers[0]["sums"]}
        return Turn(slowest["train_s"], slowest["update_s"], slowest["compute_s"], sums)

    def _answers(self) -> list[dict[str, Any]]:
        """Of every process. Raises SystemExit, with the end of the log, if one of them has ended."""
        lines = [_pipe(process.stdout).readline() for process in self._processes]
        if not all(lines):
            raise SystemExit(f"{self.name} has ended:\n{self.log.read_text()[-2000:]}")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        for process in self._processes:
            _pipe(process.stdin).close()
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _pipe(process.stdout).close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def peers(problem: Problem, cores: int, deepspeed_python: str | None, logs: Path) -> list[Processes]:
    """Everybody but ourselves, not started."""

    def processes(name: str, kind: str, python: str, num_ranks: int, about: str, same_math: bool = True) -> Processes:
        threads = cores // num_ranks
        commands = [
            (python, str(PEERS), kind, json.dumps(asdict(problem)), str(rank), str(num_ranks), str(threads))
            for rank in range(num_ranks)
        ]
        return Processes(name, about, commands, logs / f"{kind}.log", same_math)

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


def ours(problem: Problem, cores: int, logs: Path) -> Processes:
    """Not started."""
    return Processes(
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


# --- Report --------------------------------------------------------------------------------------------------
def seconds_cell(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def share_cell(parts: Sequence[float]) -> str:
    return f"{statistics.median(parts):.0%} ({min(parts):.0%}–{max(parts):.0%})"


def render(results: dict[int, Results], contestants: Sequence[Contestant], problem: Problem, cores: int) -> str:
    names = [contestant.name for contestant in contestants]
    equals = [c.name for c in contestants if c.same_math and c.name != OURS]
    columns = [f"{tokens} tokens{what}" for tokens in results for what in ("", ", with the update")]
    pairs = [part for result in results.values() for part in (result.train, result.whole)]
    best = [
        report.cell([min(each) for each in zip(*(part[n] for n in equals), strict=True)], part[OURS]) for part in pairs
    ]
    speeds, times = {}, {}
    for name in names:
        speeds[name] = [report.cell(part[ONE_PROCESS], part[name]) for part in pairs]
        times[name] = [seconds_cell(part[name]) for part in pairs]
    num_rounds = len(next(iter(results.values())).train[ONE_PROCESS])
    kind = "SwiGLU" if problem.gated else "FFN"
    parts = [
        "# A training step",
        f"Forward and backward of one MoE layer: {problem.experts} experts, top-{problem.top_k}, {kind} "
        f"{problem.width}-{problem.inner}-{problem.width} in float32; *with the update*: and a step of AdamW (fused). "
        f"All use {cores} cores, and take turns in rotating order. Median of {num_rounds} "
        f"{'round' if num_rounds == 1 else 'rounds'} (least–greatest).",
        f"## Speed, as a multiple of {ONE_PROCESS}",
        report.table(columns, speeds),
        f"And {OURS} as a multiple of whoever else was the quickest in each round, of those that compute the same:",
        report.table(columns, {OURS: best}),
        "## Seconds of a step",
        report.table(columns, times),
        "## Share of communication",
        "Of ray_moe's forward and backward, the part in which the slowest host did not compute. So this is all of "
        "communication, and the gate, the sorting and the weighing of rows as well: "
        + "; ".join(f"{tokens} tokens **{share_cell(result.between)}**" for tokens, result in results.items())
        + ".",
        "## Contestants",
        "\n".join(f"- *{contestant.name}*: {contestant.about}" for contestant in contestants),
        "Before the rounds those that drop nothing gave the same outputs and gradients.",
    ]
    if not any(name.startswith("DeepSpeed") for name in names):
        parts.append("DeepSpeed was left out: no `--deepspeed-python`.")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--gated", action="store_true", help="SwiGLU experts instead of plain ones")
    parser.add_argument("--quick", action="store_true", help="a small layer, 1 round of 1 step, nothing written")
    parser.add_argument("--deepspeed-python", metavar="PYTHON", help="of an environment with deepspeed")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what the contestants write")
    arguments = parser.parse_args()
    size = {"width": 128, "inner": 512} if arguments.quick else {}
    problem = Problem(**size, gated=arguments.gated)
    rounds, steps = (1, 1) if arguments.quick else (arguments.rounds, arguments.steps)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])  # inherited by all contestants
    results: dict[int, Results] = {}
    with ExitStack() as ending:
        logs = arguments.logs or Path(ending.enter_context(tempfile.TemporaryDirectory()))
        logs.mkdir(parents=True, exist_ok=True)
        contestants: list[Contestant] = []
        others = peers(problem, arguments.cores, arguments.deepspeed_python, logs)
        for contestant in [ours(problem, arguments.cores, logs), *others]:
            ending.callback(contestant.close)
            contestants.append(contestant.start())
        for tokens in TOKENS:
            compare(contestants, tokens)
            results[tokens] = measure(contestants, tokens, rounds, steps)
        markdown = render(results, contestants, problem, arguments.cores)
    print(markdown)
    if not arguments.quick:
        name = "train_step_gated" if arguments.gated else "train_step"
        figures = {tokens: asdict(result) for tokens, result in results.items()}
        report.write(name, markdown, {"problem": asdict(problem), "steps": steps, "seconds": figures})


if __name__ == "__main__":
    main()
