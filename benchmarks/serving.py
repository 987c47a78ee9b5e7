"""Serving, side by side: `ray_moe` with expert actors, its engine with the experts in process, `transformers serve`.

`python benchmarks/serving.py [--rounds 5] [--transformers-python PYTHON] [--quick]`. All serve the same random float32
checkpoint behind their own OpenAI-compatible HTTP server, limited to the same cores, and answer the same clients with
the same requests, in turns. The answers are compared before anything is measured. Results go to
`benchmarks/results/serving.{json,md}`.

`transformers serve` runs in an environment of its own, with the same torch and the server's own requirements:

    python -m venv DIR
    DIR/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    DIR/bin/pip install "transformers[serving]==5.23.0"
    python benchmarks/serving.py --transformers-python DIR/bin/python

Without it, that part is left out, and the page says so.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import report, serving_load, serving_servers
from benchmarks.floor import measure_rates
from benchmarks.pages.serving import CONTINUOUS, IN_PROCESS, OURS, SEQUENTIAL
from benchmarks.serving_load import Job, Load
from benchmarks.serving_servers import Contestant, Server
from benchmarks.serving_work import Settings, make_jobs, write_model

GOALS = {"in process": 0.85, "transformers": 2.0}
CB_PAGE_TOKENS, CB_BATCH_TOKENS = 256, 512
"""Of continuous batching: its page of keys and values, and its longest step, which is that of ray_moe."""


# --- Contestants ---------------------------------------------------------------------------------------------
def about(settings: Settings, extra: Sequence[str]) -> dict[str, str]:
    """What each contestant is. Args: extra: settings of `ray-moe serve`, KEY=VALUE."""
    threads = f"{settings.cores} threads"
    changed = f", but for {', '.join(extra)}" if extra else ""
    return {
        OURS: f"`ray-moe serve` with a Ray of its own: a router of {threads} and {settings.actors} expert actors of as "
        f"many each, since they are seldom all busy at once{changed}.",
        IN_PROCESS: f"the same engine and HTTP door in one process of {threads}, without Ray and dispatcher: each "
        "layer's tokens go straight to the grouped experts module of `transformers` (`benchmarks/one_process.py`). "
        "A router with room for all experts (`expert_cache_bytes`) would be an easier rival, as it still dispatches.",
        CONTINUOUS: f"`transformers serve --continuous-batching` with {threads}, {cb_blocks(settings)} blocks of keys "
        f"and values, and steps of up to {CB_BATCH_TOKENS} tokens.",
        SEQUENTIAL: f"`transformers serve` as it is, with {threads}: it answers one request after the other.",
    }


def cb_blocks(settings: Settings) -> int:
    """Pages for all clients, and one more for each: by itself continuous batching takes most of the memory."""
    return settings.clients * (1 + math.ceil(settings.max_tokens / CB_PAGE_TOKENS))


def make_contestants(model: Path, settings: Settings, extra: Sequence[str], python: str | None) -> list[Contestant]:
    contestants = [
        serving_servers.ray_moe(OURS, model, settings.actors, settings.cores, extra),
        serving_servers.one_process(IN_PROCESS, model, settings.cores),
    ]
    if python is not None:
        room = ("--cb-num-blocks", str(cb_blocks(settings)), "--cb-max-batch-tokens", str(CB_BATCH_TOKENS))
        for name, options in ((CONTINUOUS, ("--continuous-batching", *room)), (SEQUENTIAL, ())):
            contestants.append(serving_servers.transformers_serve(name, model, python, settings.cores, options))
    return contestants


def check_environment(python: str) -> None:
    """Raises SystemExit unless `python` has the same transformers and torch as this one, and can serve."""
    wanted = f"{version('transformers')} {version('torch')} True"
    code = (
        "import torch, transformers; from transformers.utils.import_utils import is_serve_available as can_serve; "
        "print(transformers.__version__, torch.__version__, can_serve())"
    )
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if run.stdout.strip() != wanted:
        raise SystemExit(
            f"{python} says of transformers, torch and whether they can serve: "
            f"{run.stdout.strip() or run.stderr.strip()[-300:]}; expected {wanted} (see the top of {__file__})"
        )


# --- Rounds --------------------------------------------------------------------------------------------------
@dataclass
class Results:
    """Of each contestant, round by round."""

    figures: dict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))
    same_answers: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Share of the answers that are, word for word, those of the engine in one process."""


