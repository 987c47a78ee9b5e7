"""Switch Transformers with their experts apart: logits, text and gradients are those of `transformers`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import NllbMoeConfig, T5Config

from ray_moe.errors import InvalidCheckpoint, UnsupportedModel
from ray_moe.models.experts import drop_parameters, experts_modules, install
from ray_moe.models.families import adapt
from ray_moe.models.huggingface import Checkpoint
from ray_moe.models.inspect import inspect
from ray_moe.ops.experts import StackedExperts
from ray_moe.policy.placement import place_by_index
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.runtime.stepper import beginning
from ray_moe.transport.local import LocalTransport
from ray_moe.types import RoutingTable
from tests.tiny_encoder_decoder import LAYERS, build, save
from tests.unit.ops.architectures.elsewhere import trainer_of

IDS = torch.tensor([[5, 9, 33, 7, 41, 8, 1], [17, 2, 61, 9, 9, 5, 1]])
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def text(model: Any) -> torch.Tensor:
    ids: torch.Tensor = model.generate(IDS, attention_mask=MASK, max_new_tokens=12, do_sample=False, eos_token_id=None)
    return ids


def logits(model: Any, **how: Any) -> Any:
    return model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS.roll(1, 1), **how)


def hosted(modules: dict[str, Any]) -> tuple[ExpertDispatcher, LocalTransport]:
    """The experts of `modules` on three hosts, and who asks them."""
    hosts = {name: ExpertHost(name) for name in ("one", "two", "three")}
    placement = place_by_index({path: each[0] for path, each in modules.items()}, list(hosts))
    for name, host in hosts.items():
        for path, held in placement.experts_on(name).items():
            host.hold(path, held, StackedExperts(modules[path][1](held)))
    transport = LocalTransport(hosts)
    dispatcher = ExpertDispatcher(transport)
    dispatcher.update(RoutingTable(1, placement, {name: transport.address(name) for name in hosts}))
    return dispatcher, transport


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("capacity", [64, 1])  # with room for one token of a sequence, most are dropped
def test_on_the_experts_interface_nothing_changes(capacity, act) -> None:
    theirs = build(capacity, dense_act_fn=act)
    ours = copy.deepcopy(theirs)
    adapt(ours)
    assert list(experts_modules(ours)) == LAYERS
    torch.testing.assert_close(logits(ours).logits, logits(theirs).logits)
    assert torch.equal(text(ours), text(theirs))
    for model in (theirs, ours):
        model.train()  # without dropout and noise
    ids, labels = IDS[:, :4], IDS[:, 2:].contiguous()
    ours(input_ids=ids, labels=labels).loss.backward()
    theirs(input_ids=ids, labels=labels).loss.backward()
    for path in LAYERS:
        stacks, block = ours.get_submodule(path), theirs.get_submodule(path)
        for stack, matrix in (("up_proj", "wi"), ("down_proj", "wo")):
            for expert, grad in enumerate(stacks.get_parameter(stack).grad):
                wanted = block[f"expert_{expert}"].get_parameter(f"{matrix}.weight").grad
                torch.testing.assert_close(grad, torch.zeros_like(grad) if wanted is None else wanted)
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters() if ".experts." not in name}
    for name, grad in grads.items():
        torch.testing.assert_close(ours.get_parameter(name).grad, grad)


@pytest.mark.parametrize("capacity", [64, 2])
def test_a_checkpoint_with_its_experts_on_hosts_gives_the_same_logits_and_text(tmp_path: Path, capacity) -> None:
    theirs = save(tmp_path, capacity)
    checkpoint = Checkpoint.open(tmp_path, encoder_decoder=True)
    assert {path: layer.num_experts for path, layer in checkpoint.layers.items()} == dict.fromkeys(LAYERS, 5)
    loaders = {
        path: (5, lambda held, path=path: checkpoint.load_experts({path: held})[path]) for path in checkpoint.layers
    }
    dispatcher, transport = hosted(loaders)
    backbone: Any = checkpoint.load_backbone()
    assert not [name for name in backbone.state_dict() if ".experts." in name]
    install(backbone, dispatcher.forward)
    with torch.no_grad():
        torch.testing.assert_close(logits(backbone).logits, logits(theirs).logits)
    assert torch.equal(text(backbone), text(theirs))
    transport.close()


def test_a_model_in_memory_gives_its_experts_to_hosts_and_trains_them_there() -> None:
    theirs = build()
    ours = copy.deepcopy(theirs)
    adapt(ours)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.roll(2, 1)}
    trainer = trainer_of(ours, lambda model, batch: model(**batch).loss)
    trainer.start()
    curve = [trainer.make_step(lambda step: [batch]).loss for _ in range(3)]
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    expected = []
    for _ in range(3):
        loss = theirs(**batch).loss
        expected.append(loss.item())
        loss.backward()
        for parameter in theirs.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
        optimizer.zero_grad()
    assert curve == pytest.approx(expected, rel=1e-4)


def test_weights_that_are_gone_are_not_needed() -> None:
    model = build()
    adapt(model)
    drop_parameters(model)
    install(model, lambda path, hidden, index, weight: hidden * 0)
    assert logits(model).logits.isfinite().all()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (T5Config(d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2, vocab_size=20), "dense: it has no routed"),
        (NllbMoeConfig(), "in transformers 5.23 only the first two experts of a layer ever act"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(tmp_path: Path, config: Any, said: str) -> None:
    config.save_pretrained(tmp_path)
    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=said):
        Checkpoint.open(tmp_path, encoder_decoder=True)


def test_what_trains_and_exports_refuses_it_and_says_what_can_be_done(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"encoder-decoder.*Checkpoint\.open\(model, encoder_decoder=True\)"):
        Checkpoint.open(tmp_path)


def test_inspection_says_that_it_is_served(tmp_path: Path) -> None:
    save(tmp_path)
    found = inspect(tmp_path)
    assert (found.kind, found.servable, found.not_servable) == ("hybrid", True, "")


def test_a_checkpoint_must_say_what_its_decoder_begins_with(tmp_path: Path) -> None:
    save(tmp_path, decoder_start_token_id=None)
    with pytest.raises(InvalidCheckpoint, match="decoder_start_token_id None; expected one token"):
        Checkpoint.open(tmp_path, encoder_decoder=True)
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 3}')  # transformers takes this one then
    checkpoint: Any = Checkpoint.open(tmp_path, encoder_decoder=True).load_backbone()
    assert beginning(checkpoint, (7, 8)) == ([7, 8, 3], 2)
