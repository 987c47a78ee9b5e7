"""Times functions of running processes from outside: each call of a chosen function leaves a mark, with its two ends.

`profile_step.py` puts this into every process that it starts, by way of a `sitecustomize.py` on their PYTHONPATH
(`hook`), so the package itself has nothing for it. Functions are wrapped when their module has been imported. While
nobody records, a wrapped function looks at one attribute and goes on (0.1 µs); while somebody does, it also reads a
clock twice and appends a tuple (0.5 µs, 0.9 µs with the CPU's clock).

Recording goes on while the file `on` is in the folder: it holds the name of the clock. A thread in each process looks
for it, and writes what was recorded to `PID.CLOCK.json` when the file is gone. Both clocks count nanoseconds; that of
the wall is one for all processes of a machine.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

CLOCKS: Mapping[str, Callable[[], int]] = {"wall": time.perf_counter_ns, "cpu": time.thread_time_ns}
EVERY_S = 0.05
"""How often it is looked whether to record."""
ON = "on"

Key = Callable[[tuple[Any, ...]], Any]


@dataclass(frozen=True, slots=True)
class Seam:
    """A function to be marked, or one after which more is to be marked."""

    module: str
    name: str
    """Within the module: ``function`` or ``Class.method``."""
    component: str = ""
    """What its own time is counted as; empty for a function that is not timed."""
    key: Key | None = None
    """What else to note of a call, from its positional arguments."""
    after: Callable[[tuple[Any, ...]], None] | None = None
    """Called with the positional arguments once it has returned: a constructor, as a rule."""


class Recorder:
    """Of one process."""

    def __init__(self) -> None:
        self.is_on = False
        self.clock = time.perf_counter_ns
        self.marks: list[tuple[str, int, int, int, Any]] = []
        """Component, thread, begin, end, key."""
        self.lines: dict[str, int] = {}
        """Socket of a host -> its process; kept also while nobody records."""

    def timed(self, function: Callable[..., Any], component: str, key: Key | None = None) -> Callable[..., Any]:
        """`function`, whose calls leave marks while somebody records."""

        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            if not self.is_on:
                return function(*args, **kwargs)
            # Of this recording, also when another has begun by the end of the call.
            clock, marks, thread = self.clock, self.marks, threading.get_ident()
            noted = None if key is None else key(args)
            begin = clock()
            try:
                return function(*args, **kwargs)
            finally:
                marks.append((component, thread, begin, clock(), noted))

        return marked

    def apply(self, module: ModuleType, seam: Seam) -> None:
        """Put the marked function in the place of the one in `module`. Raises AttributeError when there is none."""
        *owners, name = seam.name.split(".")
        owner: Any = functools.reduce(getattr, owners, module)
        function: Any = vars(owner)[name] if owners else getattr(owner, name)
        is_static = isinstance(function, staticmethod)
        wrapped = function.__func__ if is_static else function
        if seam.component:
            wrapped = self.timed(wrapped, seam.component, seam.key)
        if seam.after is not None:
            wrapped = _followed(wrapped, seam.after)
        setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)

    def watch(self, folder: Path) -> None:
        """Record while the folder says so; never returns."""
        while True:
            name = _read(folder / ON)
            if not name:
                time.sleep(EVERY_S)
                continue
            self.clock = CLOCKS[name]
            began, before = time.perf_counter_ns(), thread_cpu_ns()
            self.is_on = True
            while _read(folder / ON) == name:
                time.sleep(EVERY_S)
            self.is_on = False
            ended, after = time.perf_counter_ns(), thread_cpu_ns()
            marks, self.marks = self.marks, []
            if marks:
                used = {tid: [title, ns - before.get(tid, ("", 0))[1]] for tid, (title, ns) in after.items()}
                _write(
                    folder / f"{os.getpid()}.{name}.json",
                    {
                        "pid": os.getpid(),
                        "clock": name,
                        "window": [began, ended],
                        "marks": list(marks),
                        "lines": self.lines,
                        "threads": used,
                        "python_threads": {thread.ident: thread.native_id for thread in threading.enumerate()},
                    },
                )


RECORDER = Recorder()


def _followed(function: Callable[..., Any], after: Callable[[tuple[Any, ...]], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def followed(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        after(args)
        return result

    return followed


def thread_cpu_ns() -> dict[int, tuple[str, int]]:
    """Of each thread of this process, by the number that the kernel gives it: name, and nanoseconds on a CPU."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    used = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            ns = int((task / "schedstat").read_text().split()[0])
            name = (task / "comm").read_text().strip()
        except OSError:  # it has ended
            continue
        used[int(task.name)] = (names.get(int(task.name), name), ns)
    return used


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def _write(file: Path, content: Any) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.rename(file)  # whoever waits for it finds all of it


# --- the hook -------------------------------------------------------------------------------------------------
class _Finder(importlib.abc.MetaPathFinder):
    """Wraps what is to be marked in a module once it has been imported."""

    def __init__(self, seams: Mapping[str, Sequence[Seam]], folder: Path) -> None:
        self._seams = seams
        self._folder = folder
        self._watcher: threading.Thread | None = None

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        seams = self._seams.get(name)
        if seams is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for seam in seams:
                RECORDER.apply(module, seam)
            if self._watcher is None:
                self._watcher = threading.Thread(
                    target=RECORDER.watch, args=(self._folder,), name="profile", daemon=True
                )
                self._watcher.start()

        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010  (it is a method, for mypy)
        return spec


def install(folder: str, seams: Sequence[Seam]) -> None:
    """Mark `seams` in this process. Called by `sitecustomize.py`."""
    by_module: dict[str, list[Seam]] = {}
    for seam in seams:
        by_module.setdefault(seam.module, []).append(seam)
    sys.meta_path.insert(0, _Finder(by_module, Path(folder)))


def hook(folder: Path) -> str:
    """Writes the `sitecustomize.py` of processes in which what `profile_seams.py` lists is marked; their PYTHONPATH."""
    code = (
        "from benchmarks.profile_marks import install\n"
        "from benchmarks.profile_seams import SEAMS\n\n"
        f"install({str(folder)!r}, SEAMS)\n"
    )
    (folder / "sitecustomize.py").write_text(code)
    before = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([str(folder), str(Path(__file__).parents[1]), *([before] if before else [])])