def take_turn(server: Server, servers: Sequence[Server], jobs: Sequence[Job], settings: Settings) -> Load:
    """Have one server do the jobs while the others do nothing."""
    for other in servers:
        other.suspend()
    server.resume()
    return serving_load.run(server.url, server.model, jobs, settings.clients)


def compare(servers: Sequence[Server], settings: Settings) -> None:
    """Raises SystemExit unless all give the same answers. It warms them up, too."""
    jobs = make_jobs(settings, 0)[: settings.clients]
    texts = {s.name: [answer.text for answer in take_turn(s, servers, jobs, settings).answers] for s in servers}
    for name, mine in texts.items():
        different = sum(a != b for a, b in zip(mine, texts[IN_PROCESS], strict=True))
        if different:
            raise SystemExit(f"{different} of {len(jobs)} answers of {name} are not those of {IN_PROCESS}")


def measure(servers: Sequence[Server], settings: Settings, rounds: int) -> Results:
    results = Results()
    for number in range(rounds):
        jobs, texts = make_jobs(settings, number + 1), {}
        shift = number % len(servers)
        for server in [*servers[shift:], *servers[:shift]]:
            before_s = {other.name: other.cpu_s() for other in servers}
            load = take_turn(server, servers, jobs, settings)
            used_s = {other.name: other.cpu_s() - before_s[other.name] for other in servers}
            own_s, num_tokens = used_s.pop(server.name), sum(job.num_output for job in jobs)
            figures = load.figures() | {
                "cpu_s_per_token": own_s / num_tokens,
                "cores": own_s / load.wall_s,
                "client_cores": load.client_cpu_s / load.wall_s,
                "others_cores": sum(used_s.values()) / load.wall_s,
            }
            results.figures[server.name].append(figures)
            texts[server.name] = [answer.text for answer in load.answers]
            rate, cores = figures["output_tokens_per_s"], figures["cores"]
            print(f"round {number + 1}, {server.name}: {rate:.0f} tokens/s on {cores:.2f} cores", file=sys.stderr)
        for name, mine in texts.items():
            same = [a == b for a, b in zip(mine, texts[IN_PROCESS], strict=True)]
            results.same_answers[name].append(sum(same) / len(same))
    return results


def main(argv: list[str] | None = None) -> None:
    parser = report.options(__doc__, rounds=5)
    parser.add_argument("--transformers-python", metavar="PYTHON", help="of an environment with transformers[serving]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of ray-moe serve")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what the servers write")
    for one in fields(Settings):
        parser.add_argument(
            f"--{one.name.replace('_', '-')}", type=int, default=one.default, help="default: %(default)s"
        )
    arguments = parser.parse_args(argv)
    settings = Settings(**{one.name: getattr(arguments, one.name) for one in fields(Settings)})
    if arguments.quick:
        settings = replace(settings, requests=settings.clients)
    if arguments.transformers_python:
        check_environment(arguments.transformers_python)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by the way of all context managers
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.cores])  # inherited by all servers
    import torch

    torch.set_num_threads(settings.cores)
    rates = measure_rates(settings.hidden, settings.expert_width, repeats=3)
    with ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory()))
        write_model(folder / "model", settings)
        logs = arguments.logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        servers: list[Server] = []
        for contestant in make_contestants(folder / "model", settings, arguments.set, arguments.transformers_python):
            log = logs / f"{contestant.name}.log"
            servers.append(ending.enter_context(serving_servers.running(contestant, log)))
        compare(servers, settings)
        results = measure(servers, settings, 1 if arguments.quick else arguments.rounds)
    measured = {
        "settings": asdict(settings),
        "set": arguments.set,
        "contestants": {name: what for name, what in about(settings, arguments.set).items() if name in results.figures},
        "goals": GOALS,
        "rates": asdict(rates),
        "wait_policy": serving_servers.WAIT_POLICY,
        **vars(results),
    }
    report.finish("serving", measured, arguments)


if __name__ == "__main__":
    main()
