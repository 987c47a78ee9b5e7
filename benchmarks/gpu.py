"""One MoE layer in bfloat16 with its experts in four processes on one GPU, against one process that does it all.

`python benchmarks/gpu.py [--rounds 7] [--quick]` on a machine with a GPU; it needs torch, `transformers`, grpcio and
msgpack, and no Ray: the hosts are plain processes with the very server and loop that an expert actor has. Two shapes
(OLMoE, Qwen3-30B-A3B), a prefill of 4,096 tokens and a decode step of 64, side by side in one run: once with the
processes taking turns on the card, and once side by side under NVIDIA's MPS, which is started for it and ended after.
What could not be run is said in the page. Results go to `benchmarks/results/gpu.{json,md}`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "4")

from benchmarks import report
from benchmarks.pages.gpu import ONE, SHARING

NUM_HOSTS = 4
NODE = "here"
TOKEN = uuid.uuid4().hex
MPS = "nvidia-cuda-mps-control"


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's MoE layer."""

    name: str
    width: int
    expert_width: int
    num_experts: int
    top_k: int


SHAPES = (Shape("OLMoE-1B-7B", 2048, 1024, 64, 8), Shape("Qwen3-30B-A3B", 2048, 768, 128, 8))
TOKENS = (4096, 64)


def make_experts(shape: Shape, experts: Sequence[int]) -> Any:
    """Gated experts on the GPU, on `transformers`' experts interface; the same weights in every process."""
    import torch
    from torch import nn
    from torch.nn.functional import silu

    from ray_moe.models.families import GatedExperts

    def drawn(expert: int, *size: int) -> torch.Tensor:
        source = torch.Generator("cuda").manual_seed(expert)
        return torch.randn(size, generator=source, device="cuda", dtype=torch.bfloat16) * 0.02

    up = torch.stack([drawn(expert, 2 * shape.expert_width, shape.width) for expert in experts])
    down = torch.stack([drawn(expert, shape.width, shape.expert_width) for expert in experts])
    return GatedExperts(None, nn.Parameter(up, False), nn.Parameter(down, False), silu)


