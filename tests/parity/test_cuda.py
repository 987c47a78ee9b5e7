"""The same on a GPU: what its router, its hosts or both compute there is what `transformers` computes there.

Without a GPU that torch can use these tests are passed over; everything else in `tests` is for any machine.
"""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_moe import MoELayer
from ray_moe.errors import HostLost
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.experts import StackedExperts, pack, unpack
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.host_loop import HostLoop
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.runtime.own_experts import OwnExperts
from ray_moe.runtime.settings import DispatchSettings
from ray_moe.transport import device_memory
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.transport.host_server import HostServer
from ray_moe.transport.settings import TransportSettings
from ray_moe.transport.stream_transport import StreamTransport
from ray_moe.types import GenerateRequest, HostAddress, Placement, RoutingTable
from tests.parity.test_engine import NUM_TOKENS, PROMPT, Cluster, oracle
from tests.parity.test_training import compare_step
from tests.tiny_models import TINY, build, save
from tests.toy import random_routing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


@pytest.fixture(scope="module", params=sorted(TINY))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, save(request.param, folder).to("cuda"), folder


@torch.no_grad()
def greedy(model: Any) -> list[int]:
    prompt = torch.tensor([PROMPT], device="cuda")
    out = model.generate(prompt, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=[], pad_token_id=0)
    tokens: list[int] = out[0, len(PROMPT) :].tolist()
    return tokens


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_the_experts_of_a_layer_compute_and_learn_as_on_the_cpu(dtype: torch.dtype, within: float) -> None:
    here = MoELayer(64, 32, 6, seed=0, bias=True).experts.to(dtype)
    there = copy.deepcopy(here).cuda()
    index, weight = random_routing(40, 6, 2, sentinels=True)
    index[index == 3] = 6  # an expert without a token
    hidden = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = []
    for experts, device in ((here, "cpu"), (there, "cuda")):
        tokens, weights = hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()
        out = experts(tokens, index.to(device), weights)
        parts = torch.autograd.grad(out.square().sum(), [tokens, weights, *experts.parameters()])
        gradients.append([out.detach().cpu(), *(part.cpu() for part in parts)])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=within, atol=within * float(other.abs().max()))


async def test_float32_logits_and_greedy_tokens_equal_transformers(family: tuple[str, Any, Path]) -> None:
    _, reference, folder = family
    cluster = Cluster(folder, 3, device="cuda")
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPT], device="cuda")).logits
    assert cluster.logits().is_cuda
    torch.testing.assert_close(cluster.logits(), expected, rtol=1e-5, atol=1e-5)
    assert await cluster.generate(max_new_tokens=NUM_TOKENS, ignore_eos=True) == greedy(reference)
    cluster.close()


def test_bfloat16_logits_are_bit_equal_when_the_router_combines(family: tuple[str, Any, Path], tmp_path: Path) -> None:
    name, _, _ = family
    save(name, tmp_path, torch.bfloat16)
    cluster = Cluster(tmp_path, 3, device="cuda")
    with torch.no_grad():
        expected = oracle(name, tmp_path, "cuda")(torch.tensor([PROMPT], device="cuda")).logits
    assert torch.equal(cluster.logits(), expected)
    cluster.close()


@pytest.mark.parametrize("combine", ["router", "host"])
@pytest.mark.parametrize(("router", "hosts"), [("cpu", "cuda"), ("cuda", "cpu")])
async def test_router_and_hosts_may_be_on_different_devices(
    router: str, hosts: str, combine: Any, tmp_path: Path
) -> None:
    reference = save("qwen3_moe", tmp_path).to("cuda")
    cluster = Cluster(tmp_path, 2, DispatchSettings(combine=combine), device=router, hosts_device=hosts)
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPT], device="cuda")).logits
    torch.testing.assert_close(cluster.logits().to("cuda"), expected, rtol=1e-4, atol=1e-4)
    assert await cluster.generate(max_new_tokens=NUM_TOKENS, ignore_eos=True) == greedy(reference)
    cluster.close()


async def test_many_requests_computed_together_get_what_each_gets_alone(tmp_path: Path) -> None:
    reference = save("mixtral", tmp_path).to("cuda")
    cluster = Cluster(tmp_path, 2, device="cuda")
    prompts = [tuple((token + 7 * number) % 90 + 3 for token in PROMPT[: 3 + number]) for number in range(8)]

    async def generate(prompt: tuple[int, ...]) -> list[int]:
        request = GenerateRequest(token_ids=prompt, max_new_tokens=24, ignore_eos=True)
        return [token async for chunk in cluster.engine.generate(request) for token in chunk.token_ids]

    given = await asyncio.gather(*map(generate, prompts))
    with torch.no_grad():
        for prompt, tokens in zip(prompts, given, strict=True):
            wanted = reference.generate(
                torch.tensor([prompt], device="cuda"),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=[],
                pad_token_id=0,
            )
            assert tokens == wanted[0, len(prompt) :].tolist()
    cluster.close()


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_gradients_equal_those_of_one_process(recompute: bool) -> None:
    compare_step(build("mixtral", torch.float64).to("cuda"), 1e-10, (1, 2, 2, recompute))


