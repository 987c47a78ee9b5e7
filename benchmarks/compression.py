"""What training sends, and where its loss ends, with rows and gradients of weights made smaller.

`python benchmarks/compression.py [--quick]`. Each run is a short training by two workers on two hosts, every expert on
both, in one process: of a small Mixtral on tokens in a circle, where all calls travel as bytes, which are counted; and,
for gradients in one bit, that of `examples/train_stdlib_lm.py` with several seeds. None of the figures depends on
timing. Results go to `benchmarks/results/compression.{json,md}`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks import report
from ray_moe.models.byte_level import END, ByteModel, new_model
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.ops.schedules import ScheduleSettings, factor
from ray_moe.training.data import BatchRequest, Data, Split, open_data
from ray_moe.training.settings import ExchangeSettings, StepSettings
from tests.training_cluster import Cluster
from tests.training_traffic import Gradients, Rows

LR = 5e-3
WIDTH = 64
NUM_WORKERS = 2
KINDS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "`gradient_compression: 1bit`": {"gradient_compression": "1bit"},
    "`wire: bfloat16`": {"wire": "bfloat16"},
    "`wire: int8`": {"wire": "int8"},
    "`1bit` and `int8`": {"gradient_compression": "1bit", "wire": "int8"},
}

WARMUP = 5
"""One step in so many goes before gradients are compressed, as in `config.TrainConfig`."""

STDLIB_STEPS, STDLIB_SEEDS = 300, (0, 1, 2)
STDLIB_OPTIMIZER = OptimizerSettings(lr=4e-3, weight_decay=0.01, no_decay=("*norm*", "*bias*"))


def batches(step: int, rank: int) -> list[dict[str, torch.Tensor]]:
    """Twelve tokens in a circle, half of them replaced by any: there is a floor, which the loss gets to."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = 3 + (torch.randint(0, 12, (8, 1), generator=generator) + torch.arange(16)) % 12
    is_noise = torch.rand(ids.shape, generator=generator) < 0.5
    ids = torch.where(is_noise, torch.randint(3, 15, ids.shape, generator=generator), ids)
    return [{"input_ids": ids, "labels": ids}]


def model() -> Any:
    config = CONFIG_MAPPING["mixtral"](
        vocab_size=96,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_local_experts=6,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def run(origin: Any, num_steps: int, wire: str = "same", gradient_compression: str = "none") -> dict[str, float]:
    """One training: bytes of each step, and the mean loss of its last tenth."""
    settings: Any = StepSettings(
        num_replicas=2,
        snapshot_every=0,
        gradient_compression=gradient_compression,  # type: ignore[arg-type]
        compression_warmup_steps=num_steps // WARMUP,
    )
    made = Cluster(
        origin,
        2,
        NUM_WORKERS,
        optimizer=OptimizerSettings(lr=LR),
        settings=settings,
        exchange=ExchangeSettings(wire=wire),  # type: ignore[arg-type]
        schedule=lambda step: LR * 0.5 * (1 + math.cos(math.pi * (step - 1) / num_steps)),
    )
    gradients, rows = Gradients(made), Rows(made)
    made.start()
    losses = [each.loss for each in made.train(num_steps, batches)]
    return {
        "replicas": gradients.replicas / num_steps,
        "workers": gradients.workers / num_steps,
        "rows": rows.num_bytes / num_steps,
        "half": losses[len(losses) // 2],
        "loss": sum(losses[-(num_steps // 10) :]) / (num_steps // 10),
    }


def stdlib_run(data: Data, seed: int, num_steps: int, gradient_compression: str) -> dict[str, float]:
    """Bytes of the run and of its steps after the warm-up, and the loss of files that were kept apart."""

    def windows(step: int, rank: int, split: Split = "train") -> dict[str, torch.Tensor]:
        return data.batch(
            BatchRequest(step, batch_size=4, window=192, worker=rank, num_workers=NUM_WORKERS, seed=seed, split=split)
        )

    warmup = num_steps // WARMUP
    schedule = ScheduleSettings("cosine", warmup_steps=min(20, num_steps), total_steps=num_steps)
    made = Cluster(
        new_model(ByteModel(seed=seed)),
        2,
        NUM_WORKERS,
        optimizer=STDLIB_OPTIMIZER,
        settings=StepSettings(
            num_replicas=2,
            snapshot_every=0,
            gradient_compression=gradient_compression,  # type: ignore[arg-type]
            compression_warmup_steps=warmup,
        ),
        schedule=lambda step: STDLIB_OPTIMIZER.lr * factor(schedule, step),
    )
    gradients = Gradients(made)
    made.start()
    figures: dict[str, float] = {}
    for last in range(1, num_steps + 1):
        made.train(last, lambda step, rank: [windows(step - 1, rank)])
        if last == warmup:
            figures = {f"{key}, warm-up": number for key, number in _sent(gradients).items()}
    figures |= _sent(gradients)
    unseen = made.together(
        lambda trainer: trainer.validate([windows(step, trainer.rank, "validation") for step in range(8)])
    )
    return figures | {"loss": unseen[0]}


def _sent(gradients: Gradients) -> dict[str, float]:
    """Bytes so far: from replicas to owners, of one worker, and of everybody."""
    everybody = gradients.replicas + NUM_WORKERS * gradients.workers
    return {"replicas": gradients.replicas, "workers": gradients.workers, "all": everybody}


def main(argv: list[str] | None = None) -> None:
    given = report.options(__doc__).parse_args(argv)
    quick: bool = given.quick
    torch.set_num_threads(1)
    num_steps = 10 if quick else 200
    origin = model()
    results = {name: run(origin, num_steps, **options) for name, options in KINDS.items()}
    stdlib_steps, seeds = (10, STDLIB_SEEDS[:1]) if quick else (STDLIB_STEPS, STDLIB_SEEDS)
    data = open_data("stdlib", vocab_size=END + 1)
    runs = {how: [stdlib_run(data, seed, stdlib_steps, how) for seed in seeds] for how in ("none", "1bit")}
    about = {"width": WIDTH, "warmup": WARMUP, "stdlib_steps": stdlib_steps, "stdlib_seeds": seeds}
    report.finish("compression", {**about, "steps": num_steps, "runs": results, "stdlib": runs}, given)


if __name__ == "__main__":
    main()