def experts_of(host: int, shape: Shape) -> list[int]:
    """The host's block of them."""
    return [expert for expert in range(shape.num_experts) if expert * NUM_HOSTS // shape.num_experts == host]


def serve_host(number: int, token: str, pipe: Any) -> None:
    """A host's process: experts of every shape, until the pipe closes."""
    import torch

    from ray_moe.ops.experts import StackedExperts
    from ray_moe.runtime.expert_host import ExpertHost
    from ray_moe.runtime.host_loop import HostLoop
    from ray_moe.transport.allocator import tune_malloc
    from ray_moe.transport.host_server import HostServer
    from ray_moe.transport.settings import TransportSettings
    from ray_moe.types import HostAddress

    tune_malloc()
    torch.set_num_threads(2)
    host = ExpertHost(f"expert-{number}")
    for shape in SHAPES:
        mine = experts_of(number, shape)
        host.hold(shape.name, mine, StackedExperts(make_experts(shape, mine)))

    async def serve() -> None:
        server = HostServer(HostLoop(host).accept, token, settings=TransportSettings(device="cuda"))
        tcp, unix = await server.start()
        pipe.send(HostAddress(host.host_id, "1", NODE, os.getpid(), tcp, unix))
        await asyncio.get_running_loop().run_in_executor(None, pipe.poll, None)
        await server.stop()

    try:
        import uvloop  # as Ray's actors do
    except ImportError:
        asyncio.run(serve())
    else:
        uvloop.run(serve())


def main(argv: list[str] | None = None) -> None:
    parser = report.options(__doc__, rounds=7)
    parser.add_argument("--sharing", choices=sorted(SHARING), nargs="+", default=sorted(SHARING), help="default: both")
    parser.add_argument("--times", type=Path, help=argparse.SUPPRESS)  # where a process of this one's leaves them
    given = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here: run this on a machine with one")
    rounds = 2 if given.quick else given.rounds
    if given.times:
        given.times.write_text(json.dumps(run(rounds)))
        return
    times, left_out = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for sharing in given.sharing:
            if sharing == "mps" and shutil.which(MPS) is None:
                left_out[sharing] = f"there is no {MPS} here"
                continue
            file = Path(folder) / "times.json"
            with mps(Path(folder)) if sharing == "mps" else without_mps() as environment:
                command = [sys.executable, __file__, "--times", str(file), "--rounds", str(rounds)]
                subprocess.run(command, check=True, env=os.environ | environment)
            times[sharing] = json.loads(file.read_text())
    report.finish("gpu", {"gpu": torch.cuda.get_device_name(), "layer_s": times, "left_out": left_out}, given)


@contextmanager
def mps(folder: Path) -> Iterator[dict[str, str]]:
    """NVIDIA's MPS while the block runs; what the environment of those must be that use it."""
    environment = {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    subprocess.run([MPS, "-d"], check=True, env=os.environ | environment)
    try:
        yield environment
    finally:
        subprocess.run([MPS], input="quit\n", text=True, check=False, timeout=30, env=os.environ | environment)


@contextmanager
def without_mps() -> Iterator[dict[str, str]]:
    """The same without it, if one should run here."""
    with tempfile.TemporaryDirectory() as nothing:
        yield {"CUDA_MPS_PIPE_DIRECTORY": nothing}


def run(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of a layer, by shape and number of tokens, and by who computes it."""
    context = multiprocessing.get_context("spawn")
    pipes, hosts = [], []
    for number in range(NUM_HOSTS):
        here, there = context.Pipe()
        process = context.Process(target=serve_host, args=(number, TOKEN, there), daemon=True)
        process.start()
        pipes.append(here)
        hosts.append(process)
    try:
        return measure([pipe.recv() for pipe in pipes], rounds)
    finally:
        for process in hosts:
            process.kill()
            process.join()


def measure(addresses: Sequence[Any], rounds: int) -> dict[str, dict[str, list[float]]]:
    import torch
    from transformers.integrations.moe import grouped_mm_experts_forward

    doors = make_doors(addresses)
    times: dict[str, dict[str, list[float]]] = {}
    for shape in SHAPES:
        local = make_experts(shape, range(shape.num_experts))
        for num_tokens in TOKENS:
            source = torch.Generator("cuda").manual_seed(num_tokens)
            hidden = torch.randn(num_tokens, shape.width, generator=source, device="cuda", dtype=torch.bfloat16)
            scores = torch.rand(num_tokens, shape.num_experts, generator=source, device="cuda")
            weight, index = scores.softmax(-1).topk(shape.top_k)
            batch = (hidden, index, (weight / weight.sum(-1, keepdim=True)).bfloat16())
            run_local = torch.no_grad()(partial(grouped_mm_experts_forward, local, *batch))
            expected = run_local()
            contestants = [report.Contestant(ONE, partial(finished, run_local))]
            for name, forward in doors.items():
                run = partial(forward, shape.name, *batch)
                error = (run().float() - expected.float()).norm() / expected.float().norm()
                assert error < 1e-2, f"{name} is off by {error:.1e} of the norm"
                contestants.append(report.Contestant(name, partial(finished, run)))
            times[f"{shape.name}, {num_tokens} tokens"] = report.interleave(contestants, rounds)
        del local
    return times


def finished(run: Callable[[], Any]) -> None:
    import torch

    run()
    torch.cuda.synchronize()


def make_doors(addresses: Sequence[Any]) -> dict[str, Callable[..., Any]]:
    """The layer by every way: name -> forward(layer, hidden, index, weight)."""
    import torch

    from ray_moe.ops.experts import StackedExperts
    from ray_moe.runtime.expert_host import ExpertHost
    from ray_moe.runtime.moe_layer import ExpertDispatcher
    from ray_moe.runtime.settings import DispatchSettings
    from ray_moe.transport.local import LocalTransport
    from ray_moe.transport.settings import TransportSettings
    from ray_moe.transport.stream_transport import StreamTransport
    from ray_moe.types import Placement, RoutingTable

    names = [address.host_id for address in addresses]
    placement = Placement(
        {
            shape.name: tuple((name,) for number, name in enumerate(names) for _ in experts_of(number, shape))
            for shape in SHAPES
        }
    )
    table = RoutingTable(1, placement, {address.host_id: address for address in addresses})
    doors: dict[str, Callable[..., Any]] = {}
    combine: Literal["router", "host"]
    for combine in ("router", "host"):
        for way, device in (("GPU memory", "cuda"), ("CPU memory", "")):
            settings = TransportSettings(arena_bytes=2**30, device=device, device_arena_bytes=2**29)
            transport = StreamTransport(TOKEN, node_id=NODE, settings=settings)
            dispatcher = ExpertDispatcher(transport, DispatchSettings(combine=combine))
            dispatcher.update(table)
            doors[f"four processes, shared {way}, the {combine} combines"] = torch.no_grad()(dispatcher.forward)
    hosts = {name: ExpertHost(name) for name in names}
    for shape in SHAPES:
        for number, host in enumerate(hosts.values()):
            mine = experts_of(number, shape)
            host.hold(shape.name, mine, StackedExperts(make_experts(shape, mine)))
    local = LocalTransport(hosts)
    dispatcher = ExpertDispatcher(local, DispatchSettings(combine="host"))
    dispatcher.update(RoutingTable(1, placement, {name: local.address(name) for name in names}))
    doors["four hosts in this process, which combine"] = torch.no_grad()(dispatcher.forward)
    return doors


if __name__ == "__main__":
    main()
