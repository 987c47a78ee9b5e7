"""Train a small byte-level MoE language model on the sources of Python's standard library; save, serve and sample it.

`python examples/train_stdlib_lm.py [--steps 300] [--actors 2] [--workers 1] [--out stdlib-lm]`. Nothing is downloaded.
The experts are trained where they are served: in expert actors, which one call starts, on a Ray of its own. Kill one of
them meanwhile (`kill -9` of a process `ray::ExpertActor`): the loss goes on as if nothing had happened.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from pathlib import Path

import ray_moe
from ray_moe import Client, Config, Service
from ray_moe.models.byte_level import ByteModel, write_new
from ray_moe.models.huggingface import Checkpoint
from ray_moe.training.export import export_trained, find
from ray_moe.training.loop import Progress


def tell(progress: Progress) -> None:
    if progress.event:
        print(progress.event)
    else:
        unseen = f", unseen files {progress.validation_loss:.3f}" if math.isfinite(progress.validation_loss) else ""
        speed = f"{progress.tokens_per_s:,.0f} tokens/s, balance {progress.balancedness:.2f}"
        print(f"step {progress.step}: loss {progress.loss:.3f} nats a byte{unseen}; {speed}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--actors", type=int, default=2, help="that have the experts")
    parser.add_argument("--workers", type=int, default=1, help="that have everything else and the data")
    parser.add_argument("--data", default="stdlib", help="files or folders to learn from instead")
    parser.add_argument("--out", type=Path, default=Path("stdlib-lm"), help="folder of the trained model")
    parser.add_argument("--force", action="store_true", help="replace it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        start, checkpoints = Path(scratch) / "start", Path(scratch) / "checkpoints"
        write_new(start, ByteModel())
        few = {"num_cpus": 0.1}  # as many as there are to be, whatever the machine has
        config = Config.model_validate(
            {
                "model": str(start),
                "experts": {"num_actors": arguments.actors, **few},
                "router": few,
                "server": {"port": 0, "http_port": None},
                "train": {
                    "data": arguments.data,
                    "steps": arguments.steps,
                    "batch_size": 8,
                    "sequence_length": 192,
                    "validation_every": max(1, arguments.steps // 6),
                    "validation_batches": 4,
                    "report_every": max(1, arguments.steps // 30),
                    "parallel": {"data": arguments.workers, "expert": arguments.actors},
                    "optimizer": {"lr": 4e-3, "weight_decay": 0.01},
                    "schedule": {"kind": "cosine", "warmup_steps": min(20, arguments.steps)},
                    "checkpoints": {"folder": str(checkpoints), "every": 100},
                    **few,
                },
            }
        )
        ray_moe.train(config, tell)
        if arguments.out.exists() and arguments.force:
            shutil.rmtree(arguments.out)
        model = export_trained(find(checkpoints), Checkpoint.open(start), arguments.out)
        print(f"the model is in {model}: transformers and `ray-moe serve {model}` load it")
        served = config.model_copy(update={"model": str(model)})
        with Service(served) as service, Client(service.address) as client:
            print(client.generate("def ", max_new_tokens=120).text)


if __name__ == "__main__":
    main()
