"""One MoE layer with its experts in other processes, by every transport, against one process that does it all.

Side by side in one run, interleaved: `python benchmarks/dispatch.py [--rounds 7] [--quick]`, or `make bench`. Two
tables: the whole layer (8 experts, top-2, FFN 1024-4096-1024 in float32) on two actors of one thread each, as a speed
relative to one process of two threads (above 1 is faster); and identity experts, where only the way counts, as a
multiple of what the same bytes cost through shared memory. Results go to `benchmarks/results/dispatch.{json,md}`.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "2")

from benchmarks import report
from benchmarks.floor import Ping, measure_rates
from benchmarks.pages.dispatch import FLOOR, ONE

D, F, E, K, NUM_HOSTS = 1024, 4096, 8, 2, 2
TOKENS = (1, 8, 64, 512, 4096)
LAYER, ECHO = "ffn", "identity"
TOKEN = uuid.uuid4().hex


def make_ffn(experts: Sequence[int]) -> Any:
    """FFN experts with the flags of `transformers`' experts interface; the same weights in every process."""
    import torch
    from torch import nn

    module = nn.Module()
    flags = {"has_gate": False, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}
    for name, value in {**flags, "_is_expert_parallel": False, "num_experts": len(experts)}.items():
        setattr(module, name, value)
    module.act_fn = torch.nn.functional.silu  # type: ignore[assignment]
    seeds = [torch.Generator().manual_seed(expert) for expert in experts]
    module.up_proj = nn.Parameter(torch.stack([torch.randn(F, D, generator=seed) * 0.02 for seed in seeds]))
    module.down_proj = nn.Parameter(torch.stack([torch.randn(D, F, generator=seed) * 0.02 for seed in seeds]))
    return module


class Identity:
    """Experts that cost nothing, so that the way there and back is all there is."""

    flops_per_row = 0

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cpu")

    def run(self, rows: Any, experts: Sequence[int], counts: Sequence[int]) -> Any:
        return rows

    def parameters(self) -> list[Any]:
        return []


class BenchHost:
    """An expert actor without a checkpoint: FFN and identity experts, reached by socket, by gRPC and by Ray calls."""

    def __init__(self, number: int, num_hosts: int) -> None:
        import torch

        from ray_moe.ops.experts import StackedExperts
        from ray_moe.runtime.expert_host import ExpertHost
        from ray_moe.runtime.host_loop import HostLoop
        from ray_moe.transport.allocator import tune_malloc

        tune_malloc()
        torch.set_num_threads(1)
        mine = [expert for expert in range(E) if expert * num_hosts // E == number]
        host = ExpertHost(f"expert-{number}")
        host.hold(LAYER, mine, StackedExperts(make_ffn(mine)))
        host.hold(ECHO, mine, Identity())
        self._loop = HostLoop(host)

    async def listen(self, number: int) -> Any:
        import ray

        from ray_moe.transport.host_server import HostServer
        from ray_moe.types import HostAddress

        self._server = HostServer(self._loop.accept, TOKEN)
        tcp, unix = await self._server.start()
        return HostAddress(f"expert-{number}", "1", ray.get_runtime_context().get_node_id(), os.getpid(), tcp, unix)

    async def exchange(self, header: bytes, *arrays: Any) -> Any:
        from ray_moe.transport.object_store import serve_exchange

        return await serve_exchange(self._loop.submit, header, arrays)


class PlainExpert:
    """What one would write first: an actor per expert with a method that takes an array."""

    def __init__(self, expert: int) -> None:
        import torch

        from ray_moe.ops.experts import StackedExperts

        torch.set_num_threads(1)
        self._group = StackedExperts(make_ffn([expert]))

    def forward(self, layer: str, rows: Any) -> Any:
        import torch

        if layer == ECHO:
            return rows
        with torch.no_grad():
            return self._group.run(torch.tensor(rows), [0], [len(rows)]).numpy()


def plain_forward(ray: Any, actors: Sequence[Any], layer: str, hidden: Any, index: Any, weight: Any) -> Any:
    """The layer with one Ray call per expert that is touched."""
    import torch

    places = [(index == expert).nonzero(as_tuple=True) for expert in range(E)]
    touched = [expert for expert in range(E) if len(places[expert][0])]
    replies = ray.get([actors[e].forward.remote(layer, hidden[places[e][0]].numpy()) for e in touched])
    out = torch.zeros_like(hidden)
    for expert, rows in zip(touched, replies, strict=True):
        token, choice = places[expert]
        out.index_add_(0, token, torch.tensor(rows) * weight[token, choice, None])
    return out


def main(argv: list[str] | None = None) -> None:
    given = report.options(__doc__, rounds=7).parse_args(argv)
    sizes = TOKENS[:-1] if given.quick else TOKENS
    ping = Ping(max(sizes) * D * 4)  # forks: before threads
    try:
        measured = measure(2 if given.quick else given.rounds, sizes, ping)
    finally:
        ping.close()
    problem = {"width": D, "inner": F, "experts": E, "top_k": K, "hosts": NUM_HOSTS}
    report.finish("dispatch", {"problem": problem, "cores": NUM_HOSTS, **measured}, given)


def measure(rounds: int, sizes: Sequence[int], ping: Ping) -> dict[str, Any]:
    import ray
    import torch

    from benchmarks.report import Contestant
    from ray_moe.transport.allocator import tune_malloc

    tune_malloc()
    ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        doors = make_doors(ray)
        local = make_ffn(range(E))
        single = make_local(local)
        layer_times: dict[int, dict[str, list[float]]] = {}
        way_times: dict[int, dict[str, list[float]]] = {}
        touched: dict[int, int] = {}
        for num_tokens in sizes:
            hidden = torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(num_tokens))
            scores = torch.rand(num_tokens, E, generator=torch.Generator().manual_seed(num_tokens + 1))
            weight, index = scores.softmax(-1).topk(K)
            touched[num_tokens] = len(index.unique())
            with torch.no_grad():
                expected = single(hidden, index, weight)
                batch = (hidden, index, weight)
                contestants = [Contestant(ONE, partial(single, *batch), partial(torch.set_num_threads, 2))]
                for name, forward in doors.items():
                    torch.testing.assert_close(forward(LAYER, *batch), expected, rtol=1e-3, atol=1e-3)
                    run = partial(forward, LAYER, *batch)
                    contestants.append(Contestant(name, run, partial(torch.set_num_threads, 1)))
                ping.on_cores(0)
                layer_times[num_tokens] = report.interleave(contestants, rounds)
                # One expert per token, all on one host: the same bytes go there and back as in the ping.
                home, unit = index[:, :1] * 0, torch.ones(num_tokens, 1)
                bare = ping.round_trip(hidden.numpy())
                ways = [
                    Contestant(FLOOR, bare, partial(ping.on_cores, 2)),
                    Contestant("the same on one core", bare, partial(ping.on_cores, 1)),
                ]
                for name, forward in doors.items():
                    ways.append(Contestant(name, partial(forward, ECHO, hidden, home, unit), partial(ping.on_cores, 0)))
                way_times[num_tokens] = report.interleave(ways, rounds)
        ping.on_cores(0)
        torch.set_num_threads(NUM_HOSTS)
        rates = asdict(measure_rates(D, F))
        return {"rates": rates, "touched": touched, "layer_s": layer_times, "way_s": way_times}
    finally:
        ray.shutdown()


