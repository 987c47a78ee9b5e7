"""From marks to figures: where the time of a step goes, on the thread that makes it and in the processes it waits for.

The thread that makes steps is taken apart without a rest: every moment of a step is the own time of exactly one
component, and while the thread waits for a host, the message it waits for says what is being done: `wait_parts` follows
it through the host and back. What hosts do meanwhile is a second table, since they work side by side. Pure: it is given
what `profile_marks.py` recorded, and calls no clock. Called by `profile_step.py`.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.profile_seams import BY_CALLER, FRAMED, RECEIVED, RUN, SENT, TAKEN, WAIT, WRITTEN

REST = "loop, rest"
TO_HOST = "wait: socket, and the host wakes up"
DECODED = "wait: the host decodes"
COMPUTED = "wait: the host computes"
ANSWERED = "wait: the host encodes and sends"
TO_ROUTER = "wait: socket, and who reads wakes up"
READ = "wait: another thread reads"
WOKEN = "wait: the waiting thread wakes up"
OTHER_WAIT = "wait: rest"


@dataclass(frozen=True, slots=True)
class Mark:
    """One call of a marked function, in nanoseconds of one clock."""

    component: str
    thread: int
    begin: int
    end: int
    key: Any = None


@dataclass(slots=True)
class Recording:
    """What one process recorded by one clock."""

    pid: int
    window: tuple[int, int]
    marks: list[Mark]
    lines: dict[str, int] = field(default_factory=dict)
    """Socket of a host -> its process."""
    threads: dict[int, tuple[str, int]] = field(default_factory=dict)
    """By the kernel's number: name, and nanoseconds on a CPU within the window."""
    python_threads: dict[int, int] = field(default_factory=dict)
    """Python's number of a thread, as marks have it -> the kernel's."""

    @classmethod
    def read(cls, file: Path) -> Recording:
        raw = json.loads(file.read_text())
        return cls(
            raw["pid"],
            (raw["window"][0], raw["window"][1]),
            [Mark(*mark) for mark in raw["marks"]],
            raw["lines"],
            {int(tid): (name, ns) for tid, (name, ns) in raw["threads"].items()},
            {int(ident): tid for ident, tid in raw["python_threads"].items() if tid is not None},
        )

    def has(self, component: str) -> bool:
        return any(mark.component == component for mark in self.marks)


@dataclass(frozen=True, slots=True)
class Own:
    """A mark's time that no mark within it has."""

    mark: Mark
    ns: int
    path: tuple[str, ...]
    """Components from the outermost to its own."""
    gaps: tuple[tuple[int, int], ...]
    """When that was."""

    @property
    def title(self) -> str:
        """What it is counted as."""
        component = self.mark.component
        if component in BY_CALLER and len(self.path) > 1:
            return f"{component} ({self.path[-2].removesuffix(', rest')})"
        return component


def own_times(marks: Sequence[Mark]) -> Iterator[Own]:
    """Of the marks of one thread, which nest."""
    stack: list[tuple[Mark, list[tuple[int, int]], int]] = []
    """Open marks: with the stretches of their own so far, and where the present one begins."""

    def close() -> Own:
        mark, gaps, at = stack.pop()
        path = (*(open_mark.component for open_mark, _, _ in stack), mark.component)
        if mark.end > at:
            gaps.append((at, mark.end))
        if stack:
            outer, theirs, _ = stack[-1]
            stack[-1] = (outer, theirs, mark.end)
        return Own(mark, sum(end - begin for begin, end in gaps), path, tuple(gaps))

    for mark in sorted(marks, key=lambda each: (each.begin, -each.end)):
        while stack and stack[-1][0].end <= mark.begin:
            yield close()
        if stack:
            _, gaps, at = stack[-1]
            if mark.begin > at:
                gaps.append((at, mark.begin))
        stack.append((mark, [], mark.begin))
    while stack:
        yield close()


# --- steps ------------------------------------------------------------------------------------------------------
def periods(recording: Recording, component: str, is_decode: bool = False) -> list[tuple[int, int]]:
    """From the beginning of each step to that of the next. Args: is_decode: those of one token a sequence alone, as
    many of them as most steps have."""
    steps = sorted((m for m in recording.marks if m.component == component), key=lambda mark: mark.begin)
    if not steps:
        return []
    pairs = list(pairwise(steps))
    if is_decode:
        sizes = [tuple(step.key) for step in steps if step.key[0] == step.key[1]]
        usual = max(set(sizes), key=sizes.count) if sizes else None
        pairs = [pair for pair in pairs if tuple(pair[0].key) == usual]
    return [(one.begin, next_one.begin) for one, next_one in pairs]


def thread_of(recording: Recording, component: str) -> int:
    """Where the steps are made."""
    return next(mark.thread for mark in recording.marks if mark.component == component)


def step_times(
    recording: Recording, thread: int, spans: Sequence[tuple[int, int]], hosts: Sequence[Recording] = ()
) -> dict[str, float]:
    """Mean nanoseconds of a step by component; they add up to the mean length of `spans`.

    Args:
        thread: that makes the steps.
        spans: the steps, which do not overlap.
        hosts: what they recorded by the same clock, to take apart the waiting; without them it is one component.
    """
    times: defaultdict[str, float] = defaultdict(float)
    starts = [begin for begin, _ in spans]
    total = sum(end - begin for begin, end in spans)
    messages = Messages(recording, hosts) if hosts else None
    for own in own_times([mark for mark in recording.marks if mark.thread == thread]):
        for gap in own.gaps:
            for begin, end in _within(gap, spans, starts):
                if own.mark.component == WAIT and messages is not None:
                    for name, ns in messages.wait_parts(begin, end):
                        times[name] += ns
                else:
                    times[own.title] += end - begin
    times[REST] += total - sum(times.values())
    return {component: ns / len(spans) for component, ns in times.items()}


