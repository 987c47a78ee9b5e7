"""A service whose actors have a fraction of their experts in memory: it answers as if they had all."""

from __future__ import annotations

import os
import shutil
import signal
from typing import Any

import pytest

from ray_moe.client.sync import Client
from ray_moe.errors import ExpertFailed
from tests.ray.support import all_ready, await_status, greedy, has_actors, prompts
from tests.tiny_models import save

NUM_TOKENS = 24


def test_tokens_are_the_same_through_resizes_deaths_and_new_weights(mixtral: Any, serve: Any, tmp_path: Any) -> None:
    model, folder = mixtral
    newer = save("mixtral", tmp_path / "newer", seed=7, max_position_embeddings=2048)
    one = sum(p[0].nbytes for n, p in model.named_parameters() if ".layers.0." in n and ".experts." in n)
    service = serve(folder, experts={"offload": "disk", "resident_bytes": one, "num_actors": 2})
    texts = prompts(3)
    expected = {number: greedy(each, texts, NUM_TOKENS) for number, each in enumerate((model, newer))}
    with Client(service.address) as client:

        def said() -> list[tuple[int, ...]]:
            return [
                client.generate(token_ids=text, max_new_tokens=NUM_TOKENS, ignore_eos=True).token_ids for text in texts
            ]

        assert said() == expected[0]
        client.resize(3)
        await_status(client, has_actors(3), what="three actors")
        assert said() == expected[0]
        os.kill(client.status().hosts[0].pid, signal.SIGKILL)
        assert said() == expected[0]
        await_status(client, all_ready, what="back")
        client.publish(str(tmp_path / "newer"))
        assert said() == expected[1]
        client.rollback()
        assert said() == expected[0]


def test_a_checkpoint_that_is_taken_away_fails_what_needs_it_and_ends_no_actor(
    mixtral: Any, serve: Any, tmp_path: Any
) -> None:
    model, folder = mixtral
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    experts = {"offload": "disk", "resident_bytes": 1, "num_actors": 2}
    service = serve(mine, experts=experts, router={"lifeboat_bytes": 0})
    texts = prompts(1)
    with Client(service.address) as client:
        pids = [host.pid for host in client.status().hosts]
        (mine / "model.safetensors").rename(mine / "away")
        with pytest.raises(ExpertFailed, match="could not be brought into memory"):
            client.generate(token_ids=texts[0], max_new_tokens=NUM_TOKENS, ignore_eos=True)
        (mine / "away").rename(mine / "model.safetensors")
        answer = client.generate(token_ids=texts[0], max_new_tokens=NUM_TOKENS, ignore_eos=True)
        assert [answer.token_ids] == greedy(model, texts, NUM_TOKENS)
        assert [host.pid for host in client.status().hosts] == pids
