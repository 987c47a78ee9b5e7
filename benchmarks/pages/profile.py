"""The page of `benchmarks/profile_step.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.profile_seams import PRODUCTS, RECEIVED, STEP, TRAIN_STEP, WAIT
from benchmarks.profile_table import COMPUTED
from benchmarks.report import table

NUM_LARGEST = 10
LEAST_US = 0.5
TITLES = {"decode": "One decode step", "train": "One training step"}
NAMES: Mapping[str, str] = {
    STEP: "backbone: what is between modules, rows made",
    TRAIN_STEP: "step, rest",
    WAIT: "wait: all of it",
    RECEIVED: "replies read",
}
THREADS: Mapping[str, str] = {
    "router: AsyncIO Thread: default": "router: event loop (HTTP, gRPC, calls of Ray)",
    "router: generation": "router: steps",
    "router: replies-expert": "router: readers of replies",
    "host: AsyncIO Thread: default": "host: event loop (sockets, small batches)",
    "host: experts": "host: large batches",
    "worker: replies-expert": "worker: readers of replies",
    "router: profile": "router: the watcher of this profile",
    "host: profile": "host: the watcher of this profile",
    "worker: profile": "worker: the watcher of this profile",
}
MAIN = {"decode": "router", "train": "worker"}


def page(data: Mapping[str, Any]) -> str:
    """Made of `results/profile.json`."""
    settings, rates = data["settings"], data["rates"]
    parts = [
        "# Where the time of a step goes\n\n"
        f"Made by `benchmarks/profile_step.py`: a {data['model']} with two expert actors; router, worker and hosts "
        f"compute with one thread each. Decoding: {settings['streams']} streams over HTTP. Training: "
        f"{settings['micro_batches']} micro-batches of {settings['batch_size']} windows of "
        f"{settings['sequence_length']} tokens. One thread multiplies {rates['flops_per_s'] / 1e9:.1f} GFLOP/s and "
        f"reads {rates['read_bytes_per_s'] / 1e9:.1f} GB/s (float32, measured just before)."
    ]
    parts += [_kind(kind, data[kind]) for kind in TITLES if kind in data]
    return "\n\n".join(parts)


def _kind(kind: str, found: Mapping[str, Any]) -> str:
    name, step_us, floor = MAIN[kind], found["step_us"], found["floor"]
    text = [
        f"## {TITLES[kind]}",
        f"{step_us:,.0f} µs, the mean of {found['num_steps']}, with {found['num_layers']} MoE layers. The least it "
        f"could take is {floor['us']:,.0f} µs ({floor['us'] / step_us:.0%} of that): {_amount(floor, 'main')} of the "
        f"backbone, then {_amount(floor, 'host')} of the busiest host. Flame graph of the {found['flame']}: "
        f"`profile-{kind}.svg`.",
    ]
    if "tokens_per_s" in found:
        rate = found["tokens_per_s"]
        text.append(
            f"Without marks {rate['unmarked']:,.0f} tokens/s, with marks of the wall's clock {rate['wall']:,.0f}, of "
            f"the CPU's {rate['cpu']:,.0f}."
        )
    text.append(
        f"Meanwhile other processes used {found['other_cores']:.2f} of the machine's {found['cores']} cores. Where "
        "there are fewer cores than threads with work, waiting for one is in the wall's time and not in the CPU's."
    )
    text += [
        f"### The thread of the {name} that makes the steps",
        "Each moment of a step is in exactly one line. Lines that wait are taken apart by what became of the message "
        f"that was waited for; all waiting together takes {found['main']['cpu_us'].get(WAIT, 0):,.0f} µs of CPU.",
        _main_table(found),
        f"### A host, beside it (mean of two), and other threads of the {name}",
        "Wall is the time that marked functions took, so with whatever they waited for.",
        _host_table(found, name),
        "### CPU by thread",
        _thread_table(found, name),
        f"### The {NUM_LARGEST} largest parts of the step that are not matrix products",
        "\n".join(f"{i + 1}. {part}: {us:,.0f} µs" for i, (part, us) in enumerate(largest(found)[:NUM_LARGEST])),
    ]
    return "\n\n".join(text)


def largest(found: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Parts of a step on its own thread that are no matrix products, by µs, the largest first.

    While the host computes, most of it is; what of that is none is told of the host.
    """
    parts = {k: us for k, us in found["main"]["wall_us"].items() if k not in PRODUCTS and k != COMPUTED}
    host = found["host"]["wall_us"]
    inside = {f"host: {k}": us for k, us in host.items() if k.startswith(("experts", "orders")) and k not in PRODUCTS}
    named: list[tuple[str, float]] = [(NAMES.get(k, k), us) for k, us in (parts | inside).items() if us >= LEAST_US]
    return sorted(named, key=lambda each: -each[1])


def _amount(floor: Mapping[str, Any], who: str) -> str:
    return f"{floor[f'{who}_flops'] / 1e6:,.1f} MFLOP and {floor[f'{who}_bytes'] / 1e6:,.1f} MB"


def _main_table(found: Mapping[str, Any]) -> str:
    wall, cpu = found["main"]["wall_us"], found["main"]["cpu_us"]
    rows = {
        _label(name): [
            _number(us),
            _number(us / found["num_layers"]),
            f"{us / found['step_us']:.1%}",
            _number(cpu.get(name)),
        ]
        for name, us in sorted(wall.items(), key=lambda each: -each[1])
        if us >= LEAST_US
    }
    total = sum(wall.values())
    rows["**all**"] = [_number(total), _number(total / found["num_layers"]), "100%", _number(sum(cpu.values()))]
    return table(["µs a step", "µs a layer", "share", "CPU, µs a step"], rows)


def _host_table(found: Mapping[str, Any], name: str) -> str:
    host, others = found["host"], found["main_other_threads"]["wall_us"]
    rows = _rows(host["wall_us"], host["cpu_us"], "host", found)
    rows["host: event loop and sockets, unmarked"] = ["", "", "", _number(host["loop_cpu_us"])]
    return table(
        ["µs a step", "µs a layer", "share of the step", "CPU, µs a step"],
        rows | _rows(others, {}, f"other threads of the {name}", found),
    )


def _rows(
    wall: Mapping[str, float], cpu: Mapping[str, float], who: str, found: Mapping[str, Any]
) -> dict[str, Sequence[str]]:
    return {
        f"{who}: {_label(name)}": [
            _number(us),
            _number(us / found["num_layers"]),
            f"{us / found['step_us']:.1%}",
            _number(cpu.get(name)),
        ]
        for name, us in sorted(wall.items(), key=lambda each: -each[1])
        if us >= LEAST_US
    }


def _thread_table(found: Mapping[str, Any], name: str) -> str:
    rows: dict[str, Sequence[str]] = {}
    for who, threads in ((name, found["main_threads_cpu_us"]), ("host", found["host_threads_cpu_us"])):
        for thread, us in threads.items():
            title = f"{who}: {thread}"
            rows[THREADS.get(title, title)] = [_number(us), f"{us / found['step_us']:.1%}"]
    return table(["µs a step", "of a core"], rows)


def _label(name: str) -> str:
    said = NAMES.get(name, name)
    return f"{said} ■" if name in PRODUCTS else said


def _number(us: float | None) -> str:
    return "" if us is None else f"{us:,.1f}" if us < 100 else f"{us:,.0f}"
