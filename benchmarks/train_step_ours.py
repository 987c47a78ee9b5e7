"""Ours in `benchmarks/train_step.py`: a worker with the gate, and hosts of one thread each that train the experts.

`python benchmarks/train_step_ours.py PROBLEM HOSTS THREADS`. The worker speaks the protocol of
`train_step_work.answer`; the hosts are processes with the servers, queues and trainees that an expert actor has, and
get orders through pipes instead of Ray.

Shape legend: T tokens, D model width.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.train_step_work import Problem, take_stdout
from ray_moe.models.experts import expert_rows
from ray_moe.ops.experts import StackedExperts
from ray_moe.ops.gates.topk import TopKGate
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.ops.routed_experts import Experts
from ray_moe.policy.ownership import assign
from ray_moe.runtime.expert_host import ExpertHost, Outcome
from ray_moe.runtime.host_loop import HostLoop
from ray_moe.training.dispatcher import TrainingDispatcher
from ray_moe.training.settings import ExchangeSettings
from ray_moe.training.trainees import Trainees
from ray_moe.transport.allocator import tune_malloc
from ray_moe.transport.base import ExpertCall
from ray_moe.transport.host_server import HostServer
from ray_moe.transport.stream_transport import StreamTransport
from ray_moe.types import HostAddress, RoutingTable

LAYER, NODE, TOKEN = "layer", "here", "token"


# --- A host --------------------------------------------------------------------------------------------------
class TimedHost(ExpertHost):
    """It knows how long it has computed."""

    compute_s = 0.0

    def run(self, calls: Sequence[ExpertCall]) -> list[Outcome]:
        begin = time.perf_counter()
        try:
            return super().run(calls)
        finally:
            self.compute_s += time.perf_counter() - begin

    def take_compute_s(self) -> float:
        """Seconds since the last time this was asked."""
        seconds, self.compute_s = self.compute_s, 0.0
        return seconds


def serve(orders: Connection, problem: Problem, experts: list[int]) -> None:
    torch.set_num_threads(1)
    tune_malloc()
    name = f"expert-{os.getpid()}"
    trainees = Trainees(name)
    stack = Experts(problem.width, problem.inner, len(experts), gated=problem.gated)
    for row, expert in enumerate(experts):
        for parameter, value in zip(stack.parameters(), problem.expert(expert), strict=True):
            parameter.data[row] = value
    # Without a learning rate it costs the same, and every step can be compared with the first.
    trainees.open("run", "life", OptimizerSettings(lr=0.0, fused=True), 0)
    trainees.hold(LAYER, stack, {e: expert_rows(stack, row) for row, e in enumerate(experts)}, experts)
    host = TimedHost(name, trainees)
    host.hold(LAYER, experts, StackedExperts(stack))  # the same memory, for calls without gradients
    asyncio.run(_serve(orders, name, host, trainees))


async def _serve(orders: Connection, name: str, host: TimedHost, trainees: Trainees) -> None:
    server = HostServer(HostLoop(host).accept, TOKEN, incarnation=name)
    tcp, unix = await server.start("127.0.0.1")
    orders.send(HostAddress(name, name, NODE, os.getpid(), tcp, unix))
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def follow() -> None:
        while (order := orders.recv()) is not None:
            method, arguments = order
            orders.send(getattr(host if hasattr(host, method) else trainees, method)(*arguments))
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=follow, daemon=True).start()
    await ended.wait()
    await server.stop()


# --- The worker ----------------------------------------------------------------------------------------------
class Worker:
    """The gate, and the hosts."""

    def __init__(self, problem: Problem, num_hosts: int) -> None:
        names = [str(number) for number in range(num_hosts)]
        placement = assign({LAYER: problem.experts}, names)
        processes = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        for name in names:
            mine, theirs = processes.Pipe()
            experts = placement.experts_on(name)[LAYER]
            processes.Process(target=serve, args=(theirs, problem, experts), daemon=True).start()
            self.pipes.append(mine)
        addresses: list[HostAddress] = [pipe.recv() for pipe in self.pipes]
        hosts_of = tuple((addresses[int(hosts[0])].host_id,) for hosts in placement.hosts_of[LAYER])
        transport = StreamTransport(TOKEN, node_id=NODE)
        self.dispatcher = TrainingDispatcher(transport, ExchangeSettings())
        self.dispatcher.update(
            RoutingTable(1, type(placement)({LAYER: hosts_of}), {each.host_id: each for each in addresses})
        )
        self.gate = TopKGate(problem.width, problem.experts, problem.top_k)
        self.gate.load_state_dict({"weight": problem.gate()})

    def everybody(self, method: str, *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((method, arguments))
        return [pipe.recv() for pipe in self.pipes]

    def begin(self, attempt: str) -> None:
        self.everybody("begin", attempt)
        self.dispatcher.begin(attempt)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        routing = self.gate(hidden)
        return self.dispatcher.forward(LAYER, hidden, routing.index, routing.weight)

    def close(self) -> None:
        self.dispatcher.close()
        for pipe in self.pipes:
            pipe.send(None)


def answer(worker: Worker, problem: Problem, answers: Any) -> None:
    """As `train_step_work.answer`, with experts that are elsewhere."""
    answers.write('{"ready": true}\n')
    number = 0
    optimizer = torch.optim.AdamW(worker.gate.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    for line in sys.stdin:
        request = json.loads(line)
        hidden, grad = problem.batch(request["tokens"], 0, 1)
        train_s, update_s, compute_s, sums = [], [], [], {}
        for _ in range(request["steps"] + 1):
            number += 1
            attempt = f"{number}.life.1"
            worker.begin(attempt)
            optimizer.zero_grad()
            tokens = hidden.clone().requires_grad_()
            worker.everybody("take_compute_s")
            begin = time.perf_counter()
            out = worker(tokens)
            out.backward(grad)
            middle = time.perf_counter()
            compute_s.append(max(worker.everybody("take_compute_s")))
            asked = time.perf_counter()
            squares = _squares(worker.everybody("sums", attempt))
            worker.everybody("apply", attempt, 1.0, 0.0)
            optimizer.step()
            end = time.perf_counter()
            train_s.append(middle - begin)
            update_s.append(end - asked)
            sums = {
                "output": float((out.detach() * grad).sum()),
                "hidden": float(_grad(tokens).double().square().sum()),
                "gate": sum(float(_grad(p).double().square().sum()) for p in worker.gate.parameters()),
                "experts": squares,
            }
        answer = {"train_s": train_s[1:], "update_s": update_s[1:], "compute_s": compute_s[1:], "sums": sums}
        answers.write(json.dumps(answer) + "\n")


def _grad(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(()) if tensor.grad is None else tensor.grad


def _squares(sums: Sequence[tuple[int, Mapping[str, Mapping[int, float]]]]) -> float:
    return sum(value for _, layers in sums for experts in layers.values() for value in experts.values())


def main(problem: str, num_hosts: str, threads: str) -> None:
    answers = take_stdout()
    torch.set_num_threads(int(threads))
    tune_malloc()
    made = Problem(**json.loads(problem))
    worker = Worker(made, int(num_hosts))
    try:
        answer(worker, made, answers)
    finally:
        worker.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
