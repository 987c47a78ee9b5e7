"""Has processes record, has py-spy look at them, and collects what was seen. Used by `profile_runs.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import profile_flame
from benchmarks.profile_marks import ON
from benchmarks.profile_seams import RUN
from benchmarks.profile_table import Recording

FILE_TIMEOUT_S = 60.0
SAMPLES_PER_S = 200
SETTLED_S = 1.0
"""After a recording has ended, every process has begun to write what it has."""


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
