"""hivemind in `benchmarks/layer.py`: a server with all experts, and a client that calls them; in its environment.

`python benchmarks/layer_hivemind.py PROBLEM THREADS`. Two ways: ``grouped``, one `RemoteExpert` call for each expert
that is touched, all at once, with a gate of our own (as fast as its calls can be); and ``layer``, its own
`RemoteMixtureOfExperts`, which calls once for each token and expert. Experts have no optimizer: as in the others,
backward only accumulates. Needs torch and hivemind only.

Shape legend: T tokens, D model width, n rows of an expert.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import hivemind
import torch
from hivemind.moe.server.dht_handler import get_experts
from hivemind.moe.server.module_backend import ModuleBackend
from hivemind.moe.server.server import Server
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from torch import nn

from benchmarks.layer_work import Run, answer
from benchmarks.train_step_work import Problem, take_stdout

MAX_ROWS = 4096
"""Of a call."""


class Expert(nn.Module):
    """Up, SiLU and down; or gate and up, SwiGLU and down."""

    def __init__(self, problem: Problem, number: int) -> None:
        super().__init__()
        self.gated = problem.gated
        self.up, self.down = (nn.Parameter(each) for each in problem.expert(number))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.linear(rows, self.up)
        if self.gated:
            gate, inner = inner.chunk(2, dim=-1)
            return nn.functional.linear(nn.functional.silu(gate) * inner, self.down)
        return nn.functional.linear(nn.functional.silu(inner), self.down)


def run_server(problem: Problem, threads: int, told: Any) -> None:
    """In a process of its own, until it is killed. Tells the addresses by which it is found."""
    os.setsid()  # its own group, by which it is ended
    torch.set_num_threads(threads)
    dht = hivemind.DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    schema = BatchTensorDescriptor(problem.width)
    backends = {
        f"expert.{number}": ModuleBackend(
            f"expert.{number}",
            Expert(problem, number),
            args_schema=(schema,),
            outputs_schema=schema,
            max_batch_size=MAX_ROWS,
        )
        for number in range(problem.experts)
    }
    server = Server(dht, backends, num_connection_handlers=1, device=torch.device("cpu"))
    server.run_in_background(await_ready=True)
    told.send([str(address) for address in dht.get_visible_maddrs()])
    server.join()


def grouped(problem: Problem, dht: Any) -> Run:
    names = [f"expert.{number}" for number in range(problem.experts)]
    experts = get_experts(dht, names)
    gate, pool = problem.gate(), ThreadPoolExecutor(problem.experts)

    def run(hidden: torch.Tensor) -> torch.Tensor:
        weight, index = nn.functional.linear(hidden, gate).softmax(-1).topk(problem.top_k, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        places = {e: (index == e).nonzero(as_tuple=True) for e in index.unique().tolist()}
        with_grad = torch.is_grad_enabled()

        def call(number: int) -> torch.Tensor:
            with torch.set_grad_enabled(with_grad):  # which is each thread's own
                rows: torch.Tensor = experts[number](hidden[places[number][0]])
                return rows

        out = torch.zeros_like(hidden)
        for (token, choice), rows in zip(places.values(), pool.map(call, places), strict=True):
            out = out.index_add(0, token, rows * weight[token, choice, None])
        return out

    return run


def own_layer(problem: Problem, dht: Any) -> Run:
    layer = hivemind.RemoteMixtureOfExperts(
        in_features=problem.width,
        grid_size=(problem.experts,),
        dht=dht,
        uid_prefix="expert.",
        k_best=problem.top_k,
        k_min=problem.top_k,
        backward_k_min=problem.top_k,
    )
    with torch.no_grad():
        layer.proj.weight.copy_(problem.gate())
        layer.proj.bias.zero_()
    return layer  # type: ignore[no-any-return]


def main(problem: str, threads: str) -> None:
    answers = take_stdout()
    made = Problem(**json.loads(problem))
    mine, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=run_server, args=(made, int(threads), theirs), daemon=False)
    server.start()  # before this process has threads: hivemind forks
    torch.set_num_threads(int(threads))
    dht = hivemind.DHT(initial_peers=mine.recv(), start=True, client_mode=True)
    try:
        answer({"grouped": grouped(made, dht), "layer": own_layer(made, dht)}, made, answers)
    finally:
        dht.shutdown()
        os.killpg(server.pid or 0, signal.SIGKILL)  # it alone would leave its daemons behind
        server.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
