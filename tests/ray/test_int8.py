"""A service whose experts are held in 8 bits: a fourth of the bytes, and the same bits wherever an expert is."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import pytest

from ray_moe.client.sync import Client
from tests.ray.support import all_ready, await_status, has_actors


@pytest.mark.parametrize(("quantization", "most"), [("int8", 0.02), ("fp8", 0.06)])
def test_experts_in_8_bits_answer_the_same_from_copies_the_router_and_a_new_life(
    mixtral: Any, serve: Any, quantization: str, most: float
) -> None:
    model, folder = mixtral
    service = serve(folder, experts={"quantization": quantization, "num_actors": 2})
    with Client(service.address) as client:
        experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
        held = sum(host.weight_bytes for host in client.status().hosts)
        assert held < 0.36 * experts  # so narrow a model has a scale for each 32 or 48 weights
        layer, hosts = next(iter(client.placement().placement.hosts_of.items()))
        rng = np.random.default_rng(0)
        hidden = rng.standard_normal((64, model.config.hidden_size), dtype=np.float32)
        index = rng.integers(0, len(hosts), (64, 2))
        weight = np.full((64, 2), 0.5, dtype=np.float32)

        def forward() -> Any:
            return client.forward(layer, hidden, index, weight)

        first = forward()
        client.resize(3)
        await_status(client, has_actors(3), what="three actors")  # copies go from host to host
        client.plan(dry_run=False)
        assert np.array_equal(forward(), first)
        os.kill(client.status().hosts[0].pid, signal.SIGKILL)
        assert np.array_equal(forward(), first)  # of the router's own experts, as long as it takes
        await_status(client, all_ready, what="back")
        assert np.array_equal(forward(), first)
    exact = serve(folder)
    with Client(exact.address) as client:
        whole = client.forward(layer, hidden, index, weight)
    error = np.linalg.norm(first - whole) / np.linalg.norm(whole)
    assert 0 < error < most
