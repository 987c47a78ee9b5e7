"""How evenly hosts are loaded: our placements and per-batch split beside the balancers of others, in their own code.

`python benchmarks/balance.py [--originals DIR] [--seeds 8] [--quick]`; `originals.py` says what DIR holds. Balancedness
is mean / max of tokens per host, 1 is perfect. Tables: placements scored on the very window they were made for; on
later batches that differ from it; and what planning and splitting cost. Others are scored with the equal split they
assume, and with the best split there is over their placement (a linear program; on batches, ours). All get the same
slots, and ours may use them freely (no price on moves). Results go to `benchmarks/results/balance.{json,md}`.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt

from benchmarks import originals, report
from benchmarks.originals import Homes, Planner
from ray_moe.policy.planner import Capacity, Goals, plan
from ray_moe.policy.split import Replicas, split_tokens

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SETTINGS = ((8, 4, 4), (60, 4, 4), (64, 8, 8), (64, 8, 16), (128, 16, 32), (256, 32, 32), (256, 64, 64))
"""(experts, hosts, slots beyond one for each expert)."""
LOADS = (("Zipf", 0.5), ("Zipf", 0.8), ("Zipf", 1.0), ("Zipf", 1.2), ("log-normal", 0.5), ("log-normal", 1.0))
ASSIGNMENTS = 32_768
"""Rows of a batch: 4,096 tokens, top-8."""
PAST, NEXT = 16, 4
"""Batches of a window, where a balancer looks at them one by one; batches that a placement is scored on."""
DRIFT, NUM_TOPICS = 0.3, 8
LAYERS = 61
"""Mixture-of-Experts layers of the planning pass that is timed."""


def draw_load(kind: str, shape: float, num_experts: int, random: np.random.Generator) -> Floats:
    if kind == "Zipf":
        weight: Floats = random.permutation(1.0 / np.arange(1, num_experts + 1) ** shape)
    else:
        weight = np.exp(shape * random.standard_normal(num_experts))
    weight /= weight.sum()
    return weight


def drift(load: Floats, num_batches: int, random: np.random.Generator) -> Floats:
    """[B, E] each expert's load times exp(0.3 normal), for each batch anew."""
    batches: Floats = load * np.exp(DRIFT * random.standard_normal((num_batches, len(load))))
    batches /= batches.sum(-1, keepdims=True)
    return batches


def topics(load: Floats, num_batches: int, random: np.random.Generator) -> Floats:
    """[B, E] a mixture of topics with experts of their own; its logits follow an AR(1) process from batch to batch."""
    profile = np.exp(random.standard_normal((NUM_TOPICS, len(load))))
    profile *= load / profile.mean(0)  # equal shares give `load`
    logit = random.standard_normal(NUM_TOPICS)
    batches = []
    for _ in range(num_batches):
        logit = 0.9 * logit + np.sqrt(1 - 0.9**2) * random.standard_normal(NUM_TOPICS)
        share = np.exp(logit) / np.exp(logit).sum()
        batches.append(share @ profile)
    rows: Floats = np.array(batches)
    rows /= rows.sum(-1, keepdims=True)
    return rows


