"""What cannot be started is refused in good time, with its reason, and nothing stays behind."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from ray_moe.client.sync import Client
from ray_moe.errors import InsufficientResources, InvalidCheckpoint, InvalidConfig, RayMoEError, UnsupportedModel
from ray_moe.service.composition import Service
from tests.ray.conftest import NUM_CPUS
from tests.ray.sparse import sparse_mixtral
from tests.ray.support import PROMPT, make_config, no_leaks
from tests.tiny_models import save

LONGEST_S = 40.0


def refuses(error: type[RayMoEError], match: str, model: Path, **settings: Any) -> None:
    """Starting must raise `error` with a message that matches, and clean up."""
    tree = make_config(model, settings)
    service = Service(tree)
    started = time.monotonic()
    with no_leaks(tree.service_name), pytest.raises(RayMoEError) as caught:
        service.start()
    assert (type(caught.value), bool(re.search(match, caught.value.message))) == (error, True), repr(caught.value)
    assert time.monotonic() - started < LONGEST_S


def test_a_port_in_use(mixtral):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refuses(
            InsufficientResources,
            f"cannot listen on 127.0.0.1:{port}: address already in use; .*another port",
            mixtral[1],
            experts={"num_actors": 1},
            server={"port": port},
        )


def test_more_actors_than_experts(mixtral):
    refuses(
        InvalidConfig, "num_actors is 7, but the model has 6 experts.*6 or less", mixtral[1], experts={"num_actors": 7}
    )


def test_gpus_that_are_not_there(mixtral):
    refuses(
        InsufficientResources,
        "2 expert actors and the router need 2 GPU, and the cluster has 0; set experts.num_gpus",
        mixtral[1],
        experts={"num_gpus": 1},
    )
    refuses(InsufficientResources, "need 1 GPU, and the cluster has 0", mixtral[1], router={"num_gpus": 1})


def test_more_cpus_than_there_are(mixtral):
    refuses(
        InsufficientResources,
        rf"2 expert actors and the router need 16\.1 CPU, and the cluster has {NUM_CPUS}; start fewer actors",
        mixtral[1],
        experts={"num_cpus": 8},
    )


def test_a_resource_that_is_not_there(mixtral):
    refuses(
        InsufficientResources,
        "need 2 expert_slot, and the cluster has 0; start Ray with that resource",
        mixtral[1],
        experts={"resources": {"expert_slot": 1}},
    )


def test_a_name_that_is_taken(mixtral, serve):
    """The service that has the name goes on."""
    service = serve(mixtral[1], experts={"num_actors": 1})
    name = service.config.service_name
    second = Service(make_config(mixtral[1], {"service_name": name}))
    with pytest.raises(InvalidConfig, match=f"a service named '{name}' runs on this cluster already"):
        second.start()
    with Client(service.address) as client:
        assert len(client.generate(token_ids=PROMPT, max_new_tokens=3, ignore_eos=True).token_ids) == 3


def test_a_dense_checkpoint(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ).save_pretrained(tmp_path)
    refuses(UnsupportedModel, "dense.*upcycle", tmp_path)


def test_a_truncated_weights_file(tmp_path):
    save("mixtral", tmp_path)
    weights = tmp_path / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1000)
    refuses(InvalidCheckpoint, "model.safetensors", tmp_path)


def test_not_a_checkpoint(tmp_path):
    refuses(InvalidCheckpoint, "config.json", tmp_path)


def test_more_weights_than_memory(tmp_path):
    """A checkpoint of 345 GiB, whose files are sparse: it says what it is, and takes no space."""
    sparse_mixtral(tmp_path, hidden=8192, inner=28672, layers=32)
    refuses(
        InsufficientResources,
        r"needs about 346\.\d\d GiB of memory \(336\.00 GiB of experts, 9\.01 GiB of other weights, "
        r".* for 3 processes\), and \d.* is available; add nodes or free memory$",
        tmp_path,
    )
