"""Where each microsecond of a step goes: one decode step and one training step, taken apart at their seams.

`python benchmarks/profile_step.py [--model CHECKPOINT] [--only decode|train] [--quick]`. A service of its own (a router
and two expert actors, one thread each) answers 16 streams over HTTP; then a worker and two expert actors train. Each is
watched three times: marks at the seams by the wall's clock, the same by the CPU's, and py-spy's samples without marks.
The first two become tables (`profile_table.py`), the last a flame graph (`profile_flame.py`); where py-spy may not look
into processes, the flame graph is made of the marks. Results: `benchmarks/results/profile.{json,md}`,
`profile-decode.svg` and `profile-train.svg`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import psutil

from benchmarks import profile_flame, report
from benchmarks.pages.profile import page
from benchmarks.profile_floor import Floor, Rates, decode_floor, measure_rates, train_floor
from benchmarks.profile_marks import ON, hook
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

FILE_TIMEOUT_S = 60.0
SAMPLES_PER_S = 200
PROMPT_TOKENS, ANSWER_TOKENS = 32, 960
STEPS_BEFORE = 3
"""Training steps that warm up."""
MANY_STEPS = 1_000_000
SETTLED_S = 1.0
"""After a recording has ended, every process has begun to write what it has."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How long, and of what."""

    streams: int = 16
    warm_up_s: float = 3.0
    window_s: float = 5.0
    """For each of the clocks, for the samples, and for decoding without anything."""
    steps: int = 4
    """Of training, in each window at least."""
    micro_batches: int = 2
    batch_size: int = 4
    sequence_length: int = 128


QUICK = Settings(warm_up_s=1.0, window_s=1.0, steps=3, batch_size=2, sequence_length=64)


