"""Where each microsecond of a step goes: one decode step and one training step, taken apart at their seams.

`python benchmarks/profile_step.py [--model CHECKPOINT] [--only decode|train] [--quick]`. A service of its own (a router
and two expert actors, one thread each) answers 16 streams over HTTP; then a worker and two expert actors train. Each is
watched three times: marks at the seams by the wall's clock, the same by the CPU's, and py-spy's samples without marks.
The first two become tables (`profile_table.py`), the last a flame graph (`profile_flame.py`); where py-spy may not look
into processes, the flame graph is made of the marks. Results: `benchmarks/results/profile.{json,md}`,
`profile-decode.svg` and `profile-train.svg`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import profile_flame, report
from benchmarks.profile_floor import Floor, decode_floor, one_thread_rates, train_floor
from benchmarks.profile_marks import hook
from benchmarks.profile_runs import ANSWER_TOKENS, PROMPT_TOKENS, QUICK, Settings, decode, train, write_model
from benchmarks.profile_seams import RUN, STEP, TRAIN_STEP
from benchmarks.profile_table import (
    Recording,
    largest,
    mean,
    periods,
    process_times,
    stacks,
    step_times,
    thread_of,
    thread_times,
    unmarked_cpu,
)
from benchmarks.profile_watch import Watched


# --- figures ------------------------------------------------------------------------------------------------------
def figures(watched: Watched, component: str, num_layers: int, floor: Callable[[list[Any]], Floor]) -> dict[str, Any]:
    """All of one kind of step, in microseconds, as `pages/profile.py` takes it."""
    is_decode = component == STEP
    main_wall, main_cpu = watched.wall[watched.main], watched.cpu[watched.main]
    spans = periods(main_wall, component, is_decode)
    cpu_spans = periods(main_cpu, component, is_decode)
    if not spans or not cpu_spans:
        raise SystemExit(f"fewer than two whole steps ({component}) were seen; watch for longer")
    step_ns = sum(end - begin for begin, end in spans) / len(spans)
    hosts = [watched.wall[pid] for pid in watched.hosts]
    wall = step_times(main_wall, thread_of(main_wall, component), spans, hosts)
    cpu = step_times(main_cpu, thread_of(main_cpu, component), cpu_spans)
    # By the window's length in steps: its edges are no steps.
    numbers = {pid: (r.window[1] - r.window[0]) / step_ns for pid, r in watched.wall.items()}
    cpu_step_ns = (main_cpu.window[1] - main_cpu.window[0]) / max(1, _num(main_cpu, component))
    cpu_numbers = {pid: (r.window[1] - r.window[0]) / cpu_step_ns for pid, r in watched.cpu.items()}
    host_wall = mean([process_times(watched.wall[pid], numbers[pid]) for pid in watched.hosts])
    host_cpu = mean([process_times(watched.cpu[pid], cpu_numbers[pid]) for pid in watched.hosts])
    loop = [unmarked_cpu(watched.cpu[pid], host_cpu, cpu_numbers[pid]) for pid in watched.hosts]
    others = process_times(main_wall, numbers[watched.main], thread_of(main_wall, component))
    work = [_work(watched.wall[pid], numbers[pid]) for pid in watched.hosts]
    threads = [thread_times(watched.cpu[pid], cpu_numbers[pid]) for pid in (watched.main, *watched.hosts)]
    least_ns = step_ns / 1000
    return {
        "num_steps": len(spans),
        "num_layers": num_layers,
        "step_us": step_ns / 1e3,
        "main": {"wall_us": _us(wall), "cpu_us": _us(cpu)},
        "main_other_threads": {"wall_us": _us(others)},
        "host": {"wall_us": _us(host_wall), "cpu_us": _us(host_cpu), "loop_cpu_us": sum(loop) / len(loop) / 1e3},
        "main_threads_cpu_us": _us(largest(threads[0], least_ns)),
        "host_threads_cpu_us": _us(largest(mean(threads[1:]), least_ns)),
        "cores": os.cpu_count(),
        "other_cores": round(watched.other_cores, 2),
        "floor": asdict(floor(work)),
        "flame": "samples" if watched.samples else "marks",
    }


def _num(recording: Recording, component: str) -> int:
    return sum(mark.component == component for mark in recording.marks)


def _work(recording: Recording, num_steps: float) -> tuple[float, float]:
    """Rows and experts that a host computed in a step."""
    keys = [mark.key for mark in recording.marks if mark.component == RUN]
    return sum(key[0] for key in keys) / num_steps, sum(key[1] for key in keys) / num_steps


def _us(times: Mapping[str, float]) -> dict[str, float]:
    return {name: round(ns / 1e3, 2) for name, ns in times.items()}


def flame(watched: Watched, title: str) -> str:
    if watched.samples:
        return profile_flame.draw(profile_flame.tree([watched.samples]), title)
    marked = [stacks(watched.wall[pid], name) for pid, name in watched.names.items()]
    return profile_flame.draw(profile_flame.tree(marked), f"{title} (marks; py-spy could not look)", "µs")


# --- the command --------------------------------------------------------------------------------------------------
def run(model: Path, settings: Settings, kinds: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What was measured, and the flame graphs by kind."""
    from transformers import AutoConfig

    from ray_moe.models.huggingface import Checkpoint

    checkpoint = Checkpoint.open(str(model))
    config = AutoConfig.from_pretrained(model)
    needed, longest = PROMPT_TOKENS + ANSWER_TOKENS, getattr(config, "max_position_embeddings", None)
    if "decode" in kinds and longest is not None and longest < needed:
        sys.exit(f"{model} has {longest} positions, and decoding is watched over {needed}: take another model")
    rates = one_thread_rates(config.hidden_size, getattr(config, "moe_intermediate_size", config.intermediate_size))
    data: dict[str, Any] = {"model": checkpoint.model_type, "settings": asdict(settings), "rates": asdict(rates)}
    graphs: dict[str, str] = {}
    before = os.environ.get("PYTHONPATH")
    for kind in kinds:
        with tempfile.TemporaryDirectory(prefix="ray-moe-profile-") as place:
            folder = Path(place)
            os.environ["PYTHONPATH"] = hook(folder)
            try:
                if kind == "decode":
                    watched, speeds = decode(model, settings, folder)
                    found = figures(
                        watched,
                        STEP,
                        len(checkpoint.layers),
                        lambda work: decode_floor(checkpoint, rates, settings.streams, work),
                    )
                    data[kind] = found | {"tokens_per_s": speeds}
                    title = f"{settings.streams} streams decoding"
                else:
                    watched = train(model, settings, folder)
                    tokens = settings.micro_batches * settings.batch_size * settings.sequence_length
                    data[kind] = figures(
                        watched,
                        TRAIN_STEP,
                        len(checkpoint.layers),
                        lambda work, n=tokens: train_floor(checkpoint, rates, n, work),  # type: ignore[misc]
                    )
                    title = f"training steps of {tokens:,} tokens"
            finally:
                if before is None:
                    del os.environ["PYTHONPATH"]
                else:
                    os.environ["PYTHONPATH"] = before
            graphs[kind] = flame(watched, f"ray_moe: {title}, {checkpoint.model_type}")
    return data, graphs


def main(argv: list[str] | None = None) -> None:
    parser = report.options(__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint; without it, a small random Qwen3-MoE over bytes")
    parser.add_argument("--only", choices=("decode", "train"))
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, help="of each window")
    parser.add_argument("--graphs", type=Path, metavar="FOLDER", help="write the flame graphs there, too")
    given = parser.parse_args(argv)
    settings = replace(QUICK if given.quick else Settings(), streams=given.streams)
    if given.seconds is not None:
        settings = replace(settings, window_s=given.seconds)
    kinds = ("decode", "train") if given.only is None else (given.only,)
    with tempfile.TemporaryDirectory() as place:
        model = given.model or Path(place, "model")
        if given.model is None:
            write_model(model, given.quick)
        data, graphs = run(model, settings, kinds)
    given.quick |= given.only is not None  # half of the results is none
    report.finish("profile", data, given)
    for folder in [*([] if given.quick else [report.RESULTS]), *([given.graphs] if given.graphs else [])]:
        folder.mkdir(parents=True, exist_ok=True)
        for kind, svg in graphs.items():
            (folder / f"profile-{kind}.svg").write_text(svg)


if __name__ == "__main__":
    main()