@torch.no_grad()
def test_experts_are_copied_from_one_gpu_host_to_another_bit_by_bit(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path, torch.bfloat16)
    checkpoint = Checkpoint.open(str(tmp_path))
    path = next(iter(checkpoint.layers))
    giver, taker = ExpertHost("giver"), ExpertHost("taker")
    giver.hold(path, [0, 2, 5], StackedExperts(checkpoint.load_experts({path: [0, 2, 5]}, device="cuda")[path]))
    copied = checkpoint.experts_from(path, [2, 5], giver.export(path, [2, 5]), device="cuda")
    taker.hold(path, [2, 5], StackedExperts(copied))
    giver.drop(path, [0])
    call = ExpertCall(path, 1, torch.randn(6, 32, dtype=torch.bfloat16), None, None, [2, 5], [2, 4])
    answers = [host.run([call])[0] for host in (giver, taker)]
    assert isinstance(answers[0], ExpertReply)
    assert isinstance(answers[1], ExpertReply)
    assert torch.equal(answers[0].rows, answers[1].rows)
    assert all(parameter.is_cuda for parameter in copied.parameters())


@torch.no_grad()
def test_the_lifeboat_computes_on_the_gpu(tmp_path: Path) -> None:
    save("mixtral", tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    path, layer = next(iter(checkpoint.layers.items()))

    def load(layer: str, experts: Any, version: int) -> StackedExperts:
        return StackedExperts(checkpoint.load_experts({layer: experts}, device="cuda")[layer])

    own = OwnExperts(load, {path: layer.expert_bytes}, lifeboat_bytes=10 * layer.expert_bytes)
    call = ExpertCall(path, 1, torch.randn(5, 32), None, None, [1, 4], [3, 2])
    whole: nn.Module = checkpoint.load_experts({path: [1, 4]})[path]
    index = torch.tensor([[0], [0], [0], [1], [1]])
    reply = own.run(call)
    assert reply is not None
    torch.testing.assert_close(reply.rows, whole(call.hidden, index, torch.ones(5, 1)), rtol=1e-5, atol=1e-5)


def serve_on_the_gpu(folder: str, token: str, pipe: Any) -> None:
    """A host's process with all experts, until the pipe closes."""
    checkpoint = Checkpoint.open(folder)
    host = ExpertHost("expert-0")
    for path, layer in checkpoint.layers.items():
        every = range(layer.num_experts)
        host.hold(path, every, StackedExperts(checkpoint.load_experts({path: every}, device="cuda")[path]))

    async def serve() -> None:
        server = HostServer(HostLoop(host).accept, token, settings=TransportSettings(device="cuda"))
        tcp, unix = await server.start()
        pipe.send(HostAddress(host.host_id, "1", "here", os.getpid(), tcp, unix))
        await asyncio.get_running_loop().run_in_executor(None, pipe.poll, None)

    asyncio.run(serve())


@pytest.mark.parametrize("combine", ["router", "host"])
@pytest.mark.parametrize("sockets", [True, False], ids=["socket", "gRPC"])
def test_hidden_states_stay_on_the_gpu_from_process_to_process(
    sockets: bool, combine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "_LINGER_S", 0.2)
    reference = save("mixtral", tmp_path).to("cuda")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve_on_the_gpu, args=(str(tmp_path), "a token", there), daemon=True)
    process.start()
    address = here.recv()
    free_bytes, _ = torch.cuda.mem_get_info()
    settings = TransportSettings(device="cuda", device_arena_bytes=2**28)
    transport = StreamTransport("a token", node_id="here", sockets=sockets, settings=settings)
    connection = transport.connect(address)
    assert connection.shares_device_memory
    checkpoint = Checkpoint.open(str(tmp_path))
    path = next(iter(checkpoint.layers))
    hidden = torch.randn(300, 32, device="cuda")
    call = ExpertCall(path, 1, hidden, None, None, [2], [300])
    reply = connection.submit(call).result(30)
    assert reply.rows.is_cuda
    reply.release()
    connection.close()

    dispatcher = ExpertDispatcher(transport, DispatchSettings(combine=combine))
    dispatcher.update(RoutingTable(1, Placement({path: (("expert-0",),) * 6}), {"expert-0": address}))
    weight, index = torch.rand(300, 6, device="cuda").softmax(-1).topk(2)
    experts = reference.get_submodule(path)
    for num_tokens in (300, 1, 17):
        batch = (hidden[:num_tokens], index[:num_tokens], weight[:num_tokens])
        with torch.no_grad():
            given = dispatcher.forward(path, *batch)
            torch.testing.assert_close(given, experts(*batch), rtol=1e-5, atol=1e-5)

    line = transport.connect(address)
    process.kill()
    with pytest.raises(HostLost):
        line.submit(call).result(30)
    transport.close()
    process.join()
    del given, reply
    end_by = time.monotonic() + 20
    while torch.cuda.mem_get_info()[0] < free_bytes - 2**26:
        assert time.monotonic() < end_by, "the arenas were not freed"
        time.sleep(0.1)


def test_what_is_packed_on_a_gpu_is_unpacked_bit_by_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        tensor = torch.randn(3, 8, device="cuda").to(dtype)
        assert torch.equal(unpack(pack({"w": tensor}))["w"].float(), tensor.cpu().float())


@torch.no_grad()
@pytest.mark.parametrize("width", [24, 20])  # of 20 bfloat16 a row is 40 bytes: no multiple of 16
def test_the_grouped_product_takes_any_width_and_empty_groups(width: int, tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path, torch.bfloat16, moe_intermediate_size=width)
    checkpoint = Checkpoint.open(str(tmp_path))
    path = next(iter(checkpoint.layers))
    module = checkpoint.load_experts({path: range(8)}, device="cuda")[path]
    rows = torch.randn(7, 32, dtype=torch.bfloat16)
    given = StackedExperts(module).run(rows, [1, 3, 6], [4, 1, 2])
    wanted = StackedExperts(checkpoint.load_experts({path: range(8)})[path]).run(rows, [1, 3, 6], [4, 1, 2])
    torch.testing.assert_close(given, wanted, rtol=2e-2, atol=1e-3)