# --- watching -----------------------------------------------------------------------------------------------------
class Watch:
    """Has processes record into a folder, and reads what they have recorded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before = (0.0, 0.0, 0.0)
        self.used: list[tuple[float, float, float]] = []
        """Of each recording: seconds, CPU seconds of the whole machine, and those of this process."""

    def begin(self, clock: str) -> None:
        self._before = _used()
        (self._folder / ON).write_text(clock)

    def end(self) -> None:
        (self._folder / ON).unlink()
        wall_s, all_s, own_s = (after - before for after, before in zip(_used(), self._before, strict=True))
        self.used.append((wall_s, all_s, own_s))

    def pids(self, clock: str) -> list[int]:
        """Processes that have recorded something; those that take long to write it included."""
        time.sleep(SETTLED_S)
        return [int(file.name.partition(".")[0]) for file in self._folder.glob(f"*.{clock}.*")]

    def other_cores(self, recordings: Iterable[Recording]) -> float:
        """Cores that others used during the first recording, of which these are."""
        wall_s, all_s, own_s = self.used[0]
        theirs_s = sum(ns for recording in recordings for _, ns in recording.threads.values()) / 1e9
        return max(0.0, (all_s - own_s - theirs_s) / wall_s)

    def recordings(self, clock: str, pids: Sequence[int] = ()) -> dict[int, Recording]:
        """By process. Args: pids: processes that must be among them; it waits for them."""
        give_up_s = time.monotonic() + FILE_TIMEOUT_S
        while missing := [pid for pid in pids if not (self._folder / f"{pid}.{clock}.json").exists()]:
            if time.monotonic() > give_up_s:
                raise SystemExit(f"processes {missing} have recorded nothing within {FILE_TIMEOUT_S:g} s")
            time.sleep(0.05)
        files = self._folder.glob(f"*.{clock}.json")
        return {recording.pid: recording for recording in map(Recording.read, files)}


def _used() -> tuple[float, float, float]:
    """The clock, CPU seconds of the machine, and of this process."""
    times = psutil.cpu_times()
    return time.perf_counter(), times.user + times.nice + times.system + times.softirq, time.process_time()


@contextmanager
def sampling(names: Mapping[int, str], seconds: float, folder: Path) -> Iterator[dict[profile_flame.Stack, int]]:
    """py-spy looks at processes until the block is left, for `seconds` at least; then what is yielded has the stacks.

    It stays empty where py-spy is not there or may not. Args: names: of the processes.
    """
    found: dict[profile_flame.Stack, int] = {}
    program = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        yield found
        return
    running = {}
    for pid in names:
        command = [program, "record", "-d", str(max(1, round(seconds))), "-r", str(SAMPLES_PER_S), "-f", "raw", "-t"]
        output = folder / f"{pid}.samples"
        quiet = subprocess.DEVNULL
        running[pid] = subprocess.Popen([*command, "-o", str(output), "-p", str(pid)], stdout=quiet, stderr=quiet)
    yield found
    for pid, process in running.items():
        process.wait()
        output = folder / f"{pid}.samples"
        if output.exists():
            for stack, number in profile_flame.read_raw(output.read_text(), names[pid]).items():
                found[stack] = found.get(stack, 0) + number


@dataclass(frozen=True, slots=True)
class Watched:
    """What is known of one kind of step."""

    wall: dict[int, Recording]
    cpu: dict[int, Recording]
    samples: dict[profile_flame.Stack, int]
    main: int
    """The process that makes the steps."""
    hosts: list[int]
    other_cores: float
    """That other processes used meanwhile."""

    @property
    def names(self) -> dict[int, str]:
        return {self.main: "main", **{pid: f"host {number}" for number, pid in enumerate(self.hosts)}}


def find(recordings: Mapping[int, Recording], component: str) -> tuple[int, list[int]]:
    """The process that makes the steps, and those of the hosts. Raises SystemExit."""
    main = [pid for pid, recording in recordings.items() if recording.has(component)]
    hosts = sorted(pid for pid, recording in recordings.items() if recording.has(RUN))
    if len(main) != 1 or not hosts:
        raise SystemExit(f"one process was to make steps and some to compute experts; there were {main} and {hosts}")
    return main[0], hosts


# --- decoding -----------------------------------------------------------------------------------------------------
class Streams:
    """So many streams over HTTP, one answer after the other, until it is told to stop."""

    def __init__(self, url: str, model: str, number: int) -> None:
        self.num_tokens = 0
        self.num_begun = 0
        """Streams that have had a token."""
        self._url, self._model, self._number = url, model, number
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))
        self._over = threading.Event()
        self._error: BaseException | None = None

    async def _all(self) -> None:
        limits = httpx.Limits(max_connections=self._number)
        try:
            async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:
                await asyncio.gather(*(self._one(client, number) for number in range(self._number)))
        except BaseException as error:
            self._error = error

    async def _one(self, client: httpx.AsyncClient, number: int) -> None:
        has_begun = False
        body = {
            "model": self._model,
            "prompt": [32 + (number * 7 + at * 3) % 90 for at in range(PROMPT_TOKENS)],
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        while not self._over.is_set():
            async with client.stream("POST", f"{self._url}/v1/completions", json=body) as response:
                async for data in response.aiter_raw():
                    if response.status_code != 200:
                        raise RuntimeError(f"{self._url} answered {response.status_code}: {data[:300]!r}")
                    self.num_tokens += data.count(b"data:")
                    self.num_begun += not has_begun
                    has_begun = True
                    if self._over.is_set():
                        return

    def rate(self, seconds: float) -> float:
        """Tokens per second in the `seconds` to come."""
        before, began_s = self.num_tokens, time.perf_counter()
        time.sleep(seconds)
        return (self.num_tokens - before) / (time.perf_counter() - began_s)

    def __enter__(self) -> Streams:
        self._thread.start()
        while self.num_begun < self._number and self._error is None:
            time.sleep(0.05)
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise SystemExit(f"a stream failed: {self._error!r}")


def decode(model: Path, settings: Settings, folder: Path) -> tuple[Watched, dict[str, float]]:
    """What was seen of decoding, and tokens per second without and with marks."""
    from ray_moe.client.sync import Client
    from ray_moe.config import Config
    from ray_moe.service.composition import Service

    watch, samples = Watch(folder), {}
    config = Config.model_validate(
        {
            **common(model),
            "router": {"num_cpus": 0.5, "max_concurrent_requests": 2 * settings.streams},
            "server": {"port": 0, "http_port": 0, "grace_s": 1},
        }
    )
    with Service(config) as service, Client(service.address) as client:
        status = client.status()
        hosts = sorted(host.pid for host in status.hosts)
        pids = [status.router.pid, *hosts]
        with Streams(service.http_address, "profile", settings.streams) as streams:
            time.sleep(settings.warm_up_s)
            rates = {"unmarked": streams.rate(settings.window_s)}
            for clock in ("wall", "cpu"):
                watch.begin(clock)
                rates[clock] = streams.rate(settings.window_s)
                watch.end()
                watch.recordings(clock, pids)
            names = {status.router.pid: "router", **{pid: f"host {i}" for i, pid in enumerate(hosts)}}
            with sampling(names, settings.window_s, folder) as samples:
                pass
    wall, cpu = watch.recordings("wall", pids), watch.recordings("cpu", pids)
    return Watched(wall, cpu, samples, *find(wall, STEP), watch.other_cores(wall.values())), rates


def common(model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "model_name": "profile",
        "service_name": "profile",
        "experts": {"num_actors": 2, "num_cpus": 0.5},
        "balance": {"enabled": False},
        "ray": {"num_cpus": 4, "auth": "disabled"},
    }


# --- training -----------------------------------------------------------------------------------------------------
class Enough(Exception):
    """All of a training has been seen."""


class Phases:
    """Watches a training while it hears of its steps; then raises `Enough`."""

    def __init__(self, watch: Watch, settings: Settings, folder: Path) -> None:
        self._watch, self._settings, self._folder = watch, settings, folder
        self._next_step, self._next_s = STEPS_BEFORE, 0.0
        self._todo = self._go()
        self.samples: dict[profile_flame.Stack, int] = {}

    def hear(self, progress: Any) -> None:
        if progress.step >= self._next_step and time.monotonic() >= self._next_s:
            self._next_step = progress.step + self._settings.steps
            self._next_s = time.monotonic() + self._settings.window_s
            next(self._todo)

    def _go(self) -> Iterator[None]:
        for clock in ("wall", "cpu"):
            self._watch.begin(clock)
            yield
            self._watch.end()
        main, hosts = find(self._watch.recordings("wall", self._watch.pids("wall")), TRAIN_STEP)
        names = {main: "worker", **{pid: f"host {number}" for number, pid in enumerate(hosts)}}
        self._watch.recordings("cpu", list(names))
        with sampling(names, self._settings.window_s, self._folder) as self.samples:
            pass
        raise Enough


def train(model: Path, settings: Settings, folder: Path) -> Watched:
    import ray_moe
    from ray_moe.config import Config

    watch = Watch(folder)
    phases = Phases(watch, settings, folder)
    config = Config.model_validate(
        {
            **common(model),
            "server": {"port": 0, "http_port": None, "grace_s": 1},
            "train": {
                "data": "stdlib",
                "steps": MANY_STEPS,
                "micro_batches": settings.micro_batches,
                "batch_size": settings.batch_size,
                "sequence_length": settings.sequence_length,
                "num_cpus": 0.5,
            },
        }
    )
    with suppress(Enough):
        ray_moe.train(config, phases.hear)
    wall = watch.recordings("wall")
    main, hosts = find(wall, TRAIN_STEP)
    cpu = watch.recordings("cpu", [main, *hosts])
    return Watched(wall, cpu, phases.samples, main, hosts, watch.other_cores(wall.values()))


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
    from ray_moe.models.huggingface import Checkpoint

    checkpoint = Checkpoint.open(str(model))
    rates: Rates = measure_rates()
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint; without it, a small random Qwen3-MoE over bytes")
    parser.add_argument("--only", choices=("decode", "train"))
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, help="of each window")
    parser.add_argument("--quick", action="store_true", help="small and short, to see that it runs; no results written")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
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
    data = {"machine": report.machine(), **data}
    about = ", ".join(f"{key} {value}" for key, value in data["machine"].items())
    text, numbers = f"{page(data)}\n\nMeasured on: {about}.\n", json.dumps(data, indent=1) + "\n"
    print(text)
    is_kept = not given.quick and given.only is None
    if given.json is not None:
        given.json.write_text(numbers)
    if is_kept:
        (report.RESULTS / "profile.json").write_text(numbers)
        (report.RESULTS / "profile.md").write_text(text)
    for folder in [*([report.RESULTS] if is_kept else []), *([given.graphs] if given.graphs else [])]:
        folder.mkdir(parents=True, exist_ok=True)
        for kind, svg in graphs.items():
            (folder / f"profile-{kind}.svg").write_text(svg)


def write_model(folder: Path, is_quick: bool) -> None:
    from ray_moe.models.byte_level import ByteModel, write_new

    small = ByteModel(hidden_size=256, num_layers=8, num_heads=8, num_experts=32, top_k=4, expert_width=256)
    write_new(folder, replace(small, num_layers=2, num_experts=8) if is_quick else small)


if __name__ == "__main__":
    main()
