"""Train a model on the actors that serve it, while they serve it; publish what was learned, and go back.

`python examples/train_and_publish.py [--steps 30]`. The model, tiny and with random weights, learns this file by heart.
Somebody asks it all the time meanwhile: no request fails, and each answer is wholly of one version of the weights.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections import Counter
from pathlib import Path

from ray_moe import Client, Config, Service
from ray_moe.errors import RayMoEError
from ray_moe.models.byte_level import ByteModel, write_new

WINDOW = 96


def ask(address: str, ended: threading.Event, answers: Counter[int | str]) -> None:
    """Count answers by the version of their weights, and errors by their kind."""
    with Client(address) as client:
        while not ended.is_set():
            try:
                answers[client.generate("def ", max_new_tokens=16, ignore_eos=True).version] += 1
            except RayMoEError as error:
                answers[type(error).__name__] += 1


def learn(client: Client, steps: int) -> None:
    tokens = list(Path(__file__).read_bytes())  # this model's tokens are bytes
    windows = [tokens[start : start + WINDOW] for start in range(0, 8 * WINDOW, WINDOW)]  # [B, S]
    for _ in range(steps):
        made = client.training.train_step({"input_ids": windows, "labels": windows}, lr=5e-3)
        if made.step in (1, steps) or made.step % 10 == 0:
            print(f"step {made.step}: loss {made.loss:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write_new(Path(scratch, "model"), ByteModel(hidden_size=64, num_layers=2, expert_width=64))
        few = {"num_cpus": 0.1}
        config = Config.model_validate(
            {
                "model": f"{scratch}/model",
                "experts": {"num_actors": 2, **few},
                "router": few,
                "server": {"port": 0, "http_port": None},
                "train": {"checkpoints": {"folder": f"{scratch}/steps"}, **few},
            }
        )
        answers: Counter[int | str] = Counter()
        ended = threading.Event()
        with Service(config) as service, Client(service.address) as client:
            asking = threading.Thread(target=ask, args=(service.address, ended, answers))
            asking.start()
            try:
                prompt = '"""Train a model'
                learn(client, arguments.steps)
                print(f"served by version 0: {client.generate(prompt, max_new_tokens=24, ignore_eos=True).text!r}")
                published = client.training.publish()
                print(f"published as version {published.number}")
                learned = client.generate(prompt, max_new_tokens=24, ignore_eos=True)
                print(f"served by version {learned.version}: {learned.text!r}")
                print(f"back to version {client.rollback().number}, for all who ask from now on")
            finally:
                ended.set()
                asking.join()
    print(f"answers meanwhile, by version: {dict(answers)}")


if __name__ == "__main__":
    main()
