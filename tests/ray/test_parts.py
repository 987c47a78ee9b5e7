"""A service whose experts are in two parts each, on different actors: nobody who asks it sees any of that."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ray_moe
from ray_moe.client.sync import Client
from ray_moe.errors import InvalidConfig, NotFound, UnsupportedModel
from ray_moe.models.experts import experts_modules
from tests.ray.support import PROMPT, all_ready, await_status, greedy, has_actors, make_config, serving
from tests.tiny_models import save

NUM_TOKENS = 24
IN_TWO = {"tensor": 2, "num_actors": 2}


def test_answers_are_those_of_whole_experts_while_actors_die_come_and_go(mixtral: Any, serve: Any) -> None:
    model, folder = mixtral
    service = serve(folder, experts=IN_TWO)
    (expected,) = greedy(model, [PROMPT], NUM_TOKENS)
    path, experts = next(iter(experts_modules(model).items()))
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((16, model.config.hidden_size), dtype=np.float32)
    index = rng.integers(0, model.config.num_local_experts + 1, (16, 2))  # the last one is "no expert"
    weight = rng.random((16, 2), dtype=np.float32)
    with torch.no_grad():
        whole = experts(
            torch.from_numpy(hidden),
            torch.from_numpy(index).clamp(max=model.config.num_local_experts - 1),
            torch.from_numpy(np.where(index < model.config.num_local_experts, weight, 0)),
        ).numpy()
    with Client(service.address) as client:

        def check() -> None:
            answer = client.generate(token_ids=PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True)
            assert answer.token_ids == expected
            np.testing.assert_allclose(client.forward(path, hidden, index, weight), whole, rtol=1e-4, atol=1e-5)

        check()
        status = client.status()
        assert all(len(counts) == model.config.num_local_experts for counts in status.tokens_per_expert.values())
        held = [host.weight_bytes for host in status.hosts]
        assert held[0] == held[1]
        for homes in client.placement().placement.hosts_of.values():
            number = model.config.num_local_experts
            assert all(set(homes[expert]).isdisjoint(homes[number + expert]) for expert in range(number))
        os.kill(status.hosts[0].pid, signal.SIGKILL)
        check()  # with the router's own parts, as long as it takes
        await_status(client, all_ready, what="back")
        client.resize(3)
        await_status(client, has_actors(3), what="three actors")
        client.plan(dry_run=False)
        check()
        with pytest.raises(NotFound, match=f"there is no expert {model.config.num_local_experts}"):
            client.canary(path, model.config.num_local_experts, str(folder))


def test_a_canary_of_an_expert_in_parts_is_of_the_whole_expert(tmp_path: Path) -> None:
    model = save("mixtral", tmp_path / "first")
    save("mixtral", tmp_path / "second", seed=3)
    path = next(iter(experts_modules(model)))
    with serving(tmp_path / "first", experts=IN_TWO) as service, Client(service.address) as client:
        version = client.canary(path, 1, str(tmp_path / "second"), share=1.0, max_drift=1e9)
        assert version.model == f"{tmp_path / 'first'}, expert 1 of {path} from {tmp_path / 'second'}"
        client.end_canary(promote=True)
        answer = client.generate(token_ids=PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True)
        other = dict(save("mixtral", tmp_path / "third", seed=3).named_parameters())
        with torch.no_grad():
            for name in ("gate_up_proj", "down_proj"):
                model.get_parameter(f"{path}.{name}")[1] = other[f"{path}.{name}"][1]
        assert [answer.token_ids] == greedy(model, [PROMPT], NUM_TOKENS)


def test_training_on_a_service_has_its_number_of_parts_or_is_refused(mixtral: Any, serve: Any, tmp_path: Path) -> None:
    _, folder = mixtral
    service = serve(folder, experts=IN_TWO)
    for train, said in (
        (
            {"parallel": {"tensor": 1}},
            r"train\.parallel\.tensor is 1, .* was started with experts\.tensor 2; leave it out",
        ),
        ({"lora": {"experts": True}}, "each of which would learn an adapter of its own"),
    ):
        config = make_config(folder, {"train": {"data": "stdlib", **train}})
        with pytest.raises(InvalidConfig, match=said):
            ray_moe.train(config, service_name=service.config.service_name)


def test_experts_that_cannot_be_cut_are_refused_before_anything_starts(tmp_path: Path) -> None:
    save("gpt_oss", tmp_path)
    with pytest.raises(UnsupportedModel, match="they have biases"), serving(tmp_path, experts=IN_TWO):
        raise AssertionError("it has started")
