"""The layers that `benchmarks/layer.py` compares: one process of a contestant, in this environment.

`python benchmarks/layer_peers.py KIND PROBLEM HOSTS THREADS`. KIND is ``one`` (all in this process), ``ours`` (hosts
that are processes, and a gate and dispatcher here), ``actors`` (a plain Ray actor for each expert) or ``serve`` (a
deployment of Ray Serve for each expert).

Shape legend: T tokens, D model width, K experts per token, n rows of an expert.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import torch

from benchmarks.layer_work import Run, answer
from benchmarks.train_step_work import Problem, take_stdout
from ray_moe.ops.gates.topk import TopKGate
from ray_moe.ops.routed_experts import Experts
from ray_moe.transport.allocator import tune_malloc


def make_gate(problem: Problem) -> TopKGate:
    gate = TopKGate(problem.width, problem.experts, problem.top_k)
    gate.load_state_dict({"weight": problem.gate()})
    return gate


def make_experts(problem: Problem, numbers: Sequence[int]) -> Experts:
    """Those experts, in a module of `transformers`' experts interface."""
    experts = Experts(problem.width, problem.inner, len(numbers), gated=problem.gated)
    for row, number in enumerate(numbers):
        for parameter, value in zip(experts.parameters(), problem.expert(number), strict=True):
            parameter.data[row] = value
    return experts


# --- One process ---------------------------------------------------------------------------------------------
def one(problem: Problem) -> dict[str, Run]:
    """`transformers`' own grouped implementation, forward and, by autograd, backward."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    gate, experts = make_gate(problem), make_experts(problem, range(problem.experts))

    def run(hidden: torch.Tensor) -> torch.Tensor:
        routing = gate(hidden)
        out: torch.Tensor = grouped_mm_experts_forward(experts, hidden, routing.index, routing.weight)
        return out

    return {"layer": run}


# --- Ours ----------------------------------------------------------------------------------------------------
def ours(problem: Problem, num_hosts: int) -> tuple[dict[str, Run], Callable[[], None]]:
    """Without and with a cache that takes all experts; and what ends the hosts."""
    from benchmarks.train_step_ours import LAYER, NODE, TOKEN, Worker
    from ray_moe.ops.experts import StackedExperts
    from ray_moe.runtime.moe_layer import ExpertDispatcher
    from ray_moe.runtime.own_experts import OwnExperts
    from ray_moe.transport.stream_transport import StreamTransport

    worker = Worker(problem, num_hosts)
    expert_bytes = 4 * sum(value.numel() for value in problem.expert(0))
    own = OwnExperts(
        lambda layer, experts, version: StackedExperts(make_experts(problem, experts)),
        {LAYER: expert_bytes},
        cache_bytes=problem.experts * expert_bytes,
    )
    dispatchers = {"layer": ExpertDispatcher(StreamTransport(TOKEN, node_id=NODE))}
    dispatchers["cached"] = ExpertDispatcher(StreamTransport(TOKEN, node_id=NODE), own=own)
    for dispatcher in dispatchers.values():
        dispatcher.update(worker.dispatcher.table)
    worker.begin("1.life.1")  # all that is trained are micro-batches of one step

    def run_with(dispatcher: ExpertDispatcher) -> Run:
        def run(hidden: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                return worker(hidden)
            routing = worker.gate(hidden)
            return dispatcher.forward(LAYER, hidden, routing.index, routing.weight)

        return run

    runs = {name: run_with(dispatcher) for name, dispatcher in dispatchers.items()}
    with torch.no_grad():  # every expert once, so that each is hot enough for the cache
        warm = torch.arange(problem.experts)[:, None].expand(-1, problem.top_k)
        dispatchers["cached"].forward(LAYER, torch.zeros(problem.experts, problem.width), warm, torch.ones(warm.shape))
    dispatchers["cached"].rebalance_cache(time.monotonic())

    def end() -> None:
        for dispatcher in dispatchers.values():
            dispatcher.close()
        worker.close()

    return runs, end


# --- An actor, or a deployment, for each expert --------------------------------------------------------------
class Expert:
    """What one would write first: a method that takes an array."""

    def __init__(self, problem: Mapping[str, Any], number: int) -> None:
        from ray_moe.ops.experts import StackedExperts

        torch.set_num_threads(1)
        tune_malloc()
        self._group = StackedExperts(make_experts(Problem(**problem), [number]))

    def forward(self, rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            out: np.ndarray = self._group.run(torch.tensor(rows), [0], [len(rows)]).numpy()
            return out

    __call__ = forward


def by_calls(problem: Problem, call_all: Callable[[Mapping[int, np.ndarray]], Mapping[int, np.ndarray]]) -> Run:
    """The layer by one call for each expert that is touched. Args: call_all: rows, by expert, there and back."""
    gate = make_gate(problem)

    def run(hidden: torch.Tensor) -> torch.Tensor:
        routing = gate(hidden)
        places = {e: (routing.index == e).nonzero(as_tuple=True) for e in routing.index.unique().tolist()}
        replies = call_all({e: hidden[token].numpy() for e, (token, _) in places.items()})
        out = torch.zeros_like(hidden)
        for e, (token, choice) in places.items():
            out.index_add_(0, token, torch.tensor(replies[e]) * routing.weight[token, choice, None])
        return out

    return run


def actors(problem: Problem) -> dict[str, Run]:
    ray = start_ray()
    made = [ray.remote(Expert).options(num_cpus=1).remote(vars_of(problem), e) for e in range(problem.experts)]

    def call_all(rows: Mapping[int, np.ndarray]) -> Mapping[int, np.ndarray]:
        return dict(zip(rows, ray.get([made[e].forward.remote(each) for e, each in rows.items()]), strict=True))

    return {"layer": by_calls(problem, call_all)}


def serve(problem: Problem) -> dict[str, Run]:
    """Calls by handles; nothing listens for HTTP."""
    start_ray()
    from ray import serve as ray_serve

    ray_serve.start(proxy_location="Disabled")
    deployment = ray_serve.deployment(ray_actor_options={"num_cpus": 1}, max_ongoing_requests=100)(Expert)
    handles = [
        ray_serve.run(
            deployment.options(name=f"expert-{e}").bind(vars_of(problem), e), name=f"app-{e}", route_prefix=None
        )
        for e in range(problem.experts)
    ]

    def call_all(rows: Mapping[int, np.ndarray]) -> Mapping[int, np.ndarray]:
        calls = {e: handles[e].remote(each) for e, each in rows.items()}
        return {e: call.result() for e, call in calls.items()}

    return {"layer": by_calls(problem, call_all)}


def start_ray() -> Any:
    import ray

    ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="error")
    return ray


def vars_of(problem: Problem) -> dict[str, Any]:
    """As plain values: the actors find the class by themselves."""
    from dataclasses import asdict

    return asdict(problem)


def main(kind: str, problem: str, num_hosts: str, threads: str) -> None:
    answers = take_stdout()
    torch.set_num_threads(int(threads))
    tune_malloc()  # everybody keeps freed memory: it is worth more than what is compared
    made = Problem(**json.loads(problem))
    end: Callable[[], None] = lambda: None  # noqa: E731
    if kind == "ours":
        runs, end = ours(made, int(num_hosts))
    else:
        runs = {"one": one, "actors": actors, "serve": serve}[kind](made)
    try:
        answer(runs, made, answers)
    finally:
        end()


if __name__ == "__main__":
    main(*sys.argv[1:])
