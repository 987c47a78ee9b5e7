"""What the options of training and serving save of memory, each in a process of its own.

`python benchmarks/memory.py [--quick]`. A case is a new process that builds up what it is about and says by how much
its resident memory has grown, and how many bytes the tensors in question have. Nothing here is a timing. Results go to
`benchmarks/results/memory.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import torch
from torch import nn

from benchmarks import report
from ray_moe.models.huggingface import Checkpoint
from ray_moe.models.loading import return_free_memory
from ray_moe.ops.experts import StackedExperts
from ray_moe.ops.optimizers import Offload, Optimizer, OptimizerKind, OptimizerSettings
from ray_moe.ops.quantization import QuantizedExperts
from ray_moe.policy.placement import place_by_index
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.offload import Residents, offload_to_files
from ray_moe.training.shelf import shelf_for
from ray_moe.transport.base import ExpertCall

NUM_HOSTS = 4

Sizes = Mapping[str, int]
LARGE: Sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 16, "num_hidden_layers": 4}
ONE: Sizes = {"hidden_size": 512, "intermediate_size": 8192, "num_local_experts": 1, "num_hidden_layers": 4}
TINY_ONE: Sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_local_experts": 1, "num_hidden_layers": 2}
ONE_EXPERT = "one-expert"
"""Folder, in that of the other model, of one that has a single large expert in each layer."""
DEEP: Sizes = {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 4, "num_hidden_layers": 8}
"""With few experts, so that activations and not gradients are what a step takes."""
TINY: Sizes = {"hidden_size": 64, "intermediate_size": 128, "num_local_experts": 8, "num_hidden_layers": 2}
TOKENS = {False: (8, 256), True: (2, 32)}
"""Sequences and their length in the cases of activations."""


# --- Measuring -----------------------------------------------------------------------------------------------
class Growth:
    """By how much this process's resident memory grows while the block runs: what stays, and at most."""

    def __enter__(self) -> Growth:
        return_free_memory()
        self._before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        return self

    def __exit__(self, *error: object) -> None:
        self.peak_bytes = _peak_bytes() - self._before
        return_free_memory()
        self.bytes = psutil.Process().memory_info().rss - self._before


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _model(sizes: Sizes, top_k: int = 2) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING["mixtral"](
        **sizes,
        num_experts_per_tok=top_k,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1024,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


# --- Cases ---------------------------------------------------------------------------------------------------
def weights(folder: Path, quick: bool, num_parts: int, backbone: bool, int8: bool = False) -> dict[str, int]:
    """A process with one of `num_parts` of the experts, and perhaps the backbone."""
    checkpoint = Checkpoint.open(str(folder))
    kept: list[Any] = []
    num_bytes = 0
    with Growth() as growth:
        if backbone:
            kept.append(checkpoint.load_backbone())
            num_bytes += _bytes_of(kept[0])
        for path, layer in checkpoint.layers.items() if num_parts else ():
            module = checkpoint.load_experts({path: range(0, layer.num_experts, num_parts)})[path]
            group: Any = StackedExperts(module)
            if int8:
                group = QuantizedExperts(group)
            num_bytes += group.nbytes if int8 else _bytes_of(module)
            kept.append(group)
            del module
    return {"rss": growth.bytes, "tensors": num_bytes}


def one_expert(folder: Path, quick: bool, tensor: int) -> dict[str, int]:
    """The largest of 2 processes that share a model with one large expert a layer, in `tensor` parts."""
    checkpoint = Checkpoint.open(str(folder / ONE_EXPERT)).cut(tensor)
    hosts = ["expert-0", "expert-1"]
    placement = place_by_index({path: layer.num_experts for path, layer in checkpoint.layers.items()}, hosts)
    mine = max((placement.experts_on(host) for host in hosts), key=checkpoint.experts_bytes)
    with Growth() as growth:
        kept = checkpoint.load_experts(mine)
    return {"rss": growth.bytes, "peak": growth.peak_bytes, "tensors": sum(map(_bytes_of, kept.values()))}


def offloaded(folder: Path, quick: bool, num_parts: int, resident: float) -> dict[str, int]:
    """A host with one of `num_parts` of the experts, a share `resident` of them in memory, after each has computed."""
    checkpoint = Checkpoint.open(str(folder))
    held = {path: list(range(0, layer.num_experts, num_parts)) for path, layer in checkpoint.layers.items()}
    residents = Residents(int(resident * checkpoint.experts_bytes(held)))
    host = ExpertHost("expert-0")
    with Growth() as growth:
        for path, ids in held.items():

            def read(expert: int, path: str = path) -> StackedExperts:
                return StackedExperts(checkpoint.load_experts({path: [expert]})[path])

            layer = checkpoint.layers[path]
            host.hold(path, ids, offload_to_files(read, ids, layer.expert_bytes, residents))
            rows = torch.zeros(len(ids), layer.hidden_size)
            for _ in range(2):
                (outcome,) = host.run([ExpertCall(path, 0, rows, None, None, ids, [1] * len(ids))])
                if isinstance(outcome, Exception):
                    raise outcome
    return {"rss": growth.bytes, "tensors": residents.num_bytes}


def training_state(
    folder: Path, quick: bool, num_parts: int, kind: OptimizerKind = "adamw", offload: Offload = "none"
) -> dict[str, int]:
    """A process that steps one of `num_parts` of the experts: weights, and what the optimizer keeps of them."""
    checkpoint = Checkpoint.open(str(folder))
    settings = OptimizerSettings(kind=kind, offload=offload)
    optimizer = Optimizer(settings, shelf=shelf_for(settings))
    with Growth() as growth:
        for path, layer in checkpoint.layers.items():
            module = checkpoint.load_experts({path: range(0, layer.num_experts, num_parts)})[path]
            for name, parameter in module.named_parameters():
                optimizer.add(f"{path}/{name}", nn.Parameter(parameter.detach()))
        for slot in optimizer._slots.values():  # one after the other, so that gradients do not count
            slot.parameter.grad = torch.zeros_like(slot.parameter)
        optimizer.step()
    states = [optimizer.state_of(name) for name in optimizer.names]
    in_memory = {tensor.data_ptr() for name in optimizer.names for tensor in optimizer.in_memory(name)}
    state_bytes = sum(
        tensor.nbytes
        for state in states
        for key, tensor in state.items()
        if key != "master" and tensor.data_ptr() in in_memory
    )
    master_bytes = sum(state["master"].nbytes for state in states)
    return {"rss": growth.bytes, "tensors": master_bytes + state_bytes, "state": state_bytes}


def activations(folder: Path, quick: bool, checkpointing: bool, recompute: bool) -> dict[str, int]:
    """A step of training in one process, worker and hosts together: what it takes beyond the weights."""
    from ray_moe.ops.optimizers import OptimizerSettings
    from ray_moe.training.settings import ExchangeSettings, StepSettings
    from tests.training_cluster import Cluster

    made = Cluster(
        _model(TINY if quick else DEEP),
        2,
        optimizer=OptimizerSettings(kind="sgd"),
        settings=StepSettings(snapshot_every=0),
        exchange=ExchangeSettings(recompute=recompute),
    )
    made.start()
    model: Any = made.trainers[0].model
    model.config.use_cache = False
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows, length = TOKENS[quick]
    ids = torch.randint(3, 1000, (rows, length), generator=torch.Generator().manual_seed(1))
    held: list[int] = []

    def loss(module: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        before = psutil.Process().memory_info().rss
        value: torch.Tensor = module(**batch).loss
        return_free_memory()
        held.append(psutil.Process().memory_info().rss - before)
        return value

    made.trainers[0]._loss = loss
    with Growth() as growth:
        made.train(1, lambda step, rank: [{"input_ids": ids, "labels": ids}])
    return {"rss": held[0], "peak": growth.peak_bytes, "tensors": 0}


def _bytes_of(module: nn.Module) -> int:
    return sum({p.data_ptr(): p.nbytes for p in module.parameters()}.values())


# --- What is compared ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Row:
    """An option, beside the same without it."""

    name: str
    what: str
    without: str
    having: str
    """Names of cases."""
    by: str = "rss"


CASES: dict[str, Callable[[Path, bool], dict[str, int]]] = {
    "whole model": partial(weights, num_parts=1, backbone=True),
    "backbone": partial(weights, num_parts=0, backbone=True),
    "host": partial(weights, num_parts=NUM_HOSTS, backbone=False),
    "one expert": partial(one_expert, tensor=1),
    "one in 2 parts": partial(one_expert, tensor=2),
    "host int8": partial(weights, num_parts=NUM_HOSTS, backbone=False, int8=True),
    "host offloaded": partial(offloaded, num_parts=NUM_HOSTS, resident=0.25),
    "train whole": partial(training_state, num_parts=1),
    "train host": partial(training_state, num_parts=NUM_HOSTS),
    "train host 8bit": partial(training_state, num_parts=NUM_HOSTS, kind="adamw8bit"),
    "train host offloaded": partial(training_state, num_parts=NUM_HOSTS, offload="disk"),
    "activations": partial(activations, checkpointing=False, recompute=False),
    "activations recompute": partial(activations, checkpointing=False, recompute=True),
    "activations checkpointing": partial(activations, checkpointing=True, recompute=True),
}

ROWS = (
    Row("experts on 4 actors", "weights of the largest process", "whole model", "host"),
    Row("the same, in training", "weights and AdamW's state of the largest process", "train whole", "train host"),
    Row("`optimizer.kind: adamw8bit`", "weights and optimizer state of an actor", "train host", "train host 8bit"),
    Row("the same", "optimizer state alone (tensors)", "train host", "train host 8bit", by="state"),
    Row("`recompute`", "held between forward and backward", "activations", "activations recompute"),
    Row("`gradient_checkpointing`", "held between forward and backward", "activations", "activations checkpointing"),
    Row("the same", "peak of a whole step, gradients included", "activations", "activations checkpointing", by="peak"),
    Row("`experts.quantization: int8`", "weights of an actor", "host", "host int8"),
    Row("the same", "tensors alone", "host", "host int8", by="tensors"),
    Row("`optimizer.offload: disk`", "weights and AdamW's state of an actor", "train host", "train host offloaded"),
    Row("`experts.offload: disk`, a fourth resident", "weights of an actor", "host", "host offloaded"),
    Row("`experts.tensor: 2`", "weights of the larger of 2 actors, one expert a layer", "one expert", "one in 2 parts"),
)


def measured(case: str, folder: Path, quick: bool) -> dict[str, int]:
    """What the case says, in a process of its own."""
    command = [sys.executable, __file__, "--case", case, "--folder", str(folder), *(["--quick"] if quick else [])]
    # What is freed goes back to the system at once, and threads bring no heaps of their own.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if run.returncode:
        raise SystemExit(f"{case}:\n{run.stderr[-2000:]}")
    figures: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return figures


def main(argv: list[str] | None = None) -> None:
    arguments = report.options(__doc__)
    arguments.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = arguments.parse_args(argv)
    if chosen.case:
        print(json.dumps(CASES[chosen.case](chosen.folder, chosen.quick)))
        return
    with tempfile.TemporaryDirectory() as name:
        _model(TINY if chosen.quick else LARGE).save_pretrained(name)
        _model(TINY_ONE if chosen.quick else ONE, top_k=1).save_pretrained(Path(name) / ONE_EXPERT)
        results = {case: measured(case, Path(name), chosen.quick) for case in CASES}
    about = {"quick": chosen.quick, "sizes": TINY if chosen.quick else LARGE, "tokens": TOKENS[chosen.quick]}
    report.finish("memory", {**about, "rows": [asdict(row) for row in ROWS], "bytes": results}, chosen)


if __name__ == "__main__":
    main()
