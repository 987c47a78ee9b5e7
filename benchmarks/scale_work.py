"""What `scale.py` measures of one size of cluster, in a process of its own: with the `ray_moe` that this one finds.

`python benchmarks/scale_work.py '{"hosts": 8, "experts": 64, "layers": 16, ...}'` prints a line of JSON. The code is
the service's own, without Ray: the planner, `ClusterState`, `Routes`, `split_by_host`, the encoding of calls,
`combine`. Times are CPU seconds of this process, so others on the machine disturb them little.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from ray_moe.ops.dispatch import HostShare, combine, split_by_host
from ray_moe.policy import events as ev
from ray_moe.policy.cluster_state import ClusterState
from ray_moe.policy.hosts import ClusterSettings
from ray_moe.policy.load import TokenCounts
from ray_moe.policy.planner import Capacity, plan
from ray_moe.runtime.routing import Routes
from ray_moe.transport import codec
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.types import HostAddress, LayerSpec, Placement, RoutingTable
from ray_moe.wire import tensors

WIDTH = 2048
"""D; in bfloat16."""
TOP_K = 8
HOSTS_PER_NODE = 8
SKEW = 0.8
"""Of the load, a Zipf law."""
SPARE_SLOTS = 1
"""Of each layer on each host, beyond an equal share; the configuration's default."""
LEAST_S = 0.2
"""What is quick is done again and again for so long."""


def cpu_s(do: Callable[[], object], least_s: float = LEAST_S) -> float:
    """CPU seconds of this process for one `do`, the first apart where there is time for more."""
    begin_s = time.process_time()
    do()
    spent_s = time.process_time() - begin_s
    if spent_s > least_s:
        return spent_s
    number = max(3, int(least_s / max(spent_s, 1e-6)))
    begin_s = time.process_time()
    for _ in range(number):
        do()
    return (time.process_time() - begin_s) / number


def layers_of(number: int) -> list[str]:
    return [f"model.layers.{layer}.mlp.experts" for layer in range(number)]


def name_of(number: int) -> str:
    return f"expert-{number}"


def address_of(number: int, life: int = 1) -> HostAddress:
    node = f"{number // HOSTS_PER_NODE:056x}"
    return HostAddress(name_of(number), f"{number:012x}{life:04x}", node, 10_000 + number, "10.0.0.1:43210", "")


