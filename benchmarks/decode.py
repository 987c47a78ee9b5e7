"""Decoding, where layers get a token of each client: experts in actors beside the same engine with all in process.

`python benchmarks/decode.py [--rounds 5] [--transformers-python PYTHON] [--quick]`, or `ray-moe bench decode`. 16
clients with short prompts and long answers, a small Qwen3-MoE. Twice: with random gates, and with gates that choose
experts by Zipf's law (`zipf.py`), where a router whose cache has room for a quarter of the experts
(`expert_cache_bytes`) is compared, too. Servers, turns and checks are those of `serving.py`, as is the environment for
`transformers serve`. Results go to `benchmarks/results/decode.{json,md}`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import torch

from benchmarks import report, serving_servers, zipf
from benchmarks.floor import measure_rates
from benchmarks.pages.decode import CACHED
from benchmarks.pages.serving import CONTINUOUS, OURS
from benchmarks.serving import about, check_environment, compare, make_contestants, measure, take_turn
from benchmarks.serving_servers import Contestant, Server
from benchmarks.serving_work import Settings, make_jobs, write_model

SMALL = Settings(
    hidden=256,
    expert_width=256,
    layers=8,
    experts=32,
    top_k=4,
    requests=32,
    min_prompt=8,
    max_prompt=16,
    min_output=96,
    max_output=128,
)
CACHED_PART = 0.25
CACHE_TIMEOUT_S = 60.0


def cache_bytes(settings: Settings) -> int:
    """Room for a quarter of the experts."""
    expert_bytes = 3 * settings.hidden * settings.expert_width * 4
    return int(CACHED_PART * settings.layers * settings.experts * expert_bytes)


def contestants(
    model: Path, settings: Settings, law: str, extra: Sequence[str], python: str | None
) -> list[Contestant]:
    """Random gates: those of `serving.py` that batch. Zipf's: a router with a cache in the place of `transformers`."""
    made = make_contestants(model, settings, extra, python if law == "random" else None)
    made = [each for each in made if each.name != "transformers serve"]
    if law == "zipf":
        cache = (*extra, f"router.expert_cache_bytes={cache_bytes(settings)}", "balance.every_s=0.5")
        made.insert(1, serving_servers.ray_moe(CACHED, model, settings.actors, settings.cores, cache))
    return made


def warm_cache(server: Server, servers: Sequence[Server], settings: Settings) -> None:
    """Have it decode until the cache is as full as it gets. Raises SystemExit if it stays empty."""
    until, before = time.monotonic() + CACHE_TIMEOUT_S, -1
    while time.monotonic() < until:
        take_turn(server, servers, make_jobs(settings, 0)[: settings.clients], settings)
        time.sleep(1.0)  # the router looks at the load now and then
        held = held_bytes(server)
        if held and held == before:
            return
        before = held
    raise SystemExit(f"the cache of {server.name} holds {max(before, 0)} bytes after {CACHE_TIMEOUT_S:.0f} s")


def held_bytes(server: Server) -> int:
    """Of experts that the router itself holds, as its metrics say."""
    text = httpx.get(f"{server.url}/metrics", timeout=10, trust_env=False).text
    values = [line.rsplit(" ", 1)[1] for line in text.splitlines() if "router_expert_bytes" in line and line[0] != "#"]
    return int(sum(map(float, values)))


@torch.no_grad()
def hot_share(model: Any, settings: Settings) -> dict[str, float]:
    """Part of the slots that goes to the hottest quarter of each layer's experts: in prompts, and in what follows."""
    prompts = torch.randint(settings.vocabulary, (8, settings.max_prompt), generator=torch.Generator().manual_seed(7))
    answers = model.generate(prompts, max_new_tokens=settings.min_output, do_sample=False, pad_token_id=0)
    parts = {"prompts": (0, settings.max_prompt), "answers": (settings.max_prompt, answers.shape[1])}
    quarter = int(CACHED_PART * settings.experts)
    found: dict[str, list[float]] = {part: [] for part in parts}
    for layer in model.model.layers:
        hidden = zipf.gate_input(model, layer.mlp.gate, answers).view(*answers.shape, -1)
        for part, (begin, end) in parts.items():
            index = (hidden[:, begin:end] @ layer.mlp.gate.weight.T).topk(settings.top_k).indices
            shares = zipf.shares(index, settings.experts)
            found[part].append(float(shares.sort(descending=True).values[:quarter].sum()))
    return {part: sum(each) / len(each) for part, each in found.items()}


def measure_law(law: str, folder: Path, settings: Settings, given: argparse.Namespace) -> dict[str, Any]:
    """One model, served by each in turns."""
    said: dict[str, float] = {}

    def change(model: Any) -> None:
        if law == "zipf":
            zipf.make_zipf(model)
        said.update(hot_share(model, settings))

    model = folder / law
    write_model(model, settings, change)
    logs = given.logs or folder
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as ending:
        servers: list[Server] = []
        for contestant in contestants(model, settings, law, given.set, given.transformers_python):
            log = logs / f"{law}, {contestant.name}.log"
            servers.append(ending.enter_context(serving_servers.running(contestant, log)))
        compare(servers, settings)
        for server in servers:
            if server.name == CACHED:
                warm_cache(server, servers, settings)
        results = measure(servers, settings, 1 if given.quick else given.rounds)
    return {"hot_share": said, **vars(results)}


def main(argv: list[str] | None = None) -> None:
    parser = report.options(__doc__, rounds=5)
    parser.add_argument("--transformers-python", metavar="PYTHON", help="of an environment with transformers[serving]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of ray-moe serve")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what the servers write")
    given = parser.parse_args(argv)
    settings = replace(SMALL, requests=SMALL.clients, min_output=24, max_output=32) if given.quick else SMALL
    if given.transformers_python:
        check_environment(given.transformers_python)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by the way of all context managers
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.cores])  # inherited by all servers
    torch.set_num_threads(settings.cores)
    rates = measure_rates(settings.hidden, settings.expert_width, repeats=3)
    with tempfile.TemporaryDirectory() as folder:
        laws = {law: measure_law(law, Path(folder), settings, given) for law in ("random", "zipf")}
    told = about(settings, given.set)
    told[CACHED] = (
        f"the same with `expert_cache_bytes` for {CACHED_PART:.0%} of the experts ({cache_bytes(settings) / 1e6:.0f} "
        "MB), full of the hottest before the rounds."
    )
    names = {name for law in laws.values() for name in law["figures"]}
    measured = {
        "settings": asdict(settings),
        "set": given.set,
        "contestants": {name: what for name, what in told.items() if name in names},
        "goals": {OURS: 0.7, CACHED: 0.85, CONTINUOUS: 2.0},
        "cached_part": CACHED_PART,
        "rates": asdict(rates),
        "laws": laws,
    }
    report.finish("decode", measured, given)


if __name__ == "__main__":
    main()
