"""The whole dispatch over real streams: forward, host combine and training give what the plain loop gives."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
import torch

from ray_moe.ops.experts import unpack
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.runtime.host_loop import HostLoop
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.runtime.settings import DispatchSettings
from ray_moe.training.dispatcher import TrainingDispatcher
from ray_moe.training.settings import ExchangeSettings
from ray_moe.training.trainees import Trainees
from ray_moe.transport.device_memory import DeviceArena, DeviceSheet
from ray_moe.transport.host_server import HostServer
from ray_moe.transport.settings import TransportSettings
from ray_moe.transport.stream_transport import StreamTransport
from ray_moe.types import HostAddress, RoutingTable
from tests.toy import LAYER, ToyExperts, local_cluster, random_routing
from tests.unit.transport import device_stand_in

NODE = "this node"
WAYS = {
    "shared memory": TransportSettings(inline_bytes=0),
    "inline": TransportSettings(arena_bytes=0),
    "chunks": TransportSettings(arena_bytes=0, chunk_bytes=4096),
    "shared memory of a GPU": TransportSettings(device="cpu"),
}


@pytest.fixture
def background():
    """An event loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(params=sorted(WAYS))
def way(request):
    return request.param


@pytest.fixture
def cluster(way, background, sockets):
    """Two hosts behind real servers; the dispatcher reaches them as one on the same node does."""
    device_stand_in.install()
    module = ToyExperts(dtype=torch.float64)  # where rounding cannot be taken for an error
    _, table, hosts, _ = local_cluster(module, 2)
    settings = WAYS[way]
    servers, addresses = {}, {}
    for name, host in hosts.items():
        loop = HostLoop(host)
        servers[name] = HostServer(loop.accept, "token", incarnation="1", settings=settings)
        tcp, unix = background(servers[name].start())
        addresses[name] = HostAddress(name, "1", NODE, 0, tcp, unix)
    transport = StreamTransport("token", node_id=NODE, sockets=sockets, settings=settings)
    table = RoutingTable(1, table.placement, addresses)

    def dispatcher(combine="router"):
        made = ExpertDispatcher(transport, DispatchSettings(combine=combine))
        made.update(table)
        return made

    yield module, hosts, transport, table, dispatcher
    transport.close()
    for server in servers.values():
        background(server.stop())


@pytest.mark.parametrize("combine", ["router", "host"])
@pytest.mark.parametrize("num_tokens", [1, 700])
def test_forward(cluster, combine, num_tokens):
    module, *_, make = cluster
    hidden = torch.randn(num_tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    index, weight = random_routing(num_tokens, 6, 3, sentinels=True)
    with torch.no_grad():
        out = make(combine).forward(LAYER, hidden, index, weight)
        torch.testing.assert_close(out, module.oracle(hidden, index, weight), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", ["shared memory of a GPU"], indirect=True)
def test_on_one_gpu_a_batch_is_written_once_and_what_is_sent_again_goes_by_itself(cluster, way, monkeypatch):
    module, hosts, _, _, make = cluster
    arenas, parts = [], []
    sheet, part = DeviceArena.sheet, DeviceSheet.part

    def count_sheet(arena, *arguments):
        arenas.append(arena)
        return sheet(arena, *arguments)

    def count_part(*arguments):
        parts.append(arguments)
        return part(*arguments)

    monkeypatch.setattr(DeviceArena, "sheet", count_sheet)
    monkeypatch.setattr(DeviceSheet, "part", count_part)
    hidden = torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    index, weight = random_routing(200, 6, 3, sentinels=True)
    wanted, dispatcher = module.oracle(hidden, index, weight), make()
    with torch.no_grad():
        out = dispatcher.forward(LAYER, hidden, index, weight)
        torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
        assert len(arenas) == 1
        assert len(parts) == 2
        host = next(iter(hosts.values()))
        mine = host.held()[LAYER]
        group = host._layers[0, LAYER].place[mine[0]][0]
        host.drop(LAYER, mine[:1])
        timer = threading.Timer(0.3, host.hold, (LAYER, mine, group))
        timer.start()
        out = dispatcher.forward(LAYER, hidden, index, weight)
        timer.join()
        torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    assert len(arenas) == 2
    assert dispatcher.num_retried_calls > 0
    parts.clear()
    gc.collect()
    assert arenas[0].ledger.is_empty


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_training(cluster, recompute):
    module, hosts, transport, table, _ = cluster
    for name, host in hosts.items():
        host.trainees = trainees = Trainees(name)
        trainees.open("run", "life", OptimizerSettings(), 0)
        held = table.placement.experts_on(name)[LAYER]
        rows = {expert: {n: p.detach()[expert].clone() for n, p in module.named_parameters()} for expert in held}
        trainees.hold(LAYER, module, rows, owned=held)
        trainees.begin("1.life.1")
    dispatcher = TrainingDispatcher(transport, ExchangeSettings(recompute=recompute))
    dispatcher.update(table)
    dispatcher.begin("1.life.1")
    index, weight = random_routing(300, 6, 2)
    hidden = torch.randn(300, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    dispatcher.forward(LAYER, ours, index, weight).square().sum().backward()
    module.oracle(theirs, index, weight).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    for name, host in hosts.items():
        held = table.placement.experts_on(name)[LAYER]
        for expert, arrays in host.trainees.gradients("1.life.1", {LAYER: held})[LAYER].items():
            for parameter, grad in unpack(arrays).items():
                wanted = getattr(module, parameter).grad[expert]
                torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-10)