# --- plans -----------------------------------------------------------------------------------------------------
def measure_plans(size: dict[str, Any]) -> tuple[Placement, dict[str, float]]:
    """The first plan; one after the load has drifted; one after a host's death."""
    random = np.random.default_rng(0)
    number, slots = size["hosts"], -(-size["experts"] // size["hosts"]) + SPARE_SLOTS
    hosts = [Capacity(name_of(n), min(slots, size["experts"]), node=address_of(n).node_id) for n in range(number)]
    zipf = 1.0 / np.arange(1, size["experts"] + 1) ** SKEW
    load = {layer: 1000 * random.permutation(zipf) for layer in layers_of(size["layers"])}
    drifted = {layer: rates * np.exp(0.3 * random.standard_normal(len(rates))) for layer, rates in load.items()}
    made: list[Placement] = []
    times = {"first": cpu_s(lambda: made.append(plan(load, hosts)))}
    times["drift"] = cpu_s(lambda: plan(drifted, hosts, made[0]))
    if sum(host.slots for host in hosts[1:]) >= size["experts"]:
        times["death"] = cpu_s(lambda: plan(load, hosts[1:], made[0]))
    return made[0], times


def few_hosts_a_layer(size: dict[str, Any]) -> Placement:
    """Each layer on so many hosts of its own, one after the other, without replicas."""
    each = size["hosts_a_layer"]
    first = [layer * each % (size["hosts"] - each + 1) for layer in range(size["layers"])]
    rows = (
        tuple((name_of(begin + expert * each // size["experts"]),) for expert in range(size["experts"]))
        for begin in first
    )
    return Placement(dict(zip(layers_of(size["layers"]), rows, strict=True)))


# --- a router --------------------------------------------------------------------------------------------------
def measure_table(table: RoutingTable) -> dict[str, float]:
    """A whole table as it travels to a router and is used there, for all layers."""
    data = pickle.dumps(table, 5)
    tracemalloc.start()
    copy: RoutingTable = pickle.loads(data)  # noqa: S301 -- of this process, as below
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    layers, routes, tables = list(copy.placement.hosts_of), Routes(), [copy]

    def apply() -> None:
        newer = RoutingTable(tables[-1].epoch + 1, copy.placement, copy.addresses, copy.speeds)
        tables.append(pickle.loads(pickle.dumps(newer, 5)))  # noqa: S301 -- nothing of it is what the last one was
        began_s = time.process_time()
        routes.update(tables[-1])
        for layer in layers:
            routes.view.routes(layer)
        spent.append(time.process_time() - began_s)

    def note_late() -> None:
        routes.set_late(name_of(0), not routes.view.late)
        for layer in layers:
            routes.view.routes(layer)

    spent: list[float] = []
    for _ in range(4):
        apply()
    return {
        "bytes": len(data),
        "memory_bytes": memory,
        "encode_s": cpu_s(lambda: pickle.dumps(table, 5)),
        "decode_s": cpu_s(lambda: pickle.loads(data)),  # noqa: S301
        "apply_s": float(np.median(spent[1:])),
        "late_s": cpu_s(note_late),
    }


def measure_batch(table: RoutingTable, num_tokens: int) -> dict[str, float]:
    """One batch through one layer: split, encoded, combined, and what of it travels."""
    random = np.random.default_rng(num_tokens)
    layer, experts = next(iter(table.placement.hosts_of.items()))
    top_k = min(TOP_K, len(experts))
    zipf = random.permutation(1.0 / np.arange(1, len(experts) + 1) ** SKEW)
    # Gumbel's trick: top-k of these are drawn without putting back, in proportion to the load.
    scores = np.log(zipf) - np.log(random.exponential(size=(num_tokens, len(experts))))
    slots = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k].reshape(-1).astype(np.int64)
    routes = Routes()
    routes.update(table)
    where = routes.view.routes(layer)
    idle = (np.zeros(len(where.hosts) + 1), np.zeros(len(where.hosts) + 1))

    def split() -> list[HostShare]:
        owner, host = where.hosts_of(slots, lambda hosts: idle)
        return split_by_host(slots, owner, top_k, None, host)

    hidden = torch.zeros(num_tokens, WIDTH, dtype=torch.bfloat16)
    weight = torch.full((num_tokens, top_k), 1 / top_k, dtype=torch.bfloat16)
    shares = split()

    def encode() -> int:
        return sum(encoded(layer, hidden, share) for share in shares)

    rows = torch.zeros(len(slots), WIDTH, dtype=torch.bfloat16)
    return {
        "messages": len(shares),
        "bytes_out": encode(),
        "bytes_back": rows.nbytes,
        "split_s": cpu_s(split),
        "encode_s": cpu_s(encode),
        "combine_s": cpu_s(lambda: combine(rows, weight)),
    }


def encoded(layer: str, hidden: torch.Tensor, share: HostShare) -> int:
    """Encode a call as a line does, and tell its length."""
    call = ExpertCall(
        layer=layer,
        epoch=1,
        hidden=hidden,
        gather=None if share.gather is None else torch.from_numpy(share.gather),
        token=None if share.token is None else torch.from_numpy(share.token),
        experts=share.experts,
        counts=share.counts,
    )
    _, num_bytes = tensors.encode((codec.call_fields(call), None), codec.call_tensors(call))
    return num_bytes


# --- the controller --------------------------------------------------------------------------------------------
def measure_controller(size: dict[str, Any], placement: Placement) -> tuple[RoutingTable, dict[str, float]]:
    """Events of a cluster at rest; starts and deaths are of all hosts or one, with the tables that they bring."""
    layers = tuple(LayerSpec(layer, size["experts"], 1, 1, "bfloat16", 1) for layer in placement.hosts_of)
    settings = ClusterSettings(layers=layers, spare_slots=SPARE_SLOTS, balance=False)
    state = ClusterState(settings, [name_of(number) for number in range(size["hosts"])], (), placement)
    clock = iter(range(1, 10**9))

    def tell(event: ev.Event) -> list[ev.Instruction]:
        return state.handle(event, float(next(clock)))

    share = [
        {layer: tuple(sorted(experts)) for layer, experts in state.placed.on(name_of(number)).items()}
        for number in range(size["hosts"])
    ]
    began_s = time.process_time()
    for number, held in enumerate(share):
        tell(ev.HostStarted(address_of(number), held))
    times = {"start_all_s": time.process_time() - began_s}
    table = state.table
    counts = {layer: tuple(range(size["experts"])) for layer in placement.hosts_of}

    def round_of_heartbeats() -> None:
        for number in range(size["hosts"]):
            tell(ev.SpeedReported(name_of(number), address_of(number).incarnation, 1.0))
        tell(ev.Ticked())

    def report() -> None:
        number = next(clock)
        state.handle(ev.LoadReported(TokenCounts("router", "1", number, counts), table.epoch), float(number))

    deaths: list[float] = []
    backs: list[float] = []
    for life in range(2, 6):
        began_s = time.process_time()
        tell(ev.HostLost(name_of(0), ""))
        deaths.append(time.process_time() - began_s)
        began_s = time.process_time()
        tell(ev.HostStarted(address_of(0, life), share[0]))
        backs.append(time.process_time() - began_s)
    return table, {
        **times,
        "heartbeats_s": cpu_s(round_of_heartbeats),
        "tick_s": cpu_s(lambda: tell(ev.Ticked())),
        "report_s": cpu_s(report),
        "death_s": float(np.median(deaths)),
        "back_s": float(np.median(backs)),
    }


# --- a message -------------------------------------------------------------------------------------------------
def serve_echo() -> None:
    """A host that answers what it is sent; its address is the line that it prints."""
    from ray_moe.transport.host_server import HostServer

    async def echo(call: ExpertCall) -> ExpertReply:
        return ExpertReply(call.tokens())

    async def run() -> None:
        server = HostServer(echo, "token")
        tcp, unix = await server.start()
        print(json.dumps([tcp, unix]), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the other end goes
        await server.stop()

    asyncio.run(run())


def measure_message(num_messages: int = 2000, burst: int = 100) -> dict[str, float]:
    """CPU seconds of the router's process for one call of one token and its answer: by socket, and between nodes."""
    from ray_moe.transport.stream_transport import StreamTransport

    pipe = subprocess.PIPE
    host = subprocess.Popen([sys.executable, __file__, "echo"], stdin=pipe, stdout=pipe, text=True)
    if host.stdout is None:
        raise SystemExit("the echo has no output")
    tcp, unix = json.loads(host.stdout.readline())
    address = HostAddress("expert-0", "", "here", host.pid, tcp, unix)
    hidden = torch.zeros(1, WIDTH, dtype=torch.bfloat16)
    call = ExpertCall("layer", 1, hidden, None, None, [0], [1])
    found: dict[str, float] = {}
    for name, node in (("socket_s", "here"), ("grpc_s", "elsewhere")):
        transport = StreamTransport("token", node_id=node)
        line = transport.connect(address)

        def send(line: Any = line) -> None:
            for future in [line.submit(call) for _ in range(burst)]:
                future.result().release()

        send()
        began_s = time.process_time()
        for _ in range(num_messages // burst):
            send()
        found[name] = (time.process_time() - began_s) / num_messages
        line.close()
    host.communicate()
    return found


def measure(size: dict[str, Any]) -> dict[str, Any]:
    """Everything of one size: `hosts`, `experts` of a layer, `layers`, `tokens` of the batches, `hosts_a_layer`."""
    found: dict[str, Any] = {}
    if size.get("hosts_a_layer"):
        placement = few_hosts_a_layer(size)
    else:
        placement, found["plan"] = measure_plans(size)
    table, found["controller"] = measure_controller(size, placement)
    found["replicas"] = sum(len(hosts) for rows in placement.hosts_of.values() for hosts in rows)
    found["table"] = measure_table(table)
    found["batch"] = {str(number): measure_batch(table, number) for number in size["tokens"]}
    return found


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    if arguments == ["echo"]:
        serve_echo()
    elif arguments == ["message"]:
        print(json.dumps(measure_message()))
    else:
        print(json.dumps(measure(json.loads(arguments[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
