"""The engine with its experts on hosts against `transformers` in one process, for every family.

The router's model has no expert weights at all, so a local short cut could not answer. Float32: logits within 1e-5 and
the same 64 greedy tokens. Bfloat16 with the router combining: bit-equal logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_moe.models.experts import experts_modules, install
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.quantization import Quantization, make_group
from ray_moe.policy.placement import place_by_index
from ray_moe.runtime.engine import Engine, EngineLimits
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.runtime.settings import DispatchSettings
from ray_moe.transport.local import LocalTransport
from ray_moe.types import GenerateRequest, RoutingTable
from tests.tiny_models import TINY, save

PROMPT = [5, 17, 3, 42, 8, 11, 60, 23, 9, 31, 77, 4]
NUM_TOKENS = 64
OFF_THE_INTERFACE = {"dbrx", "jetmoe", "llama4_text"}


class Cluster:
    """An engine over hosts in this process, loaded from a checkpoint on disk."""

    def __init__(
        self,
        folder: Path,
        num_hosts: int,
        settings: DispatchSettings | None = None,
        limits: EngineLimits | None = None,
        device: str = "cpu",
        hosts_device: str = "",
        quantization: Quantization = "none",
    ) -> None:
        """`device` is the router's; the hosts are there too unless they have one of their own."""
        whole = Checkpoint.open(str(folder), encoder_decoder=True)
        checkpoint = whole.cut(1 if settings is None else settings.num_parts)
        names = [f"expert-{number}" for number in range(num_hosts)]
        placement = place_by_index({p: spec.num_experts for p, spec in checkpoint.layers.items()}, names)
        hosts = {name: ExpertHost(name) for name in names}
        for name, host in hosts.items():
            plan = placement.experts_on(name)
            for path, module in checkpoint.load_experts(plan, device=hosts_device or device).items():
                host.hold(path, plan[path], make_group(module, quantization))
        self.transport = LocalTransport(hosts)
        dispatcher = ExpertDispatcher(self.transport, settings)
        dispatcher.update(RoutingTable(1, placement, {name: self.transport.address(name) for name in names}))
        self.hosts = hosts
        self.model: Any = checkpoint.load_backbone(device=device)
        self.dispatcher = dispatcher
        self.engine = Engine(self.model, None, whole.layers, dispatcher, limits=limits or EngineLimits())

    async def generate(self, **request) -> list[int]:
        chunks = [c async for c in self.engine.generate(GenerateRequest(token_ids=tuple(PROMPT), **request))]
        assert chunks[-1].finish_reason
        return [token for chunk in chunks for token in chunk.token_ids]

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([PROMPT], device=self.model.device)).logits

    def close(self) -> None:
        self.transport.close()


@pytest.fixture(scope="module", params=sorted(TINY))
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.set_num_threads(1)
    return request.param, save(request.param, folder), folder


@pytest.mark.parametrize("num_hosts", [1, 2, 3])
async def test_float32_logits_and_greedy_tokens_equal_transformers(family, num_hosts):
    _, reference, folder = family
    cluster = Cluster(folder, num_hosts)
    assert not [p for m in experts_modules(cluster.model).values() for p in m.parameters()]
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPT])).logits
        tokens = reference.generate(
            torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=[], pad_token_id=0
        )[0, len(PROMPT) :].tolist()
    torch.testing.assert_close(cluster.logits(), expected, rtol=1e-5, atol=1e-5)
    assert await cluster.generate(max_new_tokens=NUM_TOKENS, ignore_eos=True) == tokens
    assert len(tokens) == NUM_TOKENS
    assert sum(counts.sum() for counts in cluster.dispatcher.tokens_per_expert.values()) > 0
    cluster.close()


def oracle(name: str, folder: Path, device: str = "cpu"):
    """The whole model in this process, computing by the experts interface's own formula."""
    if name not in OFF_THE_INTERFACE:
        return AutoModelForCausalLM.from_pretrained(folder).eval().to(device)
    checkpoint = Checkpoint.open(str(folder))  # the family's formula sums in another order
    model = checkpoint.load_backbone(device=device)
    every = {path: range(layer.num_experts) for path, layer in checkpoint.layers.items()}
    whole = checkpoint.load_experts(every, device=device)
    install(model, lambda path, hidden, index, weight: whole[path](hidden, index, weight))
    return model


def test_bfloat16_logits_are_bit_equal_when_the_router_combines(family, tmp_path):
    name, _, _ = family
    save(name, tmp_path, torch.bfloat16)
    cluster = Cluster(tmp_path, 3)
    with torch.no_grad():
        expected = oracle(name, tmp_path)(torch.tensor([PROMPT])).logits
    assert torch.equal(cluster.logits(), expected)
    cluster.close()


@pytest.mark.parametrize("combine", ["router", "host"])
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "llama4_text"])
async def test_experts_in_parts_give_the_logits_and_greedy_tokens_of_transformers(name, combine, tmp_path):
    reference = save(name, tmp_path)
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPT])).logits
        tokens = reference.generate(
            torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False, eos_token_id=[], pad_token_id=0
        )[0, len(PROMPT) :].tolist()
    whole = Cluster(tmp_path, 1)
    whole.logits()
    for num_hosts, num_parts in ((2, 2), (3, 4)):
        cluster = Cluster(tmp_path, num_hosts, DispatchSettings(combine=combine, num_parts=num_parts))
        torch.testing.assert_close(cluster.logits(), expected, rtol=1e-5, atol=1e-5)
        for layer, counts in cluster.dispatcher.tokens_per_expert.items():  # what people see are experts
            assert counts.tolist() == whole.dispatcher.tokens_per_expert[layer].tolist()
        assert await cluster.generate(max_new_tokens=16, ignore_eos=True) == tokens
        cluster.close()
    whole.close()


async def test_hosts_combining_gives_the_same_tokens(tmp_path):
    reference = save("mixtral", tmp_path)
    cluster = Cluster(tmp_path, 3, DispatchSettings(combine="host"))
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPT])).logits
    torch.testing.assert_close(cluster.logits(), expected, rtol=1e-4, atol=1e-4)
    cluster.close()
