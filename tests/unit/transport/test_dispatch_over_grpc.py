"""The whole dispatch over real streams: forward, host combine and backward give what the plain loop gives."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from ray_moe.runtime.host_loop import HostLoop
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.runtime.settings import DispatchSettings
from ray_moe.transport.grpc_client import GrpcTransport
from ray_moe.transport.grpc_server import HostServer
from ray_moe.transport.settings import TransportSettings
from ray_moe.types import HostAddress, RoutingTable
from tests.toy import LAYER, ToyExperts, local_cluster, random_routing

NODE = "this node"
WAYS = {
    "shared memory": TransportSettings(inline_bytes=0),
    "inline": TransportSettings(arena_bytes=0),
    "chunks": TransportSettings(arena_bytes=0, chunk_bytes=4096),
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
def cluster(request, background):
    """Two hosts behind real servers; the dispatcher reaches them as one on the same node does."""
    module = ToyExperts(dtype=torch.float64)  # where rounding cannot be taken for an error
    _, table, hosts, shards = local_cluster(module, 2)
    settings = WAYS[request.param]
    servers, addresses = {}, {}
    for name, host in hosts.items():
        loop = HostLoop(host)
        servers[name] = HostServer(loop.submit, "token", incarnation="1", settings=settings)
        tcp, unix = background(servers[name].start())
        addresses[name] = HostAddress(name, "1", NODE, 0, tcp, unix)
    transport = GrpcTransport("token", node_id=NODE, settings=settings)
    table = RoutingTable(1, table.placement, addresses)

    def dispatcher(combine="router"):
        made = ExpertDispatcher(transport, DispatchSettings(combine=combine))
        made.update(table)
        return made

    yield module, shards, dispatcher
    transport.close()
    for server in servers.values():
        background(server.stop())


@pytest.mark.parametrize("combine", ["router", "host"])
@pytest.mark.parametrize("num_tokens", [1, 700])
def test_forward(cluster, combine, num_tokens):
    module, _, make = cluster
    hidden = torch.randn(num_tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    index, weight = random_routing(num_tokens, 6, 3, sentinels=True)
    with torch.no_grad():
        out = make(combine).forward(LAYER, hidden, index, weight)
        torch.testing.assert_close(out, module.oracle(hidden, index, weight), rtol=1e-10, atol=1e-10)


def test_backward(cluster):
    module, shards, make = cluster
    index, weight = random_routing(300, 6, 2)
    hidden = torch.randn(300, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    make().forward(LAYER, ours, index, weight).square().sum().backward()
    module.oracle(theirs, index, weight).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    for name, parameter in module.named_parameters():
        grads = torch.cat([getattr(shards[host], name).grad for host in sorted(shards)])
        torch.testing.assert_close(grads, parameter.grad, rtol=1e-10, atol=1e-10)