def ours(batches: Floats, num_hosts: int, num_replicas: int) -> Homes:
    hosts = [Capacity(f"{number:03}", num_replicas // num_hosts) for number in range(num_hosts)]
    placement = plan({"layer": batches.mean(0)}, hosts, goals=Goals(min_gain=0.0, cost_per_move=0.0))
    return [[int(name) for name in names] for names in placement.hosts_of["layer"]]


def equal_split(homes: Homes, load: Floats, num_hosts: int) -> float:
    time = np.zeros(num_hosts)
    for hosts, tokens in zip(homes, load, strict=True):
        for host in hosts:
            time[host] += tokens / len(hosts)
    return float(time.mean() / time.max())


def our_split(replicas: Replicas, count: Ints) -> float:
    time = np.bincount(replicas.host, split_tokens(count, replicas), replicas.num_hosts)
    return float(time.mean() / time.max())


def best_split(replicas: Replicas, load: Floats) -> float:
    """The linear program: the least largest load over all fractional splits."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_array, hstack

    num_replicas, num_hosts = len(replicas.host), replicas.num_hosts
    ones, number = np.ones(num_replicas), np.arange(num_replicas)
    of_expert = coo_array((ones, (replicas.expert, number)), shape=(len(load), num_replicas + 1))
    on_host = coo_array((ones, (replicas.host, number)), shape=(num_hosts, num_replicas))
    least = hstack([on_host, -np.ones((num_hosts, 1))]).tocsr()
    goal = np.append(np.zeros(num_replicas), 1.0)
    solved = linprog(goal, least, np.zeros(num_hosts), of_expert.tocsr(), load, method="highs")
    if not solved.success:
        raise RuntimeError(f"the linear program failed: {solved.message}")
    return float(load.sum() / num_hosts / solved.fun)


def measure_balance(
    settings: Sequence[tuple[int, int, int]], seeds: int, peers: dict[str, Planner]
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """table -> setting -> column -> one value for each load and seed (and batch)."""
    values: Any = {table: defaultdict(lambda: defaultdict(list)) for table in ("window", "drift", "topics")}
    for num_experts, num_hosts, num_spare in settings:
        setting = f"{num_experts}, {num_hosts}, {num_spare}"
        for number, (kind, shape) in enumerate(LOADS):
            for seed in range(seeds):
                random = np.random.default_rng([seed, number, num_experts, num_hosts, num_spare])
                load = draw_load(kind, shape, num_experts, random)
                past = drift(load, PAST, random)
                past *= load / past.mean(0)  # all balancers see the same window
                later = {"drift": drift(load, NEXT, random), "topics": topics(load, NEXT, random)}
                counts = {
                    table: [random.multinomial(ASSIGNMENTS, batch) for batch in rows] for table, rows in later.items()
                }
                for name, planner in {**peers, "ours": ours}.items():
                    score_one(values, setting, name, planner, load, past, counts, (num_hosts, num_experts + num_spare))
        print(f"  {setting}: ours {np.mean(values['drift'][setting]['ours']):.3f} on drifted batches", flush=True)
    return {table: {key: dict(columns) for key, columns in rows.items()} for table, rows in values.items()}


def score_one(
    values: Any,
    setting: str,
    name: str,
    planner: Planner,
    load: Floats,
    past: Floats,
    counts: dict[str, list[Ints]],
    size: tuple[int, int],
) -> None:
    num_hosts, num_replicas = size
    window = planner(load[None], num_hosts, num_replicas)
    replicas = Replicas.of([sorted(set(hosts)) for hosts in window], num_hosts)
    values["window"][setting][f"{name}, equal split"].append(equal_split(window, load, num_hosts))
    values["window"][setting][f"{name}, best split"].append(best_split(replicas, load))
    if name == "ours":
        values["window"][setting]["ours"].append(our_split(replicas, np.rint(load * 2**24).astype(np.int64)))
    homes = planner(past, num_hosts, num_replicas)
    replicas = Replicas.of([sorted(set(hosts)) for hosts in homes], num_hosts)
    for table, batches in counts.items():
        column = values[table][setting]
        for count in batches:
            column[f"{name}, equal split"].append(equal_split(homes, count.astype(np.float64), num_hosts))
            column["ours" if name == "ours" else f"{name}, our split"].append(our_split(replicas, count))
            if name == "ours":
                column["ours, best split"].append(best_split(replicas, count.astype(np.float64)))


def measure_times(rounds: int) -> dict[str, list[float]]:
    """Seconds of a planning pass, of a split and of the dispatch that follows it, interleaved."""
    from ray_moe.ops.dispatch import split_by_host

    num_experts, num_hosts, num_spare = 256, 64, 64
    random = np.random.default_rng(0)
    loads = {f"layer-{n}": draw_load(*LOADS[n % len(LOADS)], num_experts, random) for n in range(LAYERS)}
    hosts = [Capacity(f"{number:03}", (num_experts + num_spare) // num_hosts) for number in range(num_hosts)]
    placement = plan(loads, hosts)
    layers = []
    for layer, load in list(loads.items())[: len(LOADS)]:
        homes = [[int(name) for name in names] for names in placement.hosts_of[layer]]
        index = random.choice(num_experts, ASSIGNMENTS, p=drift(load, 1, random)[0])
        owner = np.array([*(hosts[0] for hosts in homes), -1])
        layers.append((Replicas.of(homes, num_hosts), np.bincount(index, minlength=num_experts), index, owner))

    def split_all() -> None:
        for replicas, count, _, _ in layers:
            split_tokens(count, replicas)

    def dispatch_all() -> None:
        for _, _, index, owner in layers:
            split_by_host(index, owner, 8)

    drifted = {layer: drift(load, 1, random)[0] for layer, load in loads.items()}
    contestants = [
        report.Contestant("first plan", partial(plan, loads, hosts)),
        report.Contestant("plan after a drift", partial(plan, drifted, hosts, placement)),
        report.Contestant("split", split_all),
        report.Contestant("dispatch", dispatch_all),
    ]
    times = report.interleave(contestants, rounds)
    for name in ("split", "dispatch"):
        times[name] = [seconds / len(layers) for seconds in times[name]]
    return times


def main(argv: list[str] | None = None) -> None:
    parser = report.options(__doc__, rounds=5)
    parser.add_argument("--originals", type=Path, default=Path("originals"), help="folder; see benchmarks/originals.py")
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args(argv)
    peers, missing = originals.load(arguments.originals)
    for line in missing:
        print("not compared:", line)
    seeds = 1 if arguments.quick else arguments.seeds
    balance = measure_balance(SETTINGS[:3] if arguments.quick else SETTINGS, seeds, peers)
    times = measure_times(1 if arguments.quick else arguments.rounds)
    about = {"seeds": seeds, "missing": missing, "loads": LOADS, "layers": LAYERS, "num_topics": NUM_TOPICS}
    report.finish("balance", {**about, "balancedness": balance, "time_s": times}, arguments)


if __name__ == "__main__":
    main()
