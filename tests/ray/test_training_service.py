"""Training a running service through the client, against one process of PyTorch, with actors killed meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_moe.client.aio import AsyncClient
from ray_moe.client.sync import Client
from ray_moe.errors import InvalidCheckpoint, InvalidConfig, StepRefused
from ray_moe.service.composition import Service
from tests.ray.support import PROMPT, await_status, greedy, has_actors, pid_of, serving
from tests.tiny_models import save

LR = 3e-3


def batch(number: int) -> dict[str, Any]:
    ids = np.random.default_rng(number).integers(3, 96, (2, 9))
    labels = ids.copy()
    labels[0, : number % 4] = -100
    return {"input_ids": ids, "labels": labels}


class Oracle:
    """One process of PyTorch."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).train()
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.01)

    def step(self, numbers: Sequence[int]) -> float:
        """The mean loss of these micro-batches."""
        self._optimizer.zero_grad()
        losses = []
        for number in numbers:
            loss = self.model(**{name: torch.tensor(ids) for name, ids in batch(number).items()}).loss
            (loss / len(numbers)).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        return sum(losses) / len(losses)

    def tokens(self) -> tuple[int, ...]:
        return greedy(self.model.eval(), [PROMPT], 12)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    save("qwen3_moe", made)
    return made


@pytest.fixture
def service(folder: Path, tmp_path: Path) -> Iterator[Service]:
    train = {
        "optimizer": {"lr": LR, "weight_decay": 0.01, "no_decay": []},
        "num_cpus": 0.1,
        "checkpoints": {"folder": str(tmp_path / "checkpoints")},
    }
    with serving(folder, experts={"num_actors": 3}, train=train) as started:
        yield started


def expected(loss: float) -> Any:
    return pytest.approx(loss, rel=1e-5)


def test_two_clients_train_and_actors_die_and_what_was_learned_is_served(service: Service, folder: Path) -> None:
    oracle = Oracle(folder)
    before = oracle.tokens()
    with Client(service.address) as one, Client(service.address) as two:
        pids = {host.host_id: host.pid for host in one.status().hosts}
        assert one.training.state().step == 0
        for step in (1, 2):
            numbers = [10 * step + n for n in range(step + 1)]
            reports = [(one, two)[n % 2].training.forward_backward(batch(number)) for n, number in enumerate(numbers)]
            assert all(sum(tokens) % 18 == 0 < sum(tokens) for tokens in reports[0].tokens_per_expert.values())
            assert two.training.optim_step(step=step).loss == expected(oracle.step(numbers))
        # An expert actor dies while a step is open: nobody notices.
        one.training.forward_backward(batch(30))
        os.kill(pids["expert-1"], signal.SIGKILL)
        two.training.forward_backward(batch(31))
        assert one.training.optim_step(step=3).loss == expected(oracle.step([30, 31]))
        # So does the trainer, which takes the step up where it was.
        one.training.forward_backward(batch(40), micro_id="forty")
        os.kill(pid_of(service, "trainer"), signal.SIGKILL)
        again = one.training.forward_backward(batch(40), micro_id="forty")
        assert again.step == 4
        assert two.training.state().micro_batches == ("forty",)
        result = two.training.train_step(batch(41), step=4, op_id="four")
        assert result.loss == expected(oracle.step([40, 41]))
        os.kill(pid_of(service, "trainer"), signal.SIGKILL)
        assert two.training.train_step(batch(41), step=4, op_id="four") == result
        assert (one.training.state().step, one.training.state().history) == (4, (result,))
        await_status(one, has_actors(3), what="three actors")
        # And the controller, which is asked after each step who there is.
        os.kill(pid_of(service, "controller"), signal.SIGKILL)
        for step in (5, 6):
            assert one.training.train_step(batch(step), step=step).loss == expected(oracle.step([step]))
        await_status(one, has_actors(3), what="three actors")
        # Nothing of it was served yet.
        generate: Any = {"token_ids": PROMPT, "max_new_tokens": 12, "ignore_eos": True}
        learned = oracle.tokens()
        assert learned != before
        assert one.generate(**generate).token_ids == before
        assert one.training.sample(**generate).token_ids == learned
        version = one.training.publish()
        assert (version.number, version.state) == (1, "current")
        assert one.generate(**generate).token_ids == learned
        one.rollback()
        assert one.generate(**generate).token_ids == before


def test_clients_at_the_same_time_and_states_saved_and_loaded(service: Service, folder: Path) -> None:
    oracle = Oracle(folder)
    with Client(service.address) as client:
        threads = [threading.Thread(target=lambda n=n: client.training.forward_backward(batch(n))) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client.training.optim_step().loss == expected(oracle.step(range(8)))
        saved = client.training.save_state()
        assert (saved.step, Path(saved.folder).name) == (1, "step-00000001")
        for number in (20, 21):
            client.training.train_step([batch(number), batch(number + 1)])
        client.training.save_state()
        shard = next((Path(saved.folder) / "experts").iterdir())
        sound = shard.read_bytes()
        shard.write_bytes(sound[:-1])
        with pytest.raises(InvalidCheckpoint, match="is damaged"):
            client.training.load_state(1)
        assert client.training.state().step == 3
        shard.write_bytes(sound)
        assert client.training.load_state(1) == saved
        with pytest.raises(StepRefused, match="the next one is 2"):
            client.training.optim_step(step=4)
        assert client.training.train_step(batch(50), step=2).loss == expected(oracle.step([50]))


async def test_the_asynchronous_client_does_the_same(folder: Path) -> None:
    train = {"optimizer": {"lr": LR, "weight_decay": 0.01, "no_decay": []}, "num_cpus": 0.1}
    oracle = Oracle(folder)
    with serving(folder, train=train) as service:
        async with AsyncClient(service.address) as client:
            await client.training.forward_backward(batch(1))
            await client.training.forward_backward(batch(2), micro_id="two")
            assert await client.training.discard(["two"]) == ("two",)
            assert (await client.training.optim_step()).loss == expected(oracle.step([1]))
            assert (await client.training.train_step([batch(3), batch(4)])).loss == expected(oracle.step([3, 4]))
            assert (await client.training.state()).step == 2
            sample = await client.training.sample(token_ids=PROMPT, max_new_tokens=12, ignore_eos=True)
            assert sample.token_ids == oracle.tokens()
            for call in (client.training.save_state, client.training.load_state, client.training.publish):
                with pytest.raises(InvalidConfig, match=r"train\.checkpoints\.folder"):
                    await call()