def make_local(module: Any) -> Callable[..., Any]:
    """The layer in this process: `transformers`' own grouped implementation."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    return lambda hidden, index, weight: grouped_mm_experts_forward(module, hidden, index, weight)


def make_doors(ray: Any) -> dict[str, Callable[..., Any]]:
    """The layer by every transport: name -> forward(layer, hidden, index, weight)."""
    from ray_moe.policy.placement import place_by_index
    from ray_moe.runtime.moe_layer import ExpertDispatcher
    from ray_moe.transport.base import Transport
    from ray_moe.transport.object_store import ObjectStoreTransport
    from ray_moe.transport.settings import TransportSettings
    from ray_moe.transport.stream_transport import StreamTransport
    from ray_moe.types import RoutingTable

    hosts = {f"expert-{n}": ray.remote(BenchHost).options(num_cpus=1).remote(n, NUM_HOSTS) for n in range(NUM_HOSTS)}
    plain = [ray.remote(PlainExpert).options(num_cpus=1).remote(expert) for expert in range(E)]
    addresses = dict(zip(hosts, ray.get([a.listen.remote(n) for n, a in enumerate(hosts.values())]), strict=True))
    table = RoutingTable(1, place_by_index({LAYER: E, ECHO: E}, list(hosts)), addresses)
    node_id = ray.get_runtime_context().get_node_id()
    streams = partial(StreamTransport, TOKEN, node_id=node_id)
    inline = TransportSettings(arena_bytes=0)
    transports: dict[str, Transport] = {
        "socket, shared memory": streams(),
        "socket, inline": streams(settings=inline),
        "gRPC, shared memory": streams(sockets=False),
        "gRPC, inline": streams(sockets=False, settings=inline),
        "object store": ObjectStoreTransport(lambda address: hosts[address.host_id]),
    }
    doors: dict[str, Callable[..., Any]] = {}
    for name, transport in transports.items():
        dispatcher = ExpertDispatcher(transport)
        dispatcher.update(table)
        doors[name] = dispatcher.forward
    doors["Ray call per expert"] = lambda *batch: plain_forward(ray, plain, *batch)
    return doors


if __name__ == "__main__":
    main()