def _within(gap: tuple[int, int], spans: Sequence[tuple[int, int]], starts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The parts of `gap` that lie in one of the spans."""
    begin, end = gap
    for first, last in spans[max(0, bisect_right(starts, begin) - 1) :]:
        if first >= end:
            return
        if begin < last and end > first:
            yield max(begin, first), min(end, last)


class Messages:
    """What became of each call that a router sent, by the marks of the router and of its hosts."""

    def __init__(self, router: Recording, hosts: Sequence[Recording]) -> None:
        pids = {host.pid: _Host(host) for host in hosts}
        sent = {tuple(m.key): m.end for m in router.marks if m.component == SENT}
        self._ends: list[int] = []
        self._points: list[list[int]] = []
        for mark in sorted((m for m in router.marks if m.component == RECEIVED), key=lambda mark: mark.begin):
            host = pids.get(router.lines.get(mark.key[0], 0))
            at = None if host is None else host.points(mark.key[1])
            if at is not None and tuple(mark.key) in sent:
                self._ends.append(mark.begin)
                self._points.append([sent[tuple(mark.key)], *at, mark.begin, mark.end])

    def wait_parts(self, begin: int, end: int) -> Iterator[tuple[str, int]]:
        """Nanoseconds from `begin` to `end` by what became meanwhile of the message that came last before the end."""
        number = bisect_right(self._ends, end) - 1
        if number < 0:
            yield OTHER_WAIT, end - begin
            return
        at = begin
        names = (OTHER_WAIT, TO_HOST, DECODED, COMPUTED, ANSWERED, TO_ROUTER, READ, WOKEN)
        for name, point in zip(names, [*self._points[number], end], strict=True):
            until = min(max(point, at), end)
            if until > at:
                yield name, until - at
            at = until


class _Host:
    """When a host did what with a message: it computes one batch after the other."""

    def __init__(self, host: Recording) -> None:
        self._taken = {m.key: m.begin for m in host.marks if m.component == TAKEN}
        self._framed = {m.key: m.begin for m in host.marks if m.component == FRAMED}
        self._runs = sorted((m.begin, m.end) for m in host.marks if m.component == RUN)
        self._written = sorted(m.end for m in host.marks if m.component == WRITTEN)

    def points(self, message_id: int) -> list[int] | None:
        """When it was taken from the socket, when computing began and ended, and when the answer was written."""
        taken, framed = self._taken.get(message_id), self._framed.get(message_id)
        if taken is None or framed is None:
            return None
        number = bisect_left(self._runs, (taken, 0))
        written = bisect_left(self._written, framed)
        if number == len(self._runs) or written == len(self._written) or self._runs[number][1] > framed:
            return None
        return [taken, *self._runs[number], self._written[written]]


# --- the others -----------------------------------------------------------------------------------------------
def process_times(recording: Recording, num_steps: float, but: int | None = None) -> dict[str, float]:
    """Nanoseconds a step by component, of all marks of a process but those of the thread `but`."""
    times: defaultdict[str, float] = defaultdict(float)
    threads: defaultdict[int, list[Mark]] = defaultdict(list)
    for mark in recording.marks:
        threads[mark.thread].append(mark)
    for thread, marks in threads.items():
        if thread != but:
            for own in own_times(marks):
                times[own.title] += own.ns
    return {component: ns / num_steps for component, ns in times.items()}


def unmarked_cpu(recording: Recording, times: Mapping[str, float], num_steps: float) -> float:
    """Nanoseconds of CPU a step, by the process's CPU clock, that its marked threads used outside of all marks."""
    marked = {recording.python_threads.get(mark.thread) for mark in recording.marks}
    used = sum(ns for tid, (_, ns) in recording.threads.items() if tid in marked)
    return max(0.0, used / num_steps - sum(times.values()))


def thread_times(recording: Recording, num_steps: float) -> dict[str, float]:
    """Nanoseconds of CPU a step by the name of the thread; those of one pool together."""
    times: defaultdict[str, float] = defaultdict(float)
    for name, ns in recording.threads.values():
        times[name.rstrip("0123456789").rstrip("-_") or name] += ns / num_steps
    return dict(times)


def largest(times: Mapping[str, float], least: float) -> dict[str, float]:
    """The largest first; what is less than `least` is one rest."""
    small = sum(time for time in times.values() if time < least)
    shown = sorted(((name, time) for name, time in times.items() if time >= least), key=lambda each: -each[1])
    return dict(shown) | ({"rest": small} if small else {})


def mean(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of several processes, by component."""
    names = {name for times in each for name in times}
    return {name: sum(times.get(name, 0.0) for times in each) / len(each) for name in sorted(names)}


def stacks(recording: Recording, root: str) -> dict[tuple[str, ...], int]:
    """The marks as stacks for a flame graph: path -> microseconds of its own."""
    threads: defaultdict[int, list[Mark]] = defaultdict(list)
    for mark in recording.marks:
        threads[mark.thread].append(mark)
    found: defaultdict[tuple[str, ...], int] = defaultdict(int)
    for marks in threads.values():
        for own in own_times(marks):
            path = (root, *own.path)
            found[path] += own.ns
    return {path: ns // 1000 for path, ns in found.items() if ns >= 1000}
